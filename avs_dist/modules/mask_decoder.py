"""What all decoders have in common: from the four stages and the sound of a frame to its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Skips(NamedTuple):
    """What `MaskDecoder.paint` needs besides the coarsest stage."""

    maps: list[Tensor]  # of the three finer stages [N,C,h,w], finest first
    audio_ND: Tensor | None = None  # None where nothing listens
    queries_NQC: Tensor | None = None  # of the transformer decoder: they have heard the audio, and seen nothing yet


class Painting(NamedTuple):
    """Output of a decoder for N frames."""

    logits_NKHW: Tensor  # at the size of the frames
    mix_NHW: Tensor | None = None  # logits of the mixing loss at stride 4; None where the sound is not mixed in


class MaskDecoder(nn.Module, ABC):
    """Stages at strides 4, 8, 16, 32, and what is heard -> logits at the size of the frames.

    `skips` and `paint` are the two halves of `forward`: several versions of the coarsest stage, as of several latent
    codes, can share the skips. A subclass keeps its parameters in sub-modules: ZeRO-3 gathers those of a module that is
    called, and nobody has to call the decoder itself.
    """

    def forward(self, features: Sequence[Tensor], size: tuple[int, int], audio_ND: Tensor | None = None) -> Painting:
        """Logits of N frames.

        Args:
            features: four tensors [N,C,h,w], finest first.
            size: (H, W) of the frames.
            audio_ND: the sound of each frame; None where nothing listens.
        """
        return self.paint(features[3], self.skips(features, audio_ND), size)

    @abstractmethod
    def skips(self, features: Sequence[Tensor], audio_ND: Tensor | None = None) -> Skips:
        """All that does not depend on the coarsest stage, which is not looked at and may be left out."""

    @abstractmethod
    def paint(self, coarsest_NCHW: Tensor, skips: Skips, size: tuple[int, int]) -> Painting:
        """Coarsest stage [N,C,h,w], `skips` of the same frames, and (H, W) of the frames -> logits."""

    def seen_by_losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The stage features as the AVM losses get them."""
        return list(features)

"""The Sequences batch: paired sequences of several modalities, for codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from avs_dist.clip import collate_audio, on_device, pad
from avs_dist.shards.schema import FeatureSample, Sample


@dataclass(frozen=True)
class Sequences:
    """A batch of B clips as sequences of T steps, seconds of sound and picture or words; all zero behind their end.

    Features come in the precision they are stored in; `to` makes them what a system computes with.

    inputs: float by modality: "visual" [B,T,h,w,C] features or [B,T,3,H,W] frames (uint8 RGB until `to`), "audio"
            [B,T,C] features or [B,T,96,64] log-mel, "text" [B,T,C].
    valid:  bool [B,T] by modality, which steps exist; the existing ones come first.
    labels: uint8 [B,T,K] by modality, 1 where an event happens; empty where nothing is labelled.
    key:    clip names.
    audio_BTD: float [B,T,128], what a frozen audio encoder makes of the log-mel, where all clips have it stored.
    """

    inputs: dict[str, Tensor]
    valid: dict[str, Tensor]
    labels: dict[str, Tensor]
    key: tuple[str, ...]
    audio_BTD: Tensor | None = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Sequences:
        """Copy on `device`; the inputs in `dtype`, frames normalised."""
        audio_BTD = None if self.audio_BTD is None else self.audio_BTD.to(device, dtype, non_blocking=True)
        return replace(
            self,
            inputs={m: on_device(x, self.valid[m], device, dtype) for m, x in self.inputs.items()},
            valid={m: x.to(device, non_blocking=True) for m, x in self.valid.items()},
            labels={m: x.to(device, non_blocking=True) for m, x in self.labels.items()},
            audio_BTD=audio_BTD,
        )


def collate_features(
    samples: Sequence[FeatureSample], *, shapes: Mapping[str, Sequence[int]], num_steps: int, num_events: int
) -> Sequences:
    """Batch clips of features, cut or padded to `num_steps` whatever the batch, so that no clip depends on others.

    Args:
        shapes: of one step of each modality; a modality that a clip lacks has no valid step there.
        num_events: K of the labels.

    Raises:
        ValueError: features of another shape, naming the clip.
    """
    inputs, valid, labels = {}, {}, {}
    for modality, shape in shapes.items():
        found = [sample.features.get(modality, np.zeros((0, *shape), np.float32)) for sample in samples]
        for sample, value in zip(samples, found, strict=True):
            if value.shape[1:] != tuple(shape):
                raise ValueError(f"clip {sample.name}: {modality} features are {value.shape[1:]}, expected {shape}")
        inputs[modality], valid[modality] = pad(found, num_steps)
    for modality in dict.fromkeys(m for sample in samples for m in sample.labels):
        empty = np.zeros((0, num_events), np.uint8)
        labels[modality], _ = pad([sample.labels.get(modality, empty) for sample in samples], num_steps)
    return Sequences(inputs, valid, labels, tuple(sample.name for sample in samples))


def collate_media(samples: Sequence[Sample], *, num_steps: int, text_channels: int | None = None) -> Sequences:
    """Batch clips of frames, log-mel and words of their prompts, cut or padded to `num_steps`.

    Args:
        text_channels: of a word; None leaves the prompts out.

    Raises:
        ValueError: a clip without a prompt, or with other word vectors, where prompts are wanted.
    """
    inputs, valid = {}, {}
    frames_BTHWC, valid["visual"] = pad([sample.frames_THWC for sample in samples], num_steps)
    inputs["visual"] = frames_BTHWC.permute(0, 1, 4, 2, 3)
    inputs["audio"], valid["audio"] = pad([sample.mel_TFM for sample in samples], num_steps)
    if text_channels is not None:
        words = [_words(sample, text_channels) for sample in samples]
        inputs["text"], valid["text"] = pad(words, num_steps)
    names = tuple(sample.name for sample in samples)
    return Sequences(inputs, valid, {}, names, collate_audio(samples, num_steps))


def _words(sample: Sample, channels: int) -> np.ndarray:
    if sample.text_WE is None:
        raise ValueError(f"clip {sample.name}: has no text; build the shards with --prompts")
    if sample.text_WE.shape[1] != channels:
        raise ValueError(
            f"clip {sample.name}: word vectors have {sample.text_WE.shape[1]} numbers, "
            f"model.unicode.text_channels={channels}"
        )
    return sample.text_WE

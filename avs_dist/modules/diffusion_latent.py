"""Encoders of latent diffusion and the way of its code into the feature maps.

Paper: contrastive latent diffusion for audio-visual segmentation, sections III-A (E_phi, E_psi) and III-C (D_tau). All
work frame by frame (N frames) and on any size of frames. Two fully connected layers have a LeakyReLU between them; the
paper gives neither that nor their widths.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from avs_dist.modules.latent import ConvStack
from avs_dist.modules.weights import channels_last
from avs_dist.precision import at_least_float32

Condition = Literal["audio_visual", "audio", "visual", "none"]
WIDTHS = (16, 32, 64, 64, 64)


class MaskEncoder(nn.Module):
    """E_phi: five convolutions and two fully connected layers; the visual branch of E_psi is one as well.

    Args:
        in_channels: C of the mask.
        dim: D, numbers in the code.
        hidden: width between the two fully connected layers.
    """

    def __init__(self, in_channels: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, WIDTHS)
        self.code = TwoLayers(self.stack.out_features, hidden, dim)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,D], in float32 or better.

        Raises:
            ValueError: H or W is smaller than 32.
        """
        return self.code(self.stack(x_NCHW))


class ConditionEncoder(nn.Module):
    """E_psi: what the denoiser is told of picture and sound.

    Both branches end in D numbers: of one modality that is the condition (Table IV), of both they are concatenated and
    go through two more fully connected layers. There are weights only for what is used.

    Args:
        kind: what the condition is made of; "none" is the condition of an unconditional denoiser, without any number.
        audio_channels: A of the audio vectors.
        dim: D, numbers in the condition.
        hidden: width between two fully connected layers.

    Attributes:
        out_features: D, or 0 for "none".

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: Condition, audio_channels: int, dim: int, hidden: int) -> None:
        super().__init__()
        if kind not in get_args(Condition):
            raise ValueError(f"model.diffusion.condition={kind}: must be one of {', '.join(get_args(Condition))}")
        self.out_features = 0 if kind == "none" else dim
        self.visual = MaskEncoder(3, dim, hidden) if kind in ("audio_visual", "visual") else None
        self.audio = TwoLayers(audio_channels, hidden, dim) if kind in ("audio_visual", "audio") else None
        self.fuse = TwoLayers(2 * dim, hidden, dim) if kind == "audio_visual" else None

    def forward(self, frames_NCHW: Tensor, audio_NA: Tensor | None) -> Tensor:
        """Condition of each frame [N, out_features], in float32 or better.

        Args:
            frames_NCHW: normalised pictures [N,3,H,W], of 32 pixels or more.
            audio_NA: an audio vector for each, in any precision; None where the kind has no audio.

        Raises:
            ValueError: no audio where the kind has it, or frames too small.
        """
        features = []
        if self.visual is not None:
            features.append(self.visual(frames_NCHW))
        if self.audio is not None:
            if audio_NA is None:
                raise ValueError("model.diffusion.condition: this condition hears the audio, got none")
            features.append(self.audio(audio_NA))
        if not features:
            return at_least_float32(frames_NCHW.new_zeros(len(frames_NCHW), 0))
        return features[0] if self.fuse is None else self.fuse(torch.cat(features, 1))


class LatentExpansion(nn.Module):
    """D_tau: the code tiled over all positions, expanded to the channels of the maps by a 3x3 convolution, concatenated
    with them, and mixed by another.

    Called as `Injection` of ECMVAE is.

    Args:
        channels: C of the maps.
        dim: K, numbers in the code.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, channels, 3, padding=1)
        self.mix = nn.Conv2d(2 * channels, channels, 3, padding=1)
        channels_last(self)

    def forward(self, x_NCHW: Tensor, code_NK: Tensor, noise_NKP: Tensor | None = None) -> Tensor:
        """Maps that carry the code.

        Args:
            x_NCHW: feature maps [N,C,h,w].
            code_NK: code of each frame, in any precision.
            noise_NKP: added to the tiled code [N,K,h,w]; None in the paper.

        Returns:
            [N,C,h,w] in the precision of x, channels last.
        """
        code_NKHW = code_NK[:, :, None, None].expand(-1, -1, *x_NCHW.shape[-2:])
        if noise_NKP is not None:
            code_NKHW = code_NKHW + noise_NKP
        expanded_NCHW = self.expand(code_NKHW.to(x_NCHW.dtype))
        return self.mix(torch.cat([x_NCHW, expanded_NCHW], 1))


class TwoLayers(nn.Module):
    """Linear, LeakyReLU, Linear: [N,in] in any precision -> [N,out] in float32 or better."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.activation = nn.LeakyReLU(0.01)
        self.last = nn.Linear(hidden, out_features)

    def forward(self, features_NF: Tensor) -> Tensor:
        features_NF = features_NF.to(self.first.weight.dtype)
        return at_least_float32(self.last(self.activation(self.first(features_NF))))

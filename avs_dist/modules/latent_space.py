"""The latent codes of ECMVAE: which encoders there are, and how their codes become what the decoder gets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avs_dist.config import LatentConfig
from avs_dist.gaussian import Gaussian, Mixture, product
from avs_dist.modules.latent import AudioEncoder, FusedEncoder, VisualEncoder

FRAME_CHANNELS = 3
Distribution = Gaussian | Mixture


class JointEncoder(nn.Module):
    """Distribution of a code that hears and sees: of fused features, or a product or mixture of two experts.

    The visual expert sees the frame (with the mask, for a posterior), the audio expert hears the sound (and sees the
    mask alone, for a posterior).
    """

    def __init__(self, config: LatentConfig, audio_channels: int, mask_channels: int = 0) -> None:
        super().__init__()
        self.kind = config.joint
        seen = FRAME_CHANNELS + mask_channels
        if config.joint == "fused":
            self.fused = FusedEncoder(seen, audio_channels, config.dim)
        else:
            self.visual = VisualEncoder(seen, config.dim)
            self.audio = SoundEncoder(config, audio_channels, mask_channels)

    def forward(self, frames_NCHW: Tensor, audio_ND: Tensor, mask_NMHW: Tensor | None) -> Distribution:
        seen_NCHW = _with_mask(frames_NCHW, mask_NMHW)
        if self.kind == "fused":
            return self.fused(seen_NCHW, audio_ND)
        experts = (self.visual(seen_NCHW), self.audio(audio_ND, mask_NMHW))
        return product(experts) if self.kind == "poe" else Mixture(experts)


class SoundEncoder(nn.Module):
    """Distribution of a code of the sound; a posterior sees the mask as well."""

    def __init__(self, config: LatentConfig, audio_channels: int, mask_channels: int = 0) -> None:
        super().__init__()
        self.encoder: nn.Module = AudioEncoder(audio_channels, config.dim)
        if mask_channels:
            self.encoder = FusedEncoder(mask_channels, audio_channels, config.dim)

    def forward(self, audio_ND: Tensor, mask_NMHW: Tensor | None) -> Gaussian:
        return self.encoder(audio_ND) if mask_NMHW is None else self.encoder(mask_NMHW, audio_ND)


class LatentEncoders(nn.Module):
    """Distributions of all codes of each frame, by name (paper section 3.5).

    Factorised: "s_v" of the picture, "s_a" of the sound, "c" of both. Otherwise one code "z": of both, or of the
    picture alone where nothing listens (CVAE).

    Args:
        audio_channels: 0 where nothing listens.
        mask_channels: of the mask that the encoders of a posterior also get; 0 for a prior.
    """

    def __init__(self, config: LatentConfig, audio_channels: int, mask_channels: int = 0) -> None:
        super().__init__()
        self.factorise, self.listens = config.factorise, audio_channels > 0
        if self.listens:
            self.joint = JointEncoder(config, audio_channels, mask_channels)
        if self.factorise or not self.listens:
            self.visual = VisualEncoder(FRAME_CHANNELS + mask_channels, config.dim)
        if self.factorise:
            self.audio = SoundEncoder(config, audio_channels, mask_channels)

    def forward(
        self, frames_NCHW: Tensor, audio_ND: Tensor | None, mask_NMHW: Tensor | None = None
    ) -> dict[str, Distribution]:
        if audio_ND is None:
            return {"z": self.visual(_with_mask(frames_NCHW, mask_NMHW))}
        joint = self.joint(frames_NCHW, audio_ND, mask_NMHW)
        if not self.factorise:
            return {"z": joint}
        seen_NCHW = _with_mask(frames_NCHW, mask_NMHW)
        return {"s_v": self.visual(seen_NCHW), "s_a": self.audio(audio_ND, mask_NMHW), "c": joint}


class CodeFusion(nn.Module):
    """What the decoder gets of the codes: sc_v of [s_v; c] and sc_a of [s_a; c] (section 3.2), or the one code."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.out_channels = (2 if config.factorise else 1) * config.dim
        if config.factorise:
            self.visual = nn.Linear(2 * config.dim, config.dim)
            self.audio = nn.Linear(2 * config.dim, config.dim)

    def forward(self, codes: Mapping[str, Tensor]) -> list[Tensor]:
        """Codes [N,L] by name -> [sc_v, sc_a], or [z]; each [N,L]."""
        if "z" in codes:
            return [codes["z"]]
        visual_N2L = torch.cat([codes["s_v"], codes["c"]], 1)
        audio_N2L = torch.cat([codes["s_a"], codes["c"]], 1)
        return [self.visual(visual_N2L), self.audio(audio_N2L)]


def _with_mask(frames_NCHW: Tensor, mask_NMHW: Tensor | None) -> Tensor:
    return frames_NCHW if mask_NMHW is None else torch.cat([frames_NCHW, mask_NMHW], 1)

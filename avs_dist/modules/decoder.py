"""Decoders: a top-down fusion of four stages, and a head at full resolution; and which decoder a config asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.config import DecoderConfig
from avs_dist.modules.mask_decoder import MaskDecoder, Painting, Skips
from avs_dist.modules.norm import WorldBatchNorm2d
from avs_dist.modules.transformer_decoder import TransformerMaskDecoder
from avs_dist.modules.weights import channels_last

LEAST_HEAD = 16  # channels before the last ReLU; the few of a small network can all die within some steps


class ResidualConvUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))).

    The published code runs the first ReLU in place, so that what it adds is relu(x), and its caller's tensor is
    changed as well; `rectified_skip` reproduces the former.
    """

    def __init__(self, channels: int, rectified_skip: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.rectified_skip = rectified_skip

    def forward(self, x_NCHW: Tensor) -> Tensor:
        rectified = F.relu(x_NCHW)
        out = self.conv2(F.relu(self.conv1(rectified)))
        return out + (rectified if self.rectified_skip else x_NCHW)


class NormalisedResidualUnit(nn.Module):
    """x + relu(bn(conv(relu(bn(conv(x)))))), convolutions without bias (public ECMVAE code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = WorldBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = WorldBatchNorm2d(channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x_NCHW)))
        return x_NCHW + F.relu(self.bn2(self.conv2(hidden)))


class FusionStage(nn.Module):
    """Residual units of one stage: of its skip, and of the sum of the coarse path and the skip."""

    def __init__(self, unit: Callable[[], nn.Module], has_skip: bool) -> None:
        super().__init__()
        self.skip_unit = unit() if has_skip else None
        self.unit = unit()

    def forward(self, x_NCHW: Tensor, skip_NCHW: Tensor | None) -> Tensor:
        return self.unit(x_NCHW if skip_NCHW is None else x_NCHW + skip_NCHW)


class TopDownDecoder(MaskDecoder):
    """Fuses the stages from the coarsest to the finest; the audio is not listened to.

    The published stages have two residual units each; that of the coarsest stage's skip, which has none, is left out.

    Args:
        unit: makes a residual unit of C channels.
        widths: C of all stages, and the channels of the two 3x3 convolutions of the head; the last are at least 16.
        num_classes: output channels.
    """

    def __init__(self, unit: Callable[[], nn.Module], widths: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        # coarsest first
        self.stages = nn.ModuleList(FusionStage(unit, index > 0) for index in range(4))
        self.head_in = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        last = max(widths[2], LEAST_HEAD)
        self.head_mid = nn.Conv2d(widths[1], last, 3, padding=1)
        self.head_out = nn.Conv2d(last, num_classes, 1)
        channels_last(self)

    def skips(self, features: Sequence[Tensor], audio_ND: Tensor | None = None) -> Skips:
        """The three finer stages after the residual units of their skips."""
        maps = []
        for stage, x_NCHW in zip(list(self.stages)[:0:-1], features[:3], strict=True):
            assert isinstance(stage, FusionStage)
            assert stage.skip_unit is not None
            maps.append(stage.skip_unit(x_NCHW))
        return Skips(maps)

    def paint(self, coarsest_NCHW: Tensor, skips: Skips, size: tuple[int, int]) -> Painting:
        coarse_to_fine = skips.maps[::-1]
        finest = skips.maps[0].shape[-2:]
        sizes = [(s.shape[-2], s.shape[-1]) for s in coarse_to_fine] + [(2 * finest[0], 2 * finest[1])]
        path = coarsest_NCHW
        for stage, skip, target in zip(self.stages, [None, *coarse_to_fine], sizes, strict=True):
            path = self.enlarge(stage(path, skip), target)
        path = self.enlarge_head(self.head_in(path), size)
        return Painting(self.head_out(F.relu(self.head_mid(path))))

    @abstractmethod
    def enlarge(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """The path of one stage at the size of the next."""

    @abstractmethod
    def enlarge_head(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """The features of the head at the size of the frames."""


class Decoder(TopDownDecoder):
    """The decoder of the TPAVI paper, with bilinear enlargement.

    Args:
        channels: C of all stages; the head goes through C/2 and C/8 channels (published: 256, 128, 32).
        num_classes: output channels: 1 for sounding / silent, or the number of classes.
        compat: "published_code" reproduces the in-place ReLUs of the public code; the features that its AVM losses
            see are then rectified as well, see `seen_by_losses`.
    """

    def __init__(
        self, channels: int, num_classes: int = 1, compat: Literal["paper", "published_code"] = "paper"
    ) -> None:
        rectified = compat == "published_code"
        widths = (channels, channels // 2, channels // 8)
        super().__init__(lambda: ResidualConvUnit(channels, rectified), widths, num_classes)
        self.rectified = rectified

    def enlarge(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x_NCHW, size, mode="bilinear", align_corners=True)

    def enlarge_head(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x_NCHW, size, mode="bilinear", align_corners=False)

    def seen_by_losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The stage features as the AVM losses get them: unchanged, or rectified as the public code leaves them."""
        return [F.relu(f) for f in features] if self.rectified else list(features)


class NearestDecoder(TopDownDecoder):
    """The decoder of the public ECMVAE code, with batch normalisation and nearest enlargement.

    Args:
        channels: C of all stages; the head goes through C/2 and C/4 channels (published: 128, 64, 32).
        num_classes: output channels: 1 for sounding / silent, or the number of classes.
    """

    def __init__(self, channels: int, num_classes: int = 1) -> None:
        super().__init__(
            lambda: NormalisedResidualUnit(channels), (channels, channels // 2, channels // 4), num_classes
        )

    def enlarge(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        # to an odd size this is doubling and leaving out the last row or column, so stages stay on one grid
        return F.interpolate(x_NCHW, size, mode="nearest")

    enlarge_head = enlarge


def build_decoder(
    config: DecoderConfig,
    channels: int,
    num_classes: int = 1,
    compat: Literal["paper", "published_code"] = "paper",
    audio_channels: int = 0,
) -> MaskDecoder:
    """The decoder of model.decoder.

    Args:
        config: model.decoder.
        channels: C of all stages (model.neck.channels).
        num_classes: output channels: 1 for sounding / silent, or the number of classes.
        compat: makes a difference to "bilinear" alone, see `Decoder`.
        audio_channels: of the audio that a "transformer" hears; 0 where nothing listens.

    Raises:
        ValueError: channels and heads of a transformer that do not fit.
    """
    if config.kind == "transformer":
        return TransformerMaskDecoder(config, channels, num_classes, audio_channels)
    if config.kind == "nearest":
        return NearestDecoder(channels, num_classes)
    return Decoder(channels, num_classes, compat)

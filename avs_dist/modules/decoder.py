"""The decoder of the TPAVI paper: a top-down fusion of four stages, and a head at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.modules.weights import channels_last


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


class FusionStage(nn.Module):
    """Add the finer skip to the coarse path, refine, and enlarge to `size`."""

    def __init__(self, channels: int, has_skip: bool, rectified_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualConvUnit(channels, rectified_skip) if has_skip else None
        self.unit = ResidualConvUnit(channels, rectified_skip)

    def forward(self, x_NCHW: Tensor, skip_NCHW: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip_unit is not None:
            x_NCHW = x_NCHW + self.skip_unit(skip_NCHW)
        return F.interpolate(self.unit(x_NCHW), size, mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """Stages at strides 4, 8, 16, 32 -> logits at the size of the frames.

    Args:
        channels: C of all stages; the head goes through C/2 and C/8 channels (published: 256, 128, 32).
        num_classes: output channels: 1 for sounding / silent, or the number of classes.
        compat: "published_code" reproduces the in-place ReLUs of the public code; the features that its AVM losses
            see are then rectified as well, see `seen_by_losses`.
    """

    def __init__(
        self, channels: int, num_classes: int = 1, compat: Literal["paper", "published_code"] = "paper"
    ) -> None:
        super().__init__()
        self.rectified = compat == "published_code"
        # coarsest first
        self.stages = nn.ModuleList(FusionStage(channels, index > 0, self.rectified) for index in range(4))
        self.head_in = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.head_mid = nn.Conv2d(channels // 2, channels // 8, 3, padding=1)
        self.head_out = nn.Conv2d(channels // 8, num_classes, 1)
        channels_last(self)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """features: four tensors [N,C,h,w], finest first; size: (H, W) of the frames -> logits [N,classes,H,W]."""
        fine_to_coarse = list(features)
        finest = fine_to_coarse[0].shape[-2:]
        sizes = [(f.shape[-2], f.shape[-1]) for f in fine_to_coarse[2::-1]] + [(2 * finest[0], 2 * finest[1])]
        path = fine_to_coarse[-1]
        for stage, skip, target in zip(self.stages, fine_to_coarse[::-1], sizes, strict=True):
            path = stage(path, skip, target)
        path = F.interpolate(self.head_in(path), size, mode="bilinear", align_corners=False)
        return self.head_out(F.relu(self.head_mid(path)))

    def seen_by_losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The stage features as the AVM losses get them: unchanged, or rectified as the public code leaves them."""
        return [F.relu(f) for f in features] if self.rectified else list(features)

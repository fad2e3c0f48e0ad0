"""Channel reduction between the backbone and TPAVI: the same number of channels at every stage."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from avs_dist.modules.norm import WorldBatchNorm2d
from avs_dist.modules.weights import channels_last

DILATIONS = (3, 6, 12, 18)


class DilatedNeck(nn.Module):
    """Sum of four dilated 3x3 convolutions, weights N(0, 0.01), no norm, no activation (as published)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation) for dilation in DILATIONS
        )
        for branch in self.branches:
            assert isinstance(branch, nn.Conv2d)
            nn.init.normal_(branch.weight, 0.0, 0.01)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.branches[0](x_NCHW)
        for branch in self.branches[1:]:
            out = out + branch(x_NCHW)
        return out


def build_neck(kind: Literal["dilated", "one_layer", "three_layer"], in_channels: int, out_channels: int) -> nn.Module:
    """The neck of one stage: x_NCHW -> [N,out_channels,H,W].

    Args:
        kind: "dilated" as in the TPAVI paper; "one_layer", a single 3x3 convolution (ECMVAE paper); or "three_layer",
            1x1, 3x3 and 3x3, each with batch normalisation, without bias and without activation (public ECMVAE code).
        in_channels: of the backbone's stage.
        out_channels: of every stage after the neck.
    """
    if kind == "dilated":
        return channels_last(DilatedNeck(in_channels, out_channels))
    if kind == "one_layer":
        return channels_last(nn.Conv2d(in_channels, out_channels, 3, padding=1))
    layers: list[nn.Module] = []
    for width, edge in ((in_channels, 1), (out_channels, 3), (out_channels, 3)):
        layers += [
            nn.Conv2d(width, out_channels, edge, padding=edge // 2, bias=False),
            WorldBatchNorm2d(out_channels),
        ]
    return channels_last(nn.Sequential(*layers))

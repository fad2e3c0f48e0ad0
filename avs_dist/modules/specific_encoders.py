"""Encoder of what is specific to the picture in Uni-Code (paper: section 4.1, Psi; layers of the public code).

That of sound and text is a single layer, in `avs_dist.modules.modality`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from avs_dist.modules.weights import channels_last

PUBLISHED_EDGE = 7  # of a map


def map_padding(map_size: tuple[int, int]) -> tuple[int, int]:
    """Padding of the 3x3 convolutions of `MapEncoder` and `MapDecoder`, for height and width.

    None for an edge of 7 or more, which two of them make 4 shorter, as published (7 -> 5 -> 3). A shorter edge would
    lose its positions, or more than it has: there it is 1, and the edge stays as it is.
    """
    height, width = (0 if edge >= PUBLISHED_EDGE else 1 for edge in map_size)
    return height, width


class ResidualBlock(nn.Module):
    """relu(x + f(x)), where f is ReLU, 3x3 convolution, ReLU, 1x1 convolution, all of C channels (VQ-VAE)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(x_NCHW + self.layers(x_NCHW))


class MapEncoder(nn.Module):
    """Two 3x3 convolutions, a 1x1 convolution and a residual block, over the map of each second.

    Args:
        channels: C of the maps.
        specific: S, channels of the output; even.
        padding: of the 3x3 convolutions, see `map_padding`.
    """

    def __init__(self, channels: int, specific: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, specific // 2, 3, padding=padding),
            nn.ReLU(),
            nn.Conv2d(specific // 2, specific, 3, padding=padding),
            nn.ReLU(),
            nn.Conv2d(specific, specific, 1),
            ResidualBlock(specific),
        )
        channels_last(self)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """[B,T,h,w,C] -> [B,T,h',w',S], not negative."""
        return on_each_map(self.layers, x_BTHWC)


def on_each_map(layers: nn.Module, x_BTHWC: Tensor) -> Tensor:
    """`layers` of maps [N,C,h,w] on maps [B,T,h,w,C]; in memory both are the same."""
    x_NCHW = layers(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
    return x_NCHW.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])

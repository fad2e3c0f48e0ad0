"""Decoders of Uni-Code: from the code of each second, and what is specific to it, back to the features.

Paper: D in eq. 3; layers of the public code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avs_dist.modules.specific_encoders import ResidualBlock, on_each_map
from avs_dist.modules.weights import channels_last


class VectorDecoder(nn.Module):
    """A linear layer of the code, concatenated with what is specific, and a linear layer of both.

    Args:
        channels: C of the features.
        dim: D of the code.
        specific: S, numbers of what is specific.
    """

    def __init__(self, channels: int, dim: int, specific: int) -> None:
        super().__init__()
        self.code = nn.Linear(dim, specific)
        self.out = nn.Linear(2 * specific, channels)

    def forward(self, quantised_BTD: Tensor, specific_BTS: Tensor) -> Tensor:
        """-> [B,T,C]."""
        return self.out(torch.cat([self.code(quantised_BTD), specific_BTS], 2))


class MapDecoder(nn.Module):
    """A linear layer of the code, tiled over the map of what is specific and concatenated with it; then transposed
    convolutions undo the shrinking of `MapEncoder`.

    Args:
        channels: C of the maps.
        dim: D of the code.
        specific: S, channels of what is specific; even.
        padding: that of the encoder.
    """

    def __init__(self, channels: int, dim: int, specific: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.code = nn.Linear(dim, dim)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(dim + specific, specific // 2, 3, padding=padding),
            ResidualBlock(specific // 2),
            nn.ConvTranspose2d(specific // 2, channels, 3, padding=padding),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )
        channels_last(self)

    def forward(self, quantised_BTD: Tensor, specific_BTHWS: Tensor) -> Tensor:
        """Code [B,T,D] and what is specific [B,T,h',w',S] -> [B,T,h,w,C]."""
        code_BT11D = self.code(quantised_BTD)[:, :, None, None]
        code_BTHWD = code_BT11D.expand(*specific_BTHWS.shape[:4], -1)
        return on_each_map(self.layers, torch.cat([code_BTHWD, specific_BTHWS], 4))

"""Dropout and stochastic depth whose draws belong to the clip, not to the process that computes it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, arange, int64, nn

# splitmix64: numbers that differ by one give unrelated bits (Steele, Lea, Flood, OOPSLA 2014); int64 wraps around
WEYL = -0x61C8864680B583EB
FIRST, SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
BITS = 24  # of a uniform number


class ClipDropout(nn.Module):
    """Zeroes each value with a probability, in training, and scales the others up.

    Args:
        rate: the probability.
        place: tells the dropouts of one network apart.
    """

    def __init__(self, rate: float, place: int = 0) -> None:
        super().__init__()
        self.rate = rate
        self.place = place

    @property
    def active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, x_Nx: Tensor, draws_N: Tensor | None = None) -> Tensor:
        """Same shape.

        Args:
            draws_N: int64, a random number of each row, such as `ClipDraws.numbers`: what is dropped in the row depends
                on it alone. None: torch's generator decides.
        """
        if not self.active:
            return x_Nx
        if draws_N is None:
            return F.dropout(x_Nx, self.rate)
        kept_Nx = uniform_bits(draws_N + self.place, x_Nx[0].numel()).view(x_Nx.shape) >= self.rate * 2**BITS
        return x_Nx * kept_Nx / (1.0 - self.rate)


class ClipDropPath(ClipDropout):
    """Stochastic depth: drops a whole row, and scales the others up.

    Attributes:
        draws_N: see `ClipDropout`; set before each run, as the blocks of timm hand on nothing but their rows. It stays,
            so that a block which is run again drops the same.
    """

    draws_N: Tensor | None = None

    def forward(self, x_Nx: Tensor, draws_N: Tensor | None = None) -> Tensor:
        if not self.active:
            return x_Nx
        ones_N1 = x_Nx.new_ones(len(x_Nx), *[1] * (x_Nx.dim() - 1))
        return x_Nx * super().forward(ones_N1, self.draws_N if draws_N is None else draws_N)


def uniform_bits(draws_N: Tensor, length: int) -> Tensor:
    """Uniform integers in [0, 2^24), int64 [N,length] on the device of `draws_N`, each row a function of its number."""
    z_NL = _mixed(draws_N)[:, None] + arange(1, length + 1, dtype=int64, device=draws_N.device) * WEYL
    return _shifted(_mixed(z_NL), 64 - BITS)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> places) & ((1 << (64 - places)) - 1)

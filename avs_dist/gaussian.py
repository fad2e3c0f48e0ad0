"""Diagonal Gaussians and their mixtures, as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOG_TWO_PI = math.log(2.0 * math.pi)


class Gaussian(NamedTuple):
    """N(mean, exp(log_var)), independent over the last dimension; both [...,L]."""

    mean: Tensor
    log_var: Tensor

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        """mean + std * noise (reparametrised); `choice` is for mixtures."""
        return self.mean + (0.5 * self.log_var).exp() * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """log density, summed over the last dimension."""
        squared = (value - self.mean).square() * (-self.log_var).exp()
        return -0.5 * (squared + self.log_var + LOG_TWO_PI).sum(-1)


class Mixture(NamedTuple):
    """Equal-weight mixture of experts of the same shape (MoE)."""

    experts: tuple[Gaussian, ...]

    @property
    def mean(self) -> Tensor:
        return torch.stack([expert.mean for expert in self.experts]).mean(0)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        """A reparametrised sample of the expert that `choice`, uniform in [0,1) of shape [...], falls on.

        The weights of the experts are fixed, so that no gradient is lost in the choice.

        Raises:
            ValueError: no choice.
        """
        if choice is None:
            raise ValueError("a sample of a mixture needs a choice of expert, uniform in [0,1): got none")
        values = torch.stack([expert.sample(noise) for expert in self.experts])
        index = (choice * len(self.experts)).long().clamp_max(len(self.experts) - 1)
        return values.gather(0, index[None, ..., None].expand(1, *values.shape[1:]))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        each = torch.stack([expert.log_prob(value) for expert in self.experts])
        return each.logsumexp(0) - math.log(len(self.experts))


def product(experts: Sequence[Gaussian]) -> Gaussian:
    """Normalised product of Gaussians (PoE): precisions add up, means are weighted by them."""
    log_precision = torch.stack([-expert.log_var for expert in experts])
    mean = torch.stack([expert.mean for expert in experts])
    # shares of the precision by softmax: no precision is computed, so none can overflow
    return Gaussian((log_precision.softmax(0) * mean).sum(0), -log_precision.logsumexp(0))

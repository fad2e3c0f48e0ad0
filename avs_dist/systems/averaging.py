"""The mean of several masks of the same frames, and how much they differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from avs_dist.semantic import BACKGROUND
from avs_dist.systems.base import Prediction
from avs_dist.systems.generator import Masks

LOGIT_EPS = 1e-6  # a mean probability of 0 or 1 gets a finite logit


def average(paint: Callable[[int], Masks], num_samples: int, valid_BT: Tensor) -> Prediction:
    """Mean probability of `num_samples` masks, and the variance of the sounding one (of a single mask there is none).

    Args:
        paint: number of the draw, from 1, -> its masks.
        valid_BT: frames that exist; the logits of others are zero.
    """
    mean = _probability(paint(1))
    sounding = Running(_sounding(mean))
    for count in range(2, num_samples + 1):  # one mask in memory at a time
        probability = _probability(paint(count))
        mean = mean.lerp(probability, 1 / count)
        sounding.update(_sounding(probability))
    variance = sounding.variance if num_samples > 1 else None
    valid_BT11 = valid_BT[:, :, None, None]
    logits_BTHW = sounding.mean.logit(LOGIT_EPS) * valid_BT11
    if mean.ndim == 4:
        return Prediction(logits_BTHW, variance)
    return Prediction(logits_BTHW, variance, mean.clamp_min(LOGIT_EPS).log() * valid_BT11[..., None])


class Running:
    """Welford's update of mean and variance."""

    def __init__(self, value: Tensor) -> None:
        self.count, self.mean, self._squares = 1, value, torch.zeros_like(value)

    def update(self, value: Tensor) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean = self.mean + delta / self.count
        self._squares = self._squares + delta * (value - self.mean)

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count


def _probability(masks: Masks) -> Tensor:
    """Of each class [B,T,K,H,W], or of sounding [B,T,H,W]."""
    if masks.class_logits_BTKHW is None:
        return masks.logits_BTHW.sigmoid()
    return masks.class_logits_BTKHW.softmax(2)


def _sounding(probability: Tensor) -> Tensor:
    return 1.0 - probability[:, :, BACKGROUND] if probability.ndim == 5 else probability

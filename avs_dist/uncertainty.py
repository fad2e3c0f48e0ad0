"""Does a system know where it errs? The spread of its masks over prior samples, on right and on wrong pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from avs_dist import world
from avs_dist.systems.base import System

MAX_STD = 0.5  # of numbers in [0, 1]
NUM_BINS = 1024

# Standard deviations are summed as integers of this many units, so that neither batches nor ranks change a bit.
# Error per pixel 5e-10, room for 1.7e10 pixels (340 000 frames of 224 x 224).
_UNITS = 2**30

DEFINITIONS = {
    "std": "mean over all pixels of the standard deviation of the probability over the masks drawn",
    "std_right": "the same over the pixels that are classified rightly at probability > 0.5",
    "std_wrong": "the same over the pixels that are classified wrongly",
    "error_auroc": "area under the ROC of that deviation as detector of wrong pixels; 1 = perfect, 0.5 = chance",
}


class UncertaintyMetrics:
    """Accumulates pixels and compares the standard deviation with the errors, over everything seen by all ranks.

    The ROC comes from a histogram whose bins are equal in the square root of the deviation: most pixels of a trained
    system vary very little, and equal bins of the deviation itself would make ties of them.
    """

    def __init__(self) -> None:
        # right and wrong pixels x bins
        self._histogram = torch.zeros(2, NUM_BINS, dtype=torch.int64)
        self._std_sums = torch.zeros(2, dtype=torch.int64)

    def update(self, logits_FHW: Tensor, variance_FHW: Tensor, masks_FHW: Tensor) -> None:
        """Count all pixels of F frames.

        Args:
            logits_FHW: mask logits; foreground is sigmoid > 0.5.
            variance_FHW: variance of the probability; values below 0, which only rounding can make, count as 0.
            masks_FHW: truth; everything but 0 is foreground.

        Raises:
            ValueError: shapes differ, or a variance is NaN.
        """
        if not logits_FHW.shape == variance_FHW.shape == masks_FHW.shape:
            shapes = ", ".join(str(tuple(value.shape)) for value in (logits_FHW, variance_FHW, masks_FHW))
            raise ValueError(f"logits, variance and masks must have one shape, got {shapes}")
        if bool(variance_FHW.isnan().any()):
            raise ValueError(f"variance is NaN in {int(variance_FHW.isnan().sum())} of {variance_FHW.numel()} pixels")
        std_P = variance_FHW.detach().flatten().float().clamp_min(0).sqrt()
        predicted_P = logits_FHW.detach().flatten().float().sigmoid() > 0.5
        wrong_P = predicted_P != (masks_FHW.flatten().to(predicted_P.device) != 0)
        bins_P = ((std_P / MAX_STD).sqrt() * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        counts = torch.bincount(bins_P + NUM_BINS * wrong_P.long(), minlength=2 * NUM_BINS)
        self._histogram += counts.view(2, NUM_BINS).cpu()
        units_P = (std_P.double() * _UNITS).round().long()
        self._std_sums += torch.stack([units_P[~wrong_P].sum(), units_P[wrong_P].sum()]).cpu()

    def compute(self) -> dict[str, float]:
        """Results over the pixels of all ranks; every rank must call it and gets the same numbers.

        Returns:
            `std`; `std_right` and `std_wrong` where there are such pixels, and `error_auroc` where there are both;
            empty if nothing was counted. See DEFINITIONS.
        """
        parts = world.gather_objects((self._histogram, self._std_sums))
        histogram = torch.stack([part[0] for part in parts]).sum(0)
        right_sum, wrong_sum = torch.stack([part[1] for part in parts]).sum(0).tolist()
        right, wrong = histogram.sum(1).tolist()
        if not right + wrong:
            return {}
        results = {"std": (right_sum + wrong_sum) / _UNITS / (right + wrong)}
        if right:
            results["std_right"] = right_sum / _UNITS / right
        if wrong:
            results["std_wrong"] = wrong_sum / _UNITS / wrong
        if right and wrong:
            results["error_auroc"] = _auroc(*histogram.tolist())
        return results


def _auroc(right: list[int], wrong: list[int]) -> float:
    """Share of the pairs of a wrong and a right pixel where the wrong one lies in the higher bin; ties count half."""
    twice_won, below = 0, 0  # Python integers: the number of pairs does not fit into 64 bits
    for num_right, num_wrong in zip(right, wrong, strict=True):
        twice_won += num_wrong * (2 * below + num_right)
        below += num_right
    return twice_won / (2 * below * sum(wrong))


def set_num_samples(system: System, num_samples: int) -> None:
    """How many masks, from as many samples of the prior, a prediction of `system` averages.

    Raises:
        ValueError: the system draws no samples, or the number is below 1.
    """
    if system.num_samples is None:
        raise ValueError(f"samples {num_samples}: {type(system).__name__} draws no samples, it gives one mask")
    if num_samples < 1:
        raise ValueError(f"samples {num_samples}: must be at least 1")
    system.num_samples = num_samples

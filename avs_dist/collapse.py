"""Posterior collapse: how much each latent dimension says, and how many of them say anything at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from avs_dist import world
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.losses.latent import kl_per_dimension
from avs_dist.systems.base import LatentCodes

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, "Importance Weighted Autoencoders", section 5.1

# Values become integers of this many units and are summed as Python integers, which have no end: the sums are exact, so
# neither batches nor ranks change a bit, and the variance loses nothing to a large mean.
_UNITS = 2**40


@dataclass(frozen=True)
class CollapseReport:
    """Means over `frames` frames, by the name of the code; L numbers each.

    kl:       KL(q||p) in nats; of mixtures the mean over their experts.
    variance: of the mean of the posterior, over frames.
    """

    frames: int
    kl: Mapping[str, tuple[float, ...]]
    variance: Mapping[str, tuple[float, ...]]

    @property
    def active_units(self) -> dict[str, int]:
        """Dimensions whose posterior mean follows the input (variance above 0.01)."""
        return {name: sum(value > ACTIVE_VARIANCE for value in values) for name, values in self.variance.items()}

    def scalars(self) -> dict[str, float]:
        """`kl/c` (sum over dimensions), `active_units/c`, `kl_per_dimension/c_00` and so on, of each code."""
        values: dict[str, float] = {}
        for name, count in self.active_units.items():
            values[f"kl/{name}"] = sum(self.kl[name])
            values[f"active_units/{name}"] = float(count)
        for name, kl_L in self.kl.items():
            values |= {f"kl_per_dimension/{name}_{index:02d}": kl for index, kl in enumerate(kl_L)}
        return values


class CollapseMonitor:
    """Accumulates the codes of frames and measures them over everything seen, by all ranks together."""

    def __init__(self) -> None:
        self._frames = 0
        self._sums: dict[str, list[_Sums]] = {}

    def update(self, codes: LatentCodes, valid_BT: Tensor) -> None:
        """Count the frames that `valid_BT` marks; codes without a posterior are passed over.

        Raises:
            ValueError: a KL or a posterior mean that counts is NaN or infinite.
        """
        self._frames += int(valid_BT.sum())
        for name, posterior in codes.posterior.items():
            keep_BT = valid_BT.to(posterior.mean.device)
            kl_NL = _kl(posterior, codes.prior[name])[keep_BT].cpu()
            mean_NL = posterior.mean[keep_BT].double().cpu()
            if not bool((kl_NL.isfinite() & mean_NL.isfinite()).all()):
                raise ValueError(f"code {name}: its posterior mean or KL is NaN or infinite")
            columns = zip(_integers(kl_NL), _integers(mean_NL), strict=True)
            new = [_Sums(sum(kl), sum(mean), sum(value * value for value in mean)) for kl, mean in columns]
            _add(self._sums, name, new)

    def compute(self) -> CollapseReport:
        """Report over the frames of all ranks; every rank must call it and gets the same numbers.

        Raises:
            ValueError: no frame was counted.
        """
        frames = 0
        sums: dict[str, list[_Sums]] = {}
        for rank_frames, rank_sums in world.gather_objects((self._frames, self._sums)):
            frames += rank_frames
            for name, new in rank_sums.items():
                _add(sums, name, new)
        if not frames:
            raise ValueError("no frames were counted: there are no latent codes to measure")
        kl = {name: tuple(s.kl / (frames * _UNITS) for s in dimensions) for name, dimensions in sums.items()}
        variance = {name: tuple(s.variance(frames) for s in dimensions) for name, dimensions in sums.items()}
        return CollapseReport(frames, kl, variance)


@dataclass(frozen=True)
class _Sums:
    """Over frames, of one dimension, in units: KL, posterior mean, and (in squared units) its square."""

    kl: int
    mean: int
    square: int

    def variance(self, frames: int) -> float:
        return (frames * self.square - self.mean**2) / (frames * _UNITS) ** 2


def _add(sums: dict[str, list[_Sums]], name: str, new: list[_Sums]) -> None:
    old = sums.get(name, [_Sums(0, 0, 0)] * len(new))
    sums[name] = [_Sums(a.kl + b.kl, a.mean + b.mean, a.square + b.square) for a, b in zip(old, new, strict=True)]


def _integers(values_NL: Tensor) -> list[list[int]]:
    """Of each of the L dimensions, the N values in units."""
    return [[int(value) for value in column] for column in (values_NL * _UNITS).round().T.tolist()]


def _kl(q: Gaussian | Mixture, p: Gaussian | Mixture) -> Tensor:
    """KL of each dimension in float64; of mixtures the mean over experts, one Gaussian standing for all of them."""
    experts_q, experts_p = _experts(q), _experts(p)
    count = max(len(experts_q), len(experts_p))
    pairs = zip(experts_q * (count // len(experts_q)), experts_p * (count // len(experts_p)), strict=True)
    return torch.stack([kl_per_dimension(a, b) for a, b in pairs]).mean(0)


def _experts(distribution: Gaussian | Mixture) -> tuple[Gaussian, ...]:
    """Its Gaussians in float64."""
    experts = distribution.experts if isinstance(distribution, Mixture) else (distribution,)
    return tuple(Gaussian(expert.mean.double(), expert.log_var.double()) for expert in experts)

"""Mean and variance over tokens that live on several clips and several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks, with gradient


class Moments(NamedTuple):
    """Batch-normalisation statistics: number of tokens (scalar), mean [C] and biased variance [C]."""

    num_tokens: Tensor
    mean_C: Tensor
    var_C: Tensor


def merge_groups(count_G: Tensor, mean_GC: Tensor, var_GC: Tensor) -> Moments:
    """Moments of the union of G groups, from the (centred) moments of each group."""
    count = count_G.sum()
    share_G1 = (count_G / count.clamp_min(1.0))[:, None]
    mean_C = (share_G1 * mean_GC).sum(0)
    var_C = (share_G1 * (var_GC + (mean_GC - mean_C).square())).sum(0)
    return Moments(count, mean_C, var_C)


def merge_ranks(local: Moments, reduce: Reduce | None) -> Moments:
    """Moments over all ranks with one collective; `local` itself without `reduce`.

    The sums of squares travel in float64, so that the subtraction of the squared mean loses nothing that float32
    could hold.
    """
    if reduce is None:
        return local
    mean_C, var_C = local.mean_C.double(), local.var_C.double()
    count = local.num_tokens.double()
    packed = torch.cat([count[None], count * mean_C, count * (var_C + mean_C.square())])
    count, total_C, squares_C = reduce(packed).split([1, len(mean_C), len(mean_C)])
    mean_C = total_C / count.clamp_min(1.0)
    var_C = (squares_C / count.clamp_min(1.0) - mean_C.square()).clamp_min(0.0)
    dtype = local.mean_C.dtype
    return Moments(count[0].to(dtype), mean_C.to(dtype), var_C.to(dtype))


@torch.no_grad()
def update_running(running_mean_C: Tensor, running_var_C: Tensor, batch: Moments, momentum: float) -> None:
    """Move running statistics towards those of a batch as torch's batch normalisation does (unbiased variance)."""
    unbiased_C = batch.var_C * (batch.num_tokens / (batch.num_tokens - 1).clamp_min(1.0))
    running_mean_C.lerp_(batch.mean_C.to(running_mean_C.dtype), momentum)
    running_var_C.lerp_(unbiased_C.to(running_var_C.dtype), momentum)

"""Several ranks in one process, for functions that are given the sum over ranks as an argument."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def on_ranks(count: int, of_rank: Callable[[int, Reduce], Any]) -> list[Any]:
    """Results of `of_rank(rank, reduce)` on `count` ranks; `reduce` sums over them, with gradient."""
    barrier = threading.Barrier(count, timeout=30)
    terms: dict[int, Tensor] = {}

    def run(rank: int) -> Any:
        def reduce(value: Tensor) -> Tensor:
            terms[rank] = value
            barrier.wait()
            total = torch.stack([terms[each] for each in range(count)]).sum(0)
            barrier.wait()  # before anyone puts the next term in its place
            return total

        try:
            return of_rank(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))

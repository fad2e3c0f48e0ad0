"""Which clip is read when and by whom: pure functions, so that every process computes the same plan.

The training data is one endless sequence of clips: the epochs of a set of shards one after the other, or a mixture of
several such sequences. An optimiser step of global batch G takes the next G positions; its micro-step a and rank r take
a contiguous share of them, and loading process w of n makes every n-th micro-batch. Neither the number of ranks nor of
loading processes enters the sequence, and every position is random access. So all ranks make the same number of steps,
an epoch's tail is neither dropped nor padded (that batch goes on with the next epoch), and a run continues at exactly
the next clip from one number, on another number of ranks or with another global batch too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import gcd
from typing import Any

import numpy as np

PADDING = -1
# positions of a mixture in which each set has its fixed share
MIXTURE_BLOCK = 1024


def epoch_order(shard_counts: Sequence[int], seed: int, epoch: int, window: int, set_number: int = 0) -> np.ndarray:
    """Order of one epoch: int64 [N], a permutation of the clip ids 0..N-1 (ids count through the shards in order).

    Shards are shuffled, then clips within windows of `window` consecutive clips, which reads each shard in one go
    while mixing well. Depends on the arguments only.

    Args:
        set_number: Tells the sets of a mixture apart.

    Raises:
        ValueError: For a window below 1, or when there is no clip.
    """
    counts = np.asarray(shard_counts, dtype=np.int64)
    if counts.sum() < 1:
        raise ValueError("no clip to order: all shards are empty")
    if window < 1:
        raise ValueError(f"the shuffle window must be at least 1 clip, got {window}")
    rng = np.random.default_rng([seed, epoch, set_number])
    starts = np.cumsum(counts) - counts
    order = np.concatenate([np.arange(starts[s], starts[s] + counts[s]) for s in rng.permutation(len(counts))])
    for begin in range(0, len(order), window):
        rng.shuffle(order[begin : begin + window])
    return order


def micro_batch_size(global_batch: int, accumulation: int, world_size: int) -> int:
    """Clips of one rank in one micro-step.

    Raises:
        ValueError: If the global batch is not a multiple of accumulation steps x ranks.
    """
    shares = accumulation * world_size
    if global_batch < 1 or shares < 1 or global_batch % shares:
        raise ValueError(
            f"global batch {global_batch} cannot be divided by {accumulation} accumulation steps x {world_size} ranks; "
            f"use a multiple of {shares}"
        )
    return global_batch // shares


@dataclass(frozen=True)
class StepPlan:
    """Which positions of the endless sequence one rank takes.

    start:     Position of the first clip of the first step.
    num_steps: Optimiser steps.
    """

    start: int
    num_steps: int
    global_batch: int
    accumulation: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world_size)
        _ = self.size

    @property
    def size(self) -> int:
        """Clips in each micro-batch.

        Raises:
            ValueError: See `micro_batch_size`.
        """
        return micro_batch_size(self.global_batch, self.accumulation, self.world_size)

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def micro_batches(self, worker: int = 0, workers: int = 1) -> Iterator[range]:
        """Positions of each micro-batch that loading process `worker` of `workers` makes, in order."""
        for number in range(worker, len(self), workers):
            step, a = divmod(number, self.accumulation)
            begin = self.start + step * self.global_batch + (a * self.world_size + self.rank) * self.size
            yield range(begin, begin + self.size)


class SetSequence:
    """The endless sequence of one set of shards; remembers the epochs it is in, so that walking on is cheap."""

    def __init__(self, shard_counts: Sequence[int], seed: int, window: int, set_number: int = 0) -> None:
        self._arguments = (tuple(shard_counts), seed, window)
        self._set_number = set_number
        self._length = int(sum(shard_counts))
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._length)
        if epoch not in self._orders:
            counts, seed, window = self._arguments
            # a batch touches neighbouring epochs only (more when the set is smaller than the batch)
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) < 2}
            self._orders[epoch] = epoch_order(counts, seed, epoch, window, self._set_number)
        return int(self._orders[epoch][index])


class TrainSequence:
    """The endless sequence of clip ids; ids count through the sets and their shards in order.

    Of several sets each has its share of every block of 1024 positions, at places that are shuffled anew in each
    block; within its share each set goes through its own epochs, every clip once in each.

    Args:
        sets: Clips of each shard of each set.
        weights: Shares of the sets, in any unit.

    Raises:
        ValueError: For weights that are not positive, or below half a position in a block; for other errors see
            `epoch_order`.
    """

    def __init__(
        self, sets: Sequence[Sequence[int]], seed: int, window: int, weights: Sequence[float] = (1.0,)
    ) -> None:
        totals = [sum(counts) for counts in sets]
        if min(totals, default=0) < 1:
            raise ValueError("no clip to order: all shards are empty")
        self._firsts = np.cumsum([0, *totals[:-1]])
        self._sequences = [SetSequence(counts, seed, window, number) for number, counts in enumerate(sets)]
        self._quotas = _quotas(weights, len(sets))
        self._seed = seed
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        if len(self._sequences) == 1:
            return self._sequences[0][position]
        block, place = divmod(position, MIXTURE_BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._draw(block))
        _, chosen, ranks = self._block
        number = int(chosen[place])
        return int(self._firsts[number]) + self._sequences[number][block * self._quotas[number] + int(ranks[place])]

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Set of each position in a block, and how many positions of the same set come before it there."""
        chosen = np.repeat(np.arange(len(self._quotas)), self._quotas)
        # epochs use three numbers, of which the second is small
        np.random.default_rng([self._seed, block, 0, MIXTURE_BLOCK]).shuffle(chosen)
        ranks = np.zeros(MIXTURE_BLOCK, dtype=np.int64)
        for number, quota in enumerate(self._quotas):
            ranks[chosen == number] = np.arange(quota)
        return chosen, ranks


def _quotas(weights: Sequence[float], num_sets: int) -> list[int]:
    """Positions of each set in a block, by largest remainders."""
    if len(weights) != num_sets or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"a mixture of {num_sets} sets needs as many positive weights, got {list(weights)}")
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * MIXTURE_BLOCK
    quotas = np.floor(exact).astype(int)
    for number in np.argsort(quotas - exact, kind="stable")[: MIXTURE_BLOCK - quotas.sum()]:
        quotas[number] += 1
    if quotas.min() < 1:
        raise ValueError(f"weights {list(weights)}: a share below 1/{MIXTURE_BLOCK} would never be drawn")
    return [int(quota) for quota in quotas]


@dataclass(frozen=True)
class StreamState:
    """Where a training run is in its data; a few numbers, whatever the number of ranks and loading processes.

    position:    Clips taken since the start of the run, over all ranks.
    seed:        Of the order.
    window:      Of the shuffle.
    fingerprint: Of the clips and shares that the order is of, see `fingerprint`.
    """

    position: int
    seed: int
    window: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> StreamState:
        """Inverse of `to_dict`.

        Raises:
            ValueError: For anything else.
        """
        try:
            state = StreamState(**values)
        except TypeError as error:
            raise ValueError(f"not the state of a stream: {error}") from error
        if type(state.position) is not int or state.position < 0:
            raise ValueError(f"the position of a stream is a number from 0 on, got {state.position!r}")
        return state

    def advanced(self, clips: int) -> StreamState:
        """State after so many more clips."""
        return StreamState(self.position + clips, self.seed, self.window, self.fingerprint)


def fingerprint(sets: Sequence[Sequence[Sequence[str]]], weights: Sequence[float]) -> str:
    """Short hash of what the order depends on beside seed and window: weights, and the keys in each shard."""
    sha256 = hashlib.sha256(repr(_quotas(weights, len(sets))).encode())
    for shards in sets:
        sha256.update(b"\2")
        for keys in shards:
            sha256.update(b"\1" + "\0".join(keys).encode())
    return sha256.hexdigest()[:16]


def substitutes(clip: int, num_clips: int) -> Iterator[int]:
    """Clips that stand in for a damaged one: all others of its set, each once, far from it and from each other.

    A cut or lost shard damages neighbours, so the next clip in the same shard would be a poor choice.
    """
    stride = max(1, round(num_clips * 0.618))
    while gcd(stride, num_clips) > 1:
        stride += 1
    return ((clip + k * stride) % num_clips for k in range(1, num_clips))


def eval_batches(
    num_clips: int, batch: int, rank: int, world_size: int, worker: int = 0, workers: int = 1
) -> list[list[int]]:
    """Clip ids of each evaluation batch of one rank (and loading process); every clip exactly once over all ranks.

    Every rank gets the same number of batches of the same size, because collectives inside the model (ZeRO-3 gathers)
    must be entered by all; the surplus entries are PADDING (-1) and must not be counted.

    Raises:
        ValueError: For no clips, an empty batch or a rank outside the world.
    """
    if num_clips < 1 or batch < 1:
        raise ValueError(f"need at least 1 clip and a batch of at least 1, got {num_clips} and {batch}")
    _check_rank(rank, world_size)
    begins = range(0, num_clips, batch * world_size)
    return [
        [i if i < num_clips else PADDING for i in range(begin + rank * batch, begin + (rank + 1) * batch)]
        for begin in islice(begins, worker, None, workers)
    ]


def swapped(clip: int, num_clips: int) -> int:
    """Another clip than `clip`, half the set away; a derangement of the set.

    Raises:
        ValueError: If there is only one clip.
    """
    if num_clips < 2:
        raise ValueError("swapping the sound needs at least two clips in the split")
    return (clip + num_clips // 2) % num_clips


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")

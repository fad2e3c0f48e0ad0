"""Which clip is read when and by whom: pure functions, so that every process computes the same plan.

The training data is one endless sequence, the epochs one after the other. Step s of global batch G takes the
positions [s G, (s+1) G); its micro-step a and rank r take a contiguous share of them. Neither the number of shards, of
ranks nor of workers enters the sequence, so all ranks make the same number of steps and a run can resume at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

PADDING = -1


def epoch_order(shard_counts: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """Order of one epoch: int64 [N], a permutation of the clip ids 0..N-1 (ids count through the shards in order).

    Shards are shuffled, then clips within windows of `window` consecutive clips, which reads each shard in one go
    while mixing well. Depends on the arguments only.

    Raises:
        ValueError: For a window below 1, or when there is no clip.
    """
    counts = np.asarray(shard_counts, dtype=np.int64)
    if counts.sum() < 1:
        raise ValueError("no clip to order: all shards are empty")
    if window < 1:
        raise ValueError(f"the shuffle window must be at least 1 clip, got {window}")
    rng = np.random.default_rng([seed, epoch])
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


def micro_batches(
    start_step: int, num_steps: int, global_batch: int, accumulation: int, rank: int, world_size: int
) -> Iterator[range]:
    """Positions in the endless sequence of each micro-batch of one rank, step by step."""
    size = micro_batch_size(global_batch, accumulation, world_size)
    _check_rank(rank, world_size)
    for step in range(start_step, start_step + num_steps):
        for a in range(accumulation):
            begin = step * global_batch + (a * world_size + rank) * size
            yield range(begin, begin + size)


class TrainSequence:
    """The endless sequence of clip ids; remembers the epochs it is in, so that walking on is cheap."""

    def __init__(self, shard_counts: Sequence[int], seed: int, window: int) -> None:
        self._arguments = (tuple(shard_counts), seed, window)
        self._length = int(sum(shard_counts))
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._length)
        if epoch not in self._orders:
            counts, seed, window = self._arguments
            # a batch touches neighbouring epochs only (more when the set is smaller than the batch)
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) < 2}
            self._orders[epoch] = epoch_order(counts, seed, epoch, window)
        return int(self._orders[epoch][index])


def eval_batches(num_clips: int, batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Clip ids of each evaluation batch of one rank; every clip exactly once over all ranks.

    Every rank gets the same number of batches of the same size, because collectives inside the model (ZeRO-3 gathers)
    must be entered by all; the surplus entries are PADDING (-1) and must not be counted.

    Raises:
        ValueError: For no clips, an empty batch or a rank outside the world.
    """
    if num_clips < 1 or batch < 1:
        raise ValueError(f"need at least 1 clip and a batch of at least 1, got {num_clips} and {batch}")
    _check_rank(rank, world_size)
    stride = batch * world_size
    return [
        [i if i < num_clips else PADDING for i in range(begin + rank * batch, begin + (rank + 1) * batch)]
        for begin in range(0, num_clips, stride)
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

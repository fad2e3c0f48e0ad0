"""Streams of batches for training and evaluation, for a torch DataLoader with `batch_size=None`.

Worker w of n makes the batches w, w + n, ... and the DataLoader takes them from its workers in turn, so the batches
arrive in the planned order for any number of workers, also none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plan import PADDING, TrainSequence, eval_batches, micro_batch_size, micro_batches
from avs_dist.shards.read import Audio, ClipReader

Batch = TypeVar("Batch")
Item = TypeVar("Item")
# the samples are what the shards hold, see ClipReader.samples
Collate = Callable[[list[Any]], Batch]


class TrainStream(IterableDataset[Batch], Generic[Batch]):
    """Micro-batches of one rank for the steps start_step .. start_step + num_steps.

    Each step yields `grad_accumulation` micro-batches. The clips of a step depend on seed, window and global batch
    only, not on ranks, accumulation or workers (`plan`); a run resumes by its step number alone.

    Args:
        index: Folder of shards, or its loaded index.
        collate: Makes a batch of samples; runs in the worker.
        audio: See `ClipReader`.

    Raises:
        ValueError: For an unknown split, or a global batch that cannot be divided.
    """

    def __init__(
        self,
        index: ShardIndex | str | Path,
        split: str,
        *,
        seed: int,
        window: int,
        global_batch: int,
        grad_accumulation: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
        collate: Collate[Batch],
        audio: Audio = "real",
    ) -> None:
        super().__init__()
        self._reader = ClipReader(_loaded(index), split, audio)
        self._sequence = TrainSequence(self._reader.shard_counts, seed, window)
        self._size = micro_batch_size(global_batch, grad_accumulation, world_size)
        self._plan = (start_step, num_steps, global_batch, grad_accumulation, rank, world_size)
        self._length = num_steps * grad_accumulation
        self._collate = collate

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        positions = chain.from_iterable(_of_this_worker(micro_batches(*self._plan)))
        samples = self._reader.samples(self._sequence[position] for position in positions)
        while batch := list(islice(samples, self._size)):
            yield self._collate(batch)


class EvalStream(IterableDataset[tuple[Batch, list[int]]], Generic[Batch]):
    """Pairs (batch, clip ids) that cover the split once over all ranks.

    All ranks get the same number of equal batches; surplus entries repeat the last clip and have the id -1, which the
    consumer must not count.

    Args:
        index: Folder of shards, or its loaded index.
        batch_size: Clips in each batch of one rank.
        collate: Makes a batch of samples; runs in the worker.
        audio: See `ClipReader`.
    """

    def __init__(
        self,
        index: ShardIndex | str | Path,
        split: str,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        collate: Collate[Batch],
        audio: Audio = "real",
    ) -> None:
        super().__init__()
        self._reader = ClipReader(_loaded(index), split, audio)
        self._batches = eval_batches(len(self._reader), batch_size, rank, world_size)
        self._collate = collate

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        mine = list(_of_this_worker(self._batches))
        last = len(self._reader) - 1
        samples = self._reader.samples(last if clip == PADDING else clip for clip in chain.from_iterable(mine))
        for clips in mine:
            yield self._collate(list(islice(samples, len(clips)))), clips


def _loaded(index: ShardIndex | str | Path) -> ShardIndex:
    return index if isinstance(index, ShardIndex) else ShardIndex.load(index)


def _of_this_worker(batches: Iterable[Item]) -> Iterator[Item]:
    worker = get_worker_info()
    return islice(batches, 0, None) if worker is None else islice(batches, worker.id, None, worker.num_workers)

"""Streams of batches for training and evaluation, for a torch DataLoader with `batch_size=None`.

Worker w of n makes the batches w, w + n, ... and the DataLoader takes them from its workers in turn, so the batches
arrive in the planned order for any number of workers, also none.

A damaged clip does not end a stream: another one takes its place, and the damage travels with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from avs_dist.shards.faults import Damage, DamagedClipError
from avs_dist.shards.plan import PADDING, StepPlan, StreamState, TrainSequence, eval_batches, fingerprint, substitutes
from avs_dist.shards.read import ClipReader

Batch = TypeVar("Batch")
# the samples are what the shards hold, see ClipReader.sample
Collate = Callable[[list[Any]], Batch]
# substitutes that are tried for one damaged clip
MOST_TRIED = 100


class Loaded(NamedTuple, Generic[Batch]):
    """One batch.

    clips:   ids of the clips in it; PADDING (-1) marks those that only fill an evaluation batch.
    damages: clips that should have been in it.
    """

    batch: Batch
    clips: list[int]
    damages: tuple[Damage, ...]


class TrainStream(IterableDataset[Loaded[Batch]], Generic[Batch]):
    """Micro-batches of one rank, `accumulation` of them for each step of the plan.

    The clips of a step depend on seed, window, shares and global batch only, not on ranks, accumulation or workers
    (`plan`). The place of a damaged clip is taken by another one of its set.

    Args:
        collate: Makes a batch of samples; runs in the worker.
        weights: Shares of the reader's sets.
    """

    def __init__(
        self,
        reader: ClipReader,
        plan: StepPlan,
        *,
        seed: int,
        window: int,
        collate: Collate[Batch],
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self._reader, self._plan, self._collate = reader, plan, collate
        self._order = (reader.shard_counts, seed, window, weights)
        TrainSequence(*self._order)  # what cannot be ordered is refused here, not in a worker

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Loaded[Batch]]:
        sequence = TrainSequence(*self._order)
        self._reader.read_ahead(self._clips)
        with closing(self._reader):
            for positions in self._plan.micro_batches(*_this_worker()):
                damages: list[Damage] = []
                found = [self._usable(sequence[position], damages) for position in positions]
                batch = self._collate([sample for _, sample in found])
                yield Loaded(batch, [clip for clip, _ in found], tuple(damages))

    def _clips(self) -> Iterator[int]:
        sequence = TrainSequence(*self._order)
        positions = chain.from_iterable(self._plan.micro_batches(*_this_worker()))
        return (sequence[position] for position in positions)

    def _usable(self, clip: int, damages: list[Damage]) -> tuple[int, Any]:
        """The clip and its sample, or the first of its substitutes that can be read."""
        own_set = self._reader.clips_of_same_set(clip)
        others = (own_set[i] for i in substitutes(clip - own_set.start, len(own_set)))
        return _first_readable(self._reader, chain([clip], others), damages)


class EvalStream(IterableDataset[Loaded[Batch]], Generic[Batch]):
    """Batches that cover the split once over all ranks.

    All ranks get the same number of equal batches; surplus entries repeat another clip and have the id -1, which the
    consumer must not count, and so have those that stand where a clip is damaged.

    Args:
        batch_size: Clips in each batch of one rank.
        collate: Makes a batch of samples; runs in the worker.
    """

    def __init__(
        self, reader: ClipReader, *, batch_size: int, rank: int, world_size: int, collate: Collate[Batch]
    ) -> None:
        super().__init__()
        self._reader, self._collate = reader, collate
        self._plan = (len(reader), batch_size, rank, world_size)
        self._length = len(eval_batches(*self._plan))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Loaded[Batch]]:
        self._reader.read_ahead(self._clips)
        with closing(self._reader):
            for clips in eval_batches(*self._plan, *_this_worker()):
                found = [self._shown(clip) for clip in clips]
                batch = self._collate([sample for _, sample, _ in found])
                damages = tuple(damage for *_, damages in found for damage in damages)
                yield Loaded(batch, [clip for clip, _, _ in found], damages)

    def _shown(self, clip: int) -> tuple[int, Any, list[Damage]]:
        """The clip, its sample, no damage; or PADDING, the sample of another one, and what is wrong with the clip."""
        last = len(self._reader) - 1
        damages: list[Damage] = []
        candidates = chain([last if clip == PADDING else clip], substitutes(last, len(self._reader)), [last])
        read, sample = _first_readable(self._reader, candidates, damages)
        if clip == PADDING:
            return PADDING, sample, []  # nobody's clip: its damage is told where it is counted
        return (clip if read == clip and not damages else PADDING), sample, damages[:1]

    def _clips(self) -> Iterator[int]:
        return (clip for clips in eval_batches(*self._plan, *_this_worker()) for clip in clips if clip != PADDING)


def stream_state(reader: ClipReader, position: int, seed: int, window: int, weights: Sequence[float]) -> StreamState:
    """State of a training run over the reader's clips after so many of them."""
    return StreamState(position, seed, window, fingerprint(reader.shard_keys, weights))


def _first_readable(reader: ClipReader, clips: Iterable[int], damages: list[Damage]) -> tuple[int, Any]:
    """The first clip that can be read, and its sample; those before it are added to the damages.

    Raises:
        ValueError: If many in a row are damaged.
    """
    for clip in islice(clips, MOST_TRIED):
        try:
            return clip, reader.sample(clip)
        except DamagedClipError as error:
            damages.append(error.damage)
    raise ValueError(f"{len(damages)} clips one after the other cannot be read; the first: {damages[0]}")


def _this_worker() -> tuple[int, int]:
    """Number of this loading process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)

"""Streams of batches for training and evaluation, for a torch DataLoader with `batch_size=None`.

Worker w of n makes the batches w, w + n, ... and the DataLoader takes them from its workers in turn, so the batches
arrive in the planned order for any number of workers, also none.

A damaged clip does not end a stream: another one takes its place, and the damage travels with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from avs_dist.shards.faults import Damage, DamagedClipError
from avs_dist.shards.plan import PADDING, StepPlan, StreamState, TrainSequence, eval_batches, fingerprint, substitutes
from avs_dist.shards.read import ClipReader

Batch = TypeVar("Batch")


class _NothingReadableError(Exception):
    """No clip that is tried can be read."""


# the samples are what the shards hold, see ClipReader.sample
Collate = Callable[[list[Any]], Batch]
# clips that are tried in the place of one
MOST_TRIED = 100


class Loaded(NamedTuple, Generic[Batch]):
    """One batch.

    batch:   None where no clip in reach can be read: the stream ends there.
    clips:   ids of the clips in it; PADDING (-1) marks those that only fill an evaluation batch.
    damages: clips that should have been in it.
    """

    batch: Batch | None
    clips: list[int]
    damages: tuple[Damage, ...]


class TrainStream(IterableDataset[Loaded[Batch]], Generic[Batch]):
    """Micro-batches of one rank, `accumulation` of them for each step of the plan.

    The clips of a step depend on seed, window, shares and global batch only, not on ranks, accumulation or workers
    (`plan`). The place of a damaged clip is taken by another one of its set.

    Args:
        collate: Makes a batch of samples; runs in the worker.
        weights: Shares of the reader's sets.
        most_tried: Clips that are tried in the place of one before the stream ends.
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
        most_tried: int = MOST_TRIED,
    ) -> None:
        super().__init__()
        self._reader, self._plan, self._collate, self._most_tried = reader, plan, collate, most_tried
        self._order = (reader.shard_counts, seed, window, weights)
        TrainSequence(*self._order)  # what cannot be ordered is refused here, not in a worker

    def __len__(self) -> int:
        return len(self._plan)

    def describe(self, number: int) -> str:
        """Where micro-batch `number` is read from, unless a clip is damaged."""
        sequence = TrainSequence(*self._order)
        positions = next(self._plan.micro_batches(number, len(self)))
        return self._reader.describe([sequence[position] for position in positions])

    def __iter__(self) -> Iterator[Loaded[Batch]]:
        sequence = TrainSequence(*self._order)
        self._reader.read_ahead(self._clips)
        with closing(self._reader):
            for positions in self._plan.micro_batches(*_this_worker()):
                clips = [sequence[position] for position in positions]
                loaded = _loaded(self._usable, clips, self._collate)
                yield loaded
                if loaded.batch is None:
                    return

    def _clips(self) -> Iterator[int]:
        sequence = TrainSequence(*self._order)
        positions = chain.from_iterable(self._plan.micro_batches(*_this_worker()))
        return (sequence[position] for position in positions)

    def _usable(self, clip: int, damages: list[Damage]) -> tuple[int, Any]:
        """The clip and its sample, or the first of its substitutes that can be read.

        Raises:
            _NothingReadableError: None can, of as many as are tried.
        """
        own_set = self._reader.clips_of_same_set(clip)
        others = (own_set[i] for i in substitutes(clip - own_set.start, len(own_set)))
        return _first_readable(self._reader.sample, islice(chain([clip], others), self._most_tried), damages)


class EvalStream(IterableDataset[Loaded[Batch]], Generic[Batch]):
    """Batches that cover the split once over all ranks.

    All ranks get the same number of equal batches; surplus entries repeat another clip and have the id -1, which the
    consumer must not count, and so have those that stand where a clip is damaged.

    Args:
        batch_size: Clips in each batch of one rank.
        collate: Makes a batch of samples; runs in the worker.
        most_tried: Clips that are tried to fill a place before the stream ends.
    """

    def __init__(
        self,
        reader: ClipReader,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        collate: Collate[Batch],
        most_tried: int = MOST_TRIED,
    ) -> None:
        super().__init__()
        self._reader, self._collate, self._most_tried = reader, collate, most_tried
        self._plan = (len(reader), batch_size, rank, world_size)
        self._length = len(eval_batches(*self._plan))

    def __len__(self) -> int:
        return self._length

    def describe(self, number: int) -> str:
        """Where batch `number` is read from, unless a clip is damaged."""
        return self._reader.describe(
            [clip for clip in eval_batches(*self._plan, number, len(self))[0] if clip != PADDING]
        )

    def __iter__(self) -> Iterator[Loaded[Batch]]:
        self._reader.read_ahead(self._clips)
        with closing(self._reader):
            for clips in eval_batches(*self._plan, *_this_worker()):
                loaded = _loaded(self._shown, clips, self._collate)
                yield loaded
                if loaded.batch is None:
                    return

    def _shown(self, clip: int, damages: list[Damage]) -> tuple[int, Any]:
        """The clip and its sample; or PADDING and the sample of another one, where it is damaged or only fills."""
        if clip != PADDING:
            try:
                return clip, self._reader.sample(clip)
            except DamagedClipError as error:
                damages.append(error.damage)
        last = len(self._reader) - 1
        fillers = islice(chain([last], substitutes(last, len(self._reader))), self._most_tried)
        unread: list[Damage] = []  # told where those clips are counted, unless nothing is counted any more
        try:
            return PADDING, _first_readable(partial(self._reader.sample, own_sound=True), fillers, unread)[1]
        except _NothingReadableError:
            damages += unread
            raise

    def _clips(self) -> Iterator[int]:
        return (clip for clips in eval_batches(*self._plan, *_this_worker()) for clip in clips if clip != PADDING)


def stream_state(reader: ClipReader, position: int, seed: int, window: int, weights: Sequence[float]) -> StreamState:
    """State of a training run over the reader's clips after so many of them."""
    return StreamState(position, seed, window, fingerprint(reader.shard_keys, weights))


def _loaded(
    read: Callable[[int, list[Damage]], tuple[int, Any]], clips: Sequence[int], collate: Collate[Batch]
) -> Loaded[Batch]:
    """The batch of what `read` gives for each of the clips; it notes the damage that it meets."""
    damages: list[Damage] = []
    try:
        found = [read(clip, damages) for clip in clips]
    except _NothingReadableError:
        return Loaded(None, [], tuple(damages))
    batch = collate([sample for _, sample in found])
    return Loaded(batch, [clip for clip, _ in found], tuple(damages))


def _first_readable(read: Callable[[int], Any], clips: Iterable[int], damages: list[Damage]) -> tuple[int, Any]:
    """The first clip that can be read, and its sample; the damage of those before it is noted.

    Raises:
        _NothingReadableError: None can.
    """
    for clip in clips:
        try:
            return clip, read(clip)
        except DamagedClipError as error:
            damages.append(error.damage)
    raise _NothingReadableError


def _this_worker() -> tuple[int, int]:
    """Number of this loading process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)

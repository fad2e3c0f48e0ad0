"""Data loaders: shard streams joined with the Clip collation, and what all ranks must know of damaged clips."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from avs_dist import world
from avs_dist.agreed_batches import AgreedBatches
from avs_dist.clip import collate
from avs_dist.config import Config, DataConfig, UnicodeConfig
from avs_dist.damage import DamageLog, reported_clips
from avs_dist.sequences import collate_features, collate_media
from avs_dist.shards.faults import Damage, DamagedClipError
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.pipeline import MOST_TRIED, EvalStream, TrainStream, stream_state
from avs_dist.shards.plan import StepPlan, StreamState
from avs_dist.shards.read import ClipReader
from avs_dist.shards.text import MAX_WORDS

AudioSource = Literal["real", "muted", "swapped"]


class TrainBatches:
    """The micro-batches of this rank, one list per optimiser step, to the end of the run.

    Args:
        index: Of data.shards.
        first_step: Steps that the run has done.

    Raises:
        ValueError: a set of data.mixture that does not fit to data.shards, or a batch that cannot be divided.
    """

    def __init__(self, config: Config, index: ShardIndex, first_step: int = 0) -> None:
        sets = mixed_sets(config.data, index)
        self._config, self._first_step = config, first_step
        self._weights = tuple((config.data.mixture or {"": 1.0}).values())
        self._reader = clip_reader(config.data, sets, config.data.train_split)
        _warn_of_small_cache(config.data, sets)
        self._collate = _collate(config, index)
        self._state = self._state_at(first_step * config.train.global_batch)
        label = f"{config.data.train_split} of {', '.join(each.place for each in sets)}"
        self.damage = DamageLog(len(self._reader), config.data.max_damaged, label)

    def load_state(self, state: StreamState) -> None:
        """Go on exactly behind the clips that the state counts, whatever the ranks, batches and workers were.

        Raises:
            ValueError: it is of other clips, shares or settings.
        """
        here = self._state_at(state.position)
        if state != here:
            told = {"clips, shards or shares": "fingerprint", "seed": "seed", "data.shuffle_window": "window"}
            other = [name for name, key in told.items() if getattr(state, key) != getattr(here, key)]
            raise ValueError(
                f"the run was in the middle of other data ({', '.join(other)} differ): their order would be another. "
                "Continue with the shards and settings it began with, or start a new run with train.init_from"
            )
        self._state = state

    def recall(self, folder: Path) -> None:
        """Count clips on that the run had found damaged before it was resumed, as far as they still are; collective."""
        still: list[Damage] = []
        if world.is_main():
            for clip in reported_clips(folder, self._config.data.train_split):
                try:
                    self._reader.sample(clip)
                except DamagedClipError as error:
                    still.append(error.damage)
                if len(still) > self.damage.allowed:
                    break
            self._reader.close()
        self.damage.add(world.broadcast_object(still))
        self.damage.check()

    def state(self, steps_done: int) -> StreamState:
        """Where the run is after so many steps."""
        return self._state.advanced((steps_done - self._first_step) * self._config.train.global_batch)

    def __iter__(self) -> Iterator[list[Any]]:
        config = self._config
        plan = StepPlan(
            start=self._state.position,
            num_steps=config.train.max_steps - self._first_step,
            global_batch=config.train.global_batch,
            accumulation=config.engine.grad_accumulation,
            rank=world.rank(),
            world_size=world.world_size(),
        )
        stream = TrainStream(
            self._reader,
            plan,
            seed=config.seed,
            window=config.data.shuffle_window,
            weights=self._weights,
            collate=self._collate,
            most_tried=_most_tried(self.damage),
        )
        loaded = AgreedBatches(stream, config.data.workers, self.damage)
        for _ in range(plan.num_steps):
            yield [next(loaded).batch for _ in range(plan.accumulation)]

    def _state_at(self, position: int) -> StreamState:
        return stream_state(self._reader, position, self._config.seed, self._config.data.shuffle_window, self._weights)


class EvalBatches:
    """Batches `(batch, positions)` of one split; every rank gets the same number, position -1 marks what only fills a
    batch or stands where a clip is damaged."""

    def __init__(self, stream: EvalStream[Any], workers: int, damage: DamageLog) -> None:
        self._stream, self._workers, self.damage = stream, workers, damage

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        loaded = AgreedBatches(self._stream, self._workers, self.damage)
        for _ in range(len(self)):
            batch, positions, _ = next(loaded)
            yield batch, positions
        if len(self.damage) and world.is_main():
            tqdm.write(f"{self.damage.summary()}: left out", file=sys.stderr)

    def counted(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics, and how many clips were left out of them if any were."""
        return metrics | ({"damaged_clips": float(len(self.damage))} if len(self.damage) else {})


def eval_loader(
    config: Config,
    split: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    audio: AudioSource = "real",
) -> EvalBatches:
    """Batches of one split of data.shards."""
    index = ShardIndex.load(config.data.shards)
    place = (rank, world_size)
    return eval_batches(config.data, index, split, batch_size, _collate(config, index), place=place, audio=audio)


def eval_batches(
    data: DataConfig,
    index: ShardIndex,
    split: str,
    batch_size: int,
    collate_batch: Callable[[list[Any]], Any],
    *,
    place: tuple[int, int] = (0, 1),
    audio: AudioSource = "real",
    workers: int | None = None,
) -> EvalBatches:
    """Batches of one split made by `collate_batch`.

    Args:
        place: Rank and world size.
        workers: Loading processes; as data.workers says where None.
    """
    reader = clip_reader(data, [index], split, audio)
    rank, world_size = place
    damage = DamageLog(len(reader), data.max_damaged, f"{split} of {index.place}")
    stream = EvalStream(
        reader,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        collate=collate_batch,
        most_tried=_most_tried(damage),
    )
    return EvalBatches(stream, data.workers if workers is None else workers, damage)


def clip_reader(data: DataConfig, sets: Sequence[ShardIndex], split: str, audio: AudioSource = "real") -> ClipReader:
    """Reader of one split, with a cache where shards come from a URL."""
    cache = None
    if any(index.is_remote for index in sets):
        from avs_dist.shards.shard_cache import ShardCache  # not loaded where all shards are local

        cache = ShardCache(data.cache_dir, int(data.cache_gb * 1e9))
    return ClipReader(sets, split, audio, video_deadline_s=data.video_deadline_s, cache=cache)


def _most_tried(damage: DamageLog) -> int:
    """So many clips in the place of one that the bound is exceeded where none can be read."""
    return min(MOST_TRIED, damage.allowed + 1)


def _warn_of_small_cache(data: DataConfig, sets: Sequence[ShardIndex]) -> None:
    """Tell where shards from a URL would leave the cache before the clips that are mixed with theirs have been read."""
    shards = [shard for index in sets if index.is_remote for shard in index.split(data.train_split)]
    num_clips = sum(len(shard.clips) for shard in shards)
    window_gb = sum(shard.bytes for shard in shards) / 1e9 * min(1.0, data.shuffle_window / max(1, num_clips))
    if window_gb > data.cache_gb and world.is_main():
        tqdm.write(
            f"data.cache_gb={data.cache_gb:g}: the {data.shuffle_window} clips that are mixed at a time "
            f"(data.shuffle_window) take {window_gb:.2g} GB, so shards will be fetched again and again; raise it, or "
            "mix fewer clips",
            file=sys.stderr,
        )


def mixed_sets(data: DataConfig, index: ShardIndex) -> list[ShardIndex]:
    """The sets of shards that training draws from: those of data.mixture, or data.shards alone.

    Args:
        index: Of data.shards.

    Raises:
        ValueError: clips of one set cannot share a batch with those of data.shards.
    """
    if not data.mixture:
        return [index]
    sets = [index if place == data.shards else ShardIndex.load(place) for place in data.mixture]
    for each in sets:
        differ = [name for name, value in index.kind_of_clips.items() if each.kind_of_clips[name] != value]
        if differ:
            raise ValueError(
                f"data.mixture: {each.place} and data.shards={index.place} differ in {', '.join(differ)}; "
                "build them alike"
            )
    return sets


def _collate(config: Config, index: ShardIndex) -> Callable[[list[Any]], Any]:
    """Clips for systems of masks, sequences for codebooks."""
    if config.model.system != "unicode":
        return collate
    return sequence_collate(config.model.unicode, index)


def sequence_collate(config: UnicodeConfig, index: ShardIndex) -> Callable[[list[Any]], Any]:
    """Makes a Sequences batch of what the shards hold, as long as their longest clip or, with text, the longest prompt,
    so that no result depends on the other clips of a batch."""
    num_steps = max(index.clip_seconds, MAX_WORDS if "text" in config.modalities else 0)
    if config.inputs == "media":
        text = config.text_channels if "text" in config.modalities else None
        return partial(collate_media, num_steps=num_steps, text_channels=text)
    return partial(collate_features, shapes=config.shapes, num_steps=num_steps, num_events=len(index.events))

"""Data loaders: shard streams joined with the Clip collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset

from avs_dist import world
from avs_dist.clip import collate
from avs_dist.config import Config, UnicodeConfig
from avs_dist.sequences import collate_features, collate_media
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.pipeline import EvalStream, TrainStream
from avs_dist.shards.text import MAX_WORDS

AudioSource = Literal["real", "muted", "swapped"]


def train_batches(config: Config, index: ShardIndex, start_step: int) -> Iterator[list[Any]]:
    """The micro-batches of this rank, one list per optimiser step, from `start_step` to the end of the run."""
    stream = TrainStream(
        index,
        config.data.train_split,
        seed=config.seed,
        window=config.data.shuffle_window,
        global_batch=config.train.global_batch,
        grad_accumulation=config.engine.grad_accumulation,
        rank=world.rank(),
        world_size=world.world_size(),
        start_step=start_step,
        num_steps=config.train.max_steps - start_step,
        collate=_collate(config, index),
    )
    batches = iter(data_loader(stream, config.data.workers))
    for _ in range(start_step, config.train.max_steps):
        yield [next(batches) for _ in range(config.engine.grad_accumulation)]


def eval_loader(
    config: Config,
    split: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    audio: AudioSource = "real",
) -> DataLoader[Any]:
    """Batches `(clip, positions)` of one split; every rank gets the same number, position -1 marks padding."""
    index = ShardIndex.load(config.data.shards)
    stream = EvalStream(
        index,
        split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        collate=_collate(config, index),
        audio=audio,
    )
    return data_loader(stream, config.data.workers)


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


def data_loader(stream: IterableDataset[Any], workers: int) -> DataLoader[Any]:
    """Batches of a stream, decoded by so many processes; 0 decodes in this one."""
    # the stream is already split over ranks and workers and yields whole batches
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )

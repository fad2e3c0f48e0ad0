"""Data loaders: shard streams joined with the Clip collation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset

from avs_dist import world
from avs_dist.clip import Clip, collate
from avs_dist.config import Config
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.pipeline import EvalStream, TrainStream

AudioSource = Literal["real", "muted", "swapped"]


def train_batches(config: Config, index: ShardIndex, start_step: int) -> Iterator[list[Clip]]:
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
        collate=collate,
    )
    batches = iter(_loader(stream, config))
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
    stream = EvalStream(
        ShardIndex.load(config.data.shards),
        split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        collate=collate,
        audio=audio,
    )
    return _loader(stream, config)


def _loader(stream: IterableDataset[Any], config: Config) -> DataLoader[Any]:
    # the stream is already split over ranks and workers and yields whole batches
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=config.data.workers,
        prefetch_factor=2 if config.data.workers else None,
        multiprocessing_context="spawn" if config.data.workers else None,
    )

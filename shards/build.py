"""Building shards: jobs in order -> samples in parallel -> tar files one after the other -> index.json at the end.

A build can be killed at any time and started again. Each finished shard leaves a record (records.py). The order of the
jobs is fixed and a shard ends where its size says, so the next run goes on behind the last record and gives the same
bytes as a run without a break.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tqdm import tqdm

from avs_dist.shards.build_config import FEATURE_RULES, BuildConfig
from avs_dist.shards.clip_recipe import clip_recipe
from avs_dist.shards.feature_recipe import feature_recipe
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.pool import DecodePool
from avs_dist.shards.recipe import Recipe, relative
from avs_dist.shards.records import Records, empty_record, locked
from avs_dist.shards.schema import FeatureSample, Sample
from avs_dist.shards.sources import ClipJob, FeatureJob
from avs_dist.shards.workers import MediaWorker
from avs_dist.shards.write import ShardWriter


def build(config: BuildConfig, progress: bool = True) -> ShardIndex:
    """Build the shards of `config`, or finish a build that was interrupted.

    Raises:
        ValueError: If the folder holds another build (other settings, other clips), or one is running.
        RuntimeError: If more than `max_skipped` of the clips cannot be used.
    """
    with locked(config.out), DecodePool(config.workers, config.deadline_s) as pool:
        recipe = feature_recipe(config) if config.source in FEATURE_RULES else clip_recipe(config, pool)
        records = Records(config.out, recipe.settings, config.max_skipped)
        finished = records.finished_index()
        if finished is not None:
            return finished
        _write_shards(config, recipe, pool, records, progress)
        return records.finish()


@dataclass(frozen=True)
class _Made:
    """Result of one job: the sample and its tar segment, or the reason why there is none."""

    job: ClipJob | FeatureJob
    sample: Sample | FeatureSample | None = None
    segment: bytes = b""
    reason: str = ""


def _write_shards(config: BuildConfig, recipe: Recipe, pool: DecodePool, records: Records, progress: bool) -> None:
    """Walk the splits, behind the records of an earlier run."""

    def make(job: ClipJob | FeatureJob, worker: MediaWorker) -> _Made:
        try:
            return _Made(job, *recipe.make(job, worker))
        except (ValueError, OSError) as error:
            return _Made(job, reason=str(error))

    jobs = recipe.jobs
    with tqdm(total=len(jobs), desc="clips", unit="clip", disable=not progress) as bar:
        for split, group in groupby(jobs, key=lambda job: job.split):
            finished = records.take_up(split)
            rest = list(group)[sum(record["taken"] for record in finished) :]
            bar.update(sum(record["taken"] for record in finished))
            filled = _fill_shards(config, split, len(finished), _watched(pool.map(make, rest), bar))
            for number, record in enumerate(filled, start=len(finished)):
                records.add(split, number, record)
                records.check_skipped(len(jobs))
        records.check_skipped(len(jobs))


def _watched(results: Iterator[_Made], bar: tqdm) -> Iterator[_Made]:
    """Pass results on; the bar moves, and a clip that cannot be used is printed."""
    for made in results:
        if made.sample is None:
            bar.write(f"skipped {made.job.name} ({made.job.path}): {made.reason}", file=sys.stderr)
        bar.update()
        yield made


def _fill_shards(config: BuildConfig, split: str, first: int, results: Iterator[_Made]) -> Iterator[dict[str, Any]]:
    """Fill shard after shard; the record of each: jobs taken, what it holds, what was skipped."""
    number, writer, record = first, None, empty_record()
    try:
        for made in results:
            record["taken"] += 1
            if made.sample is None:
                path = relative(made.job.path, config.root)
                clip = {"name": made.job.name, "split": split, "path": path, "reason": made.reason}
                record["skipped"].append(clip)
                continue
            writer = writer or ShardWriter(config.out, split, number)
            writer.add(made.sample, made.segment)
            if writer.bytes >= config.shard_mb * 1e6:
                record["shard"] = writer.close().to_dict()
                yield record
                number, writer, record = number + 1, None, empty_record()
        if record["taken"]:
            record["shard"] = writer.close().to_dict() if writer else None
            writer = None
            yield record
    finally:
        if writer is not None:
            writer.abort()

"""Building shards: jobs in order -> samples in parallel -> tar files one after the other -> index.json at the end.

A build can be killed at any time and started again. Each finished shard leaves a record in `.build/`: how many jobs it
took, what it holds, what was skipped. The order of the jobs is fixed and a shard ends where its size says, so the next
run goes on behind the last record and gives the same bytes as a run without a break.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from avs_dist.shards.build_config import FEATURE_RULES, BuildConfig
from avs_dist.shards.clip_recipe import clip_recipe
from avs_dist.shards.feature_recipe import feature_recipe
from avs_dist.shards.index import ShardEntry, ShardIndex, write_json
from avs_dist.shards.pool import DecodePool
from avs_dist.shards.recipe import Recipe, relative
from avs_dist.shards.schema import INDEX_FILE, FeatureSample, Sample
from avs_dist.shards.sources import ClipJob, FeatureJob
from avs_dist.shards.workers import MediaWorker
from avs_dist.shards.write import ShardWriter

_RECORDS = ".build"


def build(config: BuildConfig, progress: bool = True) -> ShardIndex:
    """Build the shards of `config`, or finish a build that was interrupted.

    Raises:
        ValueError: If the folder holds another build (other settings, other clips), or one is running.
        RuntimeError: If more than `max_skipped` of the clips cannot be used.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    records = config.out / _RECORDS
    with _locked(config.out), DecodePool(config.workers, config.deadline_s) as pool:
        recipe = feature_recipe(config) if config.source in FEATURE_RULES else clip_recipe(config, pool)
        settings = recipe.settings
        if (config.out / INDEX_FILE).exists():
            _check_settings(ShardIndex.load(config.out).settings, settings, config.out)
            shutil.rmtree(records, ignore_errors=True)
            return ShardIndex.load(config.out)
        _prepare(config.out, records, settings)
        shards, skipped = _write_shards(config, recipe, pool, records, progress)
        if not shards:
            raise RuntimeError(f"no usable clip: {_reasons(skipped)}")
        index = ShardIndex(config.out, settings, tuple(shards), tuple(skipped))
        index.save()
    shutil.rmtree(records)
    return index


@dataclass(frozen=True)
class _Made:
    """Result of one job: the sample and its tar segment, or the reason why there is none."""

    job: ClipJob | FeatureJob
    sample: Sample | FeatureSample | None = None
    segment: bytes = b""
    reason: str = ""


def _write_shards(
    config: BuildConfig, recipe: Recipe, pool: DecodePool, records: Path, progress: bool
) -> tuple[list[ShardEntry], list[dict[str, str]]]:
    """Walk the splits, behind the records of an earlier run; shards and skipped clips of all of them."""

    def make(job: ClipJob | FeatureJob, worker: MediaWorker) -> _Made:
        try:
            return _Made(job, *recipe.make(job, worker))
        except (ValueError, OSError) as error:
            return _Made(job, reason=str(error))

    jobs = recipe.jobs
    done: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="clips", unit="clip", disable=not progress) as bar:
        for split, group in groupby(jobs, key=lambda job: job.split):
            finished = _finished(config.out, records, split)
            done += finished
            rest = list(group)[sum(record["taken"] for record in finished) :]
            bar.update(sum(record["taken"] for record in finished))
            filled = _fill_shards(config, split, len(finished), _watched(pool.map(make, rest), bar))
            for number, record in enumerate(filled, start=len(finished)):
                write_json(_record_path(records, split, number), record)
                done.append(record)
                _check_skipped(config, done, len(jobs))
        _check_skipped(config, done, len(jobs))
    shards = [ShardEntry.from_dict(record["shard"]) for record in done if record["shard"]]
    return shards, [clip for record in done for clip in record["skipped"]]


def _watched(results: Iterator[_Made], bar: tqdm) -> Iterator[_Made]:
    """Pass results on; the bar moves, and a clip that cannot be used is printed."""
    for made in results:
        if made.sample is None:
            bar.write(f"skipped {made.job.name} ({made.job.path}): {made.reason}", file=sys.stderr)
        bar.update()
        yield made


def _fill_shards(config: BuildConfig, split: str, first: int, results: Iterator[_Made]) -> Iterator[dict[str, Any]]:
    """Fill shard after shard; the record of each: jobs taken, what it holds, what was skipped."""
    number, writer, record = first, None, _empty_record()
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
                number, writer, record = number + 1, None, _empty_record()
        if record["taken"]:
            record["shard"] = writer.close().to_dict() if writer else None
            writer = None
            yield record
    finally:
        if writer is not None:
            writer.abort()


def _empty_record() -> dict[str, Any]:
    return {"taken": 0, "shard": None, "skipped": []}


def _record_path(records: Path, split: str, number: int) -> Path:
    return records / f"{split}-{number:05d}.json"


def _finished(out: Path, records: Path, split: str) -> list[dict[str, Any]]:
    """Records of the shards of a split that an earlier run finished, up to the first that is missing."""
    finished: list[dict[str, Any]] = []
    while (path := _record_path(records, split, len(finished))).exists():
        record = json.loads(path.read_bytes())
        shard = record["shard"]
        if shard and not ((out / shard["name"]).is_file() and (out / shard["name"]).stat().st_size == shard["bytes"]):
            break
        finished.append(record)
    return finished


def _check_skipped(config: BuildConfig, done: Sequence[dict[str, Any]], total: int) -> None:
    skipped = [clip for record in done for clip in record["skipped"]]
    if len(skipped) > config.max_skipped * total:
        raise RuntimeError(
            f"{len(skipped)} of {total} clips cannot be used, --max-skipped allows {config.max_skipped:.2%}. "
            f"First reasons: {_reasons(skipped)}. Mend the files and build into an empty folder, or run again "
            "with a higher --max-skipped"
        )


def _reasons(skipped: Sequence[dict[str, str]]) -> str:
    return "; ".join(f"{clip['name']}: {clip['reason']}" for clip in skipped[:5])


def _check_settings(theirs: dict[str, Any], ours: dict[str, Any], out: Path) -> None:
    different = [f"{k} (there {theirs.get(k)!r}, now {ours.get(k)!r})" for k in ours if theirs.get(k) != ours.get(k)]
    if different:
        raise ValueError(f"{out} holds a build with other settings: {', '.join(different)}; use another --out")


def _prepare(out: Path, records: Path, settings: dict[str, Any]) -> None:
    """Start the records of a new build, or check that the interrupted one is the same."""
    path = records / "settings.json"
    if path.exists():
        _check_settings(json.loads(path.read_bytes()), settings, out)
    else:
        foreign = sorted(p.name for p in out.iterdir() if p.suffix == ".tar")
        if foreign:
            raise ValueError(f"{out} holds tar files of something else ({foreign[0]}); use another --out")
        records.mkdir(exist_ok=True)
        write_json(path, settings)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build at a time in a folder; the lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build is writing into {out}") from None
        yield

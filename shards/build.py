"""Building shards: jobs in order -> samples in parallel -> tar files one after the other -> index.json at the end.

A build can be killed at any time and started again. Each finished shard leaves a record in `.build/`: how many jobs it
took, what it holds, what was skipped. The order of the jobs is fixed and a shard ends where its size says, so the next
run goes on behind the last record and gives the same bytes as a run without a break.
"""

from __future__ import annotations

import fcntl
import hashlib
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

from avs_dist.shards.index import ShardEntry, ShardIndex, write_json
from avs_dist.shards.make import make_sample
from avs_dist.shards.members import FRAME_FORMATS, encode_clip
from avs_dist.shards.pool import DecodePool
from avs_dist.shards.schema import INDEX_FILE, SCHEMA_VERSION, Sample
from avs_dist.shards.sources import ClipJob, avsbench, avss, videos
from avs_dist.shards.workers import ClipError, MediaWorker, VideoFacts
from avs_dist.shards.write import ShardWriter

_FRAME_RULE = "one frame a second, the one at 15/16 of it (AVSBench)"
SOURCE_RULES = {
    "avsbench-s4": f"AVSBench S4 folders; {_FRAME_RULE}; first mask only in train",
    "avsbench-ms3": f"AVSBench MS3 folders; {_FRAME_RULE}; all masks",
    "avss": "AVSBench-semantic folders; published frames, squashed in val and test, cropped to the middle in train; "
    "classes by colour; first mask only in train of v1s",
    "videos": f"consecutive windows of media files; {_FRAME_RULE}; no masks; split test",
}
SOURCES = tuple(SOURCE_RULES)
_LONGEST_S = {"avss": 10}
_RECORDS = ".build"


@dataclass(frozen=True)
class BuildConfig:
    """Settings of a build; see `avs-dist shards build --help`."""

    source: str
    root: Path
    out: Path
    size: int = 224
    workers: int = 1
    shard_mb: float = 128.0
    max_skipped: float = 0.01
    deadline_s: float = 60.0
    frames: str = "png"
    decode_video: bool = False
    clip_s: int | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source '{self.source}'; known: {', '.join(SOURCES)}")
        if self.frames not in FRAME_FORMATS:
            raise ValueError(f"unknown frame format '{self.frames}'; known: {', '.join(FRAME_FORMATS)}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"--root {self.root} is not a folder")
        if self.size < 1 or self.longest_s < 1 or self.shard_mb <= 0 or self.deadline_s <= 0:
            raise ValueError("--size, --clip-s, --shard-mb and --deadline-s must be positive")
        if not 0.0 <= self.max_skipped <= 1.0:
            raise ValueError(f"--max-skipped is a fraction from 0 to 1, got {self.max_skipped:g}")

    @property
    def longest_s(self) -> int:
        """Longest clip in seconds: `clip_s`, or what suits the source."""
        return _LONGEST_S.get(self.source, 5) if self.clip_s is None else self.clip_s


def build(config: BuildConfig, progress: bool = True) -> ShardIndex:
    """Build the shards of `config`, or finish a build that was interrupted.

    Raises:
        ValueError: If the folder holds another build (other settings, other clips), or one is running.
        RuntimeError: If more than `max_skipped` of the clips cannot be used.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    records = config.out / _RECORDS
    with _locked(config.out), DecodePool(config.workers, config.deadline_s) as pool:
        jobs = list_jobs(config, pool)
        settings = _settings(config, jobs)
        if (config.out / INDEX_FILE).exists():
            _check_settings(ShardIndex.load(config.out).settings, settings, config.out)
            shutil.rmtree(records, ignore_errors=True)
            return ShardIndex.load(config.out)
        _prepare(config.out, records, settings)
        shards, skipped = _write_shards(config, jobs, pool, records, progress)
        if not shards:
            raise RuntimeError(f"no usable clip: {_reasons(skipped)}")
        index = ShardIndex(config.out, settings, tuple(shards), tuple(skipped))
        index.save()
    shutil.rmtree(records)
    return index


def list_jobs(config: BuildConfig, pool: DecodePool) -> list[ClipJob]:
    """The clips of the source in the order of the shards."""
    if config.source == "videos":
        return videos.list_clips(config.root, config.longest_s, lambda paths: list(pool.map(_probe, paths)))
    if config.source == "avss":
        return avss.list_clips(config.root, config.longest_s)
    layout = avsbench.S4 if config.source == "avsbench-s4" else avsbench.MS3
    return avsbench.list_clips(layout, config.root, config.longest_s, config.decode_video)


def _probe(path: Path, worker: MediaWorker) -> VideoFacts | str:
    try:
        return worker.probe(path)
    except ClipError as error:
        return str(error)


@dataclass(frozen=True)
class _Made:
    """Result of one job: the sample and its tar segment, or the reason why there is none."""

    job: ClipJob
    sample: Sample | None = None
    segment: bytes = b""
    reason: str = ""


def _write_shards(
    config: BuildConfig, jobs: Sequence[ClipJob], pool: DecodePool, records: Path, progress: bool
) -> tuple[list[ShardEntry], list[dict[str, str]]]:
    """Walk the splits, behind the records of an earlier run; shards and skipped clips of all of them."""

    def make(job: ClipJob, worker: MediaWorker) -> _Made:
        try:
            sample = make_sample(job, worker, config.size)
            return _Made(job, sample, encode_clip(sample, config.frames))
        except (ValueError, OSError) as error:
            return _Made(job, reason=str(error))

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
                path = _relative(made.job.path, config.root)
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


def _settings(config: BuildConfig, jobs: Sequence[ClipJob]) -> dict[str, Any]:
    """What decides the bytes of the shards (not: workers, deadline, the place of the folders)."""
    listing = "\n".join(
        f"{j.split}\t{j.name}\t{j.start_s}\t{_relative(j.path, config.root)}\t{_size(j.path)}" for j in jobs
    )
    classes = {"classes": list(avss.read_classes(config.root))} if config.source == "avss" else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "source": config.source,
        "source_rule": SOURCE_RULES[config.source],
        "image_size": config.size,
        "frame_format": config.frames,
        "decode_video": config.decode_video,
        "clip_seconds": config.longest_s,
        "shard_mb": config.shard_mb,
        "clips": len(jobs),
        "clips_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        **classes,
    }


def _size(path: Path) -> int:
    """Bytes of a media file, so that other contents under the same name are noticed; 0 for a folder of pictures."""
    return path.stat().st_size if path.is_file() else 0


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


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

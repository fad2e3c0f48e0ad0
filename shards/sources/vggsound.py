"""VGGSound as published: one csv, and the videos of it that could still be fetched."""

from __future__ import annotations

import os
from pathlib import Path

from avs_dist.shards.sources import SPLITS, ClipJob
from avs_dist.shards.sources.media_files import files_below
from avs_dist.shards.sources.metadata import NAME_BYTES, check_file_name, check_split, read_table
from avs_dist.shards.sources.videos import SUFFIXES

METADATA = "vggsound.csv"
SECONDS = 10
# what a name of a file has behind the id: _30000_40000.mpeg
_ENDING_BYTES = 24


def list_clips(root: Path, clip_s: int) -> list[ClipJob]:
    """Every clip of vggsound.csv, named `{id}_{start:06d}`, train first; one without a file has no `video`.

    The csv has no header: id, start in seconds, label, split (train or test). The videos are cut to the clips; they lie
    anywhere in the root, down to the third folder below it, and are called by the clip's name, `{id}_{start}` or
    `{id}_{1000 start}_{1000 (start + 10)}`.

    Args:
        root: Folder with the csv and the videos.
        clip_s: Longest clip in seconds.

    Raises:
        FileNotFoundError: If there is no csv.
        ValueError: If it cannot be understood, or lists a clip twice.
    """
    table = root / METADATA
    if not table.is_file():
        raise FileNotFoundError(f"--root {root}: no {METADATA} in it")
    videos: dict[str, Path] = {}
    for path in files_below(root, SUFFIXES).values():
        videos.setdefault(path.stem, path)
    jobs: dict[str, ClipJob] = {}
    for line in read_table(table):
        job = _job(line, table, videos, clip_s)
        if job.name in jobs:
            raise ValueError(f"{table}: clip {job.name} is listed twice")
        jobs[job.name] = job
    return sorted(jobs.values(), key=lambda job: SPLITS.index(job.split))


def _job(line: list[str], table: Path, videos: dict[str, Path], clip_s: int) -> ClipJob:
    if len(line) != 4 or not line[1].isdecimal() or not line[2]:
        raise ValueError(f"{table}: line {','.join(line)!r:.300}: expected id, whole start in seconds, label, split")
    video_id, start, label, split = line[0], int(line[1]), line[2], line[3]
    check_file_name(video_id, table, line, NAME_BYTES - _ENDING_BYTES)
    name = f"{video_id}_{start:06d}"
    forms = (name, f"{video_id}_{start}", f"{video_id}_{1000 * start}_{1000 * (start + SECONDS)}")
    video = next((videos[form] for form in forms if form in videos), None)
    file = {"file": os.path.relpath(video, table.parent)} if video else {}
    return ClipJob(
        name=name,
        split=check_split(split, table, name),
        path=video or table.parent / f"{name}.mp4",
        video=video,
        sound=video,
        seconds=clip_s,
        meta={"category": label, **file},
        problem=None if video else f"no file {name}.mp4",
    )

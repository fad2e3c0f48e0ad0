"""AVVP (LLP) as published with its features: a tab-separated list of events for each modality, zips of features."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from avs_dist.shards.sources import SPLITS, FeatureArrays, FeatureJob, FeatureSource
from avs_dist.shards.sources.metadata import NAMES_FILE, check_file_name, check_split, read_names, read_records
from avs_dist.shards.sources.zips import read_features, zip_folders

LISTS = {
    "visual": "AVVP_eval_visual_checked_combined.csv",
    "audio": "AVVP_eval_audio_checked_combined.csv",
}
# files of a clip are named by its video alone, the beginning of its filename
_ID_LENGTH = 11
# event, onset and offset in seconds
Interval = tuple[str, float, float]


def list_clips(root: Path, seconds: int) -> FeatureSource:
    """Every clip of the two lists; one that only one of them has is labelled in that modality alone.

    The lists have the columns filename, event_labels, onset, offset, the last three with commas between the events of
    a clip (s; a second counts when the event touches it), and maybe split, by default test. Events are named and
    ordered by `classes.txt`, one a line, or are those of the lists in alphabetical order.

    Args:
        root: Folder with the lists and, below `feature/` or not, video and audio with a zip for each video id.
        seconds: Longest clip.

    Raises:
        FileNotFoundError: If a list or a folder is not there.
        ValueError: If the lists cannot be understood.
    """
    tables = tuple(root / name for name in LISTS.values())
    for path in tables:
        if not path.is_file():
            raise FileNotFoundError(f"--root {root}: no {path.name}")
    folders = zip_folders(root, required=("visual", "audio"))
    lists = {modality: _read_list(path) for modality, path in zip(LISTS, tables, strict=True)}
    happening = (event for clips in lists.values() for intervals in clips.values() for event, _, _ in intervals)
    found = tuple(sorted(set(happening)))
    events = read_names(root, found)
    if set(found) - set(events):
        raise ValueError(f"{root}: {NAMES_FILE} lacks {', '.join(sorted(set(found) - set(events))[:5])}")
    jobs = []
    for split, name in dict.fromkeys(clip for clips in lists.values() for clip in clips):
        files = {modality: folder / f"{name[:_ID_LENGTH]}.zip" for modality, folder in folders.items()}
        intervals = {modality: clips[split, name] for modality, clips in lists.items() if (split, name) in clips}
        jobs.append(FeatureJob(name, split, tuple(files.values()), partial(_read, files, intervals, events, seconds)))
    names = (root / NAMES_FILE,) if (root / NAMES_FILE).is_file() else ()
    return FeatureSource(events, sorted(jobs, key=lambda job: SPLITS.index(job.split)), (*tables, *names))


def _read_list(path: Path) -> dict[tuple[str, str], list[Interval]]:
    """Events of each clip, by split and name; a clip on several lines has the events of all."""
    clips: dict[tuple[str, str], list[Interval]] = {}
    for cells in read_records(path, ("filename", "event_labels", "onset", "offset"), delimiter="\t"):
        name = cells["filename"]
        check_file_name(name, path, list(cells.values()))
        split = check_split(cells.get("split", "test"), path, name)
        clips.setdefault((split, name), []).extend(_intervals(cells, path))
    return clips


def _intervals(cells: dict[str, str], path: Path) -> list[Interval]:
    events, onsets, offsets = (
        [text.strip() for text in cells[column].split(",") if text.strip()]
        for column in ("event_labels", "onset", "offset")
    )
    try:
        pairs = [(float(onset), float(offset)) for onset, offset in zip(onsets, offsets, strict=True)]
        intervals = [(event, *pair) for event, pair in zip(events, pairs, strict=True)]
    except ValueError as error:
        raise ValueError(f"{path}: clip {cells['filename']}: as many numbers as events: {error}") from error
    if not all(0 <= onset < offset < math.inf for onset, offset in pairs):
        raise ValueError(f"{path}: clip {cells['filename']}: expected 0 <= onset < offset, got {pairs}")
    return intervals


def _read(
    files: dict[str, Path], intervals: dict[str, list[Interval]], events: tuple[str, ...], seconds: int
) -> FeatureArrays:
    features = {modality: read_features(path, modality)[:seconds] for modality, path in files.items()}
    labels = {}
    for modality, happening in intervals.items():
        labels[modality] = np.zeros((len(features[modality]), len(events)), dtype=np.uint8)
        for event, onset, offset in happening:
            labels[modality][math.floor(onset) : math.ceil(offset), events.index(event)] = 1
    return features, labels

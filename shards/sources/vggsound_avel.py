"""VGGSound-AVEL as published with its features: a csv, and for each video three zips (video, audio, label)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from avs_dist.shards.plain_pickle import read_zip_array
from avs_dist.shards.sources import SPLITS, FeatureArrays, FeatureJob, FeatureSource
from avs_dist.shards.sources.metadata import only_file, read_categories, read_prompts
from avs_dist.shards.sources.zips import fitted, read_features, zip_folder, zip_folders

METADATA = "vggsound-avel*.csv"
PROMPTS = "vggsoundCategories2Prompts.csv"
SECONDS = 10


def list_clips(root: Path, seconds: int) -> FeatureSource:
    """Every clip of the csv, train first.

    The csv has the columns category, video_id, split, or category, id (with the ending .mp4) and maybe split, by
    default train. Events are the categories in alphabetical order. With a list of prompts every clip has one.

    Args:
        root: Folder with the csv files and, below `feature/` or not, video, audio and label.
        seconds: Longest clip; clips have 10 s.

    Raises:
        FileNotFoundError: If the csv or a folder is not there.
        ValueError: If the csv files cannot be understood, or a category has no prompt.
    """
    table = only_file(root, METADATA)
    folders = zip_folders(root, required=("visual", "audio"))
    labels = zip_folder(root, "label")
    if labels is None:
        raise FileNotFoundError(f"--root {root}: no folder with zips of labels (feature/label/zip or label)")
    rows = read_categories(table, default_split="train")
    events = tuple(sorted({category for category, _ in rows.values()}))
    prompt_file = root / PROMPTS if (root / PROMPTS).is_file() else None
    prompts = read_prompts(prompt_file, events) if prompt_file else {}
    jobs = []
    for name, (category, split) in rows.items():
        files = tuple(folder / f"{name}.zip" for folder in (folders["visual"], folders["audio"], labels))
        read = partial(_read, files, events.index(category), len(events), min(seconds, SECONDS))
        meta = {"category": category} | ({"prompt": prompts[category]} if prompts else {})
        jobs.append(FeatureJob(name, split, files, read, meta))
    tables = (table, prompt_file) if prompt_file else (table,)
    return FeatureSource(events, sorted(jobs, key=lambda job: SPLITS.index(job.split)), tables)


def _read(files: tuple[Path, ...], event: int, num_events: int, seconds: int) -> FeatureArrays:
    """One clip; what is seen and what is heard have the same labels."""
    visual, audio, label = files
    marks_T = read_zip_array(label).reshape(-1)[:seconds]
    if len(marks_T) < seconds or not np.isin(marks_T, (0, 1)).all():
        raise ValueError(f"{label}: expected 0 or 1 for each of {seconds} s, got {marks_T.shape} {marks_T[:10]}")
    visual_THWC = read_features(visual, "visual")[:seconds]
    if len(visual_THWC) < seconds:
        raise ValueError(f"{visual}: {len(visual_THWC)} s, expected {seconds}")
    labels_TK = np.zeros((seconds, num_events), dtype=np.uint8)
    labels_TK[:, event] = marks_T
    audio_TC = fitted(read_features(audio, "audio"), seconds)
    return {"visual": visual_THWC, "audio": audio_TC}, {"visual": labels_TK, "audio": labels_TK}

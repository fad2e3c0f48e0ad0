"""Features listed by category, as the UCF-101 and VGGSound subsets come: one csv, zips of one or both modalities."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from avs_dist.shards.sources import SPLITS, FeatureArrays, FeatureJob, FeatureSource
from avs_dist.shards.sources.metadata import only_file, read_categories
from avs_dist.shards.sources.zips import read_features, zip_folders


def list_clips(root: Path, seconds: int) -> FeatureSource:
    """Every clip of the only csv in the folder (category, video_id and maybe split, by default test), train first.

    Events are the categories in alphabetical order; a clip's own is the label of all its seconds.

    Args:
        root: Folder with the csv and, below `feature/` or not, video and audio or one of them; every clip needs a zip
            in each folder that is there.
        seconds: Longest clip.

    Raises:
        FileNotFoundError: If the csv or both folders are not there.
        ValueError: If the csv cannot be understood.
    """
    table = only_file(root, "*.csv")
    folders = zip_folders(root)
    rows = read_categories(table, default_split="test")
    events = tuple(sorted({category for category, _ in rows.values()}))
    jobs = []
    for name, (category, split) in rows.items():
        files = {modality: folder / f"{name}.zip" for modality, folder in folders.items()}
        read = partial(_read, files, events.index(category), len(events), seconds)
        jobs.append(FeatureJob(name, split, tuple(files.values()), read, {"category": category}))
    return FeatureSource(events, sorted(jobs, key=lambda job: SPLITS.index(job.split)), (table,))


def _read(files: dict[str, Path], event: int, num_events: int, seconds: int) -> FeatureArrays:
    features = {modality: read_features(path, modality)[:seconds] for modality, path in files.items()}
    labels = {}
    for modality, array in features.items():
        labels[modality] = np.zeros((len(array), num_events), dtype=np.uint8)
        labels[modality][:, event] = 1
    return features, labels

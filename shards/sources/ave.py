"""AVE as published with its features: one HDF5 file for each modality, rows in one order, lists of rows by split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from avs_dist.shards.schema import FEATURE_NDIM, MAX_CLIP_BYTES, MAX_MEMBER_BYTES
from avs_dist.shards.sources import SPLITS, FeatureArrays, FeatureJob, FeatureSource
from avs_dist.shards.sources.metadata import NAMES_FILE, read_names

DATA_KEY, ORDER_KEY = "avadataset", "order"
FILES = {"visual": "visual_feature.h5", "audio": "audio_feature.h5"}
LABELS = "labels.h5"


def list_clips(root: Path, seconds: int) -> FeatureSource:
    """Every row of the lists `{train,val,test}_order.h5`, named by its number.

    Labels [N,T,K+1] have the background in their last column. Events are named by `classes.txt`, one a line, or
    event0, event1, ...

    Args:
        root: Folder with the h5 files.
        seconds: Longest clip; clips have 10 s.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If one is damaged, or they do not fit together.
    """
    files = tuple(root / name for name in FILES.values())
    for path in (*files, root / LABELS):
        if not path.is_file():
            raise FileNotFoundError(f"--root {root}: no {path.name}")
    labels_NTK = _read_labels(root / LABELS)[:, :seconds]
    for modality, path in zip(FILES, files, strict=True):
        _check_rows(path, modality, labels_NTK)
    events = read_names(root, tuple(f"event{k}" for k in range(labels_NTK.shape[2])))
    if len(events) != labels_NTK.shape[2]:
        raise ValueError(f"{root}: {NAMES_FILE} names {len(events)} events, {LABELS} has {labels_NTK.shape[2]}")
    orders = [root / f"{split}_order.h5" for split in SPLITS]
    jobs = []
    for split, path in zip(SPLITS, orders, strict=True):
        for row in _read_order(path, len(labels_NTK)):
            totals_K = labels_NTK[row].sum(axis=0)
            meta = {"category": events[int(totals_K.argmax())]} if totals_K.any() else {}
            read = partial(_read, files, row, labels_NTK[row])
            jobs.append(FeatureJob(f"ave_{row:06d}", split, files, read, meta))
    names = root / NAMES_FILE
    tables = (root / LABELS, *orders, *([names] if names.is_file() else []))
    return FeatureSource(events, jobs, tables)


def _read(files: tuple[Path, ...], row: int, labels_TK: np.ndarray) -> FeatureArrays:
    """One clip; what is seen and what is heard have the same labels."""
    features = {}
    for modality, path in zip(FILES, files, strict=True):
        with _dataset(path, DATA_KEY) as data:
            features[modality] = data[row, : len(labels_TK)]
    return features, dict.fromkeys(FILES, labels_TK)


def _read_labels(path: Path) -> np.ndarray:
    """uint8 [N,T,K], without the background."""
    with _dataset(path, DATA_KEY) as data:
        if data.ndim != 3 or data.shape[2] < 2:
            raise ValueError(f"labels are {data.shape}, expected [clips, seconds, events + 1]")
        labels = _whole(data)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{path}: expected labels 0 and 1")
    return labels[..., :-1].astype(np.uint8)


def _read_order(path: Path, num_rows: int) -> list[int]:
    """Rows of a split, each once."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name}")
    with _dataset(path, ORDER_KEY) as data:
        rows = _whole(data).reshape(-1).tolist()
    if len(set(rows)) != len(rows) or not all(row in range(num_rows) for row in rows):
        raise ValueError(f"{path}: expected row numbers from 0 to {num_rows - 1}, each once")
    return [int(row) for row in rows]


def _check_rows(path: Path, modality: str, labels_NTK: np.ndarray) -> None:
    with _dataset(path, DATA_KEY) as data:
        rows, seconds = labels_NTK.shape[:2]
        if data.ndim != FEATURE_NDIM[modality] + 1 or len(data) != rows or data.shape[1] < seconds:
            raise ValueError(f"{modality} features are {data.shape}, labels {labels_NTK.shape}")
        if data.nbytes // max(1, rows) > MAX_MEMBER_BYTES:
            raise ValueError(f"a clip has {data.nbytes // rows} bytes, the limit is {MAX_MEMBER_BYTES}")


def _whole(data: h5py.Dataset) -> np.ndarray:
    if data.nbytes > MAX_CLIP_BYTES:
        raise ValueError(f"{data.name} has {data.nbytes} bytes, the limit is {MAX_CLIP_BYTES}")
    return data[()]


@contextmanager
def _dataset(path: Path, key: str) -> Iterator[h5py.Dataset]:
    """A dataset of numbers that lies in the file itself.

    Raises:
        ValueError: If the file is damaged, or the dataset is something else or lies elsewhere.
    """
    try:
        with h5py.File(path, "r") as file:
            here = isinstance(file.get(key, getlink=True), h5py.HardLink)
            data = file[key] if here else None
            if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
                raise ValueError(f"no dataset '{key}' in it; it has: {', '.join(list(file)[:5])}")
            if data.dtype.kind not in "fiub":
                raise ValueError(f"'{key}' holds {data.dtype}, expected numbers")
            # a packed file of a few bytes can claim any size
            at_once = np.prod(data.chunks or (1,), dtype=float) * data.dtype.itemsize
            if at_once > MAX_CLIP_BYTES:
                raise ValueError(f"'{key}' is stored in chunks of {at_once:.3g} bytes, the limit is {MAX_CLIP_BYTES}")
            yield data
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error

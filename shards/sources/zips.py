"""Folders of feature files as published: one zip with one pickled array for each clip and modality."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avs_dist.shards.plain_pickle import read_zip_array
from avs_dist.shards.schema import FEATURE_NDIM

# names of the folders of a modality, the published one first
_FOLDERS = {"visual": ("video", "visual"), "audio": ("audio",), "label": ("label",)}


def zip_folder(root: Path, modality: str) -> Path | None:
    """`feature/NAME/zip`, `NAME/zip`, `feature/NAME` or `NAME` below the root, the first that is there.

    Args:
        modality: "visual" (NAME is video or visual), "audio" or "label".
    """
    places = ("feature/{}/zip", "{}/zip", "feature/{}", "{}")
    folders = (root / place.format(name) for place in places for name in _FOLDERS[modality])
    return next((folder for folder in folders if folder.is_dir()), None)


def zip_folders(root: Path, required: tuple[str, ...] = ()) -> dict[str, Path]:
    """Folders of the visual and the audio features.

    Raises:
        FileNotFoundError: If a required one is missing, or both.
    """
    found = {name: folder for name in ("visual", "audio") if (folder := zip_folder(root, name))}
    missing = [name for name in required if name not in found] if found else ["visual", "audio"]
    if missing:
        names = ", ".join(f"feature/{_FOLDERS[name][0]}/zip or {_FOLDERS[name][0]}" for name in missing)
        raise FileNotFoundError(f"--root {root}: no folder with zips of {' or '.join(missing)} features ({names})")
    return found


def read_features(path: Path, modality: str) -> np.ndarray:
    """Features of one clip, visual [T,h,w,C] or audio [T,C], of any numeric type.

    Raises:
        FileNotFoundError, ValueError: See `read_zip_array`, or if the array has another number of dimensions.
    """
    array = read_zip_array(path)
    if array.ndim != FEATURE_NDIM[modality] or not array.size:
        raise ValueError(f"{path}: {modality} features are {array.shape}, expected {FEATURE_NDIM[modality]} dimensions")
    return array


def fitted(features: np.ndarray, seconds: int) -> np.ndarray:
    """`seconds` rows: cut, or the last one repeated, as the published loaders do."""
    missing = max(0, seconds - len(features))
    return np.concatenate([features[:seconds], features[-1:].repeat(missing, axis=0)])

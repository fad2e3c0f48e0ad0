"""Small files of features in the public layouts, for the tests of the shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from avs_dist.shards.plain_pickle import write_zip_array

CATEGORIES = ("dog barking", "car, engine", "bell")


def visual_of(number: int, seconds: int = 10) -> np.ndarray:
    """float64 [T,2,2,3], other values for each number."""
    return np.random.default_rng([number, 0]).standard_normal((seconds, 2, 2, 3))


def audio_of(number: int, seconds: int = 10) -> np.ndarray:
    """float64 [T,4]."""
    return np.random.default_rng([number, 1]).standard_normal((seconds, 4))


def label_of(number: int) -> np.ndarray:
    """float64 [1,10]: the event begins at second `number` modulo 5 and lasts 4 s."""
    label_1T = np.zeros((1, 10))
    label_1T[0, number % 5 : number % 5 + 4] = 1
    return label_1T


def put(root: Path, folder: str, name: str, array: np.ndarray) -> None:
    """One zip of the public layout."""
    path = root / folder / f"{name}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_zip_array(path, array)


def split_of(number: int) -> str:
    return ("train", "train", "val", "test")[number % 4]


def write_avel(root: Path, clips: int = 8, place: str = "feature/{}/zip", prompts: bool = True) -> Path:
    """VGGSound-AVEL with clips v0, v1, ..., category by category in turn."""
    lines = ["category,video_id,split"]
    for number in range(clips):
        put(root, place.format("video"), f"v{number}", visual_of(number))
        put(root, place.format("audio"), f"v{number}", audio_of(number))
        put(root, place.format("label"), f"v{number}", label_of(number))
        lines.append(f'"{CATEGORIES[number % 3]}",v{number},{split_of(number)}')
    (root / "vggsound-avel40k.csv").write_text("\n".join(lines) + "\n")
    if prompts:
        rows = [f'"{category}",a {category.replace(",", "")} sounds' for category in CATEGORIES]
        (root / "vggsoundCategories2Prompts.csv").write_text("\n".join(["label,prompt", *rows]) + "\n")
    return root


def members_of(segment: bytes) -> dict[str, bytes]:
    """Members of the tar segment of one clip, by name without the key."""
    with tarfile.open(fileobj=io.BytesIO(segment)) as archive:
        return {m.name.split(".", 1)[1]: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]

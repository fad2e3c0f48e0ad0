"""The AVSBench-semantic folder as published (AVSS): `avs_released/`, clips of 5 and 10 s, classes by colour."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from avs_dist.shards.palette import MAX_CLASSES
from avs_dist.shards.sources import SPLITS, ClipJob
from avs_dist.shards.sources.metadata import check_file_name, check_split, read_records
from avs_dist.shards.sources.pictures import FRAME_ENDINGS, MASK_ENDINGS, find_pictures, first_number

FOLDER = "avs_released"
METADATA = "metadata.csv"
CLASS_FILE = "label2idx.json"
BACKGROUND = "background"
# seconds of a clip of each subset: v1s is S4, v1m is MS3, v2 is new
SUBSETS = {"v1s": 5, "v1m": 5, "v2": 10}


@dataclass(frozen=True)
class Row:
    """One line of the metadata; `uid` names the clip's folder, `subset` the folder around it."""

    uid: str
    subset: str
    split: str
    category: str


def list_clips(root: Path, clip_s: int) -> list[ClipJob]:
    """Every clip of the metadata file, train first; frames are jpg or png, and numbered from 0 or from 1.

    Args:
        root: The folder that holds avs_released, or that folder itself.
        clip_s: Longest clip in seconds; the rest of longer ones is left out.

    Raises:
        FileNotFoundError: If the metadata or the list of classes is not there.
        ValueError: If they cannot be understood.
    """
    base = data_folder(root)
    num_classes = len(read_classes(root))
    jobs = [_job(base / row.subset / row.uid, row, clip_s, num_classes) for row in read_metadata(base / METADATA)]
    return sorted(jobs, key=lambda job: SPLITS.index(job.split))


def read_classes(root: Path) -> tuple[str, ...]:
    """Names of the classes in the order of their indices, the background first.

    Raises:
        FileNotFoundError: If there is no label2idx.json.
        ValueError: If it is no JSON object, its indices are not 0, 1, 2, ..., or "background" is not the first.
    """
    path = data_folder(root) / CLASS_FILE
    try:
        indices = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    # type, not isinstance: true and 0.0 equal 1 and 0 but are no indices
    whole = isinstance(indices, dict) and all(type(index) is int for index in indices.values())
    if not whole or sorted(indices.values()) != list(range(len(indices))):
        raise ValueError(f"{path}: expected an object of class names with the indices 0, 1, 2, ..., each once")
    if not 2 <= len(indices) <= MAX_CLASSES:
        raise ValueError(f"{path}: expected 2 to {MAX_CLASSES} classes, the background among them, got {len(indices)}")
    if indices.get(BACKGROUND, 0) != 0:
        raise ValueError(f"{path}: expected the index 0 for '{BACKGROUND}', got {indices[BACKGROUND]}")
    return tuple(sorted(indices, key=indices.__getitem__))


def read_metadata(path: Path) -> list[Row]:
    """Rows of metadata.csv, whose header is vid,uid,s_min,s_sec,a_obj,split,label in any order.

    Raises:
        ValueError: If a column or every clip is missing, a split or subset is unknown, a clip is listed twice in a
            split, or a uid cannot name a folder.
    """
    columns = ("uid", "label", "split", "a_obj")
    rows: dict[tuple[str, str], Row] = {}
    for cells in read_records(path, columns):
        uid, subset, split, category = (cells[column] for column in columns)
        check_file_name(uid, path, list(cells.values()))
        check_split(split, path, uid)
        if subset not in SUBSETS:
            raise ValueError(f"{path}: clip {uid}: label '{subset}' is none of {', '.join(SUBSETS)}")
        if (split, uid) in rows:
            raise ValueError(f"{path}: clip '{uid}' is listed twice in {split}")
        rows[split, uid] = Row(uid, subset, split, category)
    return list(rows.values())


def data_folder(root: Path) -> Path:
    """The folder that holds the metadata, the list of classes and a folder for each subset.

    Raises:
        FileNotFoundError: If either file is not there.
    """
    base = root / FOLDER if (root / FOLDER).is_dir() else root
    for name in (METADATA, CLASS_FILE):
        if not (base / name).is_file():
            raise FileNotFoundError(f"--root {root}: neither {FOLDER}/{name} nor {name} is in it")
    return base


def _job(folder: Path, row: Row, clip_s: int, num_classes: int) -> ClipJob:
    seconds = min(SUBSETS[row.subset], clip_s)
    # the single-source clips are weakly supervised in training, as in S4
    labelled = 1 if row.subset == "v1s" and row.split == "train" else seconds
    frames = find_pictures([folder / "frames"], "", (".jpg", *FRAME_ENDINGS))
    masks = find_pictures([folder / "labels_rgb"], "", MASK_ENDINGS)
    first, problem = first_number(frames, masks, SUBSETS[row.subset], published=0)
    sound = folder / "audio.wav"
    problem = problem or frames.missing(first, seconds)
    if not sound.is_file():
        problem = problem or f"missing sound file {sound}"
    return ClipJob(
        name=row.uid,
        split=row.split,
        path=folder / "frames",
        frames=frames.files(first, seconds),
        sound=sound,
        masks=masks.files(first, labelled),
        num_classes=num_classes,
        fit="cropped" if row.split == "train" else "squashed",
        seconds=seconds,
        meta={"subset": row.subset} | ({"category": row.category} if row.category else {}),
        problem=problem,
    )

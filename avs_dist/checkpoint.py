"""Checkpoints: what is in one, how it is found, checked and loaded; `saving` writes them, `resuming` goes on from them.

<out_dir>/checkpoints/step-000600/  manifest.json  config.yaml  model.safetensors  state/ (what the optimiser remembers)
<out_dir>/checkpoints/last.json, best.json          {"folder": "step-000600", ...}

The manifest, written last, has the config and lists all files with sizes and hashes, also its own; a folder without one
is not a checkpoint. Nothing in it is a pickle. A folder that `avs-dist export` wrote (config.json in the place of the
manifest, which may be edited) is read alike. config.yaml is for people.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from avs_dist.config import Config, from_dict
from avs_dist.modules.weights import first_lines
from avs_dist.shards.files import sha256_of
from avs_dist.shards.plan import StreamState
from avs_dist.systems import build_system
from avs_dist.systems.base import System

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
STATE = "state"
EXPORTED = "config.json"  # the manifest of an exported checkpoint
FORMAT = 2  # of the manifest; 1 was not told
_STEP_FOLDER = re.compile(r"step-(\d+)")


class UnknownFormatError(ValueError):
    """A checkpoint of a newer version, which is not damaged."""


def root(out_dir: str | Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(out_dir) / "checkpoints"


def find_checkpoint(path: str | Path) -> Path:
    """Checkpoint folder for a checkpoint, an exported one, or a run folder (its best, else its last checkpoint).

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() or (path / EXPORTED).is_file():
        return path
    for place in (root(path), path):
        for pointer in ("best.json", "last.json"):
            folder = pointed(place / pointer)
            if folder is not None:
                return folder
    raise FileNotFoundError(f"no checkpoint in {path}: expected {MANIFEST} or checkpoints/best.json (avs-dist train)")


def newest_first(root: Path) -> list[Path]:
    """The checkpoints in a folder, as far as they look whole."""
    return [path for path in step_folders(root) if (path / MANIFEST).is_file()]


def step_folders(root: Path) -> list[Path]:
    """The folders of checkpoints, the newest first, with a manifest or without."""
    steps = [(int(found[1]), path) for path in root.glob("step-*") if (found := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def load_weights(system: System, checkpoint: str | Path) -> None:
    """Start `system` from the weights of a checkpoint or run (train.init_from).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it holds another model, or is damaged.
    """
    _fill(system, find_checkpoint(checkpoint), "train.init_from: ")


def load_system(checkpoint: str | Path, device: torch.device | str = "cpu") -> tuple[System, Config]:
    """System with its trained weights, in evaluation mode, and the config it was trained with."""
    folder = find_checkpoint(checkpoint)
    config = saved_config(folder)
    system = build_system(config, load_pretrained=False)
    _fill(system, folder)
    return system.to(device).eval(), config


def _fill(system: System, folder: Path, key: str = "") -> None:
    verify(folder, {WEIGHTS: manifest(folder)["files"][WEIGHTS]})
    try:
        system.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{key}{folder} holds another model: {first_lines(error)}") from error
    except SafetensorError as error:
        raise ValueError(f"{key}{folder / WEIGHTS} is not a safetensors file: {error}") from error


def saved_config(folder: Path) -> Config:
    """The config of the run that saved a checkpoint."""
    return from_dict(manifest(folder)["config"])


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / (MANIFEST if (folder / MANIFEST).is_file() else EXPORTED)
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; use another checkpoint") from error
    missing = [name for name in ("files", "config") if not isinstance(found, dict) or name not in found]
    if not missing and WEIGHTS not in found["files"]:
        missing = [f"{WEIGHTS} among its files"]
    if missing:
        raise ValueError(f"{path} is not the manifest of a checkpoint: it has no {' and no '.join(missing)}")
    sealed = path.name == MANIFEST and ("format" in found or "sha256" in found)  # those of format 1 are not
    if sealed and found.pop("sha256", None) != _hash(found):
        raise ValueError(f"{path} is damaged: its sha256 differs from the one in it; use another checkpoint")
    if found.get("format", 1) not in range(1, FORMAT + 1):
        raise UnknownFormatError(f"{path} is of format {found['format']}, known is {FORMAT}: update avs_dist")
    return found


def sealed_manifest(facts: dict[str, Any]) -> str:
    """The text of a manifest, with its format and its own hash."""
    sealed = {**facts, "format": FORMAT}
    return json.dumps({**sealed, "sha256": _hash(sealed)}, indent=1) + "\n"


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check sizes and hashes of files of a checkpoint, as its manifest lists them.

    Raises:
        ValueError: naming the file.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise ValueError(f"{path} is missing or has another size than the manifest says; use another checkpoint")
        if sha256_of(path) != facts["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 differs from the manifest; use another checkpoint")


def pointed(pointer: Path) -> Path | None:
    """Folder that last.json or best.json names, if it is (still) there.

    Raises:
        ValueError: it is damaged.
    """
    if not pointer.is_file():
        return None
    try:
        folder = pointer.parent / Path(json.loads(pointer.read_text())["folder"]).name
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{pointer} is damaged: name the folder of a checkpoint beside it") from error
    return folder if (folder / MANIFEST).is_file() else None


def image_size(checkpoint: str | Path) -> int:
    """Side in pixels of the frames the checkpoint was trained on."""
    return int(manifest(find_checkpoint(checkpoint))["image_size"])


def metrics(checkpoint: str | Path) -> dict[str, float]:
    """What its evaluation measured; empty for one that was saved without, as when its run had to stop."""
    return manifest(find_checkpoint(checkpoint)).get("metrics") or {}


def data_state(checkpoint: str | Path) -> StreamState | None:
    """Where the run was in its training data; None where that was not recorded."""
    state = manifest(find_checkpoint(checkpoint)).get("data")
    return StreamState.from_dict(state) if state else None


def class_names(checkpoint: str | Path) -> tuple[str, ...] | None:
    """Names of the classes of a semantic system, the first is the background; None for sounding or silent."""
    names = manifest(find_checkpoint(checkpoint)).get("classes")
    return tuple(names) if names else None


def check_classes(checkpoint: str | Path, classes: tuple[str, ...] | None, shards: str) -> None:
    """Raises ValueError where a checkpoint has learnt other classes than those of the shards."""
    learnt, there = class_names(checkpoint), classes
    if learnt == there:
        return
    if learnt is None or there is None:
        sounding = "sounding or silent"
        learnt_text, there_text = (sounding if c is None else f"{len(c)} classes" for c in (learnt, there))
    else:
        pairs = enumerate(zip_longest(learnt, there, fillvalue="none"))
        index, (one, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        learnt_text, there_text = f"'{one}' as class {index}", f"'{other}'"
    raise ValueError(f"{checkpoint} was trained on {learnt_text}, the masks in {shards} have {there_text}")


def word_vectors(checkpoint: str | Path) -> str | None:
    """Which word vectors it was trained with, as `ShardIndex.word_vectors`; None without text, or where that was not
    recorded."""
    return manifest(find_checkpoint(checkpoint)).get("word_vectors")


def check_word_vectors(checkpoint: str | Path, index_word_vectors: str | None, shards: str) -> None:
    """Raises ValueError where a checkpoint that reads text has learnt other word vectors than those of the shards; it
    passes where either is not known."""
    learnt, there = word_vectors(checkpoint), index_word_vectors
    if learnt is None or there is None or learnt == there or not _reads_text(saved_config(find_checkpoint(checkpoint))):
        return
    raise ValueError(
        f"{checkpoint} was trained with word vectors {learnt}, those in {shards} are {there}: build the shards with "
        "the --word-vectors file of the pre-training's shards (hashed: without a file)"
    )


def _reads_text(config: Config) -> bool:
    return config.model.system in ("unicode", "query") and "text" in config.model.unicode.modalities

"""Checkpoints: written aside, sealed by a manifest, then renamed; a torn one is never taken for a whole one.

<out_dir>/checkpoints/step-000600/  manifest.json  config.yaml  model.safetensors  engine/ (sharded training state)
<out_dir>/checkpoints/last.json, best.json          {"folder": "step-000600", ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from avs_dist import world
from avs_dist.config import Config, config_hash, from_dict, to_dict
from avs_dist.engine import Engine
from avs_dist.modules.weights import first_lines
from avs_dist.shards.files import write_text
from avs_dist.shards.plan import StreamState
from avs_dist.systems import build_system
from avs_dist.systems.base import System

MANIFEST = "manifest.json"
# a run may be continued with other values of these; all others must be the same
_FREE_TO_CHANGE = {
    *(f"train.{name}" for name in ("out_dir", "max_steps", "eval_every", "log_every", "resume", "init_from")),
    # its data go on at the very next clip, whatever the batches, and must be the same clips, wherever they are
    *("train.global_batch", "engine.grad_accumulation", "data.shards", "data.workers"),
    *("data.eval_split", "data.max_damaged", "data.video_deadline_s", "data.cache_dir", "data.cache_gb"),
}


def save(
    engine: Engine,
    config: Config,
    *,
    step: int,
    image_size: int,
    metrics: dict[str, float],
    data: StreamState,
    best_by: str = "miou",
    classes: tuple[str, ...] | None = None,
    word_vectors: str | None = None,
) -> Path:
    """Write the checkpoint of `step` (collective) and point last.json to it, and best.json if no other has had a higher
    value of the metric `best_by`; see `data_state`, `class_names` and `word_vectors` for what else is recorded."""
    root = _root(config.train.out_dir)
    final = root / f"step-{step:06d}"
    staging = root / f".{final.name}.partial"
    if world.is_main():
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "engine").mkdir(parents=True)
    world.barrier()
    engine.save(staging / "engine")
    weights = {name: tensor.contiguous() for name, tensor in engine.full_weights()}
    world.barrier()  # all ranks have written their part
    if world.is_main():
        save_file(weights, staging / "model.safetensors")
        (staging / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        facts = {"image_size": image_size, "classes": classes, "word_vectors": word_vectors, "data": data.to_dict()}
        seal(staging, config, step=step, metrics=metrics, **facts)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        _point(root, final, step, metrics, best_by)
        _prune(root)
    world.barrier()  # nobody reads before rank 0 has renamed
    return final


def last_checkpoint(out_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; rank 0 looks, all ranks get its answer."""
    found: str | None = None
    if world.is_main():
        whole = [p for p in _root(out_dir).glob("step-*") if (p / MANIFEST).is_file()]
        found = str(max(whole, key=lambda p: int(p.name.removeprefix("step-")))) if whole else None
    answer = world.broadcast_object(found)
    return Path(answer) if answer else None


def resume(engine: Engine, config: Config, checkpoint: Path, image_size: int) -> int:
    """Load the training state; returns the number of steps done.

    Raises:
        ValueError: damaged files, another config, world size, ZeRO stage or frame size than at the save.
    """
    manifest = _verified_manifest(checkpoint)
    there = {"world_size": manifest["world_size"], "image_size": manifest["image_size"]}
    there |= _lasting_settings(_config(checkpoint))
    here = {"world_size": world.world_size(), "image_size": image_size, **_lasting_settings(config)}
    differ = [f"{key} {there[key]} there, {value} here" for key, value in here.items() if there[key] != value]
    if differ:
        raise ValueError(
            f"{checkpoint} was saved with other settings ({'; '.join(differ)}): "
            f"continue with those in {checkpoint / 'config.yaml'} or start in another train.out_dir"
        )
    engine.load(checkpoint / "engine")
    return int(manifest["step"])


def _lasting_settings(config: Config) -> dict[str, Any]:
    """The settings that must stay the same over a resume, by their dotted names."""
    values = to_dict(config)
    values["data"].pop("mixture")  # its keys are places
    return {key: value for key, value in _flat(values) if key not in _FREE_TO_CHANGE}


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def find_checkpoint(path: str | Path) -> Path:
    """Checkpoint folder for a checkpoint or a run folder (its best, else its last checkpoint).

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for root in (_root(path), path):
        for pointer in ("best.json", "last.json"):
            folder = _pointed(root / pointer)
            if folder is not None:
                return folder
    raise FileNotFoundError(f"no checkpoint in {path}: expected {MANIFEST} or checkpoints/best.json (avs-dist train)")


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
    config = _config(folder)
    system = build_system(config, load_pretrained=False)
    _fill(system, folder)
    return system.to(device).eval(), config


def _fill(system: System, folder: Path, key: str = "") -> None:
    _verify_listed(folder, "model.safetensors")
    try:
        system.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{key}{folder} holds another model: {first_lines(error)}") from error


def _config(folder: Path) -> Config:
    _verify_listed(folder, "config.yaml")
    return from_dict(yaml.safe_load((folder / "config.yaml").read_text()))


def _verify_listed(folder: Path, name: str) -> None:
    _verify(folder, {name: _manifest(folder)["files"][name]})


def image_size(checkpoint: str | Path) -> int:
    """Side in pixels of the frames the checkpoint was trained on."""
    return int(_manifest(find_checkpoint(checkpoint))["image_size"])


def is_measured(checkpoint: str | Path) -> bool:
    """Whether it was evaluated; one that was saved as its run had to stop was not."""
    return bool(_manifest(find_checkpoint(checkpoint)).get("metrics"))


def data_state(checkpoint: str | Path) -> StreamState | None:
    """Where the run was in its training data; None where that was not recorded."""
    state = _manifest(find_checkpoint(checkpoint)).get("data")
    return StreamState.from_dict(state) if state else None


def class_names(checkpoint: str | Path) -> tuple[str, ...] | None:
    """Names of the classes of a semantic system, the first is the background; None for sounding or silent."""
    names = _manifest(find_checkpoint(checkpoint)).get("classes")
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
    return _manifest(find_checkpoint(checkpoint)).get("word_vectors")


def check_word_vectors(checkpoint: str | Path, index_word_vectors: str | None, shards: str) -> None:
    """Raises ValueError where a checkpoint that reads text has learnt other word vectors than those of the shards; it
    passes where either is not known."""
    learnt, there = word_vectors(checkpoint), index_word_vectors
    if learnt is None or there is None or learnt == there or not _reads_text(_config(find_checkpoint(checkpoint))):
        return
    raise ValueError(
        f"{checkpoint} was trained with word vectors {learnt}, those in {shards} are {there}: build the shards with "
        "the --word-vectors file of the pre-training's shards (hashed: without a file)"
    )


def _reads_text(config: Config) -> bool:
    return config.model.system in ("unicode", "query") and "text" in config.model.unicode.modalities


def _root(out_dir: str | Path) -> Path:
    return Path(out_dir) / "checkpoints"


def seal(folder: Path, config: Config, **facts: Any) -> None:
    """Write the manifest last: its presence says that everything else is complete and on disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        **facts,
        "world_size": world.world_size(),
        "zero_stage": config.engine.zero_stage,
        "config_hash": config_hash(config),
        "torch": torch.__version__,
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}; use another checkpoint") from error
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise ValueError(f"{folder / MANIFEST} is not the manifest of a checkpoint: it lists no files")
    return manifest


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a checkpoint after its files were checked; they are unpickled by DeepSpeed, so hashes come first."""
    manifest = _manifest(folder)
    problem: str | None = None
    if world.is_main():
        try:
            _verify(folder, manifest["files"])
        except ValueError as error:
            problem = str(error)
    problem = world.broadcast_object(problem)  # rank 0 reads, all ranks stop together
    if problem:
        raise ValueError(problem)
    return manifest


def _verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check sizes and hashes of files of a checkpoint, as its manifest lists them.

    Raises:
        ValueError: naming the file.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise ValueError(f"{path} is missing or has another size than the manifest says; use another checkpoint")
        if _sha256(path) != facts["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 differs from the manifest; use another checkpoint")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _pointed(pointer: Path) -> Path | None:
    """Folder that last.json or best.json names, if it is (still) there."""
    if not pointer.is_file():
        return None
    folder = pointer.parent / json.loads(pointer.read_text())["folder"]
    return folder if (folder / MANIFEST).is_file() else None


def _point(root: Path, final: Path, step: int, metrics: dict[str, float], best_by: str) -> None:
    entry = {"folder": final.name, "step": step, **metrics}
    best = root / "best.json"
    if best_by in metrics and (
        _pointed(best) is None or json.loads(best.read_text()).get(best_by, -1.0) <= metrics[best_by]
    ):
        _write_json(best, entry)
    _write_json(root / "last.json", entry)


def _prune(root: Path) -> None:
    """Keep only what last.json and best.json point to."""
    keep = {_pointed(root / "last.json"), _pointed(root / "best.json")}
    for folder in root.glob("step-*"):
        if folder not in keep:
            shutil.rmtree(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")

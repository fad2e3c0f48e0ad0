"""Saving checkpoints: written aside by all ranks, flushed, sealed by a manifest, renamed, and only then pointed to.

A run that is killed at any moment leaves its former checkpoints whole; what it was writing has no manifest under its
final name. A save that fails, such as on a full disk, costs that checkpoint and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from avs_dist import checkpoint, world
from avs_dist.checkpoint import MANIFEST, STATE, WEIGHTS
from avs_dist.config import Config, config_hash, to_dict
from avs_dist.engine import Engine
from avs_dist.shards.files import sha256_of, sync_directory, write_text
from avs_dist.shards.plan import StreamState

Files = dict[str, dict[str, Any]]  # size and hash by the name within the checkpoint


class Saver:
    """Writes the checkpoints of one run; every method is collective.

    Args:
        best_by: the metric whose highest value makes a checkpoint the best.
        facts: what else the manifest says (`checkpoint.image_size`, `class_names`, `word_vectors`).
        newest: the checkpoint that the run goes on from.
    """

    def __init__(
        self, engine: Engine, config: Config, *, best_by: str, facts: dict[str, Any], newest: Path | None = None
    ) -> None:
        self._engine, self._config, self._best_by, self._facts = engine, config, best_by, facts
        self._root = checkpoint.root(config.train.out_dir)
        self._pending: _Save | None = None
        self.newest = newest  # whole checkpoint
        self.failure: str | None = None  # why the last save failed
        if world.is_main():
            for left_over in self._root.glob(".*.partial"):  # a folder, or a pointer
                left_over.unlink() if left_over.is_file() else shutil.rmtree(left_over, ignore_errors=True)
        if newest:  # which a kill may have kept from being pointed to
            self._settle()

    def save(self, step: int, metrics: dict[str, float], data: StreamState) -> None:
        """Write the checkpoint of `step`; with train.save_async the files are written while the training goes on."""
        self.finish()
        newest = self.newest
        if newest and newest.name == _name(step):
            if metrics and (failure := world.on_main(lambda: self._add_metrics(newest, metrics))):
                _warn(f"the measures of {newest} could not be noted ({failure}); make room")
            return
        token = world.broadcast_object(secrets.token_hex(4))
        staging = self._root / f".{_name(step)}.{token}.partial"
        contents: dict[str, dict[str, Tensor]] = {f"{STATE}/{_rank_file()}": self._engine.optimizer_state()}
        weights = self._engine.full_weights()
        if world.is_main():
            contents[WEIGHTS] = {name: tensor.contiguous() for name, tensor in weights}
        else:
            for _ in weights:  # collective
                pass
        facts = {**self._facts, "step": step, "metrics": metrics, "data": data.to_dict()}
        self._pending = _Save(staging, contents, facts)
        if not self._config.train.save_async:
            self.finish()

    def poll(self) -> None:
        """Complete a save that all ranks have written their part of."""
        if self._pending and not world.any_rank(self._pending.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for a save that is being written, and complete it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.join()
        parts = world.gather_objects((pending.files, pending.failure))
        failure = next((f"rank {rank}: {why}" for rank, (_, why) in enumerate(parts) if why), None)
        files = {name: facts for written, _ in parts for name, facts in written.items()}
        self.failure = failure or world.on_main(lambda: self._publish(pending, files))
        if self.failure is None:
            self.newest = self._root / _name(pending.step)
            self._settle()
        elif world.is_main():
            shutil.rmtree(pending.staging, ignore_errors=True)
            kept = f"{self.newest} stays the newest" if self.newest else "there is none yet"
            _warn(f"the checkpoint of step {pending.step} could not be written ({self.failure}): {kept}; make room")

    def _settle(self) -> None:
        if reason := world.on_main(self._point_and_prune):
            _warn(f"{self.newest} is written, but not pointed to ({reason}); make room")

    def _publish(self, pending: _Save, files: Files) -> None:
        """Make the checkpoint visible (rank 0, once all files of all ranks are on disk)."""
        for name in files:
            if not (pending.staging / name).is_file():
                raise OSError(f"{name} is not seen here: train.out_dir must be where all hosts have the same files")
        with open(pending.staging / "config.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(to_dict(self._config), file, sort_keys=False)
        files["config.yaml"] = _flushed(pending.staging / "config.yaml")
        seal(pending.staging, self._config, files, **pending.facts)
        final = self._root / _name(pending.step)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there: the run has its folder alone
        os.replace(pending.staging, final)
        sync_directory(self._root)
        sync_directory(self._root.parent)

    def _add_metrics(self, folder: Path, metrics: dict[str, float]) -> None:
        """Note the measures of a checkpoint that was saved without any."""
        changed = {"config": to_dict(self._config), "config_hash": config_hash(self._config), "metrics": metrics}
        write_text(folder / MANIFEST, checkpoint.sealed_manifest({**checkpoint.manifest(folder), **changed}))
        self._point_and_prune()

    def _point_and_prune(self) -> None:
        """Point to the newest and the best checkpoint; keep the best and the newest train.keep_last.

        What the manifests say counts, so pointers that were lost or damaged come right again.

        Raises:
            OSError: a manifest cannot be read at present; then nothing is deleted.
        """
        whole = {folder: facts for folder in checkpoint.newest_first(self._root) if (facts := _facts(folder))}
        scores = {folder: facts["metrics"].get(self._best_by, math.nan) for folder, facts in whole.items()}
        best = max((folder for folder in whole if math.isfinite(scores[folder])), key=scores.__getitem__, default=None)
        for pointer, folder in {"best.json": best, "last.json": next(iter(whole), None)}.items():
            if folder is not None:
                entry = {"folder": folder.name, "step": whole[folder]["step"], **whole[folder]["metrics"]}
                write_text(self._root / pointer, json.dumps(entry, indent=1) + "\n")
        kept = [best, self.newest, *list(whole)[: self._config.train.keep_last]]
        for folder in checkpoint.step_folders(self._root):
            half_deleted = not (folder / MANIFEST).exists()
            if folder not in kept and (folder in whole or half_deleted):
                # without its manifest first: what is half deleted must not pass for a checkpoint
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


class _Save(threading.Thread):
    """Writes and flushes the files of this rank, beside the training."""

    def __init__(self, staging: Path, contents: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        super().__init__(name="save", daemon=True)
        self.staging, self.facts, self.step = staging, facts, int(facts["step"])
        self._contents = contents
        self.files: Files = {}
        self.failure: str | None = None
        self.start()

    def run(self) -> None:
        try:
            for name, tensors in self._contents.items():
                path = self.staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, tensors)
                self.files[name] = _flushed(path)
                sync_directory(path.parent)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self.failure = f"{type(error).__name__}: {error}"
        self._contents.clear()


def seal(folder: Path, config: Config, files: Files | None = None, **facts: Any) -> None:
    """Write the manifest: its presence says that everything else is complete and on disk.

    Args:
        files: sizes and hashes of all files; read from the folder where None.
    """
    if files is None:
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = {str(path.relative_to(folder)): _flushed(path) for path in paths}
    manifest = {
        **facts,
        "world_size": world.world_size(),
        "zero_stage": config.engine.zero_stage,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "torch": torch.__version__,
        "files": files,
    }
    write_text(folder / MANIFEST, checkpoint.sealed_manifest(manifest))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; the library's own are for nobody but their owner to read."""
    save_file(tensors, path)
    with suppress(OSError):  # some file systems have no modes
        path.chmod(path.parent.stat().st_mode & 0o666)


def _facts(folder: Path) -> dict[str, Any] | None:
    """The manifest, where it is undamaged and complete."""
    try:
        facts = checkpoint.manifest(folder)
    except ValueError:
        return None
    return facts if "metrics" in facts and "step" in facts else None


def _flushed(path: Path) -> dict[str, Any]:
    """Size and hash of a file, once it is on disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _warn(text: str) -> None:
    if world.is_main():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _rank_file() -> str:
    return f"rank-{world.rank():05d}-of-{world.world_size():05d}.safetensors"

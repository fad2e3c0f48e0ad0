"""Saving checkpoints: written aside by all ranks, flushed, sealed by a manifest, renamed, and only then pointed to.

A run that is killed at any moment leaves its former checkpoints whole; what it was writing has no manifest under its
final name. A save that fails, such as on a full disk, costs that checkpoint and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from avs_dist import checkpoint, world
from avs_dist.checkpoint import MANIFEST, STATE, WEIGHTS, pointed
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
            for left_over in self._root.glob(".step-*.partial"):
                shutil.rmtree(left_over)

    def save(self, step: int, metrics: dict[str, float], data: StreamState) -> None:
        """Write the checkpoint of `step`; with train.save_async the files are written while the training goes on."""
        self.finish()
        newest = self.newest
        if newest and newest.name == _name(step):
            if metrics and (failure := _on_main(lambda: self._add_metrics(newest, step, metrics))):
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
        self.failure = failure or _on_main(lambda: self._publish(pending, files))
        if self.failure is None:
            self.newest = self._root / _name(pending.step)
        elif world.is_main():
            shutil.rmtree(pending.staging, ignore_errors=True)
            kept = f"{self.newest} stays the newest" if self.newest else "there is none yet"
            _warn(f"the checkpoint of step {pending.step} could not be written ({self.failure}): {kept}; make room")

    def _publish(self, pending: _Save, files: Files) -> None:
        """Make the checkpoint visible (rank 0, once all files of all ranks are on disk)."""
        with open(pending.staging / "config.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(to_dict(self._config), file, sort_keys=False)
        files["config.yaml"] = _flushed(pending.staging / "config.yaml")
        seal(pending.staging, self._config, files, **pending.facts)
        final = self._root / _name(pending.step)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
        os.replace(pending.staging, final)
        sync_directory(self._root)
        self._point(final, pending.step, pending.facts["metrics"])
        self._prune()

    def _add_metrics(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """Note the measures of a checkpoint that was saved without any."""
        _write_json(
            folder / MANIFEST, {**checkpoint.manifest(folder), "config": to_dict(self._config), "metrics": metrics}
        )
        self._point(folder, step, metrics)

    def _point(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        entry = {"folder": folder.name, "step": step, **metrics}
        best, by = self._root / "best.json", self._best_by
        if by in metrics and (pointed(best) is None or json.loads(best.read_text()).get(by, -1.0) <= metrics[by]):
            _write_json(best, entry)
        _write_json(self._root / "last.json", entry)

    def _prune(self) -> None:
        """Keep the newest train.keep_last checkpoints, and the best."""
        kept = [pointed(self._root / "best.json"), *checkpoint.newest_first(self._root)[: self._config.train.keep_last]]
        for folder in checkpoint.newest_first(self._root):
            if folder not in kept:
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
                save_file(tensors, path)
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
    _write_json(folder / MANIFEST, manifest)


def _flushed(path: Path) -> dict[str, Any]:
    """Size and hash of a file, once it is on disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _on_main(write: Callable[[], None]) -> str | None:
    """Let rank 0 write; every rank hears why it could not, and nobody goes on before it has."""
    failure: str | None = None
    if world.is_main():
        try:
            write()
        except OSError as error:
            failure = f"rank 0: {error}"
    return world.broadcast_object(failure)


def _warn(text: str) -> None:
    if world.is_main():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _rank_file() -> str:
    return f"rank-{world.rank():05d}-of-{world.world_size():05d}.safetensors"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")

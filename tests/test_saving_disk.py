"""What saving asks of the disk: the order of its writes, a disk that is slow or full, what is kept and what is not."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_saving import STATE_FILE, arguments, folder, same_tensors

from avs_dist import checkpoint, saving, world
from avs_dist.checkpoint import MANIFEST, WEIGHTS
from avs_dist.config import Config, TrainConfig
from avs_dist.damage import NoBatchError
from avs_dist.engine import Engine, stop
from avs_dist.launch.cli import main as avs_dist
from avs_dist.saving import Saver
from avs_dist.shards.plan import StreamState

LAST = 4  # step of the runs here


class SlowDisk:
    """The weights of a step are written no sooner than the training has done the step after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: dict[int, Exception] | None = None) -> None:
        self.waited = 0
        write, train_step = saving.write_tensors, Engine.train_step
        done = {number: threading.Event() for number in range(1, LAST + 1)}

        def write_late(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            step = int(path.parent.name.split(".")[1][-6:]) if path.name == WEIGHTS else LAST
            if step < LAST:
                assert done[step + 1].wait(20), "the training waits for the disk"
                self.waited += 1
            write(path, tensors)

        def told(engine: Engine, batches: list[Any], number: int) -> dict[str, float]:
            done[number + 1].set()
            if fails and number in fails:
                raise fails[number]
            return train_step(engine, batches, number)

        monkeypatch.setattr(saving, "write_tensors", write_late)
        monkeypatch.setattr(Engine, "train_step", told)


def test_the_training_goes_on_while_files_are_written_and_they_are_the_same(
    ms3_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert avs_dist(arguments(ms3_shards, tmp_path / "sync")) == 0
    disk = SlowDisk(monkeypatch)
    assert avs_dist(arguments(ms3_shards, tmp_path / "async", "--train.save_async", "true")) == 0
    assert disk.waited == LAST - 1
    for step in range(1, LAST + 1):
        for name in (WEIGHTS, STATE_FILE):
            assert same_tensors(folder(tmp_path / "sync", step) / name, folder(tmp_path / "async", step) / name)
    facts = [checkpoint.manifest(folder(tmp_path / run, LAST)) for run in ("sync", "async")]
    assert facts[0]["data"] == facts[1]["data"]
    assert facts[0]["metrics"] == facts[1]["metrics"]


def test_a_save_that_is_pending_where_the_data_end_is_completed(
    ms3_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch, {3: NoBatchError("rank 0 has no batch")})
    more = ("--train.save_async", "true", "--train.save_every", "3")
    assert avs_dist(arguments(ms3_shards, tmp_path / "run", *more)) == 1
    assert disk.waited == 1
    assert [path.name for path in checkpoint.newest_first(tmp_path / "run/checkpoints")] == ["step-000003"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


class Held:
    """An engine with two tensors."""

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg:w:0": torch.ones(3)}

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(3)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    world.start()
    config = Config(train=TrainConfig(out_dir=str(tmp_path), keep_last=2))
    yield Saver(Held(), config, best_by="miou", facts={})  # type: ignore[arg-type]  # all that it asks an engine
    stop()


def save(saver: Saver, step: int, **metrics: float) -> None:
    saver.save(step, metrics, StreamState(step, 0, 1, "-"))


def kept(out: Path) -> list[int]:
    return [int(path.name[-6:]) for path in checkpoint.newest_first(out / "checkpoints")]


def test_the_newest_and_the_best_are_kept(saver: Saver, tmp_path: Path) -> None:
    for step, miou, there in [
        (1, 0.5, [1]), (2, 0.9, [2, 1]), (3, 0.3, [3, 2]), (4, 0.2, [4, 3, 2]), (5, 0.9, [5, 4]), (6, None, [6, 5]),
        (7, 0.1, [7, 6, 5]), (8, 0.95, [8, 7]),
    ]:  # fmt: skip
        save(saver, step, **({} if miou is None else {"miou": miou}))
        assert kept(tmp_path) == there, step
        best = {8: 8, 7: 5, 6: 5, 5: 5, 1: 1}.get(step, 2)
        assert checkpoint.pointed(tmp_path / "checkpoints/best.json") == folder(tmp_path, best)
        assert checkpoint.pointed(tmp_path / "checkpoints/last.json") == folder(tmp_path, step)
    save(saver, 9)
    save(saver, 9, miou=0.99)  # measured after it was saved
    assert checkpoint.find_checkpoint(tmp_path) == folder(tmp_path, 9)
    assert checkpoint.manifest(folder(tmp_path, 9))["metrics"] == {"miou": 0.99}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "best.json", "last.json", "step-000008", "step-000009",
    }  # fmt: skip


def test_what_is_half_deleted_is_no_checkpoint_and_goes_the_next_time(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)  # killed in the middle of it
        for step in (1, 2, 3):
            save(saver, step)
    assert folder(tmp_path, 1).is_dir()
    assert kept(tmp_path) == [3, 2]
    save(saver, 4)
    assert not folder(tmp_path, 1).exists()


def test_nothing_is_deleted_while_a_manifest_cannot_be_read(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network file system may fail for a moment."""
    save(saver, 1), save(saver, 2)
    read = Path.read_text

    def fails(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == folder(tmp_path, 2) / MANIFEST:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        save(saver, 3)
    assert kept(tmp_path) == [3, 2, 1]
    assert "step-000003 is written, but not pointed to" in capsys.readouterr().err
    save(saver, 4)
    assert kept(tmp_path) == [4, 3]


def test_a_measure_that_is_no_number_is_never_the_best(saver: Saver, tmp_path: Path) -> None:
    for step, miou in ((1, 0.2), (2, float("nan")), (3, 0.1)):
        save(saver, step, miou=miou)
        assert checkpoint.pointed(tmp_path / "checkpoints/best.json") == folder(tmp_path, 1)


def test_all_is_on_disk_before_it_is_named_and_named_before_others_go(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls, in their order, of a save that ends with the removal of an old one."""
    save(saver, 1), save(saver, 2)
    calls: list[str] = []

    def name(path: str | Path) -> str:
        told = str(Path(path).relative_to(tmp_path)).replace(f".{os.getpid()}", "")
        return re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", told)

    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    monkeypatch.setattr(
        os, "fsync", lambda file: (calls.append(f"sync {name(os.readlink(f'/proc/self/fd/{file}'))}"), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"name {name(b)}"), replace(a, b)))

    def removed(path: Path, missing_ok: bool = False) -> None:
        if path.name == MANIFEST:
            calls.append(f"remove {name(path)}")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", removed)
    save(saver, 3)
    monkeypatch.undo()
    staged, state = "checkpoints/.step-000003.partial", "checkpoints/.step-000003.partial/state"
    order = [
        f"sync {staged}/{STATE_FILE}", f"sync {state}", f"sync {staged}/{WEIGHTS}", f"sync {staged}",
        f"sync {staged}/config.yaml", f"sync {staged}/.{MANIFEST}.partial", f"name {staged}/{MANIFEST}",
        f"sync {staged}", "name checkpoints/step-000003", "sync checkpoints", "sync .",
        "sync checkpoints/.last.json.partial", "name checkpoints/last.json", "sync checkpoints",
        "remove checkpoints/step-000001/manifest.json",
    ]  # fmt: skip
    assert calls == order


def test_files_are_for_all_to_read_who_may_read_the_folder(saver: Saver, tmp_path: Path) -> None:
    save(saver, 1)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {WEIGHTS, MANIFEST, "config.yaml", Path(STATE_FILE).name}
    assert {path.stat().st_mode & 0o777 for path in files} == {folder(tmp_path, 1).stat().st_mode & 0o666}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB; a checkpoint has 10."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Leave no block of the file system free."""
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(ballast.parent).free == 0


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    small_disk: Path, ms3_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Full to the last byte from the second step on: the log is on it too. Room for the fourth, none for the last."""
    run, step, ballast = small_disk / "run", Engine.train_step, small_disk / "ballast"

    def train_step(engine: Engine, batches: list[Any], number: int) -> dict[str, float]:
        if number in (1, 4):
            fill(ballast)
        if number == 3:
            assert checkpoint.newest_first(run / "checkpoints") == [folder(run, 1)]
            assert not list((run / "checkpoints").glob(".*"))
            checkpoint.verify(folder(run, 1), checkpoint.manifest(folder(run, 1))["files"])
            ballast.unlink()
        return step(engine, batches, number)

    monkeypatch.setattr(Engine, "train_step", train_step)
    code = avs_dist(arguments(ms3_shards, run, "--train.max_steps", "5", "--train.keep_last", "1"))
    told = capsys.readouterr().err
    assert code == 1
    for number in (2, 3):
        assert f"the checkpoint of step {number} could not be written (rank 0: SafetensorError: " in told
    assert os.strerror(errno.ENOSPC) in told
    assert f"{folder(run, 1)} stays the newest; make room" in told
    assert "the checkpoint of step 4 " not in told
    assert "the last checkpoint could not be written (rank 0: " in told.splitlines()[-1]
    assert f"newest: {folder(run, 4)}" in told.splitlines()[-1]
    ballast.unlink()
    monkeypatch.undo()
    assert avs_dist(arguments(ms3_shards, run, "--train.max_steps", "5", "--train.resume", "true")) == 0
    assert load_file(folder(run, 5) / WEIGHTS)

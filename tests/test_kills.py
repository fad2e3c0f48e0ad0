"""`avs-dist bench kills`: a training killed at random moments comes to the same; anything else is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avs_dist.checkpoint import newest_first, root, sealed_manifest
from avs_dist.launch.bench import main as bench
from avs_dist.launch.benchmarks.kills_checks import check_checkpoints, check_start, compare, left_over
from avs_dist.launch.cli import run
from avs_dist.launch.train import main as train

KILLS, STEPS = 3, 12
WHOLE, KILLED = "uninterrupted", "killed-0"
WEIGHTS, STATE = "model.safetensors", "state/rank-00000-of-00001.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial(cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kills") / "trial"
    options = ["--kills", str(KILLS), "--steps", str(STEPS), "--shards", str(cmg_shards), "--out", str(out)]
    assert bench(["kills", *options, "--json", str(out / "found.json")]) == 0
    return out


@pytest.fixture
def copy(trial: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trial, tmp_path / "copy"))


def newest(out: Path) -> Path:
    return newest_first(root(out))[0]


def test_killed_training_is_the_uninterrupted_one_bit_for_bit(trial: Path) -> None:
    found = json.loads((trial / "found.json").read_text())
    assert len(found["kills"]) == KILLS
    assert found["starts"] > KILLS
    assert found["wrong"] == []
    assert found["differences"] == [dict.fromkeys(found["differences"][0], 0.0)] * found["runs"]
    assert newest(trial / WHOLE).name == newest(trial / KILLED).name == f"step-{STEPS:06d}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_step(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(sealed_manifest({**manifest, "step": 3}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut weights": (lambda folder: cut(folder / WEIGHTS), "another size"),
    "lost state": (lambda folder: (folder / STATE).unlink(), "is missing"),
    "cut manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "stranger": (lambda folder: (folder / "stranger").touch(), "it holds"),
    "other step": (of_another_step, "is of step 3"),
    "torn pointer": (lambda folder: (folder.parent / "last.json").write_text("{"), "last.json is torn"),
    "lost target": (lambda folder: (folder / "manifest.json").unlink(), "which is not whole"),
    "set aside": (lambda folder: (folder.parent / "damaged-step-000002").mkdir(), "was taken for damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_to_a_checkpoint_is_told(name: str, copy: Path) -> None:
    break_it, message = DAMAGE[name]
    assert check_checkpoints(copy / KILLED, ranks=1) == (STEPS, [])
    break_it(newest(copy / KILLED))
    assert any(message in each for each in check_checkpoints(copy / KILLED, ranks=1).wrong)


def test_what_a_run_leaves_is_told(copy: Path) -> None:
    assert left_over(copy / KILLED) == []
    (root(copy / KILLED) / ".step-000004.12345678.partial").mkdir()
    (root(copy / KILLED) / "step-000003").mkdir()
    assert left_over(copy / KILLED) == [".step-000004.12345678.partial", "step-000003"]


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_one_bit_is_a_difference(name: str, copy: Path) -> None:
    path = newest(copy / KILLED) / name
    tensors = load_file(path)
    changed = next(value for value in tensors.values() if value.is_floating_point() and value.numel() > 1)
    changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0, dtype=changed.dtype))
    save_file(tensors, path)
    difference, wrong = compare(copy / WHOLE, copy / KILLED)
    assert wrong == []
    assert 0 < difference.relative < 1e-5
    assert (difference.weights > 0) == (name == WEIGHTS)
    assert (difference.state > 0) == (name == STATE)


def test_other_logs_and_pointers_are_a_difference(copy: Path) -> None:
    log = copy / KILLED / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, lines[-1]]) + "\n")  # as if what was done again had been logged twice
    (root(copy / KILLED) / "best.json").unlink()
    difference, wrong = compare(copy / WHOLE, copy / KILLED)
    assert difference.log == float("inf")
    assert any("best.json names" in each for each in wrong)
    record = json.loads(lines[0])
    log.write_text("\n".join([json.dumps({**record, "loss": record["loss"] * 1.001}), *lines[1:]]) + "\n")
    assert compare(copy / WHOLE, copy / KILLED)[0].log == pytest.approx(1e-3, rel=1e-2)


def test_a_run_killed_before_its_last_checkpoint_was_pointed_to_points_to_it(copy: Path) -> None:
    """Though it has nothing left to train."""
    pointers = {name: root(copy / KILLED) / name for name in ("last.json", "best.json")}
    before = {name: path.read_text() for name, path in pointers.items()}
    for path in pointers.values():
        path.unlink()
    settings = str(newest(copy / KILLED) / "config.yaml")
    assert train(["--config", settings, "--train.out_dir", str(copy / KILLED), "--train.resume", "true"]) == 0
    assert {name: path.read_text() for name, path in pointers.items()} == before


def test_a_start_from_an_older_checkpoint_is_told(tmp_path: Path) -> None:
    log = tmp_path / "life.log"
    log.write_text("resumed from run/checkpoints/step-000004\n")
    assert check_start(log, Path("run"), 4) is None
    assert check_start(log, Path("run"), 6) == "run was at step 6 and resumed from run/checkpoints/step-000004"
    log.write_text("no checkpoint in run: from step 0\n")
    assert check_start(log, Path("run"), 0) is None
    assert check_start(log, Path("run"), 2) == "run was at step 2 and began anew"


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "life-001.log").touch()
    for options, message in {
        ("--kills", "0"): "--kills 0: at least 1",
        ("--out", str(tmp_path)): "a new folder",
    }.items():
        assert run("bench", ["kills", *options]) == 2
        assert message in capsys.readouterr().err

"""Checkpoints under fire: damaged in every file, on a full disk, slow, or of a stranger; a run loses nothing else."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tampered_shards import Malicious

from avs_dist import checkpoint, resuming
from avs_dist.checkpoint import MANIFEST, WEIGHTS
from avs_dist.launch.cli import main as avs_dist
from avs_dist.shards.files import sha256_of

ROOT = Path(__file__).resolve().parents[1]
STATE_FILE = "state/rank-00000-of-00001.safetensors"
FILES = (WEIGHTS, STATE_FILE, "config.yaml", MANIFEST)


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(shards), "--data.workers", "0",
        "--optim.schedule", "constant", "--train.out_dir", str(out), "--train.max_steps", "4", "--train.eval_every",
        "0", "--train.save_every", "1", "--train.keep_last", "4", "--train.log_every", "1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert avs_dist(arguments(ms3_shards, out)) == 0
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_version(path: Path, version: int = 99) -> None:
    facts = {**json.loads(path.read_text()), "format": version}
    facts.pop("sha256")
    path.write_text(json.dumps({**facts, "sha256": checkpoint._hash(facts)}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"flip {name}": (lambda path, name=name: flip(path / name), f"{name} is damaged") for name in FILES},
    **{
        f"cut {name}": (lambda path, name=name: os.truncate(path / name, 100), f"{name} is (damaged|missing or)")
        for name in FILES
    },
    "no rank file": (lambda path: (path / STATE_FILE).unlink(), f"{STATE_FILE} is missing"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "empty manifest": (lambda path: (path / MANIFEST).write_text(""), f"{MANIFEST} is damaged"),
    "other JSON": (lambda path: (path / MANIFEST).write_text("[]"), "is not the manifest of a checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_taken_and_what_is_skipped_is_told(damage: str, run: Path, capsys: Any) -> None:
    harm, reason = DAMAGES[damage]
    harm(folder(run, 4))
    assert resuming.newest_checkpoint(run) == folder(run, 3)
    told = capsys.readouterr().err
    assert re.search(rf"warning: step-000004 is skipped, and kept as damaged-step-000004: .*{reason}", told), told
    assert not folder(run, 4).exists()
    assert resuming.newest_checkpoint(run) == folder(run, 3)
    assert capsys.readouterr().err == ""  # once


def test_a_newer_version_or_a_disk_that_fails_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is not continued from an older checkpoint, and nothing is set aside or deleted."""
    of_another_version(folder(run, 4) / MANIFEST)
    with pytest.raises(ValueError, match="is of format 99, known is 2: update avs_dist"):
        resuming.newest_checkpoint(run)
    assert folder(run, 4).is_dir()

    def fails(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint, "sha256_of", fails)
    of_another_version(folder(run, 4) / MANIFEST, 2)
    with pytest.raises(RuntimeError, match="rank 0 cannot read .*step-000004 .*[Ss]tale"):
        resuming.newest_checkpoint(run)
    assert folder(run, 4).is_dir()


def test_every_byte_of_a_manifest_counts(run: Path) -> None:
    path = folder(run, 4) / MANIFEST
    text, facts = path.read_bytes(), checkpoint.manifest(folder(run, 4))
    unnoticed = []
    for place in range(0, len(text), 7):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            if checkpoint.manifest(folder(run, 4)) != facts:
                unnoticed.append(text[place - 20 : place + 20])
        except ValueError:
            continue
    assert unnoticed == []


def test_damage_again_and_again_is_set_aside_each_time(whole: Path, run: Path) -> None:
    for name in ("damaged-step-000004", "damaged-step-000004-2", "damaged-step-000004-3"):
        flip(folder(run, 4) / WEIGHTS)
        assert resuming.newest_checkpoint(run) == folder(run, 3)
        assert (run / "checkpoints" / name / MANIFEST).is_file()
        shutil.copytree(folder(whole, 4), folder(run, 4))


def test_a_run_goes_on_from_the_newest_whole_one_as_if_it_were_the_last(
    whole: Path, run: Path, ms3_shards: Path, capsys: Any
) -> None:
    flip(folder(run, 4) / STATE_FILE)
    (folder(run, 3) / MANIFEST).unlink()
    (run / "checkpoints/best.json").write_text("{")
    (run / "checkpoints/last.json").write_text('{"folder": "step-000004"}')
    for left_over in (".step-000009.ab.partial/state", "step-old", "notes"):
        (run / "checkpoints" / left_over).mkdir(parents=True)
    (run / "checkpoints/.last.json.1.partial").touch()
    assert avs_dist(arguments(ms3_shards, run, "--train.resume", "true", "--train.keep_last", "2")) == 0
    assert f"resumed from {folder(run, 2)}" in capsys.readouterr().out
    for name in (WEIGHTS, STATE_FILE):
        assert same_tensors(folder(run, 4) / name, folder(whole, 4) / name)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"best.json", "last.json", "damaged-step-000004", "damaged-step-000003", "step-old", "notes"} | {
        "step-000003", "step-000004",
    }  # fmt: skip
    assert checkpoint.pointed(run / "checkpoints/best.json") == folder(run, 4)


def test_all_damaged_is_an_error_and_never_a_start_from_nothing(run: Path, ms3_shards: Path, capsys: Any) -> None:
    for step, harm in enumerate(("flip " + WEIGHTS, "cut " + STATE_FILE, "no manifest", "empty manifest"), start=1):
        DAMAGES[harm][0](folder(run, step))
    assert avs_dist(arguments(ms3_shards, run, "--train.resume", "true")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"all checkpoints in {run / 'checkpoints'} are damaged" in told
    assert "model.safetensors is damaged" in told
    assert "step-000003 has no manifest.json" in told
    assert "train.init_from" in told
    assert sorted(path.name for path in (run / "checkpoints").glob("*step*")) == [f"step-00000{n}" for n in "1234"]


def test_a_damaged_pointer_is_an_error_and_not_another_checkpoint(run: Path) -> None:
    (run / "checkpoints/best.json").write_text('{"folder": 3}')
    with pytest.raises(ValueError, match=r"best\.json is damaged: name the folder of a checkpoint beside it"):
        checkpoint.find_checkpoint(run)
    (run / "checkpoints/best.json").write_text('{"folder": "../../step-000004"}')
    assert checkpoint.find_checkpoint(run) == folder(run, 4)  # nothing outside


@pytest.mark.parametrize(
    ("name", "sealed"), [*((name, sealed) for name in FILES for sealed in (0, 1)), ("config.json", 1), ("best.json", 1)]
)
def test_no_pickle_is_ever_loaded(name: str, sealed: bool, run: Path, ms3_shards: Path, tmp_path: Path) -> None:
    """Also where the manifest lists it by its true size and hash, as that of a stranger would."""
    marker = tmp_path / "marker"
    evil = folder(run, 4) / name if name != "best.json" else run / "checkpoints/best.json"
    torch.save(Malicious(marker), evil) if sealed else evil.write_bytes(pickle.dumps(Malicious(marker)))
    if sealed and name in (WEIGHTS, STATE_FILE, "config.yaml"):
        facts = checkpoint.manifest(folder(run, 4))
        facts["files"][name] = {"bytes": evil.stat().st_size, "sha256": sha256_of(evil)}
        (folder(run, 4) / MANIFEST).write_text(checkpoint.sealed_manifest(facts))
    for step in (1, 2, 3):
        shutil.rmtree(folder(run, step))
    at = str(folder(run, 4) if name != "best.json" else run)
    harmless = name in ("config.json", "best.json") or (sealed and name == "config.yaml")
    resumed = avs_dist(arguments(ms3_shards, run, "--train.resume", "true", "--train.max_steps", "5"))
    assert resumed == (0 if harmless else 2)
    if resumed:  # else it is another one now
        loads = avs_dist(["export", at, "--out", str(tmp_path / "out")])
        assert loads == (0 if name in (STATE_FILE, "config.yaml") else 2)
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # but it would have
        pickle.loads(pickle.dumps(Malicious(tmp_path)))


def test_torch_load_is_told_to_load_nothing_but_tensors() -> None:
    calls = []
    for path in (
        path for package in ("avs_dist", "kernels", "launch", "shards") for path in (ROOT / package).rglob("*.py")
    ):
        if "torch.load" in (source := path.read_text()):
            found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
            calls += [(path, ast.unparse(node)) for node in found if ast.unparse(node.func) == "torch.load"]
    assert calls
    assert [(path, call) for path, call in calls if "weights_only=True" not in call] == []

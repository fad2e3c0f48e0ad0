"""train.fork_from: a run that goes on from all that another one has, with settings of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avs_dist import checkpoint, trainer
from avs_dist.config import Config
from avs_dist.launch.train import parse_config

ROOT = Path(__file__).resolve().parents[1]


def config(shards: Path, out: Path, *more: str) -> Config:
    return parse_config(
        ["--config", str(ROOT / "configs/demo_unicode.yaml"), "--data.shards", str(shards), "--data.workers", "0",
         "--train.global_batch", "8", "--train.max_steps", "6", "--train.eval_every", "3", "--train.log_every", "1",
         "--train.keep_last", "9", "--train.out_dir", str(out), *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints after three and six."""
    out = tmp_path_factory.mktemp("whole")
    trainer.train(config(cmg_shards, out))
    return out


def logged(run: Path, phase: str = "train") -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if record["phase"] == phase}


def test_fork_with_the_same_settings_is_the_same_run(whole: Path, cmg_shards: Path, tmp_path: Path) -> None:
    source = checkpoint.root(whole) / "step-000003"
    told = []
    trainer.train(config(cmg_shards, tmp_path, "--train.fork_from", str(source)), told=lambda *each: told.append(each))
    ours, theirs = (load_file(checkpoint.root(run) / "step-000006/model.safetensors") for run in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [sorted((checkpoint.root(run) / "step-000006/state").iterdir()) for run in (tmp_path, whole)]
    for mine, other in zip(*states, strict=True):
        assert mine.read_bytes() == other.read_bytes()
    assert sorted(logged(tmp_path)) == [4, 5, 6]
    [(step, metrics, newest)] = told  # nothing of what the other run has measured
    assert (step, newest) == (6, checkpoint.root(tmp_path) / "step-000006")
    assert metrics == {name: logged(whole, "eval")[6][name] for name in metrics}


def test_fork_takes_settings_of_its_own(whole: Path, cmg_shards: Path, tmp_path: Path) -> None:
    source = checkpoint.root(whole) / "step-000003"
    fork = ("--train.fork_from", str(source), "--optim.lr", "2e-4", "--loss.unicode.cpc", "0.5")
    trainer.train(config(cmg_shards, tmp_path, *fork))
    assert logged(tmp_path)[4]["lr"] == pytest.approx(2e-4)
    assert logged(whole)[4]["lr"] == pytest.approx(1e-3)
    assert logged(tmp_path)[4]["cpc"] == pytest.approx(0.5 * logged(whole)[4]["cpc"], rel=1e-5)
    # afterwards it goes on from its own checkpoints, and the other run may be gone
    told = []
    again = (*fork[2:], "--train.fork_from", str(tmp_path / "gone"), "--train.resume", "true", "--train.max_steps", "7")
    trainer.train(config(cmg_shards, tmp_path, *again), told=lambda *each: told.append(each[0]))
    assert told == [6, 7]  # a run that is resumed tells also what it goes on from


def test_forks_that_cannot_be_are_refused(whole: Path, cmg_shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "step-000003"
    shutil.copytree(checkpoint.root(whole) / "step-000003", source)

    def refused(message: str, *more: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer.train(config(cmg_shards, tmp_path / "run", "--train.fork_from", str(source), *more))

    refused("holds another model", "--model.unicode.dim", "32")
    refused("other data .seed differ", "--seed", "1")
    refused("two different starts", "--train.init_from", str(whole))
    (state,) = (source / "state").iterdir()
    state.write_bytes(state.read_bytes()[:-1])
    refused(re.escape(f"{state} is missing or has another size"))
    shutil.rmtree(source / "state")
    refused("has weights, but not what the optimiser remembers")
    shutil.rmtree(source)
    refused("no checkpoint in")

"""Sweeps from end to end, on the Ray that the command starts: early stopping, a population, faults, several workers."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from avs_dist.launch import shards, synth
from avs_dist.launch.train import parse_config

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 400.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 clips of 32 x 32."""
    root = tmp_path_factory.mktemp("clips")
    size = ["--size", "32"]
    assert synth.main(["--out", str(root / "clips"), "--setting", "ms3", "--clips", "40", "--seed", "1", *size]) == 0
    source = ["build", "--source", "avsbench-ms3", "--root", str(root / "clips"), "--out", str(root / "shards"), *size]
    assert shards.main(source) == 0
    return root / "shards"


class Sweep:
    """A sweep of demo.yaml in a folder; it can be run, killed and resumed."""

    def __init__(self, clips: Path, out: Path, sweep: dict[str, Any], *more: str) -> None:
        self.out = out
        file = out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump({"objective": "f_score", **sweep}))
        self._words = [
            "--config", "configs/demo.yaml", "--sweep", str(file), "--out", str(out), "--data.shards", str(clips),
            "--data.workers", "0", "--optim.warmup_steps", "0", "--optim.schedule", "constant",
            "--train.log_every", "1", *more,
        ]  # fmt: skip

    def start(self, *more: str) -> psutil.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.out.with_suffix(".log"), "a") as log:
            command = [sys.executable, "-m", "avs_dist.launch.cli", "sweep", *self._words, *more]
            return psutil.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, process_group=0)

    def run(self, *more: str) -> list[dict[str, str]]:
        """To its end; the rows of trials.csv."""
        started = self.start(*more)
        try:
            assert started.wait(DEADLINE_S) == 0, self.told()[-5000:]
        finally:
            killed(started)
        with open(self.out / "trials.csv", newline="") as file:
            return list(csv.DictReader(file))

    def told(self) -> str:
        return self.out.with_suffix(".log").read_text()

    def trial(self, number: int) -> Path:
        return self.out / "trials" / f"{number:04d}"

    def log(self, number: int, name: str = "log.txt") -> str:
        return (self.trial(number) / name).read_text(errors="replace")

    def evaluations(self, number: int) -> list[tuple[int, float]]:
        records = map(json.loads, (self.trial(number) / "metrics.jsonl").read_text().splitlines())
        return [(record["step"], record["f_score"]) for record in records if record["phase"] == "eval"]

    def saved(self, number: int) -> Callable[[], bool]:
        return lambda: any(self.trial(number).glob("checkpoints/step-*/manifest.json"))


def killed(started: psutil.Popen) -> None:
    """End what is left of a sweep."""
    if started.is_running():
        for each in [*started.children(recursive=True), started]:
            each.kill()
        started.wait()


def until(condition: Callable[[], Any], sweep: Sweep, started: psutil.Popen) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, sweep.told()[-5000:]
        assert started.poll() is None, sweep.told()[-5000:]
        time.sleep(0.05)
    return found


def writes(started: psutil.Popen, log: Path) -> psutil.Process | None:
    """The process of a sweep that prints into a log."""
    for each in started.children(recursive=True):
        try:
            if any(file.path == str(log) for file in each.open_files()):
                return each
        except psutil.Error:
            continue
    return None


def test_halving_stops_bad_trials_and_beats_a_bad_config(clips: Path, tmp_path: Path) -> None:
    space = {"optim.lr": "loguniform(1e-5, 1e-2)"}
    asha = {"samples": 8, "baseline": True, "scheduler": {"name": "asha", "reduction": 2}, "space": space}
    steps = ("--train.max_steps", "20", "--train.eval_every", "10")
    sweep = Sweep(clips, tmp_path / "sweep", asha, *steps, "--optim.lr", "1e-7")
    rows = sweep.run()
    states = [row["state"] for row in rows]
    assert len(rows) == 9
    assert set(states) == {"stopped", "complete"}
    assert states.count("stopped") >= 2
    for row in rows:
        assert int(row["last_step"]) == (10 if row["state"] == "stopped" else 20)
        assert row["starts"] == "1"
    best = max(rows, key=lambda row: float(row["best"]))
    assert float(best["best"]) > float(rows[0]["best"]) + 0.02
    assert rows[0]["optim.lr"] == ""
    assert "engine=DeepSpeedEngine" in sweep.log(1)
    assert list(sweep.trial(1).glob("tensorboard/**/events*"))
    config = parse_config(["--config", str(sweep.out / "best.yaml")])
    assert config.optim.lr == float(best["optim.lr"])
    assert config.data.shards == str(clips)
    page = (sweep.out / "sweep.html").read_text()
    assert "better than the default" in page
    assert f"trial {best['number']}" in page
    assert f"best: trial {int(best['number']):04d}" in sweep.told()


def test_population_changes_its_settings_and_improves(clips: Path, tmp_path: Path) -> None:
    space = {"optim.lr": "loguniform(1e-6, 1e-2)"}
    steps = ("--train.max_steps", "30", "--train.eval_every", "15")
    pbt = {"samples": 4, "scheduler": {"name": "pbt", "synchronous": True}, "space": space}
    sweep = Sweep(clips, tmp_path / "sweep", pbt, *steps)
    rows = sweep.run()
    assert [row["state"] for row in rows] == 4 * ["complete"]
    forks = [json.loads((sweep.trial(number) / "trial.json").read_text())["forks"] for number in range(4)]
    assert any(forks)
    for number in (number for number in range(4) if forks[number]):
        fork, own = forks[number][-1], dict(sweep.evaluations(number))
        source = dict(sweep.evaluations(fork["source"]))
        assert fork["step"] == 15
        assert own[15] < source[15]  # it was worse
        assert own[30] > own[15]
        assert float(rows[number]["optim.lr"]) == fork["settings"]["optim.lr"]
        assert f"forked from {sweep.trial(number)}/fork-{len(forks[number])}/step-{fork['step']:06d}" in sweep.log(
            number
        )
        logged = [json.loads(line) for line in (sweep.trial(number) / "metrics.jsonl").read_text().splitlines()]
        rates = {record["step"]: record["lr"] for record in logged if record["phase"] == "train"}
        assert rates[fork["step"] + 1] == pytest.approx(fork["settings"]["optim.lr"])
    first = max(dict(sweep.evaluations(number))[15] for number in range(4))
    assert max(float(row["best"]) for row in rows) > first


def test_killed_trial_and_killed_sweep_go_on_where_they_were(clips: Path, tmp_path: Path) -> None:
    space = {"optim.lr": "choice(1e-3)", "model.neck.channels": "grid(32, 3000000)"}
    steps = ("--train.max_steps", "60", "--train.eval_every", "10")
    sweep = Sweep(clips, tmp_path / "sweep", {"scheduler": {"name": "none"}, "space": space}, *steps)
    log = sweep.trial(0) / "log.txt"
    started = sweep.start()
    try:
        until(sweep.saved(0), sweep, started)
        trial = writes(started, log)
        assert trial is not None
        trial.kill()
        until(lambda: "resumed from" in sweep.log(0), sweep, started)
        trial = writes(started, log)
        assert trial is not None
        started.kill()
        started.wait()
        psutil.wait_procs([trial], DEADLINE_S)  # it ends with the sweep
    finally:
        killed(started)
    started = sweep.start("--resume")  # which is told to end, as batch systems do, with all of its group
    try:
        until(lambda: sweep.log(0).count("resumed from") == 2, sweep, started)
        os.killpg(started.pid, signal.SIGTERM)
        assert started.wait(60) == 75
        assert "go on with --resume" in sweep.told()
    finally:
        killed(started)
    rows = sweep.run("--resume")
    assert [row["state"] for row in rows] == ["complete", "out of memory"]
    assert "can't allocate memory" in rows[1]["reason"]
    assert int(rows[0]["starts"]) == 4
    assert rows[1]["starts"] == "1"
    assert [step for step, _ in sweep.evaluations(0)] == list(range(10, 61, 10))
    assert sweep.log(0).count("from step 0") == 1  # never twice


def test_two_workers_train_a_trial_and_survive_the_loss_of_one(clips: Path, tmp_path: Path) -> None:
    alone = {"resources": {"workers": 2}, "space": {"optim.lr": "choice(1e-3)"}, "scheduler": {"name": "none"}}
    sweep = Sweep(clips, tmp_path / "sweep", alone, "--train.max_steps", "40", "--train.eval_every", "10")
    started = sweep.start()
    try:
        until(sweep.saved(0), sweep, started)
        rank = writes(started, sweep.trial(0) / "log-1.txt")
        assert rank is not None
        rank.kill()
        assert started.wait(DEADLINE_S) == 0, sweep.told()[-5000:]
    finally:
        killed(started)
    with open(sweep.out / "trials.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["state"], row["last_step"], row["starts"]) == ("complete", "40", "2")
    assert "engine=DeepSpeedEngine zero_stage=1 world_size=2" in sweep.log(0, "log-0.txt")
    assert "resumed from" in sweep.log(0, "log-0.txt")
    assert [step for step, _ in sweep.evaluations(0)] == [10, 20, 30, 40]

"""Two ranks and damaged clips: they lose what one process loses, stop together, and never wait for each other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_damage_in_training import ROOT, arguments, flip_bits, records, write_set

from avs_dist.launch.train import main as train

pytestmark = pytest.mark.slow
DEADLINE_S = 120


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of 40 clips have a flipped bit."""
    folder = tmp_path_factory.mktemp("data") / "set"
    write_set(folder, clips=40)
    flip_bits(folder, [3, 17, 25, 38])
    return folder


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers that end with the test, and all that they started."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in [*family, process]:
            each.kill()


def launch(launched: list[subprocess.Popen[str]], shards: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [*torchrun, "launch/train.py", *arguments(shards, out, *more)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    launched.append(process)
    return process


def test_two_ranks_lose_what_one_process_loses(damaged: Path, launched: list[subprocess.Popen[str]], tmp_path: Path):
    more = ("--train.max_steps", "12", "--data.max_damaged", "0.2")
    train(arguments(damaged, tmp_path / "one", *more))
    process = launch(launched, damaged, tmp_path / "two", *more)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err[-3000:]
    reports = [json.loads((tmp_path / run / "damaged.json").read_text()) for run in ("one", "two")]
    assert [report["counts"] for report in reports] == [{"checksum": 4}] * 2
    assert sorted(c["name"] for c in reports[0]["clips"]) == sorted(c["name"] for c in reports[1]["clips"])
    losses = [[line["loss"] for line in records(tmp_path / run, "train")] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert err.count("damaged clip (checksum:") == 1


def test_above_the_bound_all_ranks_stop_with_one_report(
    damaged: Path, launched: list[subprocess.Popen[str]], tmp_path: Path
):
    """At any time one rank alone has seen the damage that is too much."""
    process = launch(launched, damaged, tmp_path / "run", "--data.max_damaged", "0.05", "--engine.zero_stage", "2")
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    messages = re.findall(r"[34] of 40 clips of train.*", err)
    assert len(set(messages)) == 1, err[-3000:]
    assert "data.max_damaged=0.05 allows 2; the first of each kind: checksum: shard" in messages[0]
    steps = len(records(tmp_path / "run", "train"))
    last = json.loads((tmp_path / "run/checkpoints/last.json").read_text())
    assert last["step"] == steps > 0


def test_a_killed_loading_process_ends_all_ranks_with_its_rank_named(
    damaged: Path, launched: list[subprocess.Popen[str]], tmp_path: Path
):
    more = ("--data.max_damaged", "0.2", "--data.workers", "1", "--train.max_steps", "1000")
    process = launch(launched, damaged, tmp_path / "run", *more)
    end = time.monotonic() + DEADLINE_S
    while not ((tmp_path / "run/metrics.jsonl").exists() and len(records(tmp_path / "run", "train")) > 3):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)
    ranks = {int(p.environ()["RANK"]): p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()}
    loaders = [p for p in ranks[1].children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(loaders) == 1
    os.kill(loaders[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "rank 1 has no batch: RuntimeError: DataLoader worker" in err, err[-3000:]

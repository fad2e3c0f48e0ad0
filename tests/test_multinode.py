"""Trainings over several hosts by the real launcher: `deepspeed --hostfile`, pdsh, ssh and gloo between addresses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hosts
import pytest
from hosts import Host, wait_until

from avs_dist.launch.train import main as train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
DEADLINE_S = 120

pytestmark = [pytest.mark.multinode, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.running(3, tmp_path_factory.mktemp("cluster")) as started:
        yield started


class Job(NamedTuple):
    """A run of the launcher on the first of its hosts."""

    launcher: subprocess.Popen[str]
    log: Path
    ranks: list[Host]

    def ends(self) -> int:
        """Exit code of the launcher; by then no process of the training is left on any of its hosts."""
        try:
            code = self.launcher.wait(DEADLINE_S)
            wait_until(lambda: not any(host.processes("train.py") for host in self.ranks), "all ranks end", DEADLINE_S)
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            raise AssertionError(f"{error}: {self.told()}") from error
        return code

    def reaches(self, run: Path, steps: int) -> None:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: len(losses(run)) >= steps or self.launcher.poll() is not None, "", DEADLINE_S)
        assert len(losses(run)) >= steps, self.told()

    def told(self) -> str:
        return self.log.read_text(errors="replace")


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    return [
        "--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(shards), "--data.workers", "0",
        "--train.out_dir", str(out), "--train.max_steps", str(STEPS), "--train.log_every", "1",
        "--train.eval_every", "0", "--train.global_batch", "6", "--optim.schedule", "constant", *more,
    ]  # fmt: skip


@contextmanager
def launched(ranks: list[Host], folder: Path, options: list[str]) -> Iterator[Job]:
    """`deepspeed` over the hosts, one rank on each."""
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in ranks))
    (folder / "environment").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    bin = Path(sys.executable).parent
    command = [str(bin / "deepspeed"), "--hostfile", str(folder / "hostfile"), "launch/train.py", *options]
    env = {**os.environ, "PATH": f"{bin}{os.pathsep}{hosts.PATH}", "DS_ENV_FILE": str(folder / "environment")}
    log = folder / "log"
    with open(log, "w") as out:
        launcher = subprocess.Popen(
            ranks[0].command(command, ROOT), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True
        )
    try:
        yield Job(launcher, log, ranks)
    finally:
        for host in ranks:
            for pid in [*host.processes("deepspeed"), *host.processes("train.py")]:
                with contextlib.suppress(ProcessLookupError):  # it went with another one
                    os.kill(pid, signal.SIGKILL)
        launcher.wait(30)


def losses(run: Path) -> list[float]:
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [line["loss"] for line in lines if line["phase"] == "train"]


@pytest.fixture(scope="module")
def alone(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, never interrupted."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(arguments(ms3_shards, run)) == 0
    return run


def assert_same_run(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    [scores, of_alone] = [json.loads((r / "metrics.jsonl").read_text().splitlines()[-1]) for r in (run, alone)]
    assert scores.pop("phase") == of_alone.pop("phase") == "eval"
    assert scores == pytest.approx(of_alone, rel=1e-3)


def test_a_launcher_that_is_told_to_stop_leaves_a_run_that_goes_on(
    cluster: list[Host], ms3_shards: Path, alone: Path, tmp_path: Path
) -> None:
    """The launcher closes its connections at once, and only then signals the ranks: they save unheard."""
    pair, run = cluster[:2], tmp_path / "run"
    command = arguments(ms3_shards, run, "--engine.zero_stage", "3", "--train.resume", "true")

    with launched(pair, tmp_path, command) as job:
        job.reaches(run, 3)
        [launcher] = pair[0].processes("bin/deepspeed --hostfile")
        os.kill(launcher, signal.SIGTERM)
        assert job.ends() == 1, job.told()
    assert "ranks: 0 on node-a 10.88.0.1, 1 on node-b 10.88.0.2" in job.told()
    done = len(losses(run))
    assert 3 <= done < STEPS

    with launched(pair, tmp_path, command) as job:
        assert job.ends() == 0, job.told()
    assert f"resumed from {run / 'checkpoints'}/step-{done:06d}" in job.told()
    assert_same_run(run, alone)


def test_a_cut_link_and_a_killed_rank_end_the_job_and_lose_nothing(
    cluster: list[Host], ms3_shards: Path, alone: Path, tmp_path: Path
) -> None:
    """The same command goes on each time with the newest checkpoint, at last on three hosts."""
    pair, run = cluster[:2], tmp_path / "run"
    more = ("--engine.zero_stage", "3", "--train.save_every", "1", "--train.resume", "true")
    command = arguments(ms3_shards, run, *more)

    with launched(pair, tmp_path, [*command, "--engine.timeout_s", "10"]) as job:
        job.reaches(run, 3)
        pair[1].cut()
        try:
            code = job.ends()
        finally:
            pair[1].mend()
    assert code not in (0, 75), job.told()
    assert "engine=DeepSpeedEngine zero_stage=3 world_size=2" in job.told()
    assert "server node-b not responding" in job.told()
    assert "rank 0 lost another rank while" in job.told()
    done = len(losses(run))
    assert done < STEPS

    with launched(pair, tmp_path, command) as job:
        job.reaches(run, done + 1)  # early, so that it does not end first
        [rank] = pair[1].processes("-u launch/train.py")
        os.kill(rank, signal.SIGKILL)
        code = job.ends()
    assert code not in (0, 75), job.told()
    assert "resumed from" in job.told()
    assert "rank 0 lost another rank while" in job.told()
    assert len(losses(run)) < STEPS

    with launched(cluster, tmp_path, command) as job:
        assert job.ends() == 0, job.told()
    assert "engine=DeepSpeedEngine zero_stage=3 world_size=3" in job.told()
    assert "ranks: 0 on node-a 10.88.0.1, 1 on node-b 10.88.0.2, 2 on node-c 10.88.0.3" in job.told()
    assert "resumed from" in job.told()
    assert_same_run(run, alone)

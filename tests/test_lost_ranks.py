"""A rank that is killed or stands still: the others end soon with a clear error, nothing is left, the run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from free_ranks import ROOT, launched, started
from test_damage_in_training import arguments, records, write_set
from test_preemption import LONG, begin

from avs_dist.checkpoint import find_checkpoint
from avs_dist.launch.checks.collective import free_port
from avs_dist.launch.train import main as train

END_S = 90.0  # a launcher gives its ranks 30 s, on a machine that has other work


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_set(tmp_path_factory.mktemp("data") / "set", clips=20).directory)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "workers"), [("deepspeed", "0"), ("torchrun", "1")])
def test_a_killed_rank_ends_the_run_which_goes_on_when_started_again(
    launcher: str, workers: str, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = arguments(shards, out, *LONG, "--train.save_every", "2", "--data.workers", workers)
    with launched(launcher, settings) as run:  # type: ignore[arg-type]  # one of the two
        begin(run, out, 5)
        loading = [child for rank in run.ranks() for child in rank.children(recursive=True)]
        assert (len(loading) > 0) == (workers != "0")
        run.ranks()[1].send_signal(signal.SIGKILL)
        assert run.ends(END_S) not in (0, 75)
        _, left = psutil.wait_procs(run.family(), timeout=20)
        assert left == []
        assert "rank 0 lost another rank while" in run.told() or "SIGTERM" in run.told()
    saved = int(find_checkpoint(out).name.removeprefix("step-"))
    assert saved >= 4
    more = ("--train.resume", "true", "--train.max_steps", str(saved + 2))
    assert train(arguments(shards, out, *more)) == 0  # by one rank
    assert [line["step"] for line in records(out, "train")] == list(range(1, saved + 3))


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up_in_time(shards: Path, tmp_path: Path) -> None:
    """Such as a host that has lost its network: no connection is closed."""
    out = tmp_path / "run"
    command = ["launch/train.py", *arguments(shards, out, *LONG, "--engine.timeout_s", "8")]
    with started(command, command) as (first, second):
        begin(first, out, 3)
        second.process.send_signal(signal.SIGSTOP)
        assert first.ends(END_S) == 1
        told = first.told().splitlines()[-1]
        assert re.search(r"train: failed: rank 0 lost another rank while [a-z]+ing .*Timed out waiting 10000ms", told)
        second.process.send_signal(signal.SIGCONT)
        assert second.ends(END_S) in (1, 69)  # it finds the others gone, or itself late


STUCK = """
import time
from avs_dist.watchdog import phase, watching
with watching(1.0), phase("evaluating step 8"):
    with phase("reading a"):
        time.sleep(1.2)
    time.sleep(1.0)
    print("in time", flush=True)
    time.sleep(60.0)
"""


def test_a_rank_that_is_stuck_says_where_and_ends() -> None:
    """An inner phase that ends gives the outer one its time again."""
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 69
    assert done.stdout == "in time\n"
    assert "rank 0 is stuck while evaluating step 8: more than 1.5 s (engine.timeout_s=1)" in done.stderr
    assert 'File "<string>", line 9 in <module>' in done.stderr


ALONE = "from avs_dist import world; world.LATEST_START_S = 2.0; world.start(1.0)"


def test_a_rank_that_never_comes_is_not_waited_for_without_end() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True, timeout=60)
    told = done.stderr.splitlines()[-1]
    assert re.search(r"RuntimeError: rank 0 of 2 has not met all others.*1/2 clients joined.*avs-dist doctor", told), (
        told
    )


def test_a_stuck_rank_ends_where_nobody_reads_what_it_says() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        run.stderr.close()
        assert run.wait(60) == 69

"""Data that do not come: the run ends in time on all ranks, and says which rank waits for which shard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faulty_server import Fault, serving
from free_ranks import ROOT, started
from test_damage_in_training import arguments, write_set

from avs_dist.checkpoint import find_checkpoint
from avs_dist.damage import NoBatchError
from avs_dist.launch.train import main as train

END_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips in two shards for training, 8 in one for validation."""
    return Path(write_set(tmp_path_factory.mktemp("data") / "set", clips=40).directory)


def stalling(split: str = "train") -> dict[str, list[Fault]]:
    """Nothing comes behind the first 1000 bytes of any shard of the split."""
    return {f"{split}-0000{i}.tar": [Fault(stall_at=1000)] * 50 for i in range(2)}


@pytest.mark.slow
def test_a_stuck_read_of_one_rank_ends_both(folder: Path, tmp_path: Path) -> None:
    """Without loading processes the main thread of rank 1 waits for its shard, rank 0 for rank 1."""
    more = ("--engine.timeout_s", "8", "--train.resume", "true")
    local = ["launch/train.py", *arguments(folder, tmp_path / "run", *more)]
    with serving(folder, stalling()) as server:
        cache = ("--data.cache_dir", str(tmp_path / "cache"))
        remote = ["launch/train.py", *arguments(server.url, tmp_path / "run", *more, *cache)]  # type: ignore[arg-type]
        with started(local, remote) as (first, second):
            assert second.ends(END_S) == 69
            assert first.ends(END_S) == 1
            shard = f"rank 1 is stuck while reading {server.url}/train-0000"
            assert shard in second.told()
            assert "(clips train0" in second.told()
            assert "more than 8 s (engine.timeout_s=8)" in second.told()
            assert "rank 0 lost another rank while waiting for the batches of the other ranks" in first.told()


@pytest.mark.slow
def test_a_stuck_loading_process_ends_the_run_and_is_ended(folder: Path, tmp_path: Path) -> None:
    more = ("--engine.timeout_s", "10", "--data.workers", "1", "--data.cache_dir", str(tmp_path / "cache"))
    with serving(folder, stalling("val")) as server:
        loading = set(multiprocessing.active_children())
        told = (
            r"rank 0 has no batch: .*timed out after 10.*engine\.timeout_s=10\); to be read: http.*/val-00000\.tar \(cl"
        )
        with pytest.raises(NoBatchError, match=told):
            train(arguments(server.url, tmp_path / "run", "--train.max_steps", "2", *more))  # type: ignore[arg-type]
        for process in set(multiprocessing.active_children()) - loading:
            process.join(10)
            assert not process.is_alive()
    assert find_checkpoint(tmp_path / "run").name == "step-000002"  # what was done is not lost


ORPHAN = """
import sys, time
from pathlib import Path
from avs_dist.agreed_batches import AgreedBatches
from avs_dist.launch.train import parse_config
from avs_dist.loader import TrainBatches
from avs_dist.shards.index import ShardIndex

if __name__ == "__main__":
    config = parse_config(sys.argv[1:])
    batches = iter(TrainBatches(config, ShardIndex.load(config.data.shards)))
    print("started", flush=True)
    next(batches)
"""


@pytest.mark.slow
def test_loading_processes_do_not_outlive_a_killed_rank_where_they_are_stuck(folder: Path, tmp_path: Path) -> None:
    """Nor do they die of a signal that is meant for their parent."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with serving(folder, stalling()) as server:
        more = ("--data.workers", "1", "--data.cache_dir", str(tmp_path / "cache"))
        command = [sys.executable, str(script), *arguments(server.url, tmp_path / "run", *more)]  # type: ignore[arg-type]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
            try:
                end = time.monotonic() + END_S
                while not any(request.name.startswith("train") for request in server.requests):
                    assert parent.poll() is None
                    assert time.monotonic() < end
                    time.sleep(0.1)
                children = psutil.Process(parent.pid).children(recursive=True)
                [loader] = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    os.kill(loader.pid, number)
                time.sleep(1)
                assert loader.is_running()
                assert loader.status() != psutil.STATUS_ZOMBIE
            finally:
                parent.kill()
            loader.wait(20)

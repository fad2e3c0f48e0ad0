"""Trainings by worlds of different sizes in a row, all forked off one process, so that all cost one start.

`test_elastic` says which. A job is a training, a checkpoint that is loaded and saved again at once, or a training in
which one rank has no room for its file.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate.utils  # noqa: F401 (what each rank would take seconds for)
import deepspeed  # noqa: F401
import torch
import transformers.integrations.deepspeed  # noqa: F401

from avs_dist import checkpoint, engine, resuming, world
from avs_dist.launch.train import parse_config
from avs_dist.saving import Saver
from avs_dist.shards.children import die_with_parent
from avs_dist.systems import build_system
from avs_dist.trainer import train

AT_ONCE = 4  # ranks
LIMIT_S = 550  # after which nothing of this is left


def main(jobs: list[dict[str, Any]]) -> None:
    """Run the jobs in their order; each waits for its source."""
    running = dict[int, str]()  # the job by process
    for job in jobs:
        while running and (len(running) + job["ranks"] > AT_ONCE or job["source"] in running.values()):
            _reap(running)
        if job["source"]:
            there, here = (Path(job[place]) / "checkpoints" / job["step"] for place in ("source", "out"))
            shutil.copytree(there, here)
        for rank in range(job["ranks"]):
            facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
            os.environ.update({name: str(value) for name, value in {**facts, "MASTER_PORT": job["port"]}.items()})
            child = os.fork()
            if child == 0:
                _run(job)
            running[child] = job["out"]
    while running:
        _reap(running)


def _reap(running: dict[int, str]) -> None:
    """Wait for a rank; where it has failed, all end."""
    child, status = os.wait()
    out = running.pop(child)
    if status:
        for other in running:
            os.kill(other, signal.SIGKILL)
        raise SystemExit(f"{out} ended with {os.waitstatus_to_exitcode(status)}")


def _run(job: dict[str, Any]) -> None:
    """What a forked rank does, to its end."""
    die_with_parent()
    try:
        JOBS[job["kind"]](job["arguments"])
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _save_again(arguments: list[str]) -> None:
    """What the optimisers remember after the load, as a checkpoint in the folder "again"."""
    config = parse_config(arguments)
    device = world.start()
    previous = resuming.newest_checkpoint(config.train.out_dir)
    assert previous is not None
    torch.manual_seed(1)  # nothing may be left of these weights
    system = build_system(config, load_pretrained=False)
    checkpoint.load_weights(system, previous)
    running = engine.Engine(system, config, device)
    step = resuming.restore(running, previous)
    again = parse_config([*arguments, "--train.out_dir", str(Path(config.train.out_dir) / "again")])
    data = checkpoint.data_state(previous)
    assert data is not None
    saver = Saver(running, again, best_by="miou", facts={})
    saver.save(step, {}, data)
    assert saver.failure is None, saver.failure
    engine.stop()


def _one_rank_in_trouble(arguments: list[str]) -> None:
    """Rank 1 cannot write in the second step; of the newest checkpoint, what it will check is damaged."""
    step, unlimited = engine.Engine.train_step, resource.RLIM_INFINITY

    def train_step(running: engine.Engine, batches: list[Any], number: int) -> dict[str, float]:
        if world.rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if number == 1 else unlimited, unlimited))
        return step(running, batches, number)

    engine.Engine.train_step = train_step  # type: ignore[method-assign]
    newest = train(parse_config(arguments))
    if os.environ["RANK"] == "1":
        data = bytearray((newest / checkpoint.WEIGHTS).read_bytes())
        data[-1] ^= 1
        (newest / checkpoint.WEIGHTS).write_bytes(data)


JOBS = {
    "train": lambda arguments: train(parse_config(arguments)),
    "save again": _save_again,
    "one rank in trouble": _one_rank_in_trouble,
}

if __name__ == "__main__":
    signal.alarm(LIMIT_S)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    main(json.loads(Path(sys.argv[1]).read_text()))

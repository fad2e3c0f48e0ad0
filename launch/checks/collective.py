"""A real all_reduce over the process group that training uses.

    python -m avs_dist.launch.checks.collective       one rank of it; RANK, WORLD_SIZE and MASTER_* as of a launcher

A process of its own for each rank: one that hangs, or that a library aborts, is a row of the table and no more.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, size

BYTES = 16 * 2**20
REPEATS = 4
ANSWER = "avs-dist-collective "
# of a run that this process may be part of
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def main() -> int:
    """Join the group, sum, and print one line of JSON: backend, ranks, seconds of one sum."""
    import torch
    import torch.distributed as dist

    from avs_dist import world

    device = world.start()
    mine = torch.full((BYTES // 4,), float(world.rank() + 1), device=device)
    world.all_reduce_sum(mine)
    world.barrier()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        total = world.all_reduce_sum(mine)
        right = bool((total == sum(range(1, world.world_size() + 1))).all())  # also waits for the device
    seconds = (time.perf_counter() - begin) / REPEATS
    answer = {"backend": dist.get_backend(), "ranks": world.world_size(), "seconds": seconds, "right": right}
    if device.type == "cuda":
        answer["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    print(ANSWER + json.dumps(answer), flush=True)
    world.stop()
    return 0


def start(variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """One rank in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | dict(variables)
    command = [sys.executable, "-m", "avs_dist.launch.checks.collective"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    """What a rank answered; {"error": ...} where it broke or did not end in time."""
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no answer within {limit_s:g} s: the ranks do not reach each other"}
    answers = [line.removeprefix(ANSWER) for line in stdout.splitlines() if line.startswith(ANSWER)]
    if answers:
        return json.loads(answers[-1])
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return {"error": (lines[-1].strip() if lines else f"exit code {process.returncode}")[:300]}


def local(options: Options) -> list[Row]:
    """`options.ranks` processes on this machine."""
    variables: list[dict[str, str]] = [{}]
    if options.ranks > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(options.ranks)}
        shared["LOCAL_WORLD_SIZE"] = shared["WORLD_SIZE"]
        variables = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(options.ranks)]
    processes = [start(each) for each in variables]
    # all are read at once: one that says much (NCCL_DEBUG=INFO) would wait for its reader, and the others for it
    with ThreadPoolExecutor(len(processes)) as readers:
        outcomes = readers.map(lambda process: outcome(process, options.within_s), processes)
        return [row("collective", list(outcomes))]


def row(name: str, outcomes: list[dict[str, Any]]) -> Row:
    """The finding from what the ranks answered, in rank order."""
    errors = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(outcomes) if "error" in answer]
    if errors:
        advice = "try GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME=<interface>, a firewall, NCCL_DEBUG=INFO"
        return Row(FAIL, name, "; ".join(errors), advice)
    if not all(answer["right"] for answer in outcomes):
        return Row(FAIL, name, "the sum is wrong", "this must never be: check the network and its drivers")
    first = outcomes[0]
    backend = first["backend"] + (f" {first['nccl']}" if "nccl" in first else "")
    ranks, seconds = first["ranks"], max(answer["seconds"] for answer in outcomes)
    if ranks != len(outcomes):
        return Row(
            FAIL, name, f"{len(outcomes)} ranks were started, {ranks} met", "check MASTER_ADDR and the interfaces"
        )
    found = f"{backend}, {ranks} rank{'s' if ranks > 1 else ''}: the sum of {size(BYTES)} is right"
    if ranks == 1:
        return Row(OK, name, f"{found}; --ranks N also measures the way between processes")
    # every rank sends and receives 2 (n - 1) / n of the buffer
    rate = 2 * (ranks - 1) / ranks * BYTES / seconds
    found += f"; {seconds * 1e3:.1f} ms, {rate / 1e9:.2f} GB/s to and from each rank"
    slow = rate < 50e6
    return Row(WARN if slow else OK, name, found, "slow: is it the wrong interface?" if slow else "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit(main())

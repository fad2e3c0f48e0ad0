"""Ranks without a launcher: processes that find each other, and that nothing but the test ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(command: list[str], ranks: int) -> Iterator[list[subprocess.Popen[str]]]:
    """`command` (without the interpreter) as that many ranks; what is left of them ends with the block."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    for each in [*family(process), *([psutil.Process(process.pid)] if process.poll() is None else [])]:
        if each.is_running():
            each.kill()
    process.wait()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that a process that still runs has started."""
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []

"""Starts the ranks of a benchmark, all on this host, by the launcher that a training would be started with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path


def launch(program: str, words: Sequence[str], ranks: int, limit_s: float, told: Callable[[str], None]) -> str:
    """Run a Python file in `ranks` processes until they end.

    Args:
        program: the file; it reads RANK, WORLD_SIZE and so on, and passes over the word --local_rank=N.
        words: of its command line.
        limit_s: after which it is ended.
        told: gets each line that the ranks print.

    Returns:
        Why it failed, as far as its last lines say; empty where it did not.
    """
    lines: list[str] = []
    command = [*launcher(ranks), program, *words]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launched:
        limit = threading.Timer(limit_s, launched.terminate)
        limit.start()
        assert launched.stdout is not None
        for line in launched.stdout:
            lines.append(line.strip())
            told(lines[-1])
        limit.cancel()
    if launched.returncode == 0:
        return ""
    return ([line for line in lines if "Error" in line] or lines or [f"exit code {launched.returncode}"])[-1]


def launcher(ranks: int) -> list[str]:
    """What stands before the program: Python, or the deepspeed launcher of this environment."""
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port)]


def environment() -> dict[str, str]:
    """One thread for each rank, whatever their number: threads share sums out, and round them in another order."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**env, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"}

"""Starts the ranks of a benchmark, all on this host, by the launcher that a training would be started with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from avs_dist.launch.checks.collective import free_port
from avs_dist.shards.children import die_with_parent
from avs_dist.shards.files import write_text


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
    late = threading.Event()

    def stop() -> None:
        late.set()
        end_group(launched)

    with start_group([*launcher(ranks), program, *words], stdout=subprocess.PIPE, text=True) as launched:
        limit = threading.Timer(limit_s, stop)
        limit.daemon = True
        limit.start()
        try:
            for line in launched.stdout or ():
                lines.append(line.strip())
                told(lines[-1])
            launched.wait()
        finally:
            limit.cancel()
            end_group(launched)
    if late.is_set():
        return f"not done within {limit_s:g} s"
    if launched.returncode == 0:
        return ""
    return ([line for line in lines if "Error" in line] or lines or [f"exit code {launched.returncode}"])[-1]


def launch_plan(program: ModuleType, plan: Mapping[str, Any], file: Path, ranks: int, limit_s: float, bar: tqdm) -> str:
    """`launch` a module that takes its work from a plan (`planned`) and prints its DONE for each part of it."""
    write_text(file, json.dumps(plan))
    assert program.__file__ is not None

    def told(line: str) -> None:
        bar.update(program.DONE in line)

    return launch(program.__file__, [str(file)], ranks, limit_s, told)


def planned() -> dict[str, Any]:
    """The plan that this process was launched with."""
    [file] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return json.loads(Path(file).read_text())


def start_group(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """A process of its own group, for `end_group`, that dies with this one; its errors go where its output goes."""
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
        **options,
    )  # fmt: skip


def end_group(launched: subprocess.Popen[Any]) -> None:
    """Kill it and all that it has started: a launcher on one host may go without its ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()


def launcher(ranks: int) -> list[str]:
    """What stands before the program: Python, or the deepspeed launcher of this environment."""
    if ranks == 1:
        return [sys.executable]
    return ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def environment() -> dict[str, str]:
    """One thread for each rank, whatever their number: threads share sums out, and round them in another order."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**env, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"}


def device() -> str:
    """What the ranks compute on, see `world.start`."""
    return "cuda" if torch.cuda.is_available() else "cpu"

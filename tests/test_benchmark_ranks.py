"""Benchmarks leave no rank behind, whatever becomes of its launcher."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from avs_dist.launch.benchmarks.ranks import end_group, launch, start_group

RANK = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
LAUNCHER = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {RANK!r}])"


@pytest.fixture
def program(tmp_path: Path) -> str:
    """Ends at once; what it has started goes on, and keeps its output open."""
    path = tmp_path / "launcher.py"
    path.write_text(LAUNCHER)
    return str(path)


def _is_gone(pid: int, deadline_s: float = 20.0) -> bool:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_the_limit_ends_a_rank_that_its_launcher_has_left(program: str) -> None:
    lines: list[str] = []
    assert launch(program, [], 1, 3.0, lines.append) == "not done within 3 s"
    assert _is_gone(int(lines[0]))


def test_a_group_ends_though_its_first_process_has(program: str) -> None:
    with start_group([sys.executable, program], stdout=subprocess.PIPE, text=True) as launched:
        rank = int(launched.stdout.readline())
        assert launched.wait() == 0
        assert psutil.pid_exists(rank)
        end_group(launched)
        assert _is_gone(rank)

"""Ranks of real runs: under a launcher, or without one, so that nothing but the test ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from avs_dist.launch.checks.collective import free_port
from avs_dist.shards.children import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 240.0
_MARK = "AVS_TEST_RUN"


class Launched:
    """A process that runs, with all that it has started; what it tells goes to a file. It dies with the tests."""

    def __init__(self, command: list[str], log: Path, extra: dict[str, str] | None = None) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | (extra or {})
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        env[_MARK] = self._mark
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        self._log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip

    def told(self) -> str:
        return self._log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """All processes that it has started, directly or not, and that still run: they have its environment."""
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(_MARK) == self._mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes in the order of their ranks."""
        found = {}
        for each in self.family():
            command = " ".join(each.cmdline())
            if "train.py" in command and "RANK" in (env := each.environ()) and "spawn_main" not in command:
                found[int(env["RANK"])] = each
        return [found[rank] for rank in sorted(found)]

    def launcher_of_ranks(self) -> psutil.Process:
        """The process that started the ranks; `deepspeed` itself is the parent of that."""
        parent = self.ranks()[0].parent()
        assert parent is not None
        return parent

    def until(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, self.told()[-5000:]
            assert self.process.poll() is None, self.told()[-5000:]
            time.sleep(0.1)

    def ends(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit code."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.told()[-5000:]}") from None

    def kill(self) -> None:
        for each in self.family():
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@contextmanager
def launched(launcher: Literal["deepspeed", "torchrun"], arguments: list[str]) -> Iterator[Launched]:
    """launch/train.py as two ranks; nothing is left of them behind the block."""
    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    with tempfile.TemporaryDirectory() as folder:
        run = Launched([*start, "launch/train.py", *arguments], Path(folder, "log"))
        try:
            yield run
        finally:
            run.kill()


@contextmanager
def started(*commands: list[str]) -> Iterator[list[Launched]]:
    """Ranks without a launcher, each by its own command (without the interpreter)."""
    ranks = str(len(commands))
    world = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for rank, command in enumerate(commands):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": ranks}
            runs.append(Launched([sys.executable, *command], Path(folder, f"log{rank}"), world | place))
        try:
            yield runs
        finally:
            for run in runs:
                run.kill()

"""One life of a training that `bench kills` starts, watches and kills: what it is doing, seen from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil

from avs_dist import checkpoint
from avs_dist.checkpoint import MANIFEST
from avs_dist.launch import train
from avs_dist.launch.benchmarks.ranks import end_group, launcher, start_group

# of the trainings, which must reach many saves and evaluations in few steps
SAVE_EVERY, EVAL_EVERY, KEEP_LAST = 2, 4, 1
RHYTHM = (
    *("--train.save_every", str(SAVE_EVERY), "--train.eval_every", str(EVAL_EVERY), "--train.log_every", "1"),
    *("--train.keep_last", str(KEEP_LAST), "--train.resume", "true"),
)
START, STEP, EVALUATION, SAVE = "start", "training step", "evaluation", "save"
RENAMED, PRUNING = f"{SAVE}: renamed", f"{SAVE}: pruning"
PHASES = (
    *(START, STEP, EVALUATION),
    *(f"{SAVE}: {part}" for part in ("copying the state", "writing", "sealed")),
    *(RENAMED, PRUNING),
)
# what is aimed at: a save from its begin, and its short end, in which pointers are changed and old folders deleted
TARGETS = (START, STEP, EVALUATION, SAVE, RENAMED, PRUNING)
POLL_S = 0.002
_TAIL_BYTES = 16384


class Moment(NamedTuple):
    """When to kill: `delay_s` after the first `target` that is seen once the life has done `steps`."""

    target: str
    steps: int
    delay_s: float
    victim: int | None  # rank, or all processes at once

    @staticmethod
    def drawn(rng: Random, seconds: dict[str, float], ranks: int) -> Moment:
        """A random one.

        Args:
            seconds: that each target usually lasts.
        """
        target = rng.choice(TARGETS)
        victim = rng.randrange(ranks) if ranks > 1 and rng.random() < 0.5 else None
        return Moment(target, rng.randint(1, EVAL_EVERY), rng.uniform(0, seconds[target]), victim)


class Life:
    """One start of the training.

    Args:
        settings: of `avs-dist train`.
        out: train.out_dir.
        log: what the training prints goes there.
    """

    def __init__(self, settings: Sequence[str], ranks: int, out: Path, log: Path) -> None:
        self.out, self.log = out, log
        self.root = checkpoint.root(out)
        self.first = _step(self._newest())
        self._begun, self.start_s = time.monotonic(), 0.0  # the seconds until the first step was seen to be done
        self._old_records = _inode(out / "metrics.jsonl")
        self._litter = set(self._unsealed())
        command = [*launcher(ranks), train.__file__, *settings, *RHYTHM, "--train.out_dir", str(out)]
        with log.open("wb") as file:
            self.process = start_group(command, stdout=file)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def reach(self, moment: Moment, limit_s: float) -> bool:
        """Wait for the moment; False where the life ended before.

        Raises:
            TimeoutError: it did not come, and the life did not end either.
        """
        limit = time.monotonic() + limit_s
        while moment.target != START and self.is_alive():
            if time.monotonic() > limit:
                raise TimeoutError(f"no {moment.target} within {limit_s:g} s: {self.last_words()}")
            steps = self.steps()
            if steps and not self.start_s:
                self.start_s = time.monotonic() - self._begun
            if steps >= moment.steps and is_part(self.phase(), moment.target):
                break
            time.sleep(POLL_S)
        time.sleep(moment.delay_s)
        return self.is_alive()

    def kill(self, victim: int | None, deadline_s: float) -> tuple[str, float | None]:
        """SIGKILL to one rank, or to all processes at once where it is None or not yet there.

        Returns the phase it fell into and, of a single rank, the seconds until all others had ended.

        Raises:
            TimeoutError: others lived on after the deadline; they are killed now.
        """
        family = psutil.Process(self.process.pid).children(recursive=True) if self.is_alive() else []
        rank = next((p for p in family if victim is not None and f"--local_rank={victim}" in _command(p)), None)
        if rank is None:
            self.end()
            return self.phase(), None
        rank.kill()
        killed, phase = time.monotonic(), self.phase()
        while self.is_alive() or any(map(_runs, family)):
            if time.monotonic() - killed > deadline_s:
                self.end()
                raise TimeoutError(f"rank {victim} was killed, and after {deadline_s:g} s others still ran")
            time.sleep(0.05)
        return phase, time.monotonic() - killed

    def wait(self, limit_s: float) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it did not end.
        """
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not at its end within {limit_s:g} s: {self.last_words()}") from error

    def end(self) -> None:
        """Whatever became of it, nothing of it runs on."""
        end_group(self.process)

    def steps(self) -> int:
        """Steps that this life has done."""
        return max(self._last_step() - self.first, 0)

    def phase(self) -> str:
        """What it is doing, or was when it was killed, by the files it has written."""
        done = self._last_step()
        if done <= self.first:
            return START
        staged = list(self.root.glob(".step-*.partial"))
        if staged:
            return f"{SAVE}: {'sealed' if any((s / MANIFEST).is_file() for s in staged) else 'writing'}"
        there, newest = checkpoint.newest_first(self.root), self._newest()
        if newest != _pointed(self.root / "last.json"):
            return RENAMED
        if set(there[KEEP_LAST:]) - {_pointed(self.root / "best.json")} or self._unsealed() - self._litter:
            return PRUNING
        if done % EVAL_EVERY == 0 and not any(r["phase"] == "eval" and r["step"] == done for r in self._records()):
            return EVALUATION
        if done % SAVE_EVERY == 0 and _step(newest) < done:
            return f"{SAVE}: copying the state"
        return STEP

    def last_words(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "failed" in line]
        return (errors or lines or ["nothing was printed"])[-1][:300]

    def _last_step(self) -> int:
        return max((r["step"] for r in self._records() if r["phase"] == "train"), default=0)

    def _records(self) -> list[dict[str, Any]]:
        """The last ones of this life; none until it has taken over what the former has logged."""
        path = self.out / "metrics.jsonl"
        if _inode(path) in (None, self._old_records):
            return []
        return [json.loads(line) for line in _tail(path).splitlines() if line.startswith("{") and line.endswith("}")]

    def _newest(self) -> Path | None:
        return next(iter(checkpoint.newest_first(self.root)), None)

    def _unsealed(self) -> set[Path]:
        return {path for path in self.root.glob("step-*") if not (path / MANIFEST).is_file()}


def usual_seconds(life: Life, limit_s: float) -> dict[str, float]:
    """Let a life come to its end, and see how long each target lasts in it."""
    spent = dict.fromkeys(TARGETS, 0.0)
    times: Counter[str] = Counter()
    begin = now = time.monotonic()
    phase = ""
    while life.is_alive():
        if now - begin > limit_s:
            raise TimeoutError(f"the uninterrupted run took more than {limit_s:g} s: {life.last_words()}")
        time.sleep(POLL_S)
        before, now = now, time.monotonic()
        phase, former = life.phase(), phase
        for target in TARGETS:
            if is_part(phase, target):
                spent[target] += now - before
                times[target] += not is_part(former, target)
    return {target: spent[target] / max(times[target], 1) for target in TARGETS}


def is_part(phase: str, target: str) -> bool:
    return phase.startswith(target)


def _pointed(pointer: Path) -> Path | None:
    with contextlib.suppress(ValueError):  # damage is for the checks to tell
        return checkpoint.pointed(pointer)
    return None


def _step(folder: Path | None) -> int:
    return int(folder.name.removeprefix("step-")) if folder else 0


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.is_file() else None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

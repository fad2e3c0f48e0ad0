"""What became of the trials of a sweep: the one form that its tables, files and page are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["waiting", "running", "complete", "stopped", "failed", "out of memory", "invalid"]


@dataclass(frozen=True)
class Fork:
    """A population based step: the trial went on from the state of another one with changed settings."""

    step: int
    source: int  # number of the other trial
    settings: dict[str, Any]  # from here on


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Args:
        number: from 0 on, in the order they were drawn.
        label: of its row, in a table of fixed rows; else empty.
        state: "stopped" early by the scheduler; "invalid" are settings that do not fit together.
        reason: why it failed, in one line; else empty.
        settings: what it has of the search space, by dotted config key; a key whose condition is not met is not there.
        scores: step and objective of every evaluation, in the order of steps.
        mode: whether high or low scores are good.
        seconds: that it has trained, over all its starts.
        starts: how often it was started; more than once after a fault, a fork, or an interrupted sweep.
        forks: the oldest first.
        published: the scores that a paper gives its row, one for each of its columns; empty for rows of ours.
        folder: the run: config.yaml, metrics.jsonl, checkpoints, tensorboard.
    """

    number: int
    state: State
    settings: dict[str, Any]
    mode: Literal["max", "min"]
    folder: Path
    label: str = ""
    reason: str = ""
    scores: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    starts: int = 0
    forks: tuple[Fork, ...] = field(default=())
    published: tuple[float, ...] = ()

    @property
    def step(self) -> int:
        """Of its last evaluation."""
        return self.scores[-1][0] if self.scores else 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best evaluation with its present settings; None where there is none that is finite."""
        begin = self.forks[-1].step if self.forks else -1
        there = [(step, score) for step, score in self.scores if step > begin and math.isfinite(score)]
        return _best(there, self.mode)

    @property
    def last(self) -> float | None:
        return self.scores[-1][1] if self.scores else None


def best_of(outcomes: list[Outcome]) -> Outcome | None:
    """The trial with the best score, the first of equals; None where no trial has one."""
    there = [(outcome.number, outcome.best[1]) for outcome in outcomes if outcome.best]
    best = _best(there, outcomes[0].mode) if there else None
    return next(outcome for outcome in outcomes if outcome.number == best[0]) if best else None


def _best(scores: list[tuple[int, float]], mode: str) -> tuple[int, float] | None:
    sign = 1 if mode == "max" else -1
    return max(scores, key=lambda pair: sign * pair[1], default=None)

"""Writes down in the study what becomes of the trials while they run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from avs_dist.launch.sweeps import trial
from avs_dist.launch.sweeps.board import Board
from avs_dist.launch.sweeps.plan import Plan
from avs_dist.launch.sweeps.study import Study

STEP, SECONDS = "step", "seconds"  # what a trial reports beside its metrics
_WORST = 1e30  # in the place of a score that is not finite: a trial that diverged is the worst, for every scheduler


def finite(score: float, mode: Literal["max", "min"]) -> float:
    """A score for schedulers."""
    return score if math.isfinite(score) else -_WORST if mode == "max" else _WORST


class Watch:
    """Hears of the trials, by their numbers."""

    def __init__(self, plan: Plan, study: Study, board: Board) -> None:
        self._plan, self._study, self._board = plan, study, board

    def look(self, active: Sequence[int]) -> None:
        self._board.show(active)

    def result(self, number: int, result: Mapping[str, Any]) -> None:
        self._study.report(number, result[STEP], result[self._plan.objective])
        self._study.worked(number, result[SECONDS])

    def started(self, number: int) -> None:
        self._study.started(number)

    def ended(self, number: int, row: str, settings: Mapping[str, Any], last: Mapping[str, Any]) -> None:
        """It came to its end, or was stopped.

        Args:
            last: its last result.
        """
        folder = self._study.trial_folder(number)
        if lack := trial.told(folder, trial.OUT_OF_MEMORY):
            self._study.end(number, "out of memory", lack)
        elif refusal := trial.told(folder, trial.REFUSED):
            self._study.failed(number, refusal)
        elif last.get(STEP, 0) < self._plan.max_steps(row, settings):
            self._study.end(number, "stopped")
        else:
            self._study.end(number, "complete")

    def failed(self, number: int, text: str) -> None:
        """No retry helped.

        Args:
            text: the error.
        """
        last = (text.strip() or "no reason was told").splitlines()[-1]
        if "OutOfMemory" in text:  # Ray ends a worker before the host has no memory left
            self._study.end(number, "out of memory", last)
        else:
            self._study.failed(number, last)

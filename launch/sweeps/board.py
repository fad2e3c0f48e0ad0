"""The live table of a sweep in the terminal, and its files, written again as results come."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from avs_dist.interruption import EXIT_CODE
from avs_dist.launch.sweeps.charts import settings_keys
from avs_dist.launch.sweeps.files import write_hparams, write_results
from avs_dist.launch.sweeps.outcome import Outcome, best_of
from avs_dist.launch.sweeps.plan import Plan
from avs_dist.launch.sweeps.study import BASELINE, Study
from avs_dist.launch.sweeps.summary import Summary

ENDED = ("complete", "stopped", "failed", "out of memory", "invalid")
_LOOK_S, _FILES_S = 1.0, 15.0  # seconds between two looks at the trials, and between two writings of the files
_MOST_ROWS = 30  # of the live table: the best, and those that run


class Board:
    """Shows the trials as they are; a context, within which a terminal has the table at its end."""

    def __init__(self, plan: Plan, study: Study) -> None:
        self._plan, self._study = plan, study
        self._console = Console(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._begun, self._looked, self._written = time.time(), 0.0, time.monotonic()
        self._told: dict[int, str] = {}

    def __enter__(self) -> Board:
        plan, outcomes = self._plan, self._study.outcomes()
        over = [each for each in outcomes if each.state in ENDED and each.state != "failed"]
        left = len(outcomes) - len(over)
        self._print(
            f"{plan.sweep.title or 'sweep'}: {len(outcomes)} trials, {left} to run, by {plan.sweep.searcher} search "
            f"and scheduler {plan.sweep.scheduler.name}; {plan.objective} should be {_WISH[plan.sweep.mode]}"
        )
        self._print(f"all of it is in {plan.out}: sweep.html shows it at any time")
        self._told = {each.number: each.state for each in over}
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since this start of the sweep."""
        return time.time() - self._begun

    def show(self, active: Sequence[int]) -> None:
        """Bring all up to date, unless that was done a moment ago."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        outcomes = self._study.outcomes(active)
        self._tell_ended(outcomes)
        if self._console.is_terminal:
            self._live.update(self._table(outcomes), refresh=True)
        if time.monotonic() - self._written > _FILES_S:
            self._write(outcomes, "running")
        self._looked = time.monotonic()

    def finish(self, out_of_time: bool) -> int:
        """Tell what came of it; returns the exit code of the command.

        Args:
            out_of_time: it was ended by sweep.hours.
        """
        outcomes = self._study.outcomes()
        self._tell_ended(outcomes)
        left = [each for each in outcomes if each.state not in ENDED]
        failed = [each for each in outcomes if each.state == "failed"]
        self._write(outcomes, "interrupted" if left and not out_of_time else "finished")
        self._console.print(self._table(outcomes))
        best = best_of(outcomes)
        if best and best.best:
            step, score = best.best
            self._print(f"best: trial {best.number:04d} with {self._plan.objective} {score:.4f} after step {step}")
            self._print(shlex.join(["avs-dist", "train", "--config", str(self._plan.out / "best.yaml")]))
        if failed:
            self._print(f"{len(failed)} trials failed, the first: {failed[0].reason}; --resume tries them again")
        if left:
            why = "sweep.hours is over" if out_of_time else "interrupted"
            self._print(f"{why}, with {len(left)} trials to run or to end: go on with --resume")
            return 0 if out_of_time else EXIT_CODE
        return 0 if best else 1

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _tell_ended(self, outcomes: list[Outcome]) -> None:
        for each in outcomes:
            if each.state in ENDED and each.number not in self._told:
                self._told[each.number] = each.state
                write_hparams(each, self._plan.objective)
                place = f"trial {each.number:04d} {each.label}".strip()
                score = f"{self._plan.objective} {each.best[1]:.4f}" if each.best else ""
                told = ", ".join(filter(None, (score, _shown(each.settings), each.reason)))
                self._print(f"{place} {each.state} at step {each.step}: {told}")

    def _write(self, outcomes: list[Outcome], state: Literal["running", "finished", "interrupted"]) -> None:
        plan = self._plan
        baseline = next((each for each in outcomes if each.label == BASELINE), None)
        summary = Summary(
            title=plan.sweep.title,
            objective=plan.objective,
            mode=plan.sweep.mode,
            command=plan.command,
            scheduler=plan.sweep.scheduler.name,
            searcher=plan.sweep.searcher,
            state=state,
            started=self._begun,
            ended=None if state == "running" else time.time(),
            baseline=baseline.best[1] if baseline and baseline.best else None,
            published=plan.sweep.published,
            init_from=plan.bases[""].train.init_from if "" in plan.bases else None,
        )
        write_results(plan.out, summary, outcomes)
        self._written = time.monotonic()

    def _table(self, outcomes: list[Outcome]) -> Table:
        counts: dict[str, int] = {}
        for each in outcomes:
            counts[each.state] = counts.get(each.state, 0) + 1
        table = Table(title=", ".join(f"{count} {state}" for state, count in counts.items()), title_justify="left")
        keys = settings_keys(outcomes)
        labels = any(each.label for each in outcomes)
        for name in ("trial", *(["row"] if labels else []), "state", "step", self._plan.objective, "best", *keys):
            table.add_column(name)
        for each in _worth_showing(outcomes, self._plan.sweep.mode):
            last = f"{each.last:.4f}" if each.last is not None else ""
            best = f"{each.best[1]:.4f}" if each.best else ""
            values = [_short(each.settings[key]) if key in each.settings else "" for key in keys]
            row = [each.label] if labels else []
            table.add_row(f"{each.number:04d}", *row, each.state, str(each.step), last, best, *values)
        return table


_WISH = {"max": "high", "min": "low"}


def _worth_showing(outcomes: list[Outcome], mode: str) -> list[Outcome]:
    """Those that run and the best, by number."""
    sign = -1 if mode == "max" else 1
    order = sorted(outcomes, key=lambda each: (each.state != "running", sign * each.best[1] if each.best else 1e30))
    return sorted(order[:_MOST_ROWS], key=lambda each: each.number)


def _shown(settings: dict[str, Any]) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

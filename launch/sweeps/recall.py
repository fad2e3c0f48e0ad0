"""Schedulers begin anew when a sweep is resumed: here they hear what the ended trials have told before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avs_dist.launch.sweeps.outcome import Outcome
from avs_dist.launch.sweeps.watch import STEP, finite


@dataclass(frozen=True)
class _Past:
    """All of a trial that a scheduler looks at."""

    trial_id: str


def recall(scheduler: Any, outcomes: list[Outcome], objective: str) -> None:
    """Let a scheduler of Tune live through the ended trials again."""
    for outcome in outcomes:
        if outcome.state not in ("complete", "stopped") or not outcome.scores:
            continue
        past = _Past(f"{outcome.number:04d}")
        results = [{STEP: step, objective: finite(score, outcome.mode)} for step, score in outcome.scores]
        scheduler.on_trial_add(None, past)
        for result in results:
            scheduler.on_trial_result(None, past, result)
        scheduler.on_trial_complete(None, past, results[-1])

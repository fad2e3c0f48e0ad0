"""What schedulers know of the ended trials when a sweep is resumed: with the schedulers of Tune themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from avs_dist.launch.sweeps.outcome import Outcome, State
from avs_dist.launch.sweeps.recall import recall

COMMON: dict[str, Any] = {"time_attr": "step", "metric": "miou"}


def outcome(number: int, *scores: float, state: State = "complete", mode: Any = "max") -> Outcome:
    evaluations = tuple((10 * k, score) for k, score in enumerate(scores, start=1))
    return Outcome(number, state, {}, mode, Path("gone"), scores=evaluations)


def decided(scheduler: TrialScheduler, step: int, score: float) -> str:
    """What becomes of a new trial."""
    trial = SimpleNamespace(trial_id="new") if isinstance(scheduler, ASHAScheduler) else "new"
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    return scheduler.on_trial_result(None, trial, {"step": step, "miou": score})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_new_trials_are_compared_with_those_before(name: str) -> None:
    def scheduler() -> TrialScheduler:
        if name == "asha":
            return ASHAScheduler(**COMMON, mode="max", max_t=40, grace_period=10, reduction_factor=2)
        return MedianStoppingRule(**COMMON, mode="max", grace_period=10, min_time_slice=sys.maxsize)

    assert decided(scheduler(), 10, 0.1) == TrialScheduler.CONTINUE  # with nothing to compare
    there = scheduler()
    past = [outcome(k, 0.3 + k / 10, 0.5) for k in range(3)]
    recall(there, [*past, outcome(3, 0.9, state="failed"), outcome(4)], "miou")
    assert decided(there, 10, 0.1) == TrialScheduler.STOP
    there = scheduler()
    recall(there, past, "miou")
    assert decided(there, 10, 0.6) == TrialScheduler.CONTINUE


def test_trials_that_diverged_were_the_worst() -> None:
    there = ASHAScheduler(**COMMON, mode="min", max_t=40, grace_period=10, reduction_factor=2)
    recall(there, [outcome(k, float("nan"), mode="min") for k in range(3)], "miou")
    assert decided(there, 10, 7.0) == TrialScheduler.CONTINUE
    there = ASHAScheduler(**COMMON, mode="min", max_t=40, grace_period=10, reduction_factor=2)
    recall(there, [outcome(k, 5.0, mode="min") for k in range(3)], "miou")
    assert decided(there, 10, 7.0) == TrialScheduler.STOP

"""What schedulers know of the ended trials when a sweep is resumed: with the schedulers of Tune themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from avs_dist.config import Config, TrainConfig
from avs_dist.launch.sweep import scheduler_of
from avs_dist.launch.sweeps.outcome import Outcome, State
from avs_dist.launch.sweeps.plan import Plan
from avs_dist.launch.sweeps.settings import SchedulerConfig, SweepConfig


class New:
    """All that schedulers look at of a trial."""

    trial_id = "new"


def outcome(number: int, *scores: float, state: State = "complete", mode: Any = "max") -> Outcome:
    evaluations = tuple((10 * k, score) for k, score in enumerate(scores, start=1))
    return Outcome(number, state, {}, mode, Path("gone"), scores=evaluations)


def decided(scheduler: TrialScheduler, step: int, score: float) -> str:
    """What becomes of a new trial."""
    trial: Any = New()
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    return scheduler.on_trial_result(None, trial, {"step": step, "miou": score})  # type: ignore[arg-type]


def made(name: Any, past: list[Outcome], mode: Any = "max") -> TrialScheduler:
    """The scheduler of a sweep of trainings of 40 steps, with an evaluation every 10."""
    train = TrainConfig(max_steps=40, eval_every=10)
    sweep = SweepConfig(space={"seed": 1}, mode=mode, scheduler=SchedulerConfig(name, reduction=2))
    return scheduler_of(Plan(sweep, Path("gone"), "", (), {"": Config(train=train)}, "miou"), past)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_new_trials_are_compared_with_those_before(name: str) -> None:
    past = [outcome(k, 0.3 + k / 10, 0.5) for k in range(3)]
    assert decided(made(name, []), 10, 0.1) == TrialScheduler.CONTINUE  # with nothing to compare
    more = [outcome(3, 0.9, state="failed"), outcome(4)]
    assert decided(made(name, [*past, *more]), 10, 0.1) == TrialScheduler.STOP
    assert decided(made(name, past), 10, 0.6) == TrialScheduler.CONTINUE


def test_trials_that_diverged_were_the_worst() -> None:
    diverged = [outcome(k, float("nan"), mode="min") for k in range(3)]
    one_good = [*diverged, outcome(3, 5.0, mode="min")]
    assert decided(made("asha", one_good, "min"), 10, 7.0) == TrialScheduler.CONTINUE
    assert decided(made("asha", [outcome(k, 5.0, mode="min") for k in range(3)], "min"), 10, 7.0) == TrialScheduler.STOP

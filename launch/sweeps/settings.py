"""What a sweep is: the typed form of configs/sweeps/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from avs_dist.model_config import at_least


@dataclass(frozen=True)
class SchedulerConfig:
    """Which trials go on.

    Args:
        name: "asha" (successive halving, as results come) and "median" (worse than the median of the others at the same
            step) stop bad trials early; "pbt" (population based training) lets bad ones go on from the state of good
            ones with changed settings; "none" lets all train to the end.
        grace_steps: Steps that every trial makes before it can be stopped; 0: until its first evaluation.
        reduction: At each level asha lets the best 1/reduction go on; levels are reduction times as far apart.
        interval_steps: Steps between the decisions of pbt; 0: at every evaluation.
        synchronous: pbt decides when all trials have come to the interval, not when each does: it compares equal
            steps, but they wait for each other.
        quantile: Share of the trials that pbt counts as bad, and as good.
        resample: How often pbt draws a setting anew, instead of changing it by a factor of 0.8 or 1.2.
    """

    name: Literal["asha", "pbt", "median", "none"] = "asha"
    grace_steps: int = 0
    reduction: float = 4
    interval_steps: int = 0
    synchronous: bool = False
    quantile: float = 0.25
    resample: float = 0.25

    def __post_init__(self) -> None:
        at_least("sweep.scheduler.grace_steps", self.grace_steps, 0)
        at_least("sweep.scheduler.interval_steps", self.interval_steps, 0)
        if self.reduction <= 1:
            raise ValueError(f"sweep.scheduler.reduction={self.reduction}: must be more than 1")
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"sweep.scheduler.quantile={self.quantile}: must be more than 0, and 0.5 at most")
        if not 0 <= self.resample <= 1:
            raise ValueError(f"sweep.scheduler.resample={self.resample}: must be between 0 and 1")


@dataclass(frozen=True)
class ResourcesConfig:
    """What one trial takes.

    Args:
        workers: Ranks that train it together, by Ray Train and DeepSpeed.
        cpus: Cores of each.
        gpus: GPUs of each (default: one, where there are any); 0.5 lets two trials share one.
        concurrent: Trials at the same time; 0: as many as fit.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float | None = None
    concurrent: int = 0

    def __post_init__(self) -> None:
        at_least("sweep.resources.workers", self.workers, 1)
        at_least("sweep.resources.concurrent", self.concurrent, 0)
        at_least("sweep.resources.gpus", self.gpus or 0, 0)
        if self.cpus <= 0:
            raise ValueError(f"sweep.resources.cpus={self.cpus}: must be more than 0")
        if self.workers > 1 and self.gpus not in (None, 0, 1):
            raise ValueError(f"sweep.resources.gpus={self.gpus}: each of several workers has one GPU, or none")


@dataclass(frozen=True)
class RowConfig:
    """A row of a table: settings by name.

    Args:
        configs: Files that are laid over those of --config; relative to the sweep's file.
        settings: Further values by dotted key.
        published: The paper's scores, in the order of sweep.published.
    """

    configs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    published: tuple[float, ...] = ()


@dataclass(frozen=True)
class SweepConfig:
    """A sweep.

    Args:
        title: What it is for, in a few words.
        objective: The metric of the evaluations that counts, as in metrics.jsonl (default: what makes a checkpoint the
            best: miou, of codebooks pairing).
        mode: Whether it should be high or low.
        samples: Trials; with grid(...) or rows so many of each combination.
        hours: No trial is started or goes on after so long; 0: no limit.
        baseline: Also train the config as it is, as the first trial.
        searcher: "random", or "tpe" (tree of Parzen estimators, of Optuna), which learns from the trials before.
        seed: Of what is drawn.
        retries: How often a trial is started again after a fault, from its last checkpoint.
        scheduler: Which trials go on.
        resources: What a trial takes.
        space: What is tried of which config key, see above.
        rows: The rows of a table, by name; each is a trial.
        published: Headings of the paper's scores.
    """

    title: str = ""
    objective: str = ""
    mode: Literal["max", "min"] = "max"
    samples: int = 1
    hours: float = 0
    baseline: bool = False
    searcher: Literal["random", "tpe"] = "random"
    seed: int = 0
    retries: int = 2
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    space: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, RowConfig] = field(default_factory=dict)
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("sweep.samples", self.samples, 1)
        at_least("sweep.retries", self.retries, 0)
        at_least("sweep.hours", self.hours, 0)
        at_least("sweep.seed", self.seed, 0)
        if not self.space and not self.rows:
            raise ValueError("nothing to try: a sweep needs a space, or rows (--sweep FILE)")
        if self.baseline and self.rows:
            raise ValueError("sweep.baseline: a table of rows has its own row for the config as it is")
        if self.scheduler.name == "pbt" and (self.rows or self.baseline or self.samples < 2):
            raise ValueError("pbt changes settings of a population: it needs 2 sweep.samples, no rows and no baseline")

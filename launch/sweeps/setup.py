"""What every trial needs to know of its sweep, wherever it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from avs_dist.config import to_dict
from avs_dist.launch.sweeps.plan import Plan
from avs_dist.launch.sweeps.settings import ResourcesConfig
from avs_dist.launch.sweeps.trial import folder_of
from avs_dist.launch.sweeps.watch import SECONDS, STEP, finite


@dataclass(frozen=True)
class Setup:
    """Sent to the trials.

    Args:
        out: folder of the sweep; all hosts have the same files there.
        bases: config of each row.
        gpus: of each worker.
        cwd: where the sweep was started, which paths in configs are relative to.
    """

    out: str
    bases: dict[str, dict[str, Any]]
    objective: str
    mode: Literal["max", "min"]
    resources: ResourcesConfig
    gpus: float
    cwd: str

    @staticmethod
    def of(plan: Plan, there: Mapping[str, float]) -> Setup:
        """
        Args:
            there: what the cluster has, by the names of Ray.

        Raises:
            ValueError: a trial does not fit in.
        """
        resources = plan.sweep.resources
        setup = Setup(
            out=str(plan.out.absolute()),
            bases={row: to_dict(base) for row, base in plan.bases.items()},
            objective=plan.objective,
            mode=plan.sweep.mode,
            resources=resources,
            gpus=min(1.0, there.get("GPU", 0.0)) if resources.gpus is None else resources.gpus,
            cwd=os.getcwd(),
        )
        if not setup.at_once(there):
            has = ", ".join(f"{there.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
            takes = " and ".join(f"{amount:g} {name}" for name, amount in setup.bundle().items())
            raise ValueError(f"a trial of {resources.workers} workers with {takes} each does not fit: there are {has}")
        return setup

    def bundle(self) -> dict[str, float]:
        """What one worker takes, by the names of Ray."""
        return {"CPU": self.resources.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def at_once(self, there: Mapping[str, float]) -> int:
        """How many trials fit in at the same time."""
        workers = self.resources.workers
        return int(min(there.get(name, 0.0) // (workers * amount) for name, amount in self.bundle().items()))

    def room(self, plan: Plan, there: Mapping[str, float]) -> int:
        """How many trials may be begun and not ended, so that none is drawn long before it runs.

        Raises:
            ValueError: a population would not be trained together.
        """
        asked, fitting, samples = self.resources.concurrent, self.at_once(there), plan.sweep.samples
        if plan.sweep.scheduler.name != "pbt":
            # one more waits, which lets a cluster grow; but those of Ray Train take their resources after they begin
            return asked or (fitting + 1 if self.resources.workers == 1 else fitting)
        most = asked or (samples if self.resources.workers == 1 else fitting)  # single workers can take turns
        if most < samples:
            raise ValueError(
                f"pbt trains all its {samples} trials side by side, but {most} of {self.resources.workers} workers fit "
                "or are allowed: use fewer samples, or single workers, which can take turns"
            )
        return samples

    def result(self, step: int, metrics: Mapping[str, float], seconds: float, max_steps: int) -> dict[str, Any]:
        """What a trial reports to Tune of an evaluation.

        Raises:
            ValueError: the objective is not among its metrics.
        """
        if self.objective not in metrics:
            raise ValueError(f"sweep.objective={self.objective} is not measured; there are {', '.join(metrics)}")
        return {
            **metrics,
            self.objective: finite(metrics[self.objective], self.mode),
            STEP: step,
            SECONDS: seconds,
            "done": step >= max_steps,  # for Tune: not to be paused, or forked, at its end
        }

    def folder(self, number: int) -> Path:
        return folder_of(Path(self.out), number)

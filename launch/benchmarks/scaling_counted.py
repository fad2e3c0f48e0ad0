"""What one training step computes and sends: counted, not assumed; the input of the model in `scaling_model`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from avs_dist.launch.benchmarks import memory
from avs_dist.launch.benchmarks.memory_rank import Case, random_batches
from avs_dist.launch.benchmarks.traffic import Sent
from avs_dist.systems import build_system

# of configs/tpavi_ms3.yaml, by `avs-dist bench scaling --count`
DEFAULT = Path(__file__).with_name("scaling_counted.json")
RANKS = 2  # that are counted; what each hands over as whole tensors does not depend on their number


@dataclass(frozen=True)
class Counted:
    """A network.

    gflop_per_clip: of forward and backward pass.
    sent:           collectives of a step, by ZeRO stage.
    """

    name: str
    parameters: int
    gflop_per_clip: float
    precision: str
    sent: dict[int, list[Sent]]

    @classmethod
    def load(cls, path: Path) -> Counted:
        """
        Raises:
            ValueError: the file holds something else.
        """
        try:
            values = json.loads(path.read_text())
            sent = {int(stage): [Sent(**row) for row in rows] for stage, rows in values.pop("sent").items()}
            return cls(**values, sent=sent)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not what `avs-dist bench scaling --count` writes: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "sent": {stage: [row._asdict() for row in rows] for stage, rows in self.sent.items()}}


def count(files: Sequence[str], limit_s: float, size: int = 224, stages: Sequence[int] = range(4)) -> Counted:
    """Count a step of the network of these config files, by two ranks on this host, in bf16.

    Args:
        limit_s: longest time for the ranks.
        size: pixels of a side, for the operations.

    Raises:
        RuntimeError: a training failed.
    """
    cases = {stage: Case(tuple(files), RANKS, stage, "bf16") for stage in stages}  # type: ignore[arg-type]  # 0 to 3
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as root:
        found = memory.measure(list(cases.values()), Path(root), limit_s)
    failed = [f"{case.name}: {found[case]['failed']}" for case in cases.values() if "failed" in found[case]]
    if failed:
        raise RuntimeError("; ".join(failed))
    sent = {stage: [Sent(**row) for row in found[case]["sent"]] for stage, case in cases.items()}
    first = cases[next(iter(stages))]
    name = " + ".join(Path(file).stem for file in files)
    return Counted(name, found[first]["parameters"], _gflop(first, size), "bf16", sent)


def _gflop(case: Case, size: int) -> float:
    system = build_system(case.config(), load_pretrained=False).train()
    [batch] = random_batches(dataclasses.replace(case, size=size))
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(system.loss_terms(batch, 0).values())).sum().backward()
    return counter.get_total_flops() / 1e9

"""How far two trainings are apart: what `bench parity` says of each case, and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from avs_dist.launch.benchmarks.parity_cases import Case
from avs_dist.systems.base import OBSERVED

LEGEND = (
    "Each case against one process with ZeRO 0 on the same global batches; relative differences. "
    "losses: of each logged term, the largest difference at any step over its mean size; the worst term. "
    "parameters: norm of the difference of all weights after the last step over the norm of all weights; "
    "of update: the same over the norm of the way that training has gone, which is much shorter; "
    "worst tensor: the same of single weight tensors (biases that began at zero have nearly no norm, and Adam makes "
    "full steps of gradients that are all rounding: not held to the tolerance). "
    "buffers: codebook, CLUB's networks and running statistics, the worst; running means by the standard deviation "
    "around them, and no moments of optimisers. "
    "metrics: of the evaluation after the last step, the worst; below {floor:g} the difference over {floor:g}. "
    "control: one process again, whose weights begin one rounding up or down: what rounding alone makes of a training. "
    "separable: TPAVI's system with pvt_v2_b0 (stochastic depth) and no TPAVI blocks. It has no batch normalisation, "
    "so summed micro-batches equal the whole batch; elsewhere batch normalisation and contrast see one micro-batch of "
    "all ranks at a time, means over frames are means of the micro-batches' means, and Uni-Code refuses accumulation."
)
FLOOR = 0.1  # of a metric: a collapsed dimension has a divergence of nearly nothing
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam: one gradient more or less, which nothing is claimed of


@dataclass(frozen=True)
class Found:
    """What a case has left."""

    engine: str
    losses: dict[str, list[float]]
    metrics: dict[str, float]
    start: dict[str, Tensor]  # parameters before the first step
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, case: Case) -> Found:
        told = json.loads((folder / f"{case.name}.json").read_text())
        names = set(told["parameters"])
        weights = {name: tensor.double() for name, tensor in load_file(folder / f"{case.name}.safetensors").items()}
        start = load_file(folder / f"{case.name}.start.safetensors")
        return cls(
            engine=told["engine"],
            losses={term: [step[term] for step in told["losses"]] for term in told["losses"][0]},
            metrics=told["metrics"],
            start={name: tensor.double() for name, tensor in start.items() if name in names},
            parameters={name: tensor for name, tensor in weights.items() if name in names},
            buffers={name: tensor for name, tensor in weights.items() if name not in names},
        )

    @property
    def names(self) -> set[str]:
        return {*self.losses, *self.metrics, *self.parameters, *self.buffers}


@dataclass(frozen=True)
class Difference:
    """Relative differences between two trainings, see LEGEND; infinite where one is not a number. `worst` has names."""

    losses: float
    parameters: float
    buffers: float
    metrics: float
    of_update: float
    worst_tensor: float
    worst: dict[str, str]

    @property
    def largest(self) -> float:
        """Of those that are held to the tolerance."""
        return max(self.losses, self.parameters, self.buffers, self.metrics)


def compare(case: Found, reference: Found) -> Difference:
    """Raises:
    ValueError: they have not the same terms, tensors or metrics.
    """
    if unmatched := case.names ^ reference.names:
        raise ValueError(f"not in both: {', '.join(sorted(unmatched))}")
    terms = [term for term in reference.losses if not term.startswith(OBSERVED)]
    losses = {term: _of_steps(case.losses[term], reference.losses[term]) for term in terms}
    metrics = {
        name: _ratio(abs(case.metrics[name] - value), max(abs(value), FLOOR))
        for name, value in reference.metrics.items()
    }
    tensors = {name: _relative([case.parameters[name]], [value]) for name, value in reference.parameters.items()}
    kept = [name for name in reference.buffers if name.rpartition(".")[2] not in MOMENTS]
    buffers = {name: _of_buffer(name, case.buffers, reference.buffers) for name in kept}
    ours, theirs = list(case.parameters.values()), [reference.parameters[name] for name in case.parameters]
    way = _norm([reference.parameters[name] - reference.start[name] for name in case.parameters])
    groups = {"losses": losses, "buffers": buffers, "metrics": metrics, "worst_tensor": tensors}
    return Difference(
        parameters=_relative(ours, theirs),
        of_update=_ratio(_norm([a - b for a, b in zip(ours, theirs, strict=True)]), way),
        worst={group: max(values, key=values.__getitem__, default="") for group, values in groups.items()},
        **{group: max(values.values(), default=0.0) for group, values in groups.items()},
    )


def _of_steps(ours: Sequence[float], theirs: Sequence[float]) -> float:
    difference = (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)).abs().max()
    return _ratio(difference.item(), torch.tensor(theirs, dtype=torch.float64).abs().mean().item())


def _of_buffer(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """A running mean by the standard deviation around it: about zero its own size says nothing."""
    stem, found, _ = name.rpartition("running_mean")
    if not found:
        return _relative([ours[name]], [theirs[name]])
    return _ratio(_norm([ours[name] - theirs[name]]), theirs[f"{stem}running_var"].sum().sqrt().item())


def _relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return _ratio(_norm([a - b for a, b in zip(ours, theirs, strict=True)]), _norm(theirs))


def _ratio(difference: float, size: float) -> float:
    """Infinite where it would be NaN, which no comparison and no maximum sees."""
    ratio = difference / max(size, 1e-12)
    return math.inf if math.isnan(ratio) else ratio


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt().item()


Row = tuple[Case, Difference | str]  # a case, and what came of it, or why nothing


def as_json(facts: Mapping[str, Any], tolerance: float, rows: Sequence[Row]) -> dict[str, Any]:
    told = [
        {**asdict(case), **({"failed": found} if isinstance(found, str) else asdict(found))} for case, found in rows
    ]
    return {"facts": dict(facts), "tolerance": tolerance, "rows": told}


def markdown(facts: Mapping[str, Any], tolerance: float, rows: Sequence[Row]) -> str:
    head = ["system", "ZeRO", "ranks", "micro-batches", "losses", "parameters", "buffers", "metrics"]
    cells = [[*head, "of update", "worst tensor", f"within {tolerance:g}"]]
    for case, found in rows:
        name = [case.system, str(case.stage), str(case.ranks), str(case.accumulation)]
        if isinstance(found, str):
            cells.append([*name, *["-"] * 6, "failed"])
            continue
        figures = [found.losses, found.parameters, found.buffers, found.metrics, found.of_update, found.worst_tensor]
        verdict = "control" if case.nudged else "ok" if found.largest <= tolerance else "**no**"
        cells.append([*name, *(f"{figure:.1e}" for figure in figures), verdict])
    cells.insert(1, ["---"] * len(cells[0]))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    notes = [f"- {case.name}: {found}" for case, found in rows if isinstance(found, str)]
    told = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return "\n\n".join([f"{told}.", LEGEND.format(floor=FLOOR), lines, *(["\n".join(notes)] if notes else [])]) + "\n"

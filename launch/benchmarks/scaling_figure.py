"""The curves of `bench scaling`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avs_dist.launch.benchmarks.scaling_model import Step, efficiency
from avs_dist.report_figures import GRID, INK, MUTED

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf")  # of the ZeRO stages
PARTS = (
    ("computing", "computing", "#9bb8cd"),
    ("straggling", "waiting for the slowest", "#e0c27b"),
    ("gradients", "gradients", "#d1495b"),
    ("weights", "gathering weights", "#8a5fbf"),
    ("own", "moments and other small sums", "#4a4a4a"),
)


def scaling_png(name: str, steps: Mapping[int, Sequence[Step]], shown: int) -> bytes:
    """Efficiency over the number of GPUs for each ZeRO stage, and where the time goes in one of them.

    Args:
        name: of the network.
        steps: by ZeRO stage, with growing numbers of GPUs from 1 on.
        shown: the stage whose parts are drawn.
    """
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for (stage, row), colour in zip(sorted(steps.items()), COLOURS, strict=False):
        values = [100 * efficiency(step, row[0]) for step in row]
        left.plot([step.gpus for step in row], values, color=colour, linewidth=2, marker="o", label=f"ZeRO {stage}")
    left.set_xscale("log", base=2)
    left.set_ylim(0, 105)
    left.set_ylabel("efficiency, % of one GPU's clips per second", color=INK, fontsize=9)
    _parts(right, steps[shown])
    right.set_ylabel(f"ms of a step, ZeRO {shown}", color=INK, fontsize=9)
    for axes, columns in ((left, 4), (right, 3)):
        axes.set_xlabel("GPUs, with as many clips on each", color=INK, fontsize=9)
        axes.tick_params(colors=MUTED, labelsize=8, length=0)
        axes.grid(color=GRID, linewidth=0.8, axis="y")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
        for side in axes.spines.values():
            side.set_visible(False)
    numbers = [step.gpus for step in steps[shown]]
    left.set_xticks(numbers, [f"{number:,}" for number in numbers], rotation=45)
    figure.suptitle(f"A model, not a measurement: {name}", x=0.01, ha="left", color=INK, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _parts(axes: Axes, row: Sequence[Step]) -> None:
    places = range(len(row))
    below = [0.0] * len(row)
    for field, label, colour in PARTS:
        values = [1e3 * getattr(step, field) for step in row]
        axes.bar(places, values, bottom=below, color=colour, width=0.7, label=label)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.plot(
        places, [1e3 * step.reading for step in row], color=INK, linewidth=1.5, linestyle=":", label="reading clips"
    )
    axes.set_xticks(places, [f"{step.gpus:,}" for step in row], rotation=45)

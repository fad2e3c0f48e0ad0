"""Scores over the number of denoising steps, as Fig. 5 of contrastive latent diffusion shows them."""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avs_dist.clip import Clip
from avs_dist.evaluate import evaluate
from avs_dist.report_figures import GRID, INK, MODEL, MUTED, TRUTH
from avs_dist.systems.base import Prediction, System
from avs_dist.systems.diffusion import set_num_steps

LEAST_SPAN = 0.02  # of the axis of a score
PANELS = (("miou", "mIoU", TRUTH), ("f_score", "F", MODEL))


@dataclass(frozen=True)
class Point:
    """Scores of the predictions that make `steps` denoising steps; their time is a median over batches."""

    steps: int
    miou: float
    f_score: float | None  # None where nothing sounds in the data
    seconds_per_clip: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON safe."""
        return dataclasses.asdict(self)


def measure_steps(
    system: System,
    batches: Iterable[tuple[Clip, Sequence[int]]],
    steps: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Point]:
    """One evaluation for each number of steps; the same clip has the same noise in all of them.

    The system is left with the last number of steps.

    Args:
        batches: `(clip, positions)`, as `avs_dist.loader.eval_loader` yields them; gone through once for each number.

    Raises:
        ValueError: the system does not denoise, or has fewer noise levels than steps are asked for.
    """
    set_num_steps(system, max(steps))  # before anything is measured
    points = []
    for number in steps:
        set_num_steps(system, number)
        seconds: list[float] = []

        def timed(clip: Clip, seconds: list[float] = seconds) -> Prediction:
            clip = clip.to(device)
            started = _now(device)
            prediction = system.predict(clip)
            seconds.append((_now(device) - started) / len(clip))
            return prediction

        scores = evaluate(timed, batches, label=f"{number} of {max(steps)} steps")
        points.append(Point(number, scores["miou"], scores.get("f_score"), statistics.median(seconds)))
    return points


def _now(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def denoising_png(points: Sequence[Point], title: str, trained_with: int) -> bytes:
    """mIoU above F, each over the number of steps; a dotted line marks the number that the config has.

    Each panel has a scale of its own, as the curves are flat but for their beginning.
    """
    figure = Figure(figsize=(6.4, 5.6), dpi=160, layout="constrained", facecolor="white")
    for axes, (key, label, colour) in zip(figure.subplots(len(PANELS), sharex=True), PANELS, strict=True):
        known = [(point.steps, value) for point in points if (value := getattr(point, key)) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, linewidth=2, marker="o", markersize=5)
            axes.set_ylim(*_limits([value for _, value in known]))
        axes.axvline(trained_with, color=MUTED, linewidth=1, linestyle=":")
        axes.set_ylabel(label, color=INK, fontsize=10)
        axes.tick_params(colors=MUTED, labelsize=9, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in axes.spines.values():
            side.set_visible(False)
    axes.set_xlabel("denoising steps of a prediction (dotted: those of the config)", color=MUTED, fontsize=9)
    figure.align_ylabels()
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _limits(scores: Sequence[float]) -> tuple[float, float]:
    """Of the axis: never so narrow that differences of no account look like a trend."""
    middle, reach = (min(scores) + max(scores)) / 2, max(max(scores) - min(scores), LEAST_SPAN) * 0.55
    return middle - reach, middle + reach

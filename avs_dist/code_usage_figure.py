"""The codes of a shared codebook by who uses them, as Fig. 4 of Uni-Code shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

from avs_dist.code_usage import PARTLY_SHARED, SHARED, CodeUsage, CodeUse
from avs_dist.report_figures import GRID, INK, MUTED
from avs_dist.sequences import Sequences
from avs_dist.shards.plan import PADDING
from avs_dist.systems.base import System
from avs_dist.systems.unicode import UnicodeSystem

# of the paper: visual blue, audio red, both green
VISUAL, AUDIO, BOTH, THIRD = "#3b6fd4", "#d43d3d", "#2f9e5b", "#d99a1c"
MODALITY = {"visual": VISUAL, "audio": AUDIO, "text": THIRD}
SPARE = ("#7a5bb5", "#2aa7b8", "#8a6d4b")


def measure_use(
    system: System, batches: Iterable[tuple[Sequences, Sequence[int]]], device: torch.device | str = "cpu"
) -> CodeUse:
    """The use of the codes by all tokens, on one process.

    Args:
        system: on `device`.
        batches: as `avs_dist.loader.eval_loader` yields them; clips that only fill a batch are not counted.

    Raises:
        ValueError: the system has no codebook.
    """
    if not isinstance(system, UnicodeSystem):
        raise ValueError(
            f"{type(system).__name__} has no codebook whose use could be shown: train model.system=unicode"
        )
    usage = CodeUsage(system.config.model.unicode.codebook.num_codes, system.modalities)
    for batch, positions in tqdm(batches, desc="encode", unit="batch", leave=False):
        fills_B1 = (torch.as_tensor(positions, device=device) == PADDING)[:, None]
        encoded = system.encode(batch.to(device))
        usage.update({m: each.indices_BT.masked_fill(fills_B1, -1) for m, each in encoded.items()})
    return usage.compute()


def draw(use: CodeUse, path: str | Path | IO[bytes]) -> None:
    """Write a PNG, to a file or its path: above, each used code as a dot, its height the number of its tokens, its
    colour its class (shares of the used codes in the legend); below, whose these tokens are. From left to right the
    codes go from the one modality over the shared ones to the other.
    """
    colours = _colours(use.modalities)
    order = _order(use)
    figure = Figure(figsize=(7.2, 5.2), dpi=160, layout="constrained", facecolor="white")
    dots, bars = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    used = len(order)
    for name, of_L in use.classes.items():
        places = np.flatnonzero(of_L.numpy()[order])
        counts = use.counts_ML.sum(0).numpy()[order][places]
        label = f"{name}: {len(places)} ({len(places) / used:.0%})"
        dots.scatter(places, counts, s=14, color=_class_colour(name, colours), linewidths=0, label=label)
    dots.set_yscale("log")
    dots.set_ylabel("tokens of the code", color=INK, fontsize=9)
    floor = np.zeros(used)
    for m, name in enumerate(use.modalities):
        share = use.shares_ML[m].numpy()[order]
        bars.bar(np.arange(used), share, bottom=floor, width=1.0, color=colours[name], linewidth=0, label=name)
        floor += share
    for border in (0.2, 0.8) if len(use.modalities) == 2 else ():
        bars.axhline(border, color="white", linewidth=1, linestyle=":")
    bars.set_ylabel("share of its tokens", color=INK, fontsize=9)
    bars.yaxis.set_major_formatter(PercentFormatter(1.0))
    bars.set_ylim(0, 1)
    bars.set_xlim(-0.5, used - 0.5)
    bars.set_xlabel("codes in use, one column each", color=MUTED, fontsize=9)
    for axes in (dots, bars):
        _plain(axes)
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}  # so that nothing is hidden
        axes.legend(**above, ncols=3, frameon=False, labelcolor=INK, fontsize=9, handletextpad=0.4)
    figure.suptitle(_facts(use), x=0.01, ha="left", color=INK, fontsize=10)
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _order(use: CodeUse) -> np.ndarray:
    """The used codes: by class, then by the share of the first modality."""
    classes = use.classes
    middle = [name for name in (SHARED, PARTLY_SHARED) if name in classes]
    alone = [name for name in classes if name not in middle]
    place_L = torch.full_like(use.counts_ML[0], -1)
    for place, name in enumerate([alone[0], *middle, *alone[1:]]):
        place_L[classes[name]] = place
    order = np.lexsort((-use.shares_ML[0].numpy(), place_L.numpy()))
    return order[use.used_L.numpy()[order]]


def _facts(use: CodeUse) -> str:
    used, total = int(use.used_L.sum()), len(use.used_L)
    perplexities = ", ".join(f"{name} {value:.0f}" for name, value in use.perplexity.items())
    agreement = f"; same code at {use.agreement:.0%} of the seconds" if use.compared else ""
    return f"{used} of {total} codes in use{agreement}\nperplexity: {perplexities}"


def _colours(modalities: tuple[str, ...]) -> dict[str, str]:
    spare = iter(SPARE)
    return {name: MODALITY[name] if name in MODALITY else next(spare) for name in modalities}


def _class_colour(name: str, colours: dict[str, str]) -> str:
    return {SHARED: BOTH, PARTLY_SHARED: MUTED}.get(name) or colours[name.removeprefix("mostly ")]


def _plain(axes: Axes) -> None:
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)

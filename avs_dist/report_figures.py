"""Pictures of the report, as PNG bytes: frames with masks, the sound strip, the curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from avs_dist.semantic import BACKGROUND
from avs_dist.shards.palette import colours
from avs_dist.systems.base import OBSERVED

INK, MUTED, GRID = "#1c2430", "#6b7686", "#e6e9ee"
TRUTH, MODEL, QUIET = "#0f9d8a", "#e8622c", "#5b6ee1"
MIN_SIDE = 256  # smaller frames are enlarged by a whole factor, so that outlines stay thin
LOG_MEL_SILENCE = float(np.log(0.01))
NOT_A_LOSS = ("phase", "step", "lr", "seconds_per_step", "loss")


def frame_png(frame_HWC: np.ndarray) -> bytes:
    return _png(_enlarged(frame_HWC))


def truth_png(frame_HWC: np.ndarray, truth_HW: np.ndarray) -> bytes:
    """The frame in dim grey with the true mask filled."""
    truth = _enlarged((truth_HW > 0).astype(np.float32))
    return _png(_painted(_dimmed(_enlarged(frame_HWC)), _rgb(TRUTH), 0.75 * truth))


def prediction_png(frame_HWC: np.ndarray, probability_HW: np.ndarray, truth_HW: np.ndarray | None) -> bytes:
    """The frame in dim grey, painted by probability; the outline of the truth in white where there is one."""
    alpha_HW = 0.85 * _enlarged(probability_HW.astype(np.float32)).clip(0, 1)
    picture = _painted(_dimmed(_enlarged(frame_HWC)), _rgb(MODEL), alpha_HW)
    if truth_HW is not None:
        picture[_outline(_enlarged(truth_HW > 0))] = 255
    return _png(picture)


def classes_png(frame_HWC: np.ndarray, classes_HW: np.ndarray, truth_HW: np.ndarray | None = None) -> bytes:
    """The frame in dim grey, each class but the background in its colour; the outline of the truth as above."""
    classes_HW = _enlarged(classes_HW)
    paint_HWC = colours(int(classes_HW.max()) + 1)[classes_HW]
    picture = _painted(_dimmed(_enlarged(frame_HWC)), paint_HWC, 0.85 * (classes_HW != BACKGROUND))
    if truth_HW is not None:
        picture[_outline(_enlarged(truth_HW != BACKGROUND))] = 255
    return _png(picture)


def class_colour(number: int) -> str:
    """Of a legend: #rrggbb."""
    return "#" + colours(number + 1)[number].tobytes().hex()


def mel_png(mel_FM: np.ndarray, loudest: float) -> bytes:
    """One second of log-mel [96,64] as a picture, time to the right, low bands at the bottom; black is silence."""
    level = (mel_FM.T[::-1] - LOG_MEL_SILENCE) / max(loudest - LOG_MEL_SILENCE, 1e-6)
    return _png((colormaps["magma"](level.clip(0, 1))[..., :3] * 255).astype(np.uint8))


def video_png(path: Path) -> bytes:
    """A frame of the beginning, which stands for the video until it is played.

    Raises:
        ValueError: the file cannot be decoded.
    """
    picture = None
    try:
        with av.open(str(path)) as container:
            if container.streams.video:
                for frame in islice(container.decode(container.streams.video[0]), 10):
                    picture = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error})") from error
    if picture is None:
        raise ValueError(f"{path}: there is no picture in it")
    return _png(picture)


def loss_curve(records: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Every loss term over the steps, with the noisy total smoothed; None without records."""
    records = [r for r in records if "loss" in r]
    if not records:
        return None
    figure, axes = _axes("loss", "optimiser steps")
    steps = np.array([r["step"] for r in records])
    total = np.array([r["loss"] for r in records], dtype=np.float64)
    axes.plot(steps, total, color=MODEL, alpha=0.25, linewidth=1)
    axes.plot(steps, _smoothed(total), color=MODEL, linewidth=2, label="loss")
    terms = [name for name in records[0] if name not in NOT_A_LOSS and not name.startswith(OBSERVED)]
    # a single term is the total
    styles = cycle(product(("-", "--"), (TRUTH, QUIET, INK, MUTED)))
    for name, (dash, colour) in zip(terms if len(terms) > 1 else [], styles, strict=False):
        values = np.array([r.get(name, np.nan) for r in records], dtype=np.float64)
        axes.plot(steps, _smoothed(values), color=colour, linestyle=dash, linewidth=1.4, label=name)
    lowest = min(np.nanmin(line.get_ydata(), initial=0.0) for line in axes.lines)
    axes.set_ylim(bottom=1.05 * lowest)  # zero, unless a term such as a log-likelihood is negative
    return _finished(figure, axes)


def miou_curve(records: Sequence[Mapping[str, Any]]) -> bytes | None:
    """mIoU at each evaluation, with its sounding and silent parts; None without records."""
    records = [r for r in records if "miou" in r]
    if not records:
        return None
    figure, axes = _axes("mIoU", "optimiser steps")
    lines = (
        ("miou", "all frames", TRUTH, 2.2),
        ("miou_sounding", "frames that sound", MODEL, 1.3),
        ("miou_silent", "silent frames", QUIET, 1.3),
    )
    for key, label, colour, width in lines:
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", markersize=4, label=label)
    axes.set_ylim(0, 1.03)
    return _finished(figure, axes)


def _axes(title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.1), dpi=200, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel, color=MUTED, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> bytes:
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over the last twentieth of the points, finite points only."""
    window = max(1, len(values) // 20)
    parts = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return np.array([np.mean(p[np.isfinite(p)]) if np.isfinite(p).any() else np.nan for p in parts])


def _enlarged(picture: np.ndarray) -> np.ndarray:
    factor = max(1, round(MIN_SIDE / max(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _dimmed(frame_HWC: np.ndarray) -> np.ndarray:
    grey = frame_HWC.mean(axis=2, keepdims=True)
    return 0.5 * (0.8 * grey + 0.2 * frame_HWC) + 20


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def _painted(picture_HWC: np.ndarray, paint: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    """`paint` is one colour [3], or one for each pixel [H,W,3]."""
    alpha = alpha_HW[..., None]
    return (picture_HWC * (1 - alpha) + paint * alpha).clip(0, 255).astype(np.uint8)


def _outline(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels of the mask that touch its outside."""
    padded = np.pad(mask_HW, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask_HW & ~inside


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return buffer.getvalue()

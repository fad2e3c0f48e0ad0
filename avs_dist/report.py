"""The report of a run: one HTML file with its pictures inside, readable without network on a laptop or a phone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from avs_dist import report_figures as figures
from avs_dist import report_html as html
from avs_dist.metrics import frame_iou
from avs_dist.semantic import BACKGROUND
from avs_dist.semantic_metrics import class_areas, is_semantic
from avs_dist.shards.files import write_text

# rows of `results` that the headline numbers are made of, and how they are called in the table
ROW_LABELS = {
    "real": "its own sound",
    "muted": "muted",
    "swapped": "the sound of another clip",
    "not aligned": "TPAVI as published, its own sound",
    "not aligned, muted": "TPAVI as published, muted",
    "not aligned, swapped": "TPAVI as published, the sound of another clip",
}


@dataclass(frozen=True)
class Panel:
    """One clip of T seconds, shown second by second.

    frames_THWC:      uint8 RGB.
    truth_THW:        0 or 1, or class indices, or None where there is no truth.
    probability_THW:  0..1, predicted.
    mel_TFM:          log-mel example of each second [T,96,64] (time, mel band).
    classes_THW:      uint8 class indices, predicted by a system of several classes.
    class_names:      names of these classes; without them the legend has their numbers.
    """

    name: str
    frames_THWC: np.ndarray
    truth_THW: np.ndarray | None
    probability_THW: np.ndarray
    mel_TFM: np.ndarray
    classes_THW: np.ndarray | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        size = self.frames_THWC.shape[:3]
        if self.frames_THWC.dtype != np.uint8 or self.frames_THWC.shape[3:] != (3,):
            got = f"{self.frames_THWC.dtype} {self.frames_THWC.shape}"
            raise ValueError(f"panel {self.name}: frames_THWC must be uint8 RGB, got {got}")
        others = {
            "probability_THW": self.probability_THW,
            "truth_THW": self.truth_THW,
            "classes_THW": self.classes_THW,
        }
        for field, value in others.items():
            if value is not None and value.shape != size:
                raise ValueError(f"panel {self.name}: {field} has shape {value.shape}, the frames {size}")
        if self.mel_TFM.ndim != 3 or len(self.mel_TFM) != size[0]:
            raise ValueError(f"panel {self.name}: mel_TFM has shape {self.mel_TFM.shape} for {size[0]} frames")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not a JSON object, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; training writes metrics.jsonl into train.out_dir")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number}: a record must be an object with the key 'step'")
        records.append(record)
    return records


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, float]],
    panels: Sequence[Panel],
    overlay: str | Path | None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> None:
    """Write the report of a run to `path`.

    Args:
        path: the HTML file; its folder is made as needed.
        title: headline of the page.
        config: the resolved config (`avs_dist.config.to_dict`).
        curves: records of metrics.jsonl (`read_records`): those with `loss` and those with `miou`.
        results: metrics (`avs_dist.evaluate.evaluate`) by row name. The names in ROW_LABELS make the headline numbers
            and get a readable label; any other name is shown as it is.
        panels: clips shown second by second.
        overlay: video with the masks painted on it, linked by its path relative to the page; not copied.
        notes: paragraphs below the title.
        command: how to repeat the run.

    Raises:
        FileNotFoundError: the overlay does not exist.
        ValueError: a row of results has no `miou`; the overlay cannot be decoded.
    """
    path = Path(path)
    if overlay is not None and not Path(overlay).is_file():
        raise FileNotFoundError(f"overlay {overlay}: no such file; avs-dist predict writes it")
    for name, row in results.items():
        if "miou" not in row:
            raise ValueError(f"results['{name}'] has no 'miou', only {', '.join(row) or 'nothing'}")
    body = [html.header(title, notes), html.cards(headlines(results))]
    if results:
        rows = {ROW_LABELS.get(name, name): row for name, row in results.items()}
        body.append(html.results_section(rows))
    if panels:
        body.append(html.panels_section([_panel(panel) for panel in panels]))
    if overlay is not None:
        relative = os.path.relpath(Path(overlay).resolve(), path.resolve().parent)
        body.append(
            html.video_section(quote(Path(relative).as_posix()), Path(overlay).name, figures.video_png(Path(overlay)))
        )
    body.append(html.curves_section(figures.loss_curve(curves), figures.miou_curve(curves)))
    body.append(html.repeat_section(command, config))
    write_text(path, html.page(title, body))


def headlines(results: Mapping[str, Mapping[str, float]]) -> list[html.Card]:
    """The few numbers that tell how it went, each with its meaning."""
    real = results.get("real")
    if real is None:
        return []
    overlap, f_score = _meanings(real)
    cards = [html.Card(f"{real['miou']:.2f}", "mIoU with its own sound", overlap)]
    differences = {
        "swapped": (
            "with the sound of another clip",
            "Same pictures, wrong sound: what is lost was gained by listening. A model that only looks loses nothing.",
        ),
        "muted": ("without sound", "Same pictures, digital silence instead of their sound."),
    }
    for name, (label, meaning) in differences.items():
        if name in results:
            cards.append(html.Card(html.signed(results[name]["miou"] - real["miou"]), f"mIoU {label}", meaning))
    if "not aligned" in results:
        gain = html.signed(real["miou"] - results["not aligned"]["miou"])
        meaning = "Gain over the published TPAVI block, which cannot tell which second a sound belongs to."
        cards.append(html.Card(gain, "mIoU by time alignment", meaning))
    if "f_score" in real:
        cards.append(html.Card(f"{real['f_score']:.2f}", "F-score", f_score))
    return cards


def _meanings(row: Mapping[str, float]) -> tuple[str, str]:
    """Of mIoU and F-score."""
    if is_semantic(row):
        return (
            "Overlap of the painted area of each class with the true one, averaged over the held-out frames and then "
            "over all classes; 1 is perfect, a class never seen counts 0.",
            "Precision and recall of each class in one number (β² = 0.3), averaged in the same way.",
        )
    return (
        "Overlap of the painted area with what really sounds, averaged over all held-out frames; 1 is perfect.",
        "Precision and recall in one number (β² = 0.3, frames that sound), at one threshold for the whole set.",
    )


def _panel(panel: Panel) -> html.PanelView:
    frames, truth, classes = panel.frames_THWC, panel.truth_THW, panel.classes_THW
    truths = [None] * len(frames) if truth is None else list(truth)
    loudest = max(float(panel.mel_TFM.max(initial=0.0)), 0.0)  # one scale for all seconds, so that silence looks dark
    rows = {"frame": [figures.frame_png(frame) for frame in frames]}
    if truth is not None:
        draw = figures.truth_png if classes is None else figures.classes_png
        rows["truth"] = [draw(frame, mask) for frame, mask in zip(frames, truth, strict=True)]
    if classes is None:
        shown = zip(frames, panel.probability_THW, truths, strict=True)
        rows["model"] = [figures.prediction_png(*second) for second in shown]
    else:
        rows["model"] = [figures.classes_png(*second) for second in zip(frames, classes, truths, strict=True)]
    rows["sound"] = [figures.mel_png(mel_FM, loudest) for mel_FM in panel.mel_TFM]
    return html.PanelView(panel.name, rows, _scores(panel), _legend(panel))


def _legend(panel: Panel) -> list[tuple[str, str]] | None:
    """Name and colour of the classes that are true or predicted in the panel."""
    if panel.classes_THW is None:
        return None
    pictures = [panel.classes_THW] if panel.truth_THW is None else [panel.classes_THW, panel.truth_THW]
    numbers = [int(k) for k in np.unique(np.stack(pictures)) if k != BACKGROUND]
    return [(panel.class_names[k] if panel.class_names else str(k), figures.class_colour(k)) for k in numbers]


def _scores(panel: Panel) -> list[str]:
    """What stands under each second: its IoU, or that it should be empty."""
    if panel.truth_THW is None:
        return []
    truth = torch.from_numpy(np.ascontiguousarray(panel.truth_THW))
    if panel.classes_THW is None:
        iou = frame_iou(torch.from_numpy(panel.probability_THW.astype(np.float64)).logit(), truth).tolist()
    else:
        iou = _class_iou(torch.from_numpy(np.ascontiguousarray(panel.classes_THW)), truth)
    sounding = truth.bool().flatten(1).any(1).tolist()
    return [f"IoU {v:.2f}" if sounds else f"silent, {v:.0%} empty" for v, sounds in zip(iou, sounding, strict=True)]


def _class_iou(classes_THW: Tensor, truth_THW: Tensor) -> list[float]:
    """Of each frame: the mean IoU of the classes, but the background, that are true or predicted in it; for a frame
    of background alone the fraction of its pixels predicted so."""
    num_classes = int(max(classes_THW.max(), truth_THW.max())) + 1
    inside_TK, predicted_TK, true_TK = class_areas(classes_THW, truth_THW, num_classes).double()
    iou_TK = inside_TK / (predicted_TK + true_TK - inside_TK)  # NaN where the class is not met
    mean_T = iou_TK[:, BACKGROUND + 1 :].nanmean(1)
    empty_T = inside_TK[:, BACKGROUND] / true_TK[:, BACKGROUND]
    return torch.where((truth_THW != BACKGROUND).flatten(1).any(1), mean_T, empty_T).tolist()

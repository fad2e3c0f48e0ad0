"""Measures a system over an evaluation loader, and prints the result as a table that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from avs_dist import metrics, semantic_metrics, uncertainty, world
from avs_dist.clip import Clip
from avs_dist.metrics import SegmentationMetrics
from avs_dist.semantic_metrics import ClassScores, SemanticMetrics
from avs_dist.systems.base import Prediction
from avs_dist.uncertainty import UncertaintyMetrics

PUBLISHED_BATCH = 4  # clips per batch of the published F-score


@dataclass(frozen=True)
class Measured:
    """Metrics of a system by name, and where it predicts several classes the scores of each."""

    metrics: dict[str, float]
    classes: ClassScores | None


def evaluate(
    predict: Callable[[Clip], Prediction],
    batches: Iterable[tuple[Clip, Sequence[int]]],
    *,
    batch_size_compat: int = PUBLISHED_BATCH,
    label: str = "evaluate",
) -> dict[str, float]:
    """Metrics over all clips of all ranks; collective, every rank gets the same numbers.

    Only frames that exist and carry a mask are counted. The numbers depend neither on the batches nor on the ranks.

    Args:
        predict: masks of a batch (`Engine.predict`, or a system's); it looks after device and evaluation mode itself.
        batches: `(clip, positions)`, as `avs_dist.loader.eval_loader` yields them: positions are the places of the
            clips in the data set, -1 marks a clip that only fills the batch.
        batch_size_compat: clips per batch of `f_score_batched`, whatever the size of the batches here.
        label: name on the progress bar.

    Returns:
        The values of `SegmentationMetrics.compute`, or, where the predictions carry class logits, those of
        `SemanticMetrics.compute`; and where they carry a variance those of `UncertaintyMetrics.compute`, of the
        probability that a pixel sounds.

    Raises:
        ValueError: no labelled frame in the data; NaN predictions; a mask with a class that the system does not know.
    """
    return measure(predict, batches, batch_size_compat=batch_size_compat, label=label).metrics


@torch.no_grad()
def measure(
    predict: Callable[[Clip], Prediction],
    batches: Iterable[tuple[Clip, Sequence[int]]],
    *,
    batch_size_compat: int = PUBLISHED_BATCH,
    label: str = "evaluate",
) -> Measured:
    """What `evaluate` returns, and the scores of each class; arguments and errors are the same."""
    segmentation, spread = SegmentationMetrics(batch_size_compat), UncertaintyMetrics()
    semantic: SemanticMetrics | None = None  # the first prediction tells the number of classes
    for clip, positions in tqdm(batches, desc=label, unit="batch", leave=False, disable=not world.is_main()):
        prediction = predict(clip)
        positions_BT = torch.as_tensor(positions)[:, None].expand(clip.valid_BT.shape)
        counted_BT = (clip.labelled_BT & clip.valid_BT).cpu() & (positions_BT >= 0)
        logits_FHW = prediction.logits_BTHW[counted_BT.to(prediction.logits_BTHW.device)]
        masks_FHW = clip.masks_BTHW[counted_BT.to(clip.masks_BTHW.device)]
        if prediction.class_logits_BTKHW is None:
            segmentation.update(logits_FHW, masks_FHW, positions_BT[counted_BT])
        else:
            semantic = semantic or SemanticMetrics(prediction.class_logits_BTKHW.shape[2])
            counted_there_BT = counted_BT.to(prediction.class_logits_BTKHW.device)
            semantic.update(prediction.class_logits_BTKHW[counted_there_BT], masks_FHW)
        if prediction.variance_BTHW is not None:
            variance_FHW = prediction.variance_BTHW[counted_BT.to(prediction.variance_BTHW.device)]
            spread.update(logits_FHW, variance_FHW, masks_FHW)
    if semantic is None:
        return Measured(segmentation.compute() | spread.compute(), None)
    values, classes = semantic.results()
    return Measured(values | spread.compute(), classes)


# what a table shows, in this order
COLUMNS = {
    "miou": "mIoU",
    "miou_sounding": "sounding",
    "miou_silent": "silent",
    "miou_no_background": "mIoU -bg",
    "miou_present": "present",
    "miou_dataset": "set",
    "miou_dataset_no_background": "set -bg",
    "f_score": "F",
    "f_score_no_background": "F -bg",
    "f_score_present": "F present",
    "f_score_batched": "F batched",
    "std": "std",
    "std_right": "std right",
    "std_wrong": "std wrong",
    "error_auroc": "AUROC",
}


def definitions(results: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Meaning of every metric in these rows, by its key."""
    if any(semantic_metrics.is_semantic(row) for row in results.values()):
        spread = {key: f"{text} (sounding or not)" for key, text in uncertainty.DEFINITIONS.items()}
        texts = semantic_metrics.DEFINITIONS | spread
    else:
        texts = metrics.DEFINITIONS | uncertainty.DEFINITIONS
    sizes = sorted({f"{row['batch_size']:.0f}" for row in results.values() if "batch_size" in row})
    if "f_score_batched" in texts and sizes:
        texts["f_score_batched"] += f" (batches of {', '.join(sizes)})"
    return {key: text for key, text in texts.items() if any(key in row for row in results.values())}


def results_table(results: Mapping[str, Mapping[str, float]], heading: str = "sound") -> str:
    """Text table, one row for each kind of sound or query, with the meaning of each column below it."""
    shown = [key for key in COLUMNS if any(key in row for row in results.values())]
    name_width = max(len(heading), *(len(name) for name in results))
    lines = ["  ".join([heading.ljust(name_width), *(COLUMNS[key].rjust(9) for key in shown)])]
    for name, row in results.items():
        cells = [f"{row[key]:.4f}".rjust(9) if key in row else "-".rjust(9) for key in shown]
        lines.append("  ".join([name.ljust(name_width), *cells]))
    if "real" in results:
        for other in ("muted", "swapped"):
            if other in results:
                gain = results["real"]["miou"] - results[other]["miou"]
                lines.append(f"real - {other}: {gain:+.4f} mIoU, the contribution of the sound")
    first, meaning = next(iter(results.values())), definitions(results)
    lines.append("")
    lines.append(f"{first['frames']:.0f} frames, {first['frames_with_sound']:.0f} of them with something that sounds")
    damaged = max(row.get("damaged_clips", 0) for row in results.values())
    if damaged:
        lines.append(f"{damaged:.0f} damaged clips are left out")
    lines += [f"{COLUMNS[key]:<10} {meaning[key]}" for key in shown]
    return "\n".join(lines)

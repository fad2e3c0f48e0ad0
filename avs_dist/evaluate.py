"""Measures a system over an evaluation loader, and prints the result as a table that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from avs_dist import metrics, uncertainty, world
from avs_dist.clip import Clip
from avs_dist.metrics import SegmentationMetrics
from avs_dist.systems.base import Prediction
from avs_dist.uncertainty import UncertaintyMetrics

PUBLISHED_BATCH = 4  # clips per batch of the published F-score
DEFINITIONS = metrics.DEFINITIONS | uncertainty.DEFINITIONS


@torch.no_grad()
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
        The values of `SegmentationMetrics.compute`, and where the predictions carry a variance those of
        `UncertaintyMetrics.compute`.

    Raises:
        ValueError: no labelled frame in the data; NaN predictions.
    """
    segmentation, spread = SegmentationMetrics(batch_size_compat), UncertaintyMetrics()
    for clip, positions in tqdm(batches, desc=label, unit="batch", leave=False, disable=not world.is_main()):
        prediction = predict(clip)
        positions_BT = torch.as_tensor(positions)[:, None].expand(clip.valid_BT.shape)
        counted_BT = (clip.labelled_BT & clip.valid_BT).cpu() & (positions_BT >= 0)
        logits_FHW = prediction.logits_BTHW[counted_BT.to(prediction.logits_BTHW.device)]
        masks_FHW = clip.masks_BTHW[counted_BT.to(clip.masks_BTHW.device)]
        segmentation.update(logits_FHW, masks_FHW, positions_BT[counted_BT])
        if prediction.variance_BTHW is not None:
            variance_FHW = prediction.variance_BTHW[counted_BT.to(prediction.variance_BTHW.device)]
            spread.update(logits_FHW, variance_FHW, masks_FHW)
    return segmentation.compute() | spread.compute()


COLUMNS = {
    "miou": "mIoU",
    "miou_sounding": "sounding",
    "miou_silent": "silent",
    "f_score": "F",
    "f_score_batched": "F batched",
    "std": "std",
    "std_right": "std right",
    "std_wrong": "std wrong",
    "error_auroc": "AUROC",
}


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Text table, one row for each kind of sound, with the meaning of each column below it."""
    shown = [key for key in COLUMNS if any(key in row for row in results.values())]
    name_width = max(len("sound"), *(len(name) for name in results))
    lines = ["  ".join(["sound".ljust(name_width), *(COLUMNS[key].rjust(9) for key in shown)])]
    for name, row in results.items():
        cells = [f"{row[key]:.4f}".rjust(9) if key in row else "-".rjust(9) for key in shown]
        lines.append("  ".join([name.ljust(name_width), *cells]))
    if "real" in results:
        for other in ("muted", "swapped"):
            if other in results:
                gain = results["real"]["miou"] - results[other]["miou"]
                lines.append(f"real - {other}: {gain:+.4f} mIoU, the contribution of the sound")
    first = next(iter(results.values()))
    lines.append("")
    lines.append(f"{first['frames']:.0f} frames, {first['frames_with_sound']:.0f} of them with something that sounds")
    for key in shown:
        batches = f" (batches of {first['batch_size']:.0f})" if key == "f_score_batched" else ""
        lines.append(f"{COLUMNS[key]:<10} {DEFINITIONS[key]}{batches}")
    return "\n".join(lines)

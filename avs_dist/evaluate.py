"""Measures a system over an evaluation loader, and prints the result as a table that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from avs_dist import world
from avs_dist.clip import Clip
from avs_dist.metrics import DEFINITIONS, SegmentationMetrics
from avs_dist.systems.base import Prediction

PUBLISHED_BATCH = 4  # clips per batch of the published F-score


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
        The values of `SegmentationMetrics.compute`.

    Raises:
        ValueError: no labelled frame in the data; NaN predictions.
    """
    metrics = SegmentationMetrics(batch_size_compat)
    for clip, positions in tqdm(batches, desc=label, unit="batch", leave=False, disable=not world.is_main()):
        logits_BTHW = predict(clip).logits_BTHW
        counted_BT = (clip.labelled_BT & clip.valid_BT).cpu()
        positions_BT = torch.as_tensor(positions)[:, None].expand_as(counted_BT)
        metrics.update(
            logits_BTHW[counted_BT.to(logits_BTHW.device)],
            clip.masks_BTHW[counted_BT.to(clip.masks_BTHW.device)],
            positions_BT[counted_BT],
        )
    return metrics.compute()


COLUMNS = {
    "miou": "mIoU",
    "miou_sounding": "sounding",
    "miou_silent": "silent",
    "f_score": "F",
    "f_score_batched": "F batched",
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
    lines += [f"{COLUMNS[key]:<10} {DEFINITIONS[key]}" for key in shown]
    if "f_score_batched" in shown:
        lines[-1] += f" (batches of {first['batch_size']:.0f})"
    return "\n".join(lines)

"""Segmentation metrics of S4 and MS3: mean frame IoU and F-score, exact for any batch and world size.

The definitions are those of the published benchmark code (AVSBench, utility.py), shared by the systems we compare with:

- IoU: prediction = sigmoid(logit) > 0.5. A frame with an empty truth scores the fraction of its pixels predicted empty.
- F: beta^2 = 0.3 at 255 thresholds, on frames with a non-empty truth. The published number takes the best threshold of
  each *batch* and then averages the batches, so it depends on the batch size and on the order; we report it with its
  batch size (`f_score_batched`) next to `f_score`, which has one threshold for the whole data set.

The curve over thresholds comes from one histogram of each frame instead of 255 passes over its pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from avs_dist import world

NUM_THRESHOLDS = 255
BETA_SQUARED = 0.3

# Scores lie in [0, 1] and are summed as integers of this many units. Integer sums do not depend on their order, so the
# result is the same to the last bit for every split into updates and ranks. Error per frame 5e-13, room for 8e6 frames.
SCORE_UNITS = 2**40

_CELLS = 2**16
_CPU_CHUNK = 2**17

DEFINITIONS = {
    "miou": "mean IoU of the frames at probability > 0.5; a silent frame scores its share of empty pixels",
    "miou_sounding": "the same over the frames where something sounds (the true mask is not empty)",
    "miou_silent": "the same over the silent frames; 1 = the mask is switched off completely",
    "f_score": "F (beta^2 = 0.3) of the sounding frames at the one threshold, of 255, that is best for the whole set",
    "f_score_batched": "F as published: the best threshold of each batch of clips, then the mean over batches",
}


def frame_iou(logits_FHW: Tensor, masks_FHW: Tensor) -> Tensor:
    """IoU of each frame.

    Args:
        logits_FHW: mask logits; predicted foreground is sigmoid > 0.5.
        masks_FHW: truth, 0 or 1 in any dtype.

    Returns:
        [F] in the precision of the logits (at least float32), on their device: intersection / (union + 1e-7); for a
        frame with an empty truth the fraction of its pixels that are predicted empty.

    Raises:
        ValueError: shapes differ or are not [F,H,W], logits are not floating point or hold NaN, masks are not binary.
    """
    probabilities_FHW, truth_FHW = _checked(logits_FHW, masks_FHW)
    return _iou(probabilities_FHW, truth_FHW).to(logits_FHW.device, probabilities_FHW.dtype)


def f_curves(logits_FHW: Tensor, masks_FHW: Tensor) -> Tensor:
    """F-score of each frame at each threshold: float64 [F,255] on the CPU; all zero where the truth is empty.

    Thresholds are linspace(0, 1 - 1e-10, 255) in float32, a pixel is foreground at probability >= threshold.

    Raises:
        ValueError: as `frame_iou`.
    """
    return _f_curves(*_checked(logits_FHW, masks_FHW))


class SegmentationMetrics:
    """Accumulates frames and computes mIoU and F over everything seen, by all ranks together.

    Args:
        batch_size_compat: items per batch of `f_score_batched` (published test script: 4 clips).
        frames_per_item: consecutive rows that make one item, when `update` is called without positions.

    Memory: 2 KB for each batch of items, whatever the image size.
    """

    def __init__(self, batch_size_compat: int = 4, frames_per_item: int = 1) -> None:
        if batch_size_compat < 1 or frames_per_item < 1:
            raise ValueError(
                f"batch_size_compat and frames_per_item must be at least 1, got {batch_size_compat}, {frames_per_item}"
            )
        self.batch_size_compat = batch_size_compat
        self.frames_per_item = frames_per_item
        self._rows_seen = 0
        self._positioned: bool | None = None
        # (rank or 0, batch number) -> int64 [256]: the 255 curve sums and, last, the number of sounding frames
        self._batches: dict[tuple[int, int], Tensor] = {}
        # int64 [2,2]: silent and sounding frames x (sum of IoU, count)
        self._iou = torch.zeros(2, 2, dtype=torch.int64)

    def update(self, logits_FHW: Tensor, masks_FHW: Tensor, positions_F: Tensor | Sequence[int] | None = None) -> None:
        """Count F frames; rows that must not count (not labelled, padding) are left out or get position -1.

        Args:
            logits_FHW: mask logits, any floating dtype, any device.
            masks_FHW: truth, 0 or 1.
            positions_F: the place in the data set of the item (clip) that each frame belongs to. It decides the batch,
                so that the result depends neither on the order of arrival nor on the rank. Without positions the items
                are numbered as they arrive, and each rank makes batches of its own.

        Raises:
            ValueError: as `frame_iou`; positions of the wrong length; updates with and without positions mixed.
        """
        _check_shapes(logits_FHW, masks_FHW)
        positions = self._positions(len(logits_FHW), positions_F)
        if bool((positions < 0).any()):
            kept = positions >= 0
            index = kept.nonzero().squeeze(1)
            positions = positions[kept]
            logits_FHW = logits_FHW.index_select(0, index.to(logits_FHW.device))
            masks_FHW = masks_FHW.index_select(0, index.to(masks_FHW.device))
        probabilities_FHW, truth_FHW = _checked(logits_FHW, masks_FHW)
        sounding_F = truth_FHW.flatten(1).any(1).long().cpu()

        iou_F2 = torch.stack([in_units(_iou(probabilities_FHW, truth_FHW)), torch.ones_like(sounding_F)], dim=1)
        self._iou.index_add_(0, sounding_F, iou_F2)

        rows = torch.cat([in_units(_f_curves(probabilities_FHW, truth_FHW)), sounding_F[:, None]], dim=1)
        numbers, inverse = torch.unique(positions // self.batch_size_compat, return_inverse=True)
        sums = torch.zeros(len(numbers), NUM_THRESHOLDS + 1, dtype=torch.int64).index_add_(0, inverse, rows)
        source = 0 if positions_F is not None else world.rank()
        for number, batch_sum in zip(numbers.tolist(), sums, strict=True):
            _add(self._batches, (source, number), batch_sum)

    def compute(self) -> dict[str, float]:
        """Results over the frames of all ranks; every rank must call it and gets the same numbers.

        Returns:
            `miou`, `f_score`, `f_score_batched`; `miou_sounding` and `miou_silent` where there are such frames;
            and the counts `frames`, `frames_with_sound`, `batch_size` (of `f_score_batched`). See DEFINITIONS.

        Raises:
            ValueError: no frame was counted.
        """
        iou = torch.zeros_like(self._iou)
        batches: dict[tuple[int, int], Tensor] = {}
        for rank_batches, rank_iou in world.gather_objects((self._batches, self._iou)):
            iou += rank_iou
            for key, batch_sum in rank_batches.items():
                _add(batches, key, batch_sum)
        if not batches:
            raise ValueError("no frames were counted: the evaluation data has no labelled frames")

        rows = torch.stack([batches[key] for key in sorted(batches)])
        totals = rows.sum(0, keepdim=True)
        (silent_sum, silent), (sounding_sum, sounding) = iou.tolist()
        results = {
            "miou": (silent_sum + sounding_sum) / SCORE_UNITS / (silent + sounding),
            "f_score": float(_best_of_mean_curve(totals)),
            "f_score_batched": float(_best_of_mean_curve(rows).mean()),
            "frames": silent + sounding,
            "frames_with_sound": sounding,
            "batch_size": self.batch_size_compat,
        }
        if sounding:
            results["miou_sounding"] = sounding_sum / SCORE_UNITS / sounding
        if silent:
            results["miou_silent"] = silent_sum / SCORE_UNITS / silent
        return results

    def _positions(self, num_rows: int, positions_F: Tensor | Sequence[int] | None) -> Tensor:
        if self._positioned not in (None, positions_F is not None):
            raise ValueError("updates with and without positions cannot be mixed: their batches would overlap")
        self._positioned = positions_F is not None
        if positions_F is None:
            rows = torch.arange(self._rows_seen, self._rows_seen + num_rows)
            self._rows_seen += num_rows
            return rows // self.frames_per_item
        positions = torch.as_tensor(positions_F, dtype=torch.int64).cpu()
        if positions.shape != (num_rows,):
            raise ValueError(f"positions must be one for each of the {num_rows} frames, got {tuple(positions.shape)}")
        return positions


def _check_shapes(logits_FHW: Tensor, masks_FHW: Tensor) -> None:
    if logits_FHW.ndim != 3 or logits_FHW.shape != masks_FHW.shape:
        raise ValueError(
            f"logits and masks must both be [F,H,W], got {tuple(logits_FHW.shape)} and {tuple(masks_FHW.shape)}"
        )


def _checked(logits_FHW: Tensor, masks_FHW: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (float32, or float64 of float64 logits) and the truth as bool, both on the device of the logits."""
    _check_shapes(logits_FHW, masks_FHW)
    if not logits_FHW.is_floating_point():
        raise ValueError(f"logits must be floating point (before the sigmoid), got {logits_FHW.dtype}")
    bad_F = logits_FHW.isnan().flatten(1).any(1)
    if bool(bad_F.any()):
        frames = bad_F.nonzero().flatten().tolist()
        raise ValueError(f"logits are NaN in {len(frames)} of {len(bad_F)} frames (first: frame {frames[0]})")
    masks_FHW = masks_FHW.to(logits_FHW.device)
    truth_FHW = masks_FHW != 0
    if bool((masks_FHW != truth_FHW).any()):
        raise ValueError("masks must hold only 0 and 1; binarise them first (masks > 0)")
    # half precision has too few values between the thresholds
    dtype = torch.promote_types(logits_FHW.dtype, torch.float32)
    return logits_FHW.detach().to(dtype).sigmoid(), truth_FHW


def _iou(probabilities_FHW: Tensor, truth_FHW: Tensor) -> Tensor:
    """float64 [F] on the CPU, from integer pixel counts."""
    predicted, truth = (probabilities_FHW > 0.5).flatten(1), truth_FHW.flatten(1)
    num_pixels = truth.shape[1]
    intersection = (predicted & truth).sum(1).cpu().double()
    union = (predicted | truth).sum(1).cpu().double()
    empty = ~truth.any(1).cpu()
    # with an empty truth the union is what was predicted in error
    intersection = torch.where(empty, num_pixels - union, intersection)
    union = torch.where(empty, torch.full_like(union, num_pixels), union)
    return intersection / (union + 1e-7)


def _f_curves(probabilities_FHW: Tensor, truth_FHW: Tensor) -> Tensor:
    pixels = max(1, probabilities_FHW[:1].numel())
    # a few frames at a time on a CPU, so that the temporaries stay in the cache
    at_once = max(1, _CPU_CHUNK // pixels) if probabilities_FHW.device.type == "cpu" else max(1, len(truth_FHW))
    parts = zip(probabilities_FHW.split(at_once), truth_FHW.split(at_once), strict=True)
    histogram = torch.cat([_histogram(probabilities, truth) for probabilities, truth in parts])
    reached = histogram.cpu().double().flip(-1).cumsum(-1).flip(-1)  # [F, background and foreground, bins]
    true_positives, selected = reached[:, 1, 1:], reached[:, :, 1:].sum(1)
    precision = true_positives / (selected + 1e-20)
    recall = true_positives / (reached[:, 1, :1] + 1e-20)
    f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    return f.nan_to_num(nan=0.0)


def _histogram(probabilities_FHW: Tensor, truth_FHW: Tensor) -> Tensor:
    """Pixels by frame, truth and number of thresholds reached [F,2,256]; threshold k is reached by the bins above k."""
    num_frames, num_bins = len(truth_FHW), NUM_THRESHOLDS + 1
    frames_F1 = torch.arange(num_frames, dtype=torch.int32, device=truth_FHW.device)[:, None]
    places_FP = _thresholds_reached(probabilities_FHW).view_as(truth_FHW.flatten(1))
    places_FP.add_(truth_FHW.flatten(1).int(), alpha=num_bins).add_(frames_F1, alpha=2 * num_bins)
    return torch.bincount(places_FP.flatten(), minlength=num_frames * 2 * num_bins).view(num_frames, 2, num_bins)


def _thresholds_reached(probabilities: Tensor) -> Tensor:
    """How many thresholds each probability reaches, exactly: int32, flat.

    Two table look-ups instead of a binary search: the unit interval is cut into cells of 2^-16, which a multiplication
    by 2^16 finds without rounding, and no cell holds more than one threshold above its lower edge.
    """
    flat = probabilities.flatten()
    cells = (flat * _CELLS).to(torch.int32)
    reached, threshold = _cell_tables(flat.dtype, flat.device)
    # one integer type throughout: torch adds mixed types some ten times slower
    return reached.index_select(0, cells).add_((flat >= threshold.index_select(0, cells)).int())


@functools.cache
def _cell_tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell: thresholds up to its lower edge, and the threshold within it (infinity where there is none)."""
    thresholds = torch.linspace(0, 1 - 1e-10, NUM_THRESHOLDS, dtype=torch.float32).to(dtype)
    edges = torch.arange(_CELLS + 1, dtype=dtype) / _CELLS
    reached = torch.searchsorted(thresholds, edges, right=True)
    following = torch.cat([thresholds, thresholds.new_tensor([torch.inf])])[reached]
    within = following.where(following < edges + 1 / _CELLS, torch.inf)
    return reached.int().to(device), within.to(device)


def in_units(scores: Tensor) -> Tensor:
    """Scores, 0 to 1, as integers of 1 / SCORE_UNITS."""
    return (scores * SCORE_UNITS).round().long()


def _best_of_mean_curve(rows: Tensor) -> Tensor:
    """[n,256] sums -> [n]: the best threshold of each mean curve; 0 where no frame sounds, as published."""
    curves = rows[:, :-1].double() / SCORE_UNITS / rows[:, -1:].clamp_min(1)
    return curves.max(dim=1).values


def _add(batches: dict[tuple[int, int], Tensor], key: tuple[int, int], batch_sum: Tensor) -> None:
    batches[key] = batches[key] + batch_sum if key in batches else batch_sum.clone()

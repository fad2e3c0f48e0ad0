"""Metrics of semantic segmentation (AVSS): IoU and F-score of each class, exact for any batch and world size.

The published numbers (AVSBench, avss/utils/compute_color_metrics.py and avss/test.py) are means over *frames*, class by
class: the IoU of a class in a frame counts where the class is in the true or in the predicted mask, and the mean over
all K classes takes a class that was never seen as 0. F (beta^2 = 0.3) comes from precision and recall of the argmax and
is divided by the same number of frames. `miou` and `f_score` are these numbers, apart from two faults of that code:

- It also evaluates the frames that only pad a clip of 5 seconds to 10: truth and prediction are background there, and
  each adds an IoU of 1 to the background. They never count here.
- Its numbers without background drop the last class, while the background is the first. Here the background is dropped.

Others report the IoU over the data set, sum of intersections over sum of unions, which comes out clearly higher:
`miou_dataset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avs_dist import world
from avs_dist.metrics import BETA_SQUARED, SCORE_UNITS, in_units
from avs_dist.semantic import BACKGROUND

_PUBLISHED = "a class never seen counts 0"
_PRESENT = "classes that occur in the true masks"

DEFINITIONS = {
    "miou": "IoU of each class, mean over the frames that show or predict it, then over all classes; "
    f"{_PUBLISHED} (as published, but without frames of padding)",
    "miou_no_background": "the same over all classes but the background",
    "miou_present": f"the same over the {_PRESENT}",
    "miou_present_no_background": f"the same over the {_PRESENT}, without the background",
    "miou_dataset": f"intersection / union of each class, both summed over the whole set; mean over the {_PRESENT}",
    "miou_dataset_no_background": "the same without the background",
    "f_score": "F (beta^2 = 0.3) of each class from the predicted classes, mean over the same frames, then over all "
    f"classes; {_PUBLISHED}",
    "f_score_no_background": "the same over all classes but the background",
    "f_score_present": f"the same over the {_PRESENT}",
    "f_score_present_no_background": f"the same over the {_PRESENT}, without the background",
}


@dataclass(frozen=True)
class ClassScores:
    """Results of each class, float64 [K]; NaN where the class was never seen.

    iou_K, f_score_K: means over the frames that show or predict the class.
    iou_dataset_K:    intersection / union, both summed over all frames.
    frames_K:         int64, the number of frames whose true mask shows the class.
    """

    iou_K: Tensor
    f_score_K: Tensor
    iou_dataset_K: Tensor
    frames_K: Tensor

    def rows(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One dict a class, with its name where known, for JSON: None in the place of NaN.

        Raises:
            ValueError: not one name for each class.
        """
        if names is not None and len(names) != len(self.frames_K):
            raise ValueError(f"{len(names)} class names for {len(self.frames_K)} classes")
        columns = {"iou": self.iou_K, "f_score": self.f_score_K, "iou_dataset": self.iou_dataset_K}
        values = {key: [None if math.isnan(v) else v for v in column.tolist()] for key, column in columns.items()}
        return [
            {
                "class": k,
                **({"name": names[k]} if names else {}),
                **{key: values[key][k] for key in values},
                "frames": n,
            }
            for k, n in enumerate(self.frames_K.tolist())
        ]


def is_semantic(row: Mapping[str, float]) -> bool:
    """Whether a row of results comes from `SemanticMetrics`."""
    return "miou_no_background" in row


def class_areas(classes_FHW: Tensor, masks_FHW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each frame, int64 [3,F,K]: predicted rightly, predicted, true.

    Args:
        classes_FHW: predicted class indices.
        masks_FHW: true class indices.

    Raises:
        ValueError: shapes differ, or an index is not one of a class.
    """
    if classes_FHW.ndim != 3 or classes_FHW.shape != masks_FHW.shape:
        shapes = f"{tuple(classes_FHW.shape)} and {tuple(masks_FHW.shape)}"
        raise ValueError(f"predicted and true classes must both be [F,H,W], got {shapes}")
    num_frames, K = len(masks_FHW), num_classes
    predicted_FHW, truth_FHW = classes_FHW.long(), masks_FHW.to(classes_FHW.device).long()
    for what, index_FHW in (("predicted", predicted_FHW), ("true", truth_FHW)):
        if index_FHW.numel() and not 0 <= int(index_FHW.min()) <= int(index_FHW.max()) < K:
            found = f"{int(index_FHW.min())} to {int(index_FHW.max())}"
            raise ValueError(f"{what} classes must be from 0 to {K - 1}, got {found}")
    frames_F11 = torch.arange(num_frames, device=truth_FHW.device)[:, None, None]
    places_FHW = (frames_F11 * K + truth_FHW).mul_(K).add_(predicted_FHW)
    confusion_FKK = torch.bincount(places_FHW.flatten(), minlength=num_frames * K * K).view(num_frames, K, K)
    return torch.stack([confusion_FKK.diagonal(dim1=1, dim2=2), confusion_FKK.sum(1), confusion_FKK.sum(2)])


class SemanticMetrics:
    """Accumulates frames and computes IoU and F of each class over everything seen, by all ranks together.

    Args:
        num_classes: K; class 0 is the background.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes {num_classes}: must be at least 2, the background and another one")
        self.num_classes = num_classes
        # by class: IoU and F in units, frames that show or predict it, frames that show it, intersection, union
        self._sums = torch.zeros(6, num_classes, dtype=torch.int64)
        # frames, and those that show another class than the background
        self._frames = torch.zeros(2, dtype=torch.int64)

    def update(self, class_logits_FKHW: Tensor, masks_FHW: Tensor) -> None:
        """Count F frames; rows that must not count (not labelled, padding) are left out by the caller.

        Args:
            class_logits_FKHW: the highest one is the class of the pixel, of equal ones the first.
            masks_FHW: true class indices, in any integer dtype.

        Raises:
            ValueError: shapes that do not fit, NaN logits, or a true index that is not one of a class.
        """
        if class_logits_FKHW.ndim != 4 or class_logits_FKHW.shape[1] != self.num_classes:
            expected = f"[F,{self.num_classes},H,W]"
            raise ValueError(f"class logits must be {expected}, got {tuple(class_logits_FKHW.shape)}")
        highest_FHW, classes_FHW = class_logits_FKHW.detach().max(dim=1)
        bad_F = highest_FHW.isnan().flatten(1).any(1)
        if bool(bad_F.any()):
            raise ValueError(f"class logits are NaN in {int(bad_F.sum())} of {len(bad_F)} frames")
        inside_FK, predicted_FK, true_FK = class_areas(classes_FHW, masks_FHW, self.num_classes).cpu()
        union_FK = predicted_FK + true_FK - inside_FK
        iou_FK = inside_FK.double() / union_FK.clamp_min(1)
        # (1 + b) P R / (b P + R) with precision and recall written out; 0 where one of them is 0 / 0, as published
        weighted_FK = BETA_SQUARED * true_FK.double() + predicted_FK
        f_FK = ((1 + BETA_SQUARED) * inside_FK.double() / weighted_FK).nan_to_num(nan=0.0)
        seen_FK, shown_FK = union_FK > 0, true_FK > 0
        counted = (in_units(iou_FK), in_units(f_FK), seen_FK, shown_FK, inside_FK, union_FK)
        self._sums += torch.stack([part_FK.long().sum(0) for part_FK in counted])
        sounding_F = shown_FK[:, BACKGROUND + 1 :].any(1)
        self._frames += torch.tensor([len(sounding_F), int(sounding_F.sum())])

    def compute(self) -> dict[str, float]:
        """Results over the frames of all ranks; every rank must call it and gets the same numbers.

        Returns:
            The values of DEFINITIONS (those over the classes that occur, where any does), and the counts `frames` and
            `frames_with_sound` (that show another class than the background).

        Raises:
            ValueError: no frame was counted.
        """
        return self.results()[0]

    def results(self) -> tuple[dict[str, float], ClassScores]:
        """What `compute` returns, and what it is made of; collective like it, with the same errors."""
        sums, frames = torch.zeros_like(self._sums), torch.zeros_like(self._frames)
        for rank_sums, rank_frames in world.gather_objects((self._sums, self._frames)):
            sums += rank_sums
            frames += rank_frames
        num_frames, with_sound = frames.tolist()
        if not num_frames:
            raise ValueError("no frames were counted: the evaluation data has no labelled frames")
        iou_K, f_K, seen_K, shown_K, inside_K, union_K = sums
        # 0 / 0 is NaN: never seen
        scores = ClassScores(
            iou_K=iou_K.double() / SCORE_UNITS / seen_K,
            f_score_K=f_K.double() / SCORE_UNITS / seen_K,
            iou_dataset_K=inside_K.double() / union_K,
            frames_K=shown_K,
        )
        return {**_means(scores), "frames": num_frames, "frames_with_sound": with_sound}, scores


def _means(scores: ClassScores) -> dict[str, float]:
    everything_K = torch.ones_like(scores.frames_K, dtype=torch.bool)
    present_K, no_background_K = scores.frames_K > 0, everything_K.clone()
    no_background_K[BACKGROUND] = False
    choices = (
        ("miou", scores.iou_K, everything_K),
        ("miou_present", scores.iou_K, present_K),
        ("miou_dataset", scores.iou_dataset_K, present_K),
        ("f_score", scores.f_score_K, everything_K),
        ("f_score_present", scores.f_score_K, present_K),
    )
    means = {}
    for name, value_K, chosen_K in choices:
        for suffix, kept_K in (("", chosen_K), ("_no_background", chosen_K & no_background_K)):
            if bool(kept_K.any()):
                means[name + suffix] = float(value_K[kept_K].nan_to_num(nan=0.0).mean())
    return means

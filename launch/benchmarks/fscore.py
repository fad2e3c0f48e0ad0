"""F-score of each frame at 255 thresholds, the evaluation's hot spot: one histogram against 255 passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avs_dist.launch.benchmarks.problem import Case, Op, Problem, Size
from avs_dist.metrics import BETA_SQUARED, NUM_THRESHOLDS, f_curves

IMPLEMENTATIONS = {
    "literal": "255 passes over the pixels, as in the published code",
    "ours": "avs_dist.metrics.f_curves: one histogram a frame",
}


def _sizes(device: str, tiny: bool) -> list[Size]:
    if tiny:
        return [{"frames": 2, "hw": 6}]
    return [{"frames": 20, "hw": 224}]


def _prepare(case: Case) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (case.size["frames"], case.size["hw"], case.size["hw"])
    logits_FHW = torch.randn(*shape, generator=generator, device=case.device)
    masks_FHW = (torch.rand(*shape, generator=generator, device=case.device) > 0.7).to(torch.uint8)
    probabilities_FHW, truth_FHW = logits_FHW.sigmoid(), masks_FHW != 0

    def literal() -> Sequence[Tensor]:
        return [_literal(probabilities_FHW, truth_FHW)]

    def ours() -> Sequence[Tensor]:
        return [f_curves(logits_FHW, masks_FHW)]

    mine = case.implementation == "ours"
    return Problem(
        modes={"forward": ours if mine else literal},
        exact=literal,
        tolerance=1e-6 if mine else None,
        capturable=False,  # the curves end on the host
    )


def _literal(probabilities_FHW: Tensor, truth_FHW: Tensor) -> Tensor:
    """float64 [F,255] on the CPU."""
    thresholds = torch.linspace(0, 1 - 1e-10, NUM_THRESHOLDS)
    curves_FK = torch.zeros(len(truth_FHW), NUM_THRESHOLDS, dtype=torch.float64)
    for frame, (probability_HW, truth_HW) in enumerate(zip(probabilities_FHW, truth_FHW.float(), strict=True)):
        for k, threshold in enumerate(thresholds.tolist()):
            predicted_HW = (probability_HW >= threshold).float()
            hits = (predicted_HW * truth_HW).sum().double()
            precision, recall = hits / (predicted_HW.sum() + 1e-20), hits / (truth_HW.sum() + 1e-20)
            f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
            curves_FK[frame, k] = f.nan_to_num(nan=0.0)
    return curves_FK


OP = Op(
    name="fscore",
    title="F-score curves of the evaluation",
    implementations=IMPLEMENTATIONS,
    sizes=_sizes,
    dtypes=lambda device: ("float32",),
    included=lambda case: True,
    prepare=_prepare,
)

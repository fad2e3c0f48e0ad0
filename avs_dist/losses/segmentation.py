"""Segmentation losses. Each returns a total and a count of frames, so that the mean can be taken over all ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel-mean binary cross entropy of each counted frame, in float32 (S4 and MS3 loss of the TPAVI paper).

    S4 training counts the first frame of each clip only, MS3 all frames: that is `labelled_BT & valid_BT`.

    Args:
        logits_BTHW: mask logits.
        masks_BTHW: 0 = silent, anything else = sounding.
        counted_BT: bool, frames that carry a mask.

    Returns:
        Sum over the counted frames, and their number.
    """
    loss_BTHW = F.binary_cross_entropy_with_logits(logits_BTHW.float(), (masks_BTHW > 0).float(), reduction="none")
    weight_BT = counted_BT.float()
    return (loss_BTHW.mean((2, 3)) * weight_BT).sum(), weight_BT.sum()

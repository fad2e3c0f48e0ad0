"""Segmentation losses. Each returns a total and a count of frames, so that the mean can be taken over all ranks.

Arguments of all: logits_BTHW, the mask logits; masks_BTHW, where 0 = silent and anything else = sounding, or the class
of the pixel; counted_BT, bool, the frames that carry a mask. S4 training counts the first frame of each clip only, MS3
all frames: that is `labelled_BT & valid_BT`. They return the sum over the counted frames, and the number of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from avs_dist.precision import at_least_float32

EDGE_WINDOW = 31  # pixels
EDGE_EMPHASIS = 5.0
DICE_SMOOTHING = 1.0  # pixels


def binary_cross_entropy(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel-mean binary cross entropy of each counted frame, in float32 (S4 and MS3 loss of the TPAVI paper)."""
    loss_BTHW = F.binary_cross_entropy_with_logits(logits_BTHW.float(), (masks_BTHW > 0).float(), reduction="none")
    weight_BT = counted_BT.float()
    return (loss_BTHW.mean((2, 3)) * weight_BT).sum(), weight_BT.sum()


def structure_loss(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy plus IoU loss of each counted frame, both weighted near edges (ECMVAE section 3.5; F3Net).

    In float32, or float64 if the logits are. `ecmvae_code.structure_loss` is what the public code computes.
    """
    logits_NHW, mask_NHW = counted_frames(logits_BTHW, masks_BTHW, counted_BT)
    weight_NHW = edge_weight(mask_NHW)
    bce_NHW = F.binary_cross_entropy_with_logits(logits_NHW, mask_NHW, reduction="none")
    bce_N = (weight_NHW * bce_NHW).sum((1, 2)) / weight_NHW.sum((1, 2))
    loss_N = bce_N + weighted_iou_loss(logits_NHW, mask_NHW, weight_NHW)
    return loss_N.sum(), counted_BT.sum().to(loss_N.dtype)


def dice(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice loss of each counted frame (AVSegFormer), see `dice_loss`; in float32, or float64 if the logits are."""
    loss_N = dice_loss(*counted_frames(logits_BTHW, masks_BTHW, counted_BT))
    return loss_N.sum(), counted_BT.sum().to(loss_N.dtype)


def mixing_loss(mix_BThw: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Dice of "anything sounds here" at the size of the mixed features (L_mix of AVSegFormer), for any classes.

    The binary mask is resized by area: a cell holds the share of its pixels that sound (the cells of sizes that do not
    divide overlap, as in adaptive average pooling), so that an object smaller than a cell is not lost.
    """
    mix_Nhw, mask_NHW = counted_frames(mix_BThw, masks_BTHW, counted_BT)
    size = (mix_Nhw.shape[-2], mix_Nhw.shape[-1])
    loss_N = dice_loss(mix_Nhw, F.adaptive_avg_pool2d(mask_NHW[:, None], size)[:, 0])
    return loss_N.sum(), counted_BT.sum().to(loss_N.dtype)


def cross_entropy(class_logits_BTKHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel-mean cross entropy of each counted frame over K classes (AVSS); masks hold the index of the class.

    In float32, or float64 if the logits are.

    Raises:
        IndexError: a class >= K (on a GPU this is a device-side assertion, so that the host need not wait).
    """
    # only the counted ones: K maps of every frame are large, and one frame in ten may carry a mask
    logits_NKHW = at_least_float32(class_logits_BTKHW[counted_BT])
    loss_NHW = F.cross_entropy(logits_NKHW, masks_BTHW[counted_BT].long(), reduction="none")
    return loss_NHW.mean((1, 2)).sum(), counted_BT.sum().to(loss_NHW.dtype)


SEGMENTATION: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "bce": binary_cross_entropy,
    "structure": structure_loss,
    "dice": dice,
}


def counted_frames(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and binary masks [N,H,W] of the counted frames, both in float32 (float64 if the logits are)."""
    logits_NHW = at_least_float32(logits_BTHW[counted_BT])
    return logits_NHW, (masks_BTHW[counted_BT] > 0).to(logits_NHW.dtype)


def dice_loss(logits_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """1 - (2 sum(p m) + s) / (sum(p) + sum(m) + s) of each frame [N], with soft masks.

    The paper leaves s open. With none, any prediction for an empty mask costs 1; with s = 1 pixel, a false area of n
    pixels on an empty mask costs n / (n + 1). That is nearly flat unless n is small, so silent frames teach little as
    long as much is predicted for them. A frame painted all over is a plateau too, where the sigmoids saturate: random
    weights learn better from another loss.
    """
    probability_NHW = logits_NHW.sigmoid()
    common_N = (probability_NHW * mask_NHW).sum((1, 2))
    both_N = probability_NHW.sum((1, 2)) + mask_NHW.sum((1, 2))
    return 1.0 - (2.0 * common_N + DICE_SMOOTHING) / (both_N + DICE_SMOOTHING)


def edge_weight(mask_NHW: Tensor) -> Tensor:
    """1 + 5 |mean of the mask over the 31 x 31 pixels around - mask|; what lies outside the frame counts as silent."""
    half = EDGE_WINDOW // 2
    # the square window as two lines: the same mean from 62 instead of 961 pixels
    mean_N1HW = F.avg_pool2d(mask_NHW[:, None], (1, EDGE_WINDOW), stride=1, padding=(0, half))
    mean_N1HW = F.avg_pool2d(mean_N1HW, (EDGE_WINDOW, 1), stride=1, padding=(half, 0))
    return 1.0 + EDGE_EMPHASIS * (mean_N1HW[:, 0] - mask_NHW).abs()


def weighted_iou_loss(logits_NHW: Tensor, mask_NHW: Tensor, weight_NHW: Tensor) -> Tensor:
    """1 - (intersection + 1) / (union + 1) of each frame [N], with soft masks and weighted pixels."""
    probability_NHW = logits_NHW.sigmoid()
    intersection_N = (weight_NHW * probability_NHW * mask_NHW).sum((1, 2))
    both_N = (weight_NHW * (probability_NHW + mask_NHW)).sum((1, 2))
    return 1.0 - (intersection_N + 1.0) / (both_N - intersection_N + 1.0)

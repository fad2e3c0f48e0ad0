"""Several classes: what stands for "sounding" there, and masks as pictures that a network can look at."""

from __future__ import annotations

import torch
from torch import Tensor

from avs_dist.shards.palette import colours

BACKGROUND = 0


def sounding_logits(class_logits_NKHW: Tensor) -> Tensor:
    """Log odds that a pixel is not background, [N,H,W]; of one class its logits.

    Positive where the background has less than half of the probability; the predicted class can still be background
    where several others share the rest.
    """
    if class_logits_NKHW.shape[1] == 1:
        return class_logits_NKHW[:, 0]
    return class_logits_NKHW[:, 1:].logsumexp(1) - class_logits_NKHW[:, BACKGROUND]


def picture_channels(num_classes: int) -> int:
    """Channels of `mask_pictures`."""
    return 1 if num_classes == 1 else 3


def mask_pictures(masks_NHW: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Masks for an encoder: 0 or 1 [N,1,H,W], or, of several classes, their colours from 0 to 1 [N,3,H,W].

    AVSS is distributed as such coloured pictures, and three channels instead of one for each class keep the encoders
    of the binary settings as they are.
    """
    if num_classes == 1:
        return (masks_NHW > 0)[:, None].to(dtype)
    palette_K3 = torch.from_numpy(colours(num_classes)).to(masks_NHW.device, dtype) / 255
    return palette_K3[masks_NHW.long()].permute(0, 3, 1, 2)

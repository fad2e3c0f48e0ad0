"""Augmentation of training clips."""

from __future__ import annotations

from dataclasses import replace

import torch

from avs_dist.clip import Clip
from avs_dist.draws import ClipDraws


def mirror(clip: Clip, share: float, draws: ClipDraws, each_frame: bool = False) -> Clip:
    """Mirror a random share of the clips left to right, all frames and masks of a clip together.

    Args:
        each_frame: decide for each labelled frame by itself, as the public ECMVAE code does (so an S4 clip has its
            first frame mirrored and not the others); it breaks the motion that TPAVI looks at.
    """
    if share == 0.0:
        return clip
    num_frames = clip.valid_BT.shape[1]
    chosen_BT = (draws.uniform("mirror", num_frames if each_frame else 1) < share).to(clip.valid_BT.device)
    chosen_BT = chosen_BT & clip.labelled_BT if each_frame else chosen_BT.expand_as(clip.valid_BT)
    return replace(
        clip,
        frames_BTCHW=torch.where(chosen_BT[..., None, None, None], clip.frames_BTCHW.flip(-1), clip.frames_BTCHW),
        masks_BTHW=torch.where(chosen_BT[..., None, None], clip.masks_BTHW.flip(-1), clip.masks_BTHW),
    )

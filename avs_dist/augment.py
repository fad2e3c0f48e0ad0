"""Augmentation of training clips: frames, masks and time move together, by draws that belong to the clip alone."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

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


def crop(clip: Clip, smallest: float, draws: ClipDraws) -> Clip:
    """Cut a random window out of each clip, the same of all its frames and masks, and bring it back to full size.

    Frames are resized bilinearly, masks by nearest neighbour.

    Args:
        smallest: share of height and width that the smallest window keeps; 1 = off.
    """
    if smallest == 1.0:
        return clip
    full_HW = clip.masks_BTHW.shape[-2:]
    frames, masks = [], []
    for b, (size, top, left) in enumerate(draws.uniform("crop", 3).tolist()):
        share = smallest + (1.0 - smallest) * size
        height, width = (max(1, round(share * side)) for side in full_HW)
        y, x = int(top * (full_HW[0] - height + 1)), int(left * (full_HW[1] - width + 1))
        window = (..., slice(y, y + height), slice(x, x + width))
        frames.append(F.interpolate(clip.frames_BTCHW[b][window], full_HW, mode="bilinear", align_corners=False))
        # of its two kinds this one takes the pixel whose centre is nearest, as it is where the frame has it
        masks.append(F.interpolate(clip.masks_BTHW[b][window][:, None], full_HW, mode="nearest-exact")[:, 0])
    return replace(clip, frames_BTCHW=torch.stack(frames), masks_BTHW=torch.stack(masks))


def shift(clip: Clip, longest: int, draws: ClipDraws) -> Clip:
    """Roll the seconds of each clip by a random number of them, forwards or back: frames, masks and sound together.

    What leaves at one end comes in at the other; padding stays where it is.

    Args:
        longest: most seconds; 0 = off.
    """
    if longest == 0:
        return clip
    device = clip.valid_BT.device
    by_B1 = (draws.uniform("shift", 1) * (2 * longest + 1)).long().to(device) - longest
    second_T = torch.arange(clip.valid_BT.shape[1], device=device)
    rolled_BT = (second_T - by_B1) % clip.valid_BT.sum(1, keepdim=True)
    source_BT = torch.where(clip.valid_BT, rolled_BT, second_T)
    rows_B1 = torch.arange(len(clip), device=device)[:, None]

    def rolled(value_BTx: Tensor) -> Tensor:
        return value_BTx[rows_B1, source_BT]

    return replace(
        clip,
        frames_BTCHW=rolled(clip.frames_BTCHW),
        mel_BTFM=rolled(clip.mel_BTFM),
        masks_BTHW=rolled(clip.masks_BTHW),
        labelled_BT=rolled(clip.labelled_BT),
        audio_BTD=None if clip.audio_BTD is None else rolled(clip.audio_BTD),
    )

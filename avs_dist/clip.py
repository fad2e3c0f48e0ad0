"""The Clip batch: the one type that travels from the shards through the systems to the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avs_dist.shards.schema import Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Clip:
    """A batch of clips; B clips of T seconds, one frame, one log-mel example and one mask a second.

    frames_BTCHW: uint8 RGB as the shards hold it, until `to` makes it float, ImageNet-normalised.
    mel_BTFM:     float [B,T,96,64], VGGish log-mel example of each second.
    masks_BTHW:   uint8, 1 where it sounds, or class indices (AVSS); zero where not labelled.
    labelled_BT:  bool, which frames carry a mask.
    valid_BT:     bool, which frames exist (clips of different length share a batch; padding is zero).
    key:          clip names.
    text_BWE:     float, vectors of the words of each clip's prompt; None where not all clips have one.
    text_valid_BW: bool, which words exist; those come first, padding is zero.
    audio_BTD:    float [B,T,128], what a frozen audio encoder makes of the log-mel, where the shards of all clips hold
                  it; padding is zero.
    """

    frames_BTCHW: Tensor
    mel_BTFM: Tensor
    masks_BTHW: Tensor
    labelled_BT: Tensor
    valid_BT: Tensor
    key: tuple[str, ...]
    text_BWE: Tensor | None = None
    text_valid_BW: Tensor | None = None
    audio_BTD: Tensor | None = None

    def __len__(self) -> int:
        return self.frames_BTCHW.shape[0]

    @property
    def normalised_BTCHW(self) -> Tensor:
        """The frames as networks see them.

        Raises:
            ValueError: they are still uint8.
        """
        return require_normalised(self.frames_BTCHW)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Clip:
        """Copy on `device`; the floating-point fields in `dtype`, the frames normalised."""

        def moved(value: Tensor | None, to: torch.dtype | None = None) -> Any:
            return None if value is None else value.to(device=device, dtype=to, non_blocking=True)

        return replace(
            self,
            frames_BTCHW=on_device(self.frames_BTCHW, self.valid_BT, device, dtype),
            mel_BTFM=moved(self.mel_BTFM, dtype),
            masks_BTHW=moved(self.masks_BTHW),
            labelled_BT=moved(self.labelled_BT),
            valid_BT=moved(self.valid_BT),
            text_BWE=moved(self.text_BWE, dtype),
            text_valid_BW=moved(self.text_valid_BW),
            audio_BTD=moved(self.audio_BTD, dtype),
        )


def on_device(value_BTx: Tensor, valid_BT: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A field of a batch on `device` in `dtype`; uint8 frames are normalised there, those that do not exist are zero.

    The host does not wait for the device: whether there is padding is seen before the copy.
    """
    moved_BTx = value_BTx.to(device, non_blocking=True)
    if value_BTx.dtype != torch.uint8:
        return moved_BTx.to(dtype)
    normalised_BTCHW = normalise_frames(moved_BTx)
    if not bool(valid_BT.all()):
        normalised_BTCHW *= valid_BT.to(device, non_blocking=True)[..., None, None, None]
    return normalised_BTCHW.to(dtype)


def normalise_frames(frames_NCHW: Tensor) -> Tensor:
    """uint8 RGB [...,3,H,W] -> ImageNet-normalised float32 of the same shape, C contiguous in memory."""
    mean_C, std_C = (torch.tensor(numbers).mul(255.0) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    rows_NHX = frames_NCHW.movedim(-3, -1).flatten(-2)  # a view of stored frames: whole rows at once are faster
    width = frames_NCHW.shape[-1]
    scale_X, shift_X = (
        value_C.repeat(width).to(frames_NCHW.device, non_blocking=True) for value_C in (1 / std_C, -mean_C / std_C)
    )
    normalised_NHX = rows_NHX.to(torch.float32).mul_(scale_X).add_(shift_X)
    return normalised_NHX.unflatten(-1, (width, 3)).movedim(-1, -3)


def require_normalised(frames: Tensor) -> Tensor:
    """`frames`, for a network.

    Raises:
        ValueError: they are still uint8.
    """
    if frames.dtype == torch.uint8:
        raise ValueError("frames are uint8, as stored: move the batch to the device of the system with its `to` first")
    return frames


def pad(values: Sequence[np.ndarray], length: int) -> tuple[Tensor, Tensor]:
    """Arrays [t,...] of one type and shape of a step, cut or padded with zeros to one length.

    Returns:
        All of them [B,length,...], and which steps exist, bool [B,length].
    """
    out = np.empty((len(values), length, *values[0].shape[1:]), dtype=values[0].dtype)
    valid = np.zeros((len(values), length), dtype=bool)
    for row, value in enumerate(values):
        count = min(len(value), length)
        out[row, :count], valid[row, :count] = value[:count], True
        out[row, count:] = 0
    return torch.from_numpy(out), torch.from_numpy(valid)


def collate(samples: Sequence[Sample]) -> Clip:
    """Batch samples of one image size; shorter clips are padded with zeros and marked in `valid_BT`."""
    num_frames = max(len(s.frames_THWC) for s in samples)
    height, width = samples[0].frames_THWC.shape[1:3]
    for s in samples:
        if s.frames_THWC.shape[1:3] != (height, width):
            raise ValueError(
                f"clip {s.name}: frames are {s.frames_THWC.shape[1:3]}, others of the batch {(height, width)}; "
                "build all shards with one --size"
            )
    frames_BTHWC, valid_BT = pad([s.frames_THWC for s in samples], num_frames)
    text_BWE, text_valid_BW = _collate_text(samples)
    return Clip(
        frames_BTCHW=frames_BTHWC.permute(0, 1, 4, 2, 3),
        mel_BTFM=pad([s.mel_TFM for s in samples], num_frames)[0],
        masks_BTHW=pad([s.masks_THW for s in samples], num_frames)[0],
        labelled_BT=pad([s.labelled_T for s in samples], num_frames)[0],
        valid_BT=valid_BT,
        key=tuple(s.name for s in samples),
        text_BWE=text_BWE,
        text_valid_BW=text_valid_BW,
        audio_BTD=collate_audio(samples, num_frames),
    )


def collate_audio(samples: Sequence[Sample], length: int) -> Tensor | None:
    """Stored sound [B,length,128]; None where not all clips have it."""
    stored = [s.audio_TD for s in samples if s.audio_TD is not None]
    return pad(stored, length)[0] if len(stored) == len(samples) else None


def _collate_text(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Words [B,W,E], as many as the longest prompt has, and which of them exist."""
    words = [s.text_WE for s in samples if s.text_WE is not None]
    if len(words) < len(samples):
        return None, None
    for s, text_WE in zip(samples, words, strict=True):
        if text_WE.shape[1] != words[0].shape[1]:
            raise ValueError(
                f"clip {s.name}: word vectors have {text_WE.shape[1]} numbers, others of the batch "
                f"{words[0].shape[1]}; build all shards with one --word-vectors"
            )
    return pad(words, max(map(len, words)))

"""The Clip batch: the one type that travels from the shards through the systems to the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from avs_dist.shards.schema import Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Clip:
    """A batch of clips; B clips of T seconds, one frame, one log-mel example and one mask a second.

    frames_BTCHW: float, ImageNet-normalised.
    mel_BTFM:     float [B,T,96,64], VGGish log-mel example of each second.
    masks_BTHW:   uint8, 1 where it sounds, or class indices (AVSS); zero where not labelled.
    labelled_BT:  bool, which frames carry a mask.
    valid_BT:     bool, which frames exist (clips of different length share a batch; padding is zero).
    key:          clip names.
    text_BWE:     float, vectors of the words of each clip's prompt; None where not all clips have one.
    text_valid_BW: bool, which words exist; those come first, padding is zero.
    """

    frames_BTCHW: Tensor
    mel_BTFM: Tensor
    masks_BTHW: Tensor
    labelled_BT: Tensor
    valid_BT: Tensor
    key: tuple[str, ...]
    text_BWE: Tensor | None = None
    text_valid_BW: Tensor | None = None

    def __len__(self) -> int:
        return self.frames_BTCHW.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Clip:
        """Copy on `device`; the floating-point fields in `dtype`."""
        return replace(
            self,
            frames_BTCHW=self.frames_BTCHW.to(device, dtype, non_blocking=True),
            mel_BTFM=self.mel_BTFM.to(device, dtype, non_blocking=True),
            masks_BTHW=self.masks_BTHW.to(device, non_blocking=True),
            labelled_BT=self.labelled_BT.to(device, non_blocking=True),
            valid_BT=self.valid_BT.to(device, non_blocking=True),
            text_BWE=None if self.text_BWE is None else self.text_BWE.to(device, dtype, non_blocking=True),
            text_valid_BW=None if self.text_valid_BW is None else self.text_valid_BW.to(device, non_blocking=True),
        )


def normalise_frames(frames_THWC: np.ndarray) -> Tensor:
    """uint8 RGB frames [T,H,W,3] -> ImageNet-normalised float32 [T,3,H,W]."""
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return frames_TCHW.sub_(mean).div_(std)


def denormalise_frames(frames_TCHW: Tensor) -> np.ndarray:
    """Inverse of `normalise_frames`, for pictures."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (frames_TCHW.float().cpu() * std + mean).mul(255.0).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


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
    batch = len(samples)
    frames = torch.zeros(batch, num_frames, 3, height, width)
    mel = torch.zeros(batch, num_frames, *samples[0].mel_TFM.shape[1:])
    masks = torch.zeros(batch, num_frames, height, width, dtype=torch.uint8)
    labelled = torch.zeros(batch, num_frames, dtype=torch.bool)
    valid = torch.zeros(batch, num_frames, dtype=torch.bool)
    for i, s in enumerate(samples):
        n = len(s.frames_THWC)
        frames[i, :n] = normalise_frames(s.frames_THWC)
        mel[i, :n] = torch.from_numpy(s.mel_TFM)
        masks[i, :n] = torch.from_numpy(s.masks_THW)
        labelled[i, :n] = torch.from_numpy(s.labelled_T)
        valid[i, :n] = True
    return Clip(frames, mel, masks, labelled, valid, tuple(s.name for s in samples), *_collate_text(samples))


def _collate_text(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Words [B,W,E], as many as the longest prompt has, and which of them exist."""
    words = [s.text_WE for s in samples if s.text_WE is not None]
    if len(words) < len(samples):
        return None, None
    text = torch.zeros(len(words), max(map(len, words)), words[0].shape[1])
    valid = torch.zeros(text.shape[:2], dtype=torch.bool)
    for i, (s, text_WE) in enumerate(zip(samples, words, strict=True)):
        if text_WE.shape[1] != text.shape[2]:
            raise ValueError(
                f"clip {s.name}: word vectors have {text_WE.shape[1]} numbers, others of the batch {text.shape[2]}; "
                "build all shards with one --word-vectors"
            )
        text[i, : len(text_WE)] = torch.from_numpy(text_WE)
        valid[i, : len(text_WE)] = True
    return text, valid

"""Latent codes for every frame, or one for every clip, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from avs_dist.systems.trunk import Existing


class CodeRows:
    """R rows of codes for N existing frames of B clips: R = N, or R = B.

    Args:
        per: what has a code of its own.
        exist: the frames.
        counted_BT: frames that have a true code, in whole clips.
    """

    def __init__(self, per: Literal["frame", "clip"], exist: Existing, counted_BT: Tensor) -> None:
        self._exist, self._of_frames = exist, per == "frame"
        batch, frames = exist.shape
        clip_BT = torch.arange(batch, device=counted_BT.device)[:, None].expand(batch, frames)
        self._clip_N = exist.select(clip_BT)
        self.counted_R = exist.select(counted_BT) if self._of_frames else counted_BT.any(1)
        self.clip_R = self._clip_N if self._of_frames else clip_BT[:, 0]

    def reduce(self, value_ND: Tensor) -> Tensor:
        """Of frames -> of rows: the frames themselves, or the mean of each clip [R,D]."""
        if self._of_frames:
            return value_ND
        sums_BD = value_ND.new_zeros(self._exist.shape[0], value_ND.shape[1]).index_add(0, self._clip_N, value_ND)
        return sums_BD / self._clip_N.bincount(minlength=len(sums_BD)).clamp_min(1)[:, None]

    def spread(self, value_RD: Tensor) -> Tensor:
        """Of rows -> of frames [N,D]."""
        return value_RD if self._of_frames else value_RD[self._clip_N]

    def draw(self, draws: Callable[..., Tensor], purpose: str, *shape: int) -> Tensor:
        """Numbers of each row [R,*shape] from `ClipDraws.normal` or `.uniform`."""
        if self._of_frames:
            return self._exist.select(draws(purpose, self._exist.shape[1], *shape).to(self._clip_N.device))
        return draws(purpose, *shape).to(self._clip_N.device)

    def draw_of_clip(self, draws: Callable[..., Tensor], purpose: str) -> Tensor:
        """One number of each clip, at its rows [R]."""
        return draws(purpose).to(self._clip_N.device)[self.clip_R]

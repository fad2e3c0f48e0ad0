"""What one clip is inside a shard: the Sample record and the names of its tar members."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One clip of T seconds, as decoded from a shard.

    frames_THWC: uint8 RGB.
    mel_TFM:     float32 [T,96,64], VGGish log-mel examples.
    masks_THW:   uint8, 0 = silent, 1 = sounding (or a class index); zero where not labelled.
    labelled_T:  bool, which frames carry a mask.
    meta:        JSON facts: category, sound ("ok" | "silent" | "none"), fps, original size, source ...
    """

    name: str
    frames_THWC: np.ndarray
    mel_TFM: np.ndarray
    masks_THW: np.ndarray
    labelled_T: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

"""What one clip is inside a shard: the Sample and FeatureSample records and the facts that writer and reader share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

SCHEMA_VERSION = 1
INDEX_FILE = "index.json"

MEL_FRAMES = 96
MEL_BANDS = 64
LOG_OFFSET = 0.01
SILENT_LOG_MEL = float(np.log(LOG_OFFSET))

# What shards hold: Samples, FeatureSamples.
CLIPS, FEATURES = "clips", "features"

# Features of a clip: how many dimensions they have; all begin with seconds, those of text with words.
FEATURE_NDIM = {"visual": 4, "audio": 2, "text": 2}
# settings of an index whose clips come with the output of a frozen audio encoder, and how long each vector is
AUDIO_ENCODER = "audio_encoder"
ENCODED_CHANNELS = 128
# the modalities that events have seconds in
LABELLED = ("visual", "audio")

# Limits against decompression bombs; real clips stay far below.
MAX_MEMBER_BYTES = 64 * 2**20
MAX_CLIP_BYTES = 512 * 2**20
MAX_PIXELS = 8192 * 8192
MAX_CLIP_SECONDS = 3600
MAX_IMAGE_SIZE = 8192


@dataclass(frozen=True)
class Sample:
    """One clip of T seconds, as decoded from a shard.

    frames_THWC: uint8 RGB.
    mel_TFM:     float32 [T,96,64], VGGish log-mel examples.
    masks_THW:   uint8, 0 = silent, 1 = sounding (or a class index); zero where not labelled.
    labelled_T:  bool, which frames carry a mask.
    meta:        JSON facts: category, sound ("ok" | "silent" | "none"), fps, original size, source ...
    text_WE:     float32 vectors of the prompt's words, for clips that have one.
    audio_TD:    float32 [T,128], what a frozen audio encoder makes of mel_TFM, in shards that have it stored.
    """

    name: str
    frames_THWC: np.ndarray
    mel_TFM: np.ndarray
    masks_THW: np.ndarray
    labelled_T: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    text_WE: np.ndarray | None = None
    audio_TD: np.ndarray | None = None

    @property
    def seconds(self) -> int:
        return len(self.frames_THWC)

    @property
    def labelled_seconds(self) -> int:
        return int(self.labelled_T.sum())

    @property
    def sound(self) -> str:
        return self.meta.get("sound", "none")


@dataclass(frozen=True)
class FeatureSample:
    """One clip as paired sequences of features, as decoded from a shard of kind "features".

    features: float16 or float32 by modality: "visual" [T,h,w,C] and "audio" [T,C] of each second, "text" [W,C] of each
              word. Modalities that the clip lacks are left out; lengths may differ.
    labels:   uint8 [T,K] by modality ("visual", "audio"), 1 where an event of the K happens in that second, all 0 in
              background; empty where nothing is labelled.
    meta:     JSON facts: category, prompt, source ...
    """

    name: str
    features: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> int:
        """Of the longest modality but text, which has words instead."""
        return max((len(self.features[name]) for name in LABELLED if name in self.features), default=0)

    @property
    def labelled_seconds(self) -> int:
        """Of the modality that is labelled longest."""
        return max((len(labels_TK) for labels_TK in self.labels.values()), default=0)

    @property
    def sound(self) -> str:
        return "ok" if "audio" in self.features else "none"


def key_of(name: str) -> str:
    """Tar key of a clip name: percent-encoded, dots too, since a key ends at the first dot of a member's name."""
    return quote(name, safe="").replace(".", "%2E")


def name_of(key: str) -> str:
    """Inverse of `key_of`."""
    return unquote(key)

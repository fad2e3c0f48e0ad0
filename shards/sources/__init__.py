"""Where raw clips come from: a source lists ClipJobs or FeatureJobs, `build` turns each into a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avs_dist.shards.images import Fit
from avs_dist.shards.workers import VideoFacts

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ClipJob:
    """One clip still to be made.

    name:        Unique within its split.
    split:       "train", "val" or "test".
    path:        What to name when it fails.
    frames:      Extracted frames, one a second; when empty they are decoded from `video`.
    video:       Media file, or None.
    sound:       File with the sound (a wav, or the video itself), or None.
    mel:         File with the log-mel as published, or None; there is no `sound` then.
    masks:       Mask of each second from the first on; later ones are unlabelled, those behind the end are ignored.
    num_classes: Classes that the masks tell by colour; 1: what is not black sounds.
    fit:         How frames and masks become square.
    start_s:     Start of the clip in the media files.
    seconds:     Length, at most (a video may end earlier).
    meta:        Facts for the shard.
    problem:     Why it cannot be made at all, where the listing already shows it.
    """

    name: str
    split: str
    path: Path
    frames: tuple[Path, ...] = ()
    video: Path | None = None
    sound: Path | None = None
    mel: Path | None = None
    masks: tuple[Path, ...] = ()
    num_classes: int = 1
    fit: Fit = "sampled"
    start_s: float = 0.0
    seconds: int = 5
    meta: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


# facts of each file, or the reason why there are none
Probe = Callable[[Sequence[Path]], list[VideoFacts | str]]

# features and labels of a clip by modality, as in FeatureSample but of any numeric type
FeatureArrays = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class FeatureJob:
    """One clip of stored features, still to be read.

    name:  Unique in all splits.
    split: "train", "val" or "test".
    files: What it is read from; the first is named when it fails.
    read:  Reads it; raises ValueError or OSError, naming the file, where that cannot be done.
    meta:  Facts for the shard; the words of a "prompt" become the features of text.
    """

    name: str
    split: str
    files: tuple[Path, ...]
    read: Callable[[], FeatureArrays]
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.files[0]


@dataclass(frozen=True)
class FeatureSource:
    """What a source of features lists.

    events: Names of the K event classes, in the order of the labels.
    jobs:   Clips, train first; all have the same modalities.
    tables: Small files that decide names, splits and labels.
    """

    events: tuple[str, ...]
    jobs: list[FeatureJob]
    tables: tuple[Path, ...]

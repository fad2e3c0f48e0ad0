"""Where raw clips come from. A source lists ClipJobs; `build` turns each into a Sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from avs_dist.shards.workers import VideoFacts


@dataclass(frozen=True)
class ClipJob:
    """One clip still to be made.

    name:     Unique within the build.
    split:    "train", "val" or "test".
    frames:   Extracted frames, one a second; when empty they are decoded from `video`.
    video:    Media file, or None.
    sound:    File with the sound (a wav, or the video itself), or None.
    masks:    Mask picture of each labelled second, existing or not.
    labels:   Labelled seconds: "none", "first" or "all".
    start_s:  Start of the clip in the media files.
    problem:  Why it cannot be made at all, found while listing.
    """

    name: str
    split: str
    path: Path
    frames: tuple[Path, ...] = ()
    video: Path | None = None
    sound: Path | None = None
    mask_pattern: Callable[[int], Path] | None = None
    labels: str = "none"
    start_s: float = 0.0
    meta: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


Probe = Callable[[list[Path]], list[VideoFacts | str]]

"""Settings of the data of a run; part of `config`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from avs_dist.model_config import at_least, share


@dataclass(frozen=True)
class DataConfig:
    """Where the clips come from.

    Args:
        shards: Folder with index.json and the tar shards (`avs-dist shards build`), or its URL (http, s3, gs, az).
        mixture: Folders or URLs of shards that training draws from instead, each with its share (in any unit); those of
            data.shards are then for evaluation only, unless they are among them.
        train_split: Split used for training.
        eval_split: Split used for the evaluations during training.
        workers: Loading processes per rank (0 loads in the training process).
        shuffle_window: Clips that are mixed at a time, counted over consecutive (shuffled) shards.
        mirror: Share of the training clips that are mirrored left to right, frames and masks together (ECMVAE: 0.3).
        crop: Smallest share of the side that a random square window of a training clip keeps, brought back to full
            size; the same for all frames and masks of the clip; 1 = off.
        shift: Largest number of seconds by which a training clip is rolled around: frames, masks and sound together;
            0 = off.
        max_damaged: Share of the clips that may be damaged: they are left out and told, other ones take their place in
            training; with more the run stops with a report. One clip may always be, unless this is 0.
        video_deadline_s: Longest time for decoding one clip that is stored as video, before it counts as damaged.
        cache_dir: Where shards from a URL are kept, shared by all processes of a machine (default:
            ~/.cache/avs_dist/shards).
        cache_gb: Most gigabytes kept there; the shards used least recently go first.
    """

    shards: str = "shards"
    mixture: dict[str, float] | None = None
    train_split: str = "train"
    eval_split: str = "val"
    workers: int = 2
    shuffle_window: int = 4096
    mirror: float = 0.0
    crop: float = 1.0
    shift: int = 0
    max_damaged: float = 0.01
    video_deadline_s: float = 60.0
    cache_dir: str | None = None
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        at_least("data.workers", self.workers, 0)
        at_least("data.shuffle_window", self.shuffle_window, 1)
        share("data.mirror", self.mirror)
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f"data.crop={self.crop}: must be more than 0 and at most 1")
        at_least("data.shift", self.shift, 0)
        share("data.max_damaged", self.max_damaged)
        for name in ("video_deadline_s", "cache_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be positive")
        if self.mixture is not None and (not self.mixture or not all(0 < w < math.inf for w in self.mixture.values())):
            raise ValueError(
                f"data.mixture={self.mixture}: name at least one set of shards, each with a positive share"
            )

"""What a build is made of: the jobs in their order, how one becomes a tar segment, and the settings that tell both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avs_dist.shards.build_config import SOURCE_RULES, BuildConfig
from avs_dist.shards.schema import SCHEMA_VERSION, FeatureSample, Sample
from avs_dist.shards.sources import ClipJob, FeatureJob
from avs_dist.shards.workers import MediaWorker


@dataclass(frozen=True)
class Recipe:
    """A build, ready to run.

    jobs:     In the order of the shards, split by split.
    make:     Sample of a job and its tar segment; raises ValueError or OSError with the reason where there is none.
    settings: What decides the bytes of the shards (not: workers, deadline, the place of the folders).
    """

    jobs: Sequence[ClipJob | FeatureJob]
    make: Callable[[Any, MediaWorker], tuple[Sample | FeatureSample, bytes]]
    settings: dict[str, Any]


def shared_settings(config: BuildConfig, lines: Sequence[str]) -> dict[str, Any]:
    """Settings of every build; `lines`: one for each job, other where the shards would be."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": config.source,
        "source_rule": SOURCE_RULES[config.source],
        "clip_seconds": config.longest_s,
        "shard_mb": config.shard_mb,
        "clips": len(lines),
        "clips_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def file_size(path: Path) -> int:
    """Bytes of a file, so that other contents under the same name are noticed; 0 for a folder of pictures."""
    return path.stat().st_size if path.is_file() else 0


def relative(path: Path, root: Path) -> str:
    """Place of a file below the root, the same wherever the root lies."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

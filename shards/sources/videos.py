"""Any folder of media files, cut into consecutive windows; no masks, one split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from avs_dist.shards.sources import ClipJob, Probe

SPLIT = "test"
SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts"),
    *(".ogv", ".wmv", ".flv", ".3gp"),
}


def list_clips(root: Path, clip_s: int, probe: Probe) -> list[ClipJob]:
    """Windows of `clip_s` seconds of every media file below `root`, named `{stem}_{window:04d}`.

    A started second counts when at least half of it exists; a file has at least one second. The last window may be
    shorter. Where two files share a stem, their path below `root` (and suffix, if need be) stands for it.

    Raises:
        FileNotFoundError: If there is no media file.
    """
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(f"no media file below --root {root}; known suffixes: {' '.join(sorted(SUFFIXES))}")
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!r}: its name is not UTF-8; rename it") from None
    jobs: list[ClipJob] = []
    for path, label, facts in zip(paths, unique_labels(paths, root), probe(paths), strict=True):
        if isinstance(facts, str):
            jobs.append(ClipJob(label, SPLIT, path, problem=facts))
            continue
        total = max(1, int(facts.duration_s + 0.5))
        for window, start in enumerate(range(0, total, clip_s)):
            jobs.append(
                ClipJob(
                    name=f"{label}_{window:04d}",
                    split=SPLIT,
                    path=path,
                    video=path,
                    sound=path,
                    start_s=float(start),
                    seconds=min(clip_s, total - start),
                    meta={"file": path.relative_to(root).as_posix()},
                )
            )
    return jobs


def unique_labels(paths: list[Path], root: Path) -> list[str]:
    """Shortest of stem, relative path without suffix, relative path that no other file has."""
    forms = [
        [path.stem, path.relative_to(root).with_suffix("").as_posix(), path.relative_to(root).as_posix()]
        for path in paths
    ]
    counts = Counter(form for path_forms in forms for form in set(path_forms))
    return [next((form for form in path_forms if counts[form] == 1), path_forms[-1]) for path_forms in forms]

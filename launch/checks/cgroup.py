"""What the control groups of this process grant it: those of a container, a pod or a job of Slurm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


class Bound(NamedTuple):
    """Bytes of memory."""

    limit: int
    free: int


class Files(NamedTuple):
    """Where a version of control groups has the memory of one group."""

    limit: str
    used: str
    cache: str  # name in memory.stat of what the kernel gives back by itself


VERSION_2 = Files("memory.max", "memory.current", "inactive_file")
VERSION_1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# version 1 tells "no limit" as a number near 2**63
NO_LIMIT = 2**60


def processors() -> float | None:
    """Processors that are granted, where they are bounded."""
    try:
        granted, period = (ROOT / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if granted == "max" else int(granted) / int(period)


def memory() -> Bound | None:
    """The tightest bound on memory: the one with the least free; None where nothing bounds it."""
    bounds = [bound for folder, files in _groups() if (bound := _bound(folder, files))]
    return min(bounds, key=lambda bound: bound.free, default=None)


def _groups() -> Iterator[tuple[Path, Files]]:
    """Folders of this process's groups and of those above them. In a container its own group may be the topmost."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, files = ROOT, VERSION_2
        elif "memory" in controllers.split(","):
            top, files = ROOT / "memory", VERSION_1
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in dict.fromkeys([group, *group.parents]):
            yield top / folder, files


def _bound(folder: Path, files: Files) -> Bound | None:
    try:
        limit = int((folder / files.limit).read_text())
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", or not there
        return None
    free = limit - used + int(stat.get(files.cache, 0))
    return None if limit >= NO_LIMIT else Bound(limit, max(0, free))

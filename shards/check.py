"""Comparing what is on disk with the list of a source, and the list with what is published; nothing is written."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from avs_dist.shards.build_config import FEATURE_RULES, BuildConfig
from avs_dist.shards.clip_recipe import list_jobs
from avs_dist.shards.feature_recipe import list_features
from avs_dist.shards.pool import DecodePool
from avs_dist.shards.recipe import relative
from avs_dist.shards.sources import SPLITS, ClipJob, FeatureJob, avsbench, avss
from avs_dist.shards.sources.media_files import files_below
from avs_dist.shards.sources.videos import SUFFIXES

# clips of each split, of AVSS also of each subset
PUBLISHED = {
    "avsbench-s4": {"train": 3452, "val": 740, "test": 740},
    "avsbench-ms3": {"train": 296, "val": 64, "test": 64},
    "avss": {
        **{"v1s train": 3452, "v1s val": 740, "v1s test": 740},
        **{"v1m train": 296, "v1m val": 64, "v1m test": 64},
        **{"v2 train": 4750, "v2 val": 500, "v2 test": 750},
    },
}
_SHOWN = 10
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Incomplete:
    """A listed clip that lacks something.

    parts:  What it lacks: frames, masks, sound, video, files; "other" where the files are there but cannot be used.
    reason: Which files.
    """

    group: str
    name: str
    parts: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Report:
    """What a check found.

    title:      Source and folder.
    parts:      What clips of the source are made of.
    published:  Clips of each group (split, or subset and split) as published; empty where that is not known.
    listed:     Clips of each group in the list.
    incomplete: Listed clips that lack something.
    extra:      Split (or "" where the place does not tell it) and place of clips that are not listed.
    """

    title: str
    parts: tuple[str, ...]
    published: dict[str, int]
    listed: dict[str, int]
    incomplete: tuple[Incomplete, ...]
    extra: tuple[tuple[str, str], ...]

    @property
    def missing(self) -> bool:
        """Whether the list or a listed clip lacks something."""
        fewer = any(self.listed.get(group, 0) < count for group, count in self.published.items())
        return fewer or bool(self.incomplete)

    def __str__(self) -> str:
        lacking = [f"{clip.group} {clip.name}: {clip.reason}" for clip in self.incomplete]
        lines = [self.title, *self._table(), *self._differences()]
        lines += _first("incomplete", lacking) + _first("on disk but not listed", [place for _, place in self.extra])
        return "\n".join([*lines, "something is missing" if self.missing else "all that is listed is there"])

    def _table(self) -> Iterator[str]:
        extra, incomplete = Counter(split for split, _ in self.extra), Counter(clip.group for clip in self.incomplete)
        lacks = Counter((clip.group, part) for clip in self.incomplete for part in clip.parts)
        groups = [*dict.fromkeys([*self.published, *self.listed]), *(split for split in extra if split in SPLITS)]
        rows = [["split", "published", "listed", "complete", "incomplete", *(f"no {p}" for p in self.parts), "extra"]]
        for group in dict.fromkeys(groups):
            listed = self.listed.get(group, 0)
            counts = [listed, listed - incomplete[group], incomplete[group]]
            counts += [*(lacks[group, part] for part in self.parts), extra[group]]
            published = f"{self.published[group]:,}" if group in self.published else "-"
            rows.append([group, published, *(f"{count:,}" for count in counts)])
        if extra[""]:
            rows.append(["unknown", *["-"] * (len(rows[0]) - 2), f"{extra['']:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            yield "  ".join([first.ljust(widths[0]), *cells])

    def _differences(self) -> Iterator[str]:
        for group, count in self.published.items():
            listed = self.listed.get(group, 0)
            if listed < count:
                yield f"the list has {listed:,} of {count:,} published {group} clips"
            elif listed > count:
                yield f"the list has {listed:,} {group} clips, published are {count:,}"


def check(config: BuildConfig, progress: bool = True) -> Report:
    """Look for all files of all clips that the source lists, and for clips that it does not list.

    A file without a byte counts as missing. `config.out` is not used.

    Raises:
        FileNotFoundError, ValueError: If the source has no list, or one that cannot be understood.
    """
    jobs: Sequence[ClipJob | FeatureJob]
    if config.source in FEATURE_RULES:
        jobs = list_features(config).jobs
    else:
        with DecodePool(config.workers, config.deadline_s) as pool:
            jobs = list_jobs(config, pool)
    bar = tqdm(jobs, desc="clips", unit="clip", disable=not progress)
    incomplete = tuple(clip for job in bar if (clip := _incomplete(job)) is not None)
    parts = [*dict.fromkeys(part for job in jobs for part in _files(job))]
    return Report(
        title=f"{config.source} in {config.root}",
        parts=(*parts, *(("other",) if any("other" in clip.parts for clip in incomplete) else ())),
        published=PUBLISHED.get(config.source, {}),
        listed=dict(Counter(_group(job) for job in jobs)),
        incomplete=incomplete,
        extra=tuple(_extra(config, jobs)),
    )


def _group(job: ClipJob | FeatureJob) -> str:
    subset = job.meta.get("subset")
    return f"{subset} {job.split}" if subset else job.split


def _files(job: ClipJob | FeatureJob) -> dict[str, tuple[Path, ...]]:
    """The files that a clip is made of, also those that are not there; none where no place is known."""
    if isinstance(job, FeatureJob):
        return {"files": job.files}
    video, sound = (job.video,) if job.video else (), job.mel or job.sound
    if not job.frames and not job.masks:
        return {"video": video}
    masks = job.masks[: len(job.frames) or len(job.masks)]
    return {"frames": job.frames or video, "masks": masks, "sound": (sound,) if sound else ()}


def _incomplete(job: ClipJob | FeatureJob) -> Incomplete | None:
    lacking = {}
    for part, files in _files(job).items():
        absent = [path for path in files if not _has_bytes(path)]
        if absent or not files:
            lacking[part] = absent
    problem = job.problem if isinstance(job, ClipJob) else None
    if not lacking and problem is None:
        return None
    reason = problem or "; ".join(_told(part, absent) for part, absent in lacking.items())
    return Incomplete(_group(job), job.name, tuple(lacking) or ("other",), reason)


def _has_bytes(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def _told(part: str, absent: list[Path]) -> str:
    if not absent:
        return f"no {part}"
    one_folder = len({path.parent for path in absent}) == 1
    names = ", ".join(path.name if one_folder else str(path) for path in absent[:_SHOWN_FILES])
    more = f" and {len(absent) - _SHOWN_FILES} more" if len(absent) > _SHOWN_FILES else ""
    return f"no {part}: {names}{more}" + (f" in {absent[0].parent}" if one_folder else "")


def _extra(config: BuildConfig, jobs: Sequence[ClipJob | FeatureJob]) -> Iterator[tuple[str, str]]:
    """Split, or "", and place of each clip on disk that is not listed, once for each clip."""
    if config.source == "vggsound":
        used = {job.video for job in jobs if isinstance(job, ClipJob)}
        unlisted = (path for path in files_below(config.root, SUFFIXES).values() if path not in used)
        yield from (("", relative(path, config.root)) for path in unlisted)
        return
    names = {job.name for job in jobs}
    found: dict[str, tuple[str, str]] = {}
    for folder in _clip_folders(config, jobs):
        places = {place for job in jobs for path in _one_of_each(job) if (place := _place(path, folder, job.name))}
        for name, path in _unlisted(folder, places, names):
            split = next((part for part in path.relative_to(folder).parts if part in SPLITS), "")
            if not found.get(name, ("",))[0]:
                found[name] = split, relative(path, config.root)
    yield from found.values()


def _clip_folders(config: BuildConfig, jobs: Sequence[ClipJob | FeatureJob]) -> list[Path]:
    """Folders below which everything of the kind and depth of a clip is a clip."""
    if config.source in avsbench.LAYOUTS:
        data = avsbench.data_folder(avsbench.LAYOUTS[config.source], config.root)
        names = (avsbench.FRAMES, avsbench.MASKS, avsbench.SOUNDS, avsbench.MELS, avsbench.VIDEOS)
        return [data / name for name in names]
    if config.source == "avss":
        return [avss.data_folder(config.root) / subset for subset in avss.SUBSETS]
    if config.source in FEATURE_RULES and config.source != "ave":  # whose clips are rows of files
        return sorted({path.parent for job in jobs for path in _one_of_each(job)})
    return []


def _one_of_each(job: ClipJob | FeatureJob) -> tuple[Path, ...]:
    """Files that lead to all places of a clip: its pictures lie in one folder."""
    return job.files if isinstance(job, FeatureJob) else tuple(files[0] for files in _files(job).values() if files)


def _place(path: Path, folder: Path, name: str) -> tuple[str, ...]:
    """Names of the folders down to the clip's own folder or file; empty where it is elsewhere."""
    if not path.is_relative_to(folder):
        return ()
    parts = path.relative_to(folder).parts
    own = next((depth for depth, part in enumerate(parts, start=1) if part == name), len(parts))
    return parts[:own]


def _unlisted(folder: Path, places: set[tuple[str, ...]], names: set[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of what lies where clips lie, is of the same kind, and belongs to none of them."""
    above = {place[:depth] for place in places for depth in range(1, len(place))}
    kinds = {(len(place), os.path.splitext(place[-1])[1].lower()) for place in places if place[-1] not in names}
    depths = {len(place) for place in places if place[-1] in names}
    deepest = max((len(place) for place in places), default=0)

    def walk(below: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
        try:
            entries = sorted(os.scandir(folder.joinpath(*below)), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            place = (*below, entry.name)
            stem, ending = os.path.splitext(entry.name)
            if place in places or entry.name in names or entry.name.startswith("."):
                continue
            if entry.is_dir():
                if len(place) in depths and place not in above:
                    yield entry.name, Path(entry.path)
                elif len(place) < deepest:
                    yield from walk(place)
            elif (len(place), ending.lower()) in kinds and stem not in names:
                yield stem, Path(entry.path)

    return walk(())


def _first(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return [f"{title}: {len(lines):,}", *(f"  {line}" for line in lines[:_SHOWN]), *more]

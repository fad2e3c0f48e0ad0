"""The parts of `bench loader`: which loaders are measured on which clips, in which processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from avs_dist.launch.benchmarks import loader_measure, loader_sets
from avs_dist.launch.benchmarks.loader_measure import BATCH, Loader
from avs_dist.launch.benchmarks.workers import Worker
from avs_dist.shards.members import FRAME_FORMATS
from avs_dist.shards.video_member import VIDEO

PICTURES = tuple(name for name in FRAME_FORMATS if name != VIDEO)
# measured with several numbers of loading processes: one that is copied and one that is decoded
_OVER_WORKERS = ("raw", "jpeg")

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    clips:        in the sets of each frame format.
    seconds:      least time of one measurement of a rate.
    repeats:      measurements of each rate and time.
    size:         side of the frames.
    film_sizes:   of the films that stand in where none is given; one of the first size is made of a given film where
                  none has it.
    film_s, fps:  length and frame rate of films that are made.
    film_clips:   most clips of one film.
    memory_clips: read while the memory is watched; of video `video_memory_clips`.
    small_clips:  of the set that runs are started on.
    workers:      numbers of loading processes whose rates are measured; `memory_workers`: whose memory is watched too;
                  `start_workers`: that runs are started with.
    """

    clips: int
    seconds: float
    repeats: int
    size: int = 224
    film_sizes: tuple[tuple[int, int], ...] = ((640, 360), (1280, 720))
    film_s: int = 30
    fps: int = 25
    film_clips: int = 16
    memory_clips: int = 10_000
    video_memory_clips: int = 1_000
    small_clips: int = 10_000
    workers: tuple[int, ...] = (0, 1, 2)
    memory_workers: tuple[int, ...] = (2,)
    start_workers: tuple[int, ...] = (0, 1)


TINY = Scale(
    clips=8,
    seconds=0.0,
    repeats=1,
    size=32,
    film_sizes=((64, 36),),
    film_s=5,
    fps=5,
    film_clips=1,
    memory_clips=80,
    video_memory_clips=8,
    small_clips=20,
    workers=(0, 1),
    memory_workers=(),
    start_workers=(0,),
)


class _Call(NamedTuple):
    """A function of `loader_measure`, what it gets, and what the row says beside its results."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    facts: Row = {}


class Bench:
    """All parts, over sets of clips.

    Args:
        root: An empty folder for the clips; `write` fills it.
        films: Taken instead of synthetic pictures and films.
        limit_s: Longest time for one call of `loader_measure`.
        one_process: Measure all in one process, which starts faster.
    """

    def __init__(self, root: Path, films: Sequence[Path], scale: Scale, limit_s: float, one_process: bool) -> None:
        self._root, self._films, self._scale, self._limit_s = root, list(films), scale, limit_s
        self._shared = Worker(fresh=False) if one_process else None
        names = ", ".join(film.name for film in films)
        self.about = (
            f"{scale.clips} clips of {loader_sets.CLIP_S} x {scale.size} x {scale.size} with masks and log-mel, "
            + (f"out of {names}" if films else "synthetic: noise with a 1/f spectrum")
        )

    def close(self) -> None:
        if self._shared is not None:
            self._shared.stop()

    def write(self) -> None:
        """Write the clips.

        Raises:
            ValueError, OSError: If a film cannot be used.
        """
        scale = self._scale
        samples = (
            loader_sets.film_samples(self._films, scale.clips, scale.size)
            if self._films
            else loader_sets.synthetic_samples(scale.clips, scale.size)
        )
        loader_sets.write_sets(self._root, tqdm(samples, "writing clips", scale.clips), PICTURES, scale.size)
        (self._root / VIDEO).mkdir()
        self._films = self._made_films()
        for film in tqdm(self._films, "writing films"):
            loader_sets.write_film_set(self._film_set(film), film, scale.size, scale.film_clips)
        loader_sets.write_small_set(self._root / "small", scale.small_clips)

    def rows_of(self, part: str) -> list[Row]:
        """What one part measures: a row for each loader, with "failed" and the reason where that is so."""
        parts = {
            "rate": self._rates,
            "video": self._videos,
            "workers": self._workers,
            "memory": self._memory,
            "start": self._starts,
        }
        return parts[part]()

    def _rates(self) -> list[Row]:
        loaders = {"ours, raw": self._ours("raw"), "ours, raw, normalised": self._ours("raw", normalise=True)}
        loaders |= {f"ours, {name}": self._ours(name) for name in PICTURES if name != "raw"}
        loaders["literal AVSBench"] = Loader("literal", str(self._root / "literal"))
        loaders["webdataset, same raw shards"] = Loader("webdataset", str(self._root / "raw"))
        rows = self._rounds("rate", {label: self._rate(loader) for label, loader in loaders.items()})
        for row in rows:
            row["kb"] = _bytes_below(Path(loaders[row["label"]].folder)) / self._scale.clips / 1e3
        return rows

    def _videos(self) -> list[Row]:
        calls = {}
        for film in self._films:
            place, about = str(self._film_set(film)), loader_sets.describe_film(film)
            for label, kind in (("ours", "ours"), ("raw decord", "decord")):
                calls[f"{about}: {label}"] = self._rate(Loader(kind, place), least_clips=BATCH, film=about, kind=kind)
        return self._rounds("video", calls)

    def _workers(self) -> list[Row]:
        calls = {
            f"{name}, data.workers {workers}": self._rate(self._ours(name, workers), frames=name, workers=workers)
            for name in _OVER_WORKERS
            for workers in self._scale.workers
        }
        return self._rounds("workers", calls)

    def _memory(self) -> list[Row]:
        scale = self._scale
        numbers = [(name, 0) for name in _OVER_WORKERS] + [("raw", workers) for workers in scale.memory_workers]
        calls: dict[str, tuple[Loader, int]] = {
            f"{name}, data.workers {workers}": (self._ours(name, workers), scale.memory_clips)
            for name, workers in numbers
        }
        film = min(self._films, key=loader_sets.film_size)
        calls[f"video of {film.name}, data.workers 0"] = (
            Loader("ours", str(self._film_set(film))),
            scale.video_memory_clips,
        )
        return self._rounds("memory", {k: _Call(loader_measure.memory, call) for k, call in calls.items()}, 1, True)

    def _starts(self) -> list[Row]:
        folder, count = self._root / "small", self._scale.small_clips
        steps = int(2.5 * count) // BATCH  # the middle of the third epoch
        state = loader_measure.state_after(str(folder), steps)
        about: Row = {"clips": count, "position": steps * BATCH, "state_bytes": len(state)}
        calls = {}
        for workers in self._scale.start_workers:
            place = f"data.workers {workers}"
            new = (str(folder), workers)
            calls[f"new run, {place}"] = _Call(loader_measure.start, new, about)
            calls[f"restored, {place}"] = _Call(loader_measure.start, (*new, steps, state), about)
        rows = self._rounds("start", calls, fresh=True)
        walking = {"walking there, data.workers 0": _Call(loader_measure.walk, (str(folder), steps), about)}
        rows += self._rounds("walking", walking, 1, fresh=True)
        for row in rows:
            there = rows[-1].get("first")
            if row["label"].startswith("restored") and row.get("first", there) != there:
                row["failed"] = f"begins with {row['first']}, not with {there}"
        return rows

    def _ours(self, frame_format: str, workers: int = 0, normalise: bool = False) -> Loader:
        return Loader("ours", str(self._root / frame_format), workers, normalise)

    def _rate(self, loader: Loader, least_clips: int | None = None, **facts: Any) -> _Call:
        least_clips = least_clips or self._scale.clips
        return _Call(loader_measure.rate, (loader, least_clips, self._scale.seconds), facts)

    def _rounds(
        self, part: str, calls: Mapping[str, _Call], repeats: int | None = None, fresh: bool = False
    ) -> list[Row]:
        """Call all in turn, several times, so that what else the machine does meets all alike; a row for each.

        Args:
            fresh: every call gets a process of its own; else each of the calls keeps one.
        """
        repeats = repeats or self._scale.repeats
        results: dict[str, list[Row]] = {label: [] for label in calls}
        rows: dict[str, Row] = {label: {"label": label, **call.facts} for label, call in calls.items()}
        workers = {label: self._shared or Worker(fresh) for label in calls}
        try:
            for label, call in tqdm(list(calls.items()) * repeats, desc=part):
                if "failed" in rows[label]:
                    continue
                arguments = self._limit_s, call.function, *call.arguments
                result = workers[label].call(loader_measure.with_one_thread, *arguments, limit_s=self._limit_s)
                if why := result.get("failed") or result.get("skipped"):
                    rows[label]["failed"] = why
                results[label].append(result)
        finally:
            for worker in workers.values():
                if worker is not self._shared:
                    worker.stop()
        for label, row in rows.items():
            if "failed" not in row:
                row |= _summary(results[label])
        return list(rows.values())

    def _made_films(self) -> list[Path]:
        """The films of the user and a small one made of the first, or synthetic ones."""
        scale, folder = self._scale, self._root / VIDEO
        if not self._films:
            films = {folder / f"synthetic{height}.mp4": (width, height) for width, height in scale.film_sizes}
            for path, (width, height) in films.items():
                loader_sets.write_synthetic_film(path, width, height, scale.film_s, scale.fps)
            return list(films)
        width, height = scale.film_sizes[0]
        if any(loader_sets.film_size(film) == (width, height) for film in self._films):
            return self._films
        smaller = folder / f"{self._films[0].stem}_{height}.mp4"
        loader_sets.write_smaller_film(self._films[0], smaller, width, height, scale.film_s)
        return [*self._films, smaller]

    def _film_set(self, film: Path) -> Path:
        return self._root / VIDEO / f"set{self._films.index(film)}"


def _summary(results: Sequence[Row]) -> Row:
    """Of several results: the spread of rates and times, the last of everything else."""
    measured = [name for name in ("clips_per_s", "clips_per_cpu_s", "seconds") if name in results[0]]
    spread: Row = {name: _spread([result[name] for result in results]) for name in measured}
    return {**results[-1], **spread}


def _spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""What `bench loader` measures, each function in a process of its own with one thread."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from avs_dist.clip import Clip
from avs_dist.config import Config, DataConfig, TrainConfig
from avs_dist.launch.benchmarks.loader_baselines import decord_clips, literal_batches, webdataset_batches
from avs_dist.launch.benchmarks.loader_sets import SPLIT
from avs_dist.loader import TrainBatches
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plan import StreamState

BATCH = 4
# what is loaded before the clock starts: caches fill, and a loading process may be ahead by two batches
_WARM_UP, _WARM_UP_OF_PROCESS = 2, 4
_ENDLESS = 10**9


class Loader(NamedTuple):
    """A way to read clips.

    kind:      "ours", "literal", "webdataset" or "decord".
    folder:    of what it reads, see `loader_sets`.
    workers:   data.workers (ours only).
    normalise: also normalise the frames, in the measuring process (ours only; "literal" always does).
    """

    kind: str
    folder: str
    workers: int = 0
    normalise: bool = False


def batches(loader: Loader) -> Generator[tuple[str, ...], None, None]:
    """Names of the clips of one batch after the other, without end; decord's have none."""
    folder = Path(loader.folder)
    if loader.kind == "ours":
        yield from (clip.key for clip in clips_of_training(loader))
    elif loader.kind == "literal":
        yield from (tuple(names) for *_, names in literal_batches(folder, BATCH))
    elif loader.kind == "webdataset":
        yield from (tuple(names) for *_, names in webdataset_batches(folder, BATCH))
    else:
        yield from (("",) for _ in decord_clips(folder))


def clips_of_training(loader: Loader) -> Iterator[Clip]:
    """Batches as training takes them, uint8 or normalised."""
    for (clip,) in train_batches(loader.folder, loader.workers):
        yield clip.to("cpu") if loader.normalise else clip


def train_batches(folder: str, workers: int, first_step: int = 0) -> TrainBatches:
    """What training takes its batches from."""
    config = Config(
        data=DataConfig(shards=folder, workers=workers, train_split=SPLIT),
        train=TrainConfig(global_batch=BATCH, max_steps=_ENDLESS),
    )
    return TrainBatches(config, ShardIndex.load(folder), first_step)


def rate(loader: Loader, least_clips: int, least_seconds: float) -> dict[str, float]:
    """Clips per second in the steady state, over at least so many clips and seconds."""
    _use_one_thread()
    stream = batches(loader)
    for _ in range(_WARM_UP + _WARM_UP_OF_PROCESS * loader.workers):
        next(stream)
    clips, seconds, start = 0, 0.0, time.perf_counter()
    while clips < least_clips or seconds < least_seconds:
        clips += len(next(stream))
        seconds = time.perf_counter() - start
    stream.close()
    return {"clips": clips, "clips_per_s": clips / seconds}


def memory(loader: Loader, num_clips: int) -> dict[str, Any]:
    """Resident MiB of this process and its children after each tenth of the clips."""
    _use_one_thread()
    stream = batches(loader)
    clips = 0
    resident_mib = []
    for tenth in range(1, 11):
        while clips < tenth * num_clips / 10:
            clips += len(next(stream))
        resident_mib.append(_resident_mib())
    stream.close()
    return {"clips": clips, "resident_mib": resident_mib}


def state_after(folder: str, steps: int) -> str:
    """JSON of the state of a run that has done so many steps."""
    return json.dumps(train_batches(folder, workers=0).state(steps).to_dict())


def start(folder: str, workers: int, steps: int = 0, state: str | None = None) -> dict[str, Any]:
    """Seconds from an open program to the first batch of a run, new or restored after so many steps; its clips."""
    _use_one_thread()
    begin = time.perf_counter()
    run = train_batches(folder, workers, steps)
    if state is not None:
        run.load_state(StreamState.from_dict(json.loads(state)))
    (clip,) = next(iter(run))
    return {"seconds": time.perf_counter() - begin, "first": clip.key}


def walk(folder: str, steps: int) -> dict[str, Any]:
    """Seconds to the batch behind so many steps where all before it are read; its clips."""
    _use_one_thread()
    begin = time.perf_counter()
    stream = iter(train_batches(folder, workers=0))
    for _ in range(steps):
        next(stream)
    (clip,) = next(stream)
    return {"seconds": time.perf_counter() - begin, "first": clip.key}


def _use_one_thread() -> None:
    """Without loading processes the figures are then those of one core; no process is tied to one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _resident_mib() -> float:
    """Of this process and all below it."""
    parents: dict[int, int] = {}
    resident_kb: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:  # it has ended meanwhile
            continue
        process = int(fields["Pid"])
        parents[process], resident_kb[process] = int(fields["PPid"]), int(fields.get("VmRSS", "0 kB").split()[0])
    return sum(kb for process, kb in resident_kb.items() if _is_below(process, os.getpid(), parents)) / 1024


def _is_below(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    while process in parents and process != ancestor:
        process = parents[process]
    return process == ancestor

"""What `bench loader` measures, in other processes by `with_one_thread`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
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
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


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


def with_one_thread(limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of this file in a process of its own; its figures are those of one core, which it is not tied to.

    The process ends where the call takes longer, also when nobody waits for it any more.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    signal.alarm(int(limit_s) + 10)
    result = function(*arguments)
    signal.alarm(0)
    return result


def rate(loader: Loader, least_clips: int, least_seconds: float) -> dict[str, float]:
    """Clips per second in the steady state, over at least so many clips and seconds.

    "clips_per_s" by the clock, "clips_per_cpu_s" by the time that this process and its children were running, which
    other programs do not change much.
    """
    stream = batches(loader)
    for _ in range(_WARM_UP + _WARM_UP_OF_PROCESS * loader.workers):
        next(stream)
    clips, seconds, start, cpu_start_s = 0, 0.0, time.perf_counter(), _cpu_s()
    while clips < least_clips or seconds < least_seconds:
        clips += len(next(stream))
        seconds = time.perf_counter() - start
    cpu_s = _cpu_s() - cpu_start_s
    stream.close()
    return {"clips": clips, "clips_per_s": clips / seconds, "clips_per_cpu_s": clips / cpu_s}


def memory(loader: Loader, num_clips: int) -> dict[str, Any]:
    """Resident MiB of this process and its children after each tenth of the clips."""
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
    begin = time.perf_counter()
    run = train_batches(folder, workers, steps)
    if state is not None:
        run.load_state(StreamState.from_dict(json.loads(state)))
    (clip,) = next(iter(run))
    return {"seconds": time.perf_counter() - begin, "first": clip.key}


def walk(folder: str, steps: int) -> dict[str, Any]:
    """Seconds to the batch behind so many steps where all before it are read; its clips."""
    begin = time.perf_counter()
    stream = iter(train_batches(folder, workers=0))
    for _ in range(steps):
        next(stream)
    (clip,) = next(stream)
    return {"seconds": time.perf_counter() - begin, "first": clip.key}


def _resident_mib() -> float:
    """Of this process and all below it."""
    return sum(_resident_pages(process) for process in [os.getpid(), *_below(os.getpid())]) * _PAGE_MIB


def _cpu_s() -> float:
    """Time that this process and all below it were running, those that have ended too."""
    ticks = sum(int(field) for process in _below(os.getpid()) for field in _stat(process)[11:13])
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")


def _below(ancestor: int) -> list[int]:
    """Children of a process, and theirs."""
    parents = {int(path.name): int(_stat(int(path.name))[1]) for path in Path("/proc").glob("[0-9]*")}
    found, latest = [], [ancestor]
    while latest:
        latest = [process for process, parent in parents.items() if parent in latest]
        found += latest
    return found


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; zeros where it has ended meanwhile."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50


def _resident_pages(process: int) -> int:
    return int(_stat(process)[21])

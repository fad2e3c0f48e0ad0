"""Wall time of a call, replay time of its CUDA graph, and the most memory it takes beside its inputs."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from avs_dist.launch.benchmarks.problem import Call

SECONDS = 0.3  # a short call is repeated for this long, so that the median survives a busy machine
PATIENCE = 2.0  # seconds after which a long call is not repeated again
MOST_REPEATS = 200
FLUSH_BYTES = 256 << 20  # written between replays; several times the L2 cache of today's GPUs


class Quantiles(NamedTuple):
    """Microseconds."""

    p20: float
    p50: float
    p80: float


def quantiles(seconds: list[float]) -> Quantiles:
    if len(seconds) == 1:
        return Quantiles(*[1e6 * seconds[0]] * 3)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Quantiles(1e6 * cuts[1], 1e6 * cuts[4], 1e6 * cuts[7])


def wall(call: Call, device: str, least_repeats: int, least_seconds: float = SECONDS) -> Quantiles:
    """Time of one call from Python until its result is there: what eager code pays, launches included."""
    seconds: list[float] = []
    while sum(seconds) < (least_seconds if len(seconds) >= least_repeats else PATIENCE) and len(seconds) < MOST_REPEATS:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return quantiles(seconds)


def graph_replay(call: Call, least_repeats: int, wall_us: float) -> Quantiles:
    """Time of one replay of the call's CUDA graph, by events, with a cold L2 cache.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture must not be the first use of a stream by cuBLAS
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    repeats = int(min(MOST_REPEATS, max(SECONDS * 1e6 / wall_us, min(least_repeats, PATIENCE * 1e6 / wall_us), 1)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    graph.replay()
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept
    return quantiles([start.elapsed_time(end) / 1e3 for start, end in events])


class PeakMemory:
    """Most memory since construction: allocated on a GPU; resident of this process on Linux, else not a number."""

    def __init__(self, device: str) -> None:
        self.cuda, self.linux = device == "cuda", sys.platform == "linux"
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline_mib = torch.cuda.memory_allocated() / 2**20
        elif self.linux:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already must not count as used
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.baseline_mib = self._resident_mib("VmRSS")

    def mib(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.baseline_mib
        return max(0.0, self._resident_mib("VmHWM") - self.baseline_mib) if self.linux else math.nan

    def _resident_mib(self, field: str) -> float:
        match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) / 1024 if match else math.nan

"""Time a hot spot against its literal formula: forward + backward, and the peak memory beside the inputs.

avs-dist bench tpavi                        all four stages of a 224 x 224 frame, 5 frames, 256 channels
avs-dist bench tpavi --sizes 56 --batch 4 --device cuda --json tpavi.json

Before anything is timed, outputs and gradients of every implementation are compared with the literal formula; a wrong
result is an error, not a time. Each case runs in a fresh process, so that its peak memory is its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from avs_dist.kernels import reference
from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels.reference import TPAVIWeights
from avs_dist.launch.cli import Parser, run
from avs_dist.shards.files import write_text

TOLERANCE = 1e-2  # of the largest element; in float32 the literal sums over N tokens lose more digits than ours


@dataclass(frozen=True)
class Case:
    """One measurement of `avs-dist bench tpavi`."""

    implementation: str
    size: int
    batch: int
    frames: int
    channels: int
    device: str
    repeats: int


@dataclass(frozen=True)
class Result:
    """Milliseconds of forward + backward; peak_mib above inputs and parameters; error against the literal formula."""

    median_ms: float
    best_ms: float
    peak_mib: float
    error: float


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="avs-dist bench", description=__doc__)
    parser.add_argument("op", type=Literal["tpavi"], help="the hot spot")
    parser.add_argument("--sizes", type=int, nargs="+", default=[7, 14, 28, 56], help="h = w of the feature map")
    parser.add_argument("--frames", type=int, default=5, help="T, frames of a clip")
    parser.add_argument("--channels", type=int, default=256, help="C of the visual tokens")
    parser.add_argument("--batch", type=int, default=1, help="B, clips")
    parser.add_argument(
        "--implementations",
        type=Literal["literal", "rank_t", "compiled"],
        nargs="+",
        default=["literal", "rank_t", "compiled"],
        help="literal: the published formula; rank_t: ours; compiled: torch.compile of the plain rank-T formula",
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--repeats", type=int, default=5, help="least number of timed runs")
    parser.add_argument("--json", type=str, default=None, help="also write the results to this file")
    args = parser.parse_args(argv)
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    base = Case("", 0, args.batch, args.frames, args.channels, device, args.repeats)
    cases = [replace(base, size=s, implementation=i) for s in args.sizes for i in args.implementations]
    facts = _facts(device)
    print("  ".join(f"{key}={value}" for key, value in facts.items()))
    rows = [{**asdict(case), **_measure_apart(case)} for case in tqdm(cases, unit="case", leave=False)]
    print(_table(rows))
    if args.json:
        write_text(args.json, json.dumps({**facts, "op": args.op, "rows": rows}, indent=1) + "\n")
    return 0


def _measure_apart(case: Case) -> dict[str, Any]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, case).result()


def measure(case: Case) -> dict[str, Any]:
    """Compare, then time: the Result as a dict, or {"skipped": reason} where this machine cannot run the case."""
    inputs = _inputs(case)
    step = _step(case.implementation)
    try:
        got = step(inputs)  # loads and compiles, so that this counts neither as time nor as memory
    except Exception as failure:
        if case.implementation != "compiled":
            raise
        return {"skipped": f"torch.compile: {' '.join(str(failure).split())[:80]}"}
    error = 0.0 if case.implementation == "literal" else _error(got, _step("literal")(inputs))
    if error > TOLERANCE:
        raise RuntimeError(f"{case.implementation} at {case.size}x{case.size} is wrong: relative error {error:.1e}")
    del got
    meter = _PeakMemory(case.device)
    step(inputs)
    peak_mib = meter.peak_mib()
    times: list[float] = []
    # short cases are repeated for half a second, so that the median survives a busy machine
    while len(times) < case.repeats or sum(times) < 0.5:
        start = time.perf_counter()
        step(inputs)
        times.append(time.perf_counter() - start)
    return asdict(Result(1e3 * statistics.median(times), 1e3 * min(times), peak_mib, error))


Inputs = tuple[Tensor, Tensor, TPAVIWeights, Tensor]


def _inputs(case: Case) -> Inputs:
    """Visual tokens, audio, weights (with gradient) and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    channels, inner = case.channels, case.channels // 2

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1.0)
        return values.to(case.device).requires_grad_()

    projections = [normal(*shape) for _ in range(3) for shape in ((inner, channels), (inner,))]
    others = [normal(*shape) for shape in ((channels, inner), *[(channels,)] * 5)]
    x_BTPC = normal(case.batch, case.frames, case.size**2, channels)
    audio_BTC = normal(case.batch, case.frames, channels)
    grad_BTPC = normal(*x_BTPC.shape).detach()
    return x_BTPC, audio_BTC, TPAVIWeights(*projections, *others), grad_BTPC


def _step(implementation: str) -> Callable[[Inputs], list[Tensor]]:
    """Forward + backward of an implementation: inputs -> output and gradients."""

    def forward(x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights) -> Tensor:
        if implementation == "literal":
            return reference.tpavi(x_BTPC, audio_BTC[:, :, None], weights)[0]
        return rank_t.tpavi(x_BTPC, audio_BTC, weights)[0]

    run_forward = torch.compile(forward, dynamic=False) if implementation == "compiled" else forward

    def step(inputs: Inputs) -> list[Tensor]:
        x_BTPC, audio_BTC, weights, grad_BTPC = inputs
        out_BTPC = run_forward(x_BTPC, audio_BTC, weights)
        grads = torch.autograd.grad(out_BTPC, [x_BTPC, audio_BTC, *weights], grad_BTPC)
        if x_BTPC.is_cuda:
            torch.cuda.synchronize()
        return [out_BTPC.detach(), *grads]

    return step


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference over output and gradients, relative to the largest value of each (if that is above 1)."""
    return max((g - w).abs().max().item() / max(w.abs().max().item(), 1.0) for g, w in zip(got, want, strict=True))


class _PeakMemory:
    """Peak memory since construction: allocated on a GPU; resident of this process on Linux, else not a number."""

    def __init__(self, device: str) -> None:
        self.cuda, self.linux = device == "cuda", sys.platform == "linux"
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.baseline_mib = torch.cuda.memory_allocated() / 2**20
        elif self.linux:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already must not count as used
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.baseline_mib = self._resident_mib("VmRSS")

    def peak_mib(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.baseline_mib
        return self._resident_mib("VmHWM") - self.baseline_mib if self.linux else math.nan

    def _resident_mib(self, field: str) -> float:
        match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) / 1024 if match else math.nan


def _facts(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    literal = {row["size"]: row["median_ms"] for row in rows if row["implementation"] == "literal"}
    form = "{:>7}  {:<8}  {:>10}  {:>9}  {:>9}  {:>8}  {:>8}"
    lines = [form.format("size", "form", "median ms", "best ms", "peak MiB", "speed-up", "error")]
    for row in rows:
        name = f"{row['size']}x{row['size']}"
        if "skipped" in row:
            lines.append(f"{name:>7}  {row['implementation']:<8}  skipped: {row['skipped']}")
            continue
        speedup = f"{literal[row['size']] / row['median_ms']:.1f}x" if row["size"] in literal else "-"
        numbers = [f"{row['median_ms']:.2f}", f"{row['best_ms']:.2f}", f"{row['peak_mib']:.1f}"]
        lines.append(form.format(name, row["implementation"], *numbers, speedup, f"{row['error']:.0e}"))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run("bench"))

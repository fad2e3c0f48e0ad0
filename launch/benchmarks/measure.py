"""One case from inputs to figures: compare with the truth, then time; a wrong result is refused, not timed."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avs_dist.kernels import runtime
from avs_dist.launch.benchmarks import timing
from avs_dist.launch.benchmarks.problem import Call, Case, Problem, Skip
from avs_dist.launch.benchmarks.registry import OPS


def measure(case: Case) -> dict[str, Any]:
    """Figures of each mode and the error; {"skipped": why} where it cannot run, {"failed": why} where it is wrong."""
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()  # what an earlier case left
    try:
        problem = OPS[case.op].prepare(case)
        return _compare_and_time(case, problem)
    except Skip as reason:
        return {"skipped": str(reason)}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}


def _compare_and_time(case: Case, problem: Problem) -> dict[str, Any]:
    call = list(problem.modes.values())[-1]
    try:
        # the first call also loads and compiles, so that this counts neither as time nor as memory
        got = [value.detach().clone() for value in call()]
    except Exception as failure:
        if case.implementation != "compiled" or isinstance(failure, torch.OutOfMemoryError):
            raise
        raise Skip(f"torch.compile: {' '.join(str(failure).split())[:120]}") from failure
    error = relative_error(got, problem.exact())
    del got
    if problem.tolerance is not None and not error <= problem.tolerance:  # NaN is wrong too
        return {"failed": f"{case} is wrong: relative error {error:.1e}, allowed {problem.tolerance:.0e}"}
    modes = {mode: figures(case, problem, mode, call) for mode, call in problem.modes.items()}
    return {"error": error, "modes": modes, **_choice_of_auto(case, call)}


def figures(case: Case, problem: Problem, mode: str, call: Call) -> dict[str, Any]:
    """Times in microseconds, peak MiB beside the inputs, and the work with its ceiling."""
    call()
    meter = timing.PeakMemory(case.device)
    call()
    found: dict[str, Any] = {"peak_mib": meter.mib()}
    wall = timing.wall(call, case.device, case.repeats, 0.0 if case.tiny else timing.SECONDS)
    found["wall_us"] = wall._asdict()
    if case.device == "cuda" and problem.capturable:
        try:
            found["graph_us"] = timing.graph_replay(call, case.repeats, wall.p50)._asdict()
        except RuntimeError as failure:
            found["graph_failed"] = " ".join(str(failure).split())[:120]
    if mode in problem.work:
        found["work"] = problem.work[mode]._asdict()
    return found


def _choice_of_auto(case: Case, call: Call) -> dict[str, Any]:
    """Which form the library would take at this size if nobody forced one."""
    if case.implementation != "ours" or case.device != "cuda":
        return {}
    os.environ["AVS_KERNELS"] = "auto"
    runtime.last_choice.clear()
    call()
    return {"auto": {op: "triton" if triton else "torch" for op, triton in runtime.last_choice.items()}}


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest rms error of a tensor, relative to the rms of the exact one, or to 1 where that is less."""
    errors = []
    for value, exact in zip(got, want, strict=True):
        difference = (value.to(exact.device, exact.dtype) - exact).square().mean().sqrt().item()
        errors.append(difference / max(exact.square().mean().sqrt().item(), 1.0))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)

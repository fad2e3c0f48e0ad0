"""The parts of a benchmark: an op with its sizes and implementations, a case to measure, a problem ready to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from avs_dist.kernels import runtime

Size = dict[str, int]
Call = Callable[[], Sequence[Tensor]]
Form = TypeVar("Form", bound=Callable[..., object])

# largest rms error of a result, relative to the rms of the exact one
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


class Skip(Exception):
    """This machine cannot run the case; the reason goes into the table."""


@dataclass(frozen=True)
class Case:
    """One implementation of one op at one size."""

    op: str
    size: Size
    dtype: str
    implementation: str
    device: str
    repeats: int = 20
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.implementation} {describe(self.size)} {self.dtype}"


class Work(NamedTuple):
    """What the op must at least do: bytes to move or floating-point operations, and the ceiling that limits it."""

    amount: float
    ceiling: str  # a key of ceilings.measure


@dataclass(frozen=True)
class Problem:
    """Inputs are made: calls by mode, the truth to compare the last mode with, and the work of each mode."""

    modes: Mapping[str, Call]
    exact: Call
    work: dict[str, Work] = field(default_factory=dict)
    tolerance: float | None = None  # None: the published formula itself, whose error is reported but not judged
    capturable: bool = True  # in a CUDA graph


class Op(NamedTuple):
    """A hot spot as it is benchmarked; "ours" is the implementation that the others are compared with."""

    name: str
    title: str
    implementations: dict[str, str]  # name -> what it is; the first is the literal formula
    sizes: Callable[[str, bool], list[Size]]  # device, tiny
    dtypes: Callable[[str], tuple[str, ...]]
    included: Callable[[Case], bool]  # by default; leaves out what would say nothing or take long
    prepare: Callable[[Case], Problem]


def describe(size: Size) -> str:
    return " ".join(f"{name}={value}" for name, value in size.items())


def floating_type(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def needs_memory(case: Case, num_bytes: float) -> None:
    """Raises Skip when the device has less free."""
    free = free_bytes(case.device)
    if num_bytes > free:
        raise Skip(f"needs about {num_bytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def force_kernels(case: Case) -> None:
    """The library's ops in this process run on Triton, wherever it can run, whatever `auto` would choose."""
    os.environ["AVS_KERNELS"] = "triton" if case.device == "cuda" or runtime.INTERPRETED else "torch"


def compiled(function: Form, case: Case) -> Form:
    """torch.compile; in a dry run without code generation, which takes longest."""
    torch.compiler.reset()  # a process compiles few sizes of a function before it gives up and runs eagerly
    backend = "aot_eager" if case.tiny else "inductor"
    return cast(Form, torch.compile(function, dynamic=False, backend=backend))

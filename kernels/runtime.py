"""How kernels are chosen, checked and launched: one place for all ops.

AVS_KERNELS=auto    Triton on a GPU, except at sizes where it was measured to lose; torch elsewhere (default)
AVS_KERNELS=torch   never Triton
AVS_KERNELS=triton  always Triton; without a GPU this needs TRITON_INTERPRET=1, set before triton is first imported

Arithmetic, stated once for all kernels: inputs of any floating type are converted to float32 after the load and summed
in float32; products of matrices take the precision that `dot_precision` names; multiply-adds are fused. Sums that cross
programs are written as partials and added in a fixed order, never with atomics, so every result is bit-repeatable.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHOICES = ("auto", "torch", "triton")
Backward = TypeVar("Backward", bound=Callable[..., Any])
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()
last_choice: dict[str, bool] = {}  # op -> whether its latest call chose Triton; the benchmark shows it


class Launch(NamedTuple):
    """One kernel launch: what the compiler sees of it."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_recorded: list[Launch] | None = None
_backend = "hip" if torch.version.hip else "cuda"


def use_triton(op: str, tensor: Tensor, wins: bool = True) -> bool:
    """Whether `op` runs its Triton kernel on this tensor; the first decision of each kind is logged.

    Args:
        wins: False where the kernel was measured to lose against torch at this size; AVS_KERNELS=triton overrules it.

    Raises:
        ValueError: AVS_KERNELS is none of auto, torch, triton; or it is triton where that cannot run.
    """
    if _recorded is not None:
        return True
    choice = os.environ.get("AVS_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"AVS_KERNELS must be one of {', '.join(CHOICES)}, got '{choice}'")
    if choice == "triton":
        require_triton(op, tensor)
    chosen = choice == "triton" or (choice == "auto" and tensor.is_cuda and wins)
    last_choice[op] = chosen
    _log_once(op, f"{'triton' if chosen else 'torch'} (AVS_KERNELS={choice}, {tensor.device.type})")
    return chosen


def require_triton(op: str, tensor: Tensor) -> None:
    """Refuse a tensor that Triton cannot work on.

    Raises:
        ValueError: it is not on a GPU, and kernels are neither interpreted nor recorded.
    """
    if not tensor.is_cuda and not INTERPRETED and _recorded is None:
        raise ValueError(
            f"{op}: Triton was asked for, but the tensor is on {tensor.device}; it needs a GPU (or, to debug, "
            "TRITON_INTERPRET=1 from the start)"
        )


def _log_once(op: str, decision: str) -> None:
    if (op, decision) not in _logged:
        _logged.add((op, decision))
        _log.info("%s: %s", op, decision)


def check(
    op: str, name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Compare a tensor with what `op` expects; None in `shape` stands for any size.

    Raises:
        ValueError: says what was expected and what came.
    """
    fits = tensor.ndim == len(shape) and all(s in (None, t) for s, t in zip(shape, tensor.shape, strict=True))
    if fits and tensor.dtype in dtypes and tensor.device == device:
        return
    sizes = ", ".join("any" if s is None else str(s) for s in shape)
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    got = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    raise ValueError(f"{op}: {name} must be [{sizes}] {kinds} on {device}, got {got}")


def backend() -> str:
    """What the next launch is compiled for: "cuda" or "hip"."""
    return _backend


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which autocast does not reach the small products beside the kernels: they stay in float32."""
    # the meta device has no autocast; no other form of this is understood by torch.compile
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def without_autocast(backward: Backward) -> Backward:
    """Decorator of an autograd function's backward: its products stay in float32 inside an autocast region too."""

    @functools.wraps(backward)
    def plain(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with no_autocast(grad):
            return backward(ctx, grad, *grads)

    return cast(Backward, plain)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot for operands that came from tensors of this type.

    float32 keeps float32 accuracy (three TF32 products, or plain float32 where the hardware has no TF32). Beside
    values that came from 16-bit tensors one TF32 product is enough: it rounds no coarser than they were.
    """
    if _backend == "hip":
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Run a kernel on the device of its first tensor; `constants` are its tl.constexpr arguments."""
    made = Launch(kernel, args, constants, num_warps, num_stages)
    if _recorded is not None:
        _recorded.append(made)
        return
    if 0 in grid:
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **constants, **made.options)


@contextlib.contextmanager
def recording(backend: str = "cuda") -> Iterator[list[Launch]]:
    """Within it launches are noted for ahead-of-time compilation instead of run: outputs stay uninitialised.

    Args:
        backend: "cuda" or "hip", decides what depends on the hardware, such as `dot_precision`.
    """
    global _recorded, _backend
    before = _recorded, _backend
    _recorded, _backend = [], backend
    try:
        yield _recorded
    finally:
        _recorded, _backend = before

"""What this very device reaches: copying a large tensor, and multiplying large matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from avs_dist.launch.benchmarks import timing

UNITS = {"copy": "GB/s"}  # all others: TFLOP/s


def unit(ceiling: str) -> str:
    return UNITS.get(ceiling, "TFLOP/s")


def rate(amount: float, microseconds: float, ceiling: str) -> float:
    """GB/s of bytes, TFLOP/s of operations."""
    return amount / microseconds * (1e-3 if unit(ceiling) == "GB/s" else 1e-6)


def measure(device: str, tiny: bool) -> dict[str, float]:
    """Best rates: GB/s of a copy (bytes read + bytes written), TFLOP/s of products of square matrices."""

    def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:  # products of zeros run faster than those of data
        return torch.randn(*shape, device=device).to(dtype)

    large, small = (1 << 28, 8192) if device == "cuda" else (1 << 25, 1024)
    if tiny:
        large, small = 1 << 12, 32
    source = random(torch.float32, 2, large // 2)
    target = torch.empty_like(source)
    rates = {"copy": rate(2.0 * source.nbytes, _best(lambda: target.copy_(source), device), "copy")}
    kinds = {"float32": (torch.float32, "ieee")}
    if device == "cuda":
        kinds |= {"tf32": (torch.float32, "tf32"), "bfloat16": (torch.bfloat16, "ieee")}
    for name, (dtype, precision) in kinds.items():
        side = small // 2 if name == "float32" else small
        left, right = random(dtype, side, side), random(dtype, side, side)
        with float32_products(precision):
            rates[name] = rate(2.0 * side**3, _best(partial(torch.matmul, left, right), device), name)
    return rates


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within it torch multiplies float32 matrices in "ieee" or "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _best(call: Callable[[], torch.Tensor], device: str) -> float:
    """Microseconds; the 20% quantile, as a ceiling is what the device can do at its best."""
    for _ in range(3):
        call()
    return timing.wall(lambda: [call()], device, 5).p20

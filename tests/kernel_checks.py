"""What all kernel tests share: where they run, in which types, and how accurate is accurate enough.

Without a GPU the kernels run in Triton's interpreter (float32 and float16 only: its bfloat16 arithmetic is wrong); on a
GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_TYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
DTYPES = [torch.float32, *HALF_TYPES]
# what a correctly rounded result may differ by, relative to the root mean square of the exact one
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()


def assert_as_accurate(name: str, got: Tensor, exact: Tensor, eager: Tensor, factor: float = 2.0) -> None:
    """The error of `got` is at most `factor` times that of the eager computation in the same types.

    Args:
        got: the kernel's result.
        exact: the float64 reference from the same (rounded) inputs.
        eager: the same formula by torch in the types of the kernel; its error, or one rounding if that is more, is the
            measure.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    assert bool(got.isfinite().all()), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    exact = exact.to(got.device)
    allowed = factor * max(rms(eager.double() - exact), ROUNDING[got.dtype] * rms(exact))
    error = rms(got.double() - exact)
    assert error <= allowed, f"{name}: rms error {error:.2e}, allowed {allowed:.2e}, rms of exact {rms(exact):.2e}"

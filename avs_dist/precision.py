"""Arithmetic that must not be done in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """`value` in float32; float64 stays."""
    return value.to(torch.promote_types(value.dtype, torch.float32))

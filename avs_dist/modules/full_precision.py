"""Buffers that stay float32 in a model that is cast to another precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """Base of modules whose buffers, and those of their children, are statistics of many steps.

    A moving average loses most of its updates in bfloat16, where 1 + 0.001 is 1. DeepSpeed casts the whole model at the
    start; here only the device follows.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = [
            (module, name, value)
            for module in self.modules()
            for name, value in module._buffers.items()
            if value is not None and value.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, value in kept:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != torch.float32:
                module._buffers[name] = value.to(moved.device)
        return self

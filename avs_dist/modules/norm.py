"""Batch normalisation over the global batch, on any backend and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.kernels.moments import Moments, merge_ranks, update_running
from avs_dist.modules.recompute import recomputing
from avs_dist.world import all_reduce_sum, world_size


class RunningStatistics(nn.Module):
    """Keeps the buffers running_mean and running_var in float32 or better when the module is cast to bfloat16.

    With eight bits of mantissa an exponential moving average of momentum 0.1 stands still within 2% of its target.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for name in ("running_mean", "running_var") if self._buffers.get(name) is not None]
        before = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and old is not None and new.is_floating_point() and new.element_size() < 4:
                self._buffers[name] = old.to(new.device)
        return self


class WorldBatchNorm2d(RunningStatistics, nn.BatchNorm2d):
    """nn.BatchNorm2d whose training moments are those of all ranks (K ranks x b equals one rank x K b).

    torch's SyncBatchNorm does the same on CUDA only. On one process this is the native batch normalisation. `drop`
    and `act` follow it, for timm's fused norm-activation layers. Activation checkpointing runs it twice on a batch: the
    running statistics move the first time.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x_NCHW)))

    def _normalise(self, x_NCHW: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        weight_C, bias_C = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        momentum, tracked = 0.0, self.training and not recomputing()
        if tracked:
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        if not self.training or world_size() == 1:
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x_NCHW, *running, weight_C, bias_C, self.training, momentum, self.eps)
        x = x_NCHW.to(self.running_mean.dtype)
        var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        num_pixels = mean_C.new_tensor(float(x.numel() // x.shape[1]))
        moments = merge_ranks(Moments(num_pixels, mean_C, var_C), all_reduce_sum)
        if tracked:
            update_running(self.running_mean, self.running_var, moments, momentum)
        scale_C = weight_C * torch.rsqrt(moments.var_C + self.eps)
        shift_C = bias_C - moments.mean_C * scale_C
        out_NCHW = torch.addcmul(shift_C.view(1, -1, 1, 1), x, scale_C.view(1, -1, 1, 1))
        return out_NCHW.to(x_NCHW.dtype)


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every nn.BatchNorm2d (and subclass with `drop` and `act`) inside `module`; parameter names stay.

    Returns:
        `module`, or its replacement if it is itself a batch normalisation.

    Raises:
        ValueError: a batch normalisation without weights or running statistics.
    """
    if isinstance(module, nn.BatchNorm2d):
        return module if isinstance(module, WorldBatchNorm2d) else _convert(module)
    for name, child in list(module.named_children()):
        new = synchronise_batchnorm(child)
        if new is not child:
            module.add_module(name, new)
    return module


def _convert(old: nn.BatchNorm2d) -> WorldBatchNorm2d:
    if not (old.affine and old.track_running_stats):
        raise ValueError("cannot synchronise a batch normalisation without weights or without running statistics")
    new = WorldBatchNorm2d(old.num_features, old.eps, old.momentum)
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    new.drop = getattr(old, "drop", nn.Identity())
    new.act = getattr(old, "act", nn.Identity())
    return new.train(old.training)

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

    torch's SyncBatchNorm does the same on CUDA only. On one GPU this is the native batch normalisation; that of the CPU
    sums up one pixel after the other, so that gradients of channels-last maps lose a digit or two. `drop` and `act`
    follow it, for timm's fused norm-activation layers. Activation checkpointing runs it twice on a batch: the
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
        if not self.training or (x_NCHW.is_cuda and world_size() == 1):
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x_NCHW, *running, weight_C, bias_C, self.training, momentum, self.eps)
        out_NCHW, *moments = _Normalised.apply(x_NCHW, weight_C, bias_C, self.eps)
        if tracked:
            update_running(self.running_mean, self.running_var, Moments(*moments), momentum)
        return out_NCHW


class _Normalised(torch.autograd.Function):
    """(x - mean) / std * weight + bias with the moments of all ranks, and these moments."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[Tensor, ...]:
        x = x_NCHW.to(weight_C.dtype)
        mean_C = x.mean((0, 2, 3))
        var_C = (x - _maps(mean_C)).square_().mean((0, 2, 3))  # on a CPU ten times as fast as torch.var_mean
        num_pixels = mean_C.new_full((), float(x.numel() // x.shape[1]))
        moments = merge_ranks(Moments(num_pixels, mean_C, var_C), all_reduce_sum if world_size() > 1 else None)
        inverse_C = torch.rsqrt(moments.var_C + eps)
        scale_C = weight_C * inverse_C
        # centred first: x * scale + shift would round mean / std times as much
        out_NCHW = torch.addcmul(_maps(bias_C), x - _maps(moments.mean_C), _maps(scale_C)).to(x_NCHW.dtype)
        ctx.save_for_backward(x_NCHW, moments.mean_C, inverse_C, scale_C, moments.num_tokens)
        ctx.mark_non_differentiable(*moments)
        return out_NCHW, *moments

    @staticmethod
    def backward(ctx: Any, grad_NCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, mean_C, inverse_C, scale_C, num_pixels = ctx.saved_tensors
        grad = grad_NCHW.to(scale_C.dtype)
        centred_NCHW = x_NCHW.to(scale_C.dtype) - _maps(mean_C)
        grad_bias_C = grad.sum((0, 2, 3))
        grad_weight_C = (grad * centred_NCHW).sum((0, 2, 3)) * inverse_C
        # every pixel of every rank has moved the moments
        mean_grads_2C = all_reduce_sum(torch.stack([grad_bias_C, grad_weight_C])) / num_pixels
        shift_C, slope_C = scale_C * mean_grads_2C[0], scale_C * mean_grads_2C[1] * inverse_C
        grad_x_NCHW = torch.addcmul(-_maps(shift_C), grad, _maps(scale_C)).addcmul_(centred_NCHW, -_maps(slope_C))
        return grad_x_NCHW.to(x_NCHW.dtype), grad_weight_C, grad_bias_C, None


def _maps(value_C: Tensor) -> Tensor:
    return value_C.view(1, -1, 1, 1)


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

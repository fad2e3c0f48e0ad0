"""The two passes of rank-T TPAVI over the visual tokens in torch operations, chunk by chunk; formulas in tpavi.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from avs_dist.kernels import runtime
from avs_dist.kernels.reference import EPS

CPU_CHUNK = 1 << 18  # elements worked on at a time, so that the temporaries stay in the cache


def read(x_FPC: Tensor, u_FTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First pass over x: x itself, the scores x u^T [F,P,T] and the frame means [F,C]."""
    if torch.compiler.is_compiling():  # leave the fusion to the compiler
        x = x_FPC.to(u_FTC.dtype)
        return x_FPC, x @ u_FTC.transpose(1, 2), x.mean(1)
    return _Read.apply(x_FPC, u_FTC)


def write(x_FPC: Tensor, q_FPT: Tensor, v_FTC: Tensor, shift_C: Tensor, weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """Second pass over x: LayerNorm(x + q v + shift), in the type of x."""
    if torch.compiler.is_compiling():
        h_FPC = x_FPC.to(v_FTC.dtype) + q_FPT @ v_FTC + shift_C
        return F.layer_norm(h_FPC, [h_FPC.shape[-1]], weight_C, bias_C, EPS).to(x_FPC.dtype)
    # the shift rides along as one more column of the scores
    q_FPS = F.pad(q_FPT, (0, 1), value=1.0)
    v_FSC = torch.cat([v_FTC, shift_C.expand(len(v_FTC), 1, -1)], 1)
    return _Write.apply(x_FPC, q_FPS, v_FSC, weight_C, bias_C)


def _chunks(x_FPC: Tensor) -> Iterator[slice]:
    """Groups of frames to work on at a time: cache-sized on a CPU, everything on an accelerator."""
    frames, positions, channels = x_FPC.shape
    size = max(1, CPU_CHUNK // (positions * channels)) if x_FPC.device.type == "cpu" else frames
    return (slice(start, start + size) for start in range(0, frames, size))


class _Read(torch.autograd.Function):
    """Hands x on, so that its backward receives the gradient of the second pass and adds to it in place."""

    @staticmethod
    def forward(ctx: Any, x_FPC: Tensor, u_FTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_FPC, u_FTC)
        frames, positions, channels = x_FPC.shape
        scores_FPT = u_FTC.new_empty(frames, positions, u_FTC.shape[1])
        mean_FC = u_FTC.new_empty(frames, channels)
        for part in _chunks(x_FPC):
            x = x_FPC[part].to(u_FTC.dtype)
            torch.bmm(x, u_FTC[part].transpose(1, 2), out=scores_FPT[part])
            torch.mean(x, 1, out=mean_FC[part])
        return x_FPC.view_as(x_FPC), scores_FPT, mean_FC

    @staticmethod
    @once_differentiable
    @runtime.without_autocast
    def backward(ctx: Any, grad_x_FPC: Tensor, grad_scores_FPT: Tensor, grad_mean_FC: Tensor) -> tuple[Any, ...]:
        x_FPC, u_FTC = ctx.saved_tensors
        grad_u_FTC = torch.empty_like(u_FTC)
        # the gradient of the mean rides along as one more column
        left_FPS = F.pad(grad_scores_FPT, (0, 1), value=1.0 / x_FPC.shape[1])
        right_FSC = torch.cat([u_FTC, grad_mean_FC[:, None]], 1)
        for part in _chunks(x_FPC):
            torch.bmm(grad_scores_FPT[part].transpose(1, 2), x_FPC[part].to(u_FTC.dtype), out=grad_u_FTC[part])
            if grad_x_FPC.dtype == u_FTC.dtype:
                grad_x_FPC[part].baddbmm_(left_FPS[part], right_FSC[part])
            else:
                total = torch.baddbmm(grad_x_FPC[part].to(u_FTC.dtype), left_FPS[part], right_FSC[part])
                grad_x_FPC[part] = total.to(grad_x_FPC.dtype)
        return grad_x_FPC, grad_u_FTC


class _Write(torch.autograd.Function):
    """LayerNorm(x + q v); backward recomputes the sum instead of storing it."""

    @staticmethod
    def forward(ctx: Any, x_FPC: Tensor, q_FPS: Tensor, v_FSC: Tensor, weight_C: Tensor, bias_C: Tensor) -> Tensor:
        out_FPC = torch.empty_like(x_FPC)
        mean_FP1 = q_FPS.new_empty(*x_FPC.shape[:2], 1)
        rstd_FP1 = torch.empty_like(mean_FP1)
        for part in _chunks(x_FPC):
            h = torch.baddbmm(x_FPC[part].to(v_FSC.dtype), q_FPS[part], v_FSC[part])
            out, mean_FP1[part], rstd_FP1[part] = torch.native_layer_norm(h, h.shape[-1:], weight_C, bias_C, EPS)
            out_FPC[part] = out
        ctx.save_for_backward(x_FPC, q_FPS, v_FSC, weight_C, bias_C, mean_FP1, rstd_FP1)
        return out_FPC

    @staticmethod
    @once_differentiable
    @runtime.without_autocast
    def backward(ctx: Any, grad_out_FPC: Tensor) -> tuple[Any, ...]:
        x_FPC, q_FPS, v_FSC, weight_C, bias_C, mean_FP1, rstd_FP1 = ctx.saved_tensors
        grad_x_FPC = torch.empty_like(x_FPC)
        grad_q_FPS, grad_v_FSC = torch.empty_like(q_FPS), torch.empty_like(v_FSC)
        grad_weight_C, grad_bias_C = torch.zeros_like(weight_C), torch.zeros_like(bias_C)
        for part in _chunks(x_FPC):
            h = torch.baddbmm(x_FPC[part].to(v_FSC.dtype), q_FPS[part], v_FSC[part])
            grad_h, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_out_FPC[part].to(h.dtype).contiguous(),
                h,
                h.shape[-1:],
                mean_FP1[part],
                rstd_FP1[part],
                weight_C,
                bias_C,
                [True, True, True],
            )
            grad_weight_C += grad_weight
            grad_bias_C += grad_bias
            torch.bmm(grad_h, v_FSC[part].transpose(1, 2), out=grad_q_FPS[part])
            torch.bmm(q_FPS[part].transpose(1, 2), grad_h, out=grad_v_FSC[part])
            grad_x_FPC[part] = grad_h
        return grad_x_FPC, grad_q_FPS, grad_v_FSC, grad_weight_C, grad_bias_C

"""TPAVI in rank-T form on Triton: forward reads x twice and writes out, backward reads x and its gradient twice.

tpavi.py states the formulas. Passes over the tokens (|x| = their size; everything else is B*T*C or smaller):

    read      x                    -> scores q, frame sums of x, moments of q
    moments   of q, through v      -> mean and variance of the batch normalisation
    write     x, q                 -> out
    sums      x, q, grad           -> gradients of both normalisations, sums for the gradient of v
    gradient  x, q, grad           -> dx, sums for the gradients of u and c

Both backward passes recompute the input of the layer normalisation, so that nothing of the size of x is stored: saved
for backward are x, q and O(B T C). The gradient of the batch moments is applied in closed form: with
zhat = (z - mean) rstd, dz = scale (dh - mean(dh) - zhat mean(dh zhat)), as for any batch normalisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from avs_dist.kernels import runtime
from avs_dist.kernels.moments import Moments, merge_ranks
from avs_dist.kernels.tpavi_backward_kernels import (
    gradient_sums_kernel,
    norm_gradient_kernel,
    token_gradient_kernel,
    value_gradient_kernel,
)
from avs_dist.kernels.tpavi_kernels import (
    affine_kernel,
    batch_moments_kernel,
    clip_moments_kernel,
    read_kernel,
    write_kernel,
)

ROWS = 256  # positions that one program of the passes over whole rows works through, about
SMALL = {"num_warps": 4, "num_stages": 1}  # launch options of the kernels that do not touch the tokens


class Norms(NamedTuple):
    """Affine parameters of both normalisations, each [C]."""

    bn_weight_C: Tensor
    bn_bias_C: Tensor
    ln_weight_C: Tensor
    ln_bias_C: Tensor


class Pass(NamedTuple):
    """How a pass over the tokens is split: `splits` programs a frame, each `tiles` tiles of BLOCK_P positions."""

    splits: int
    tiles: int
    options: dict[str, Any]  # launch options and constants


class Plan(NamedTuple):
    """Sizes, and the constants that all kernels share."""

    shape: torch.Size
    dtype: torch.dtype
    constants: dict[str, Any]
    tokens: dict[str, Any]
    exact: str

    @staticmethod
    def of(x_BTPC: Tensor, l2_normalise: bool) -> Plan:
        frames, channels = x_BTPC.shape[1], x_BTPC.shape[3]
        accumulate = tl.float64 if x_BTPC.dtype == torch.float64 else tl.float32
        block_t = max(16, triton.next_power_of_2(frames))
        constants = {"T": frames, "C": channels, "BLOCK_T": block_t}
        precision = runtime.dot_precision(x_BTPC.dtype)
        tokens = {**constants, "L2": l2_normalise, "PRECISION": precision, "ACC": accumulate}
        return Plan(x_BTPC.shape, x_BTPC.dtype, constants, tokens, runtime.dot_precision(torch.float32))

    def read_pass(self) -> Pass:
        """Channels in steps, pipelined: a thin matrix product."""
        block_c = min(64 if self.dtype.itemsize == 2 else 32, self.row_width)
        options = {"BLOCK_P": 64, "BLOCK_C": block_c, "EXACT": self.exact, "num_warps": 4, "num_stages": 3}
        return Pass(triton.cdiv(self.shape[2], 64), 1, {**self.tokens, **options})

    def row_pass(self, block_p: int, unrolled: int = 8) -> Pass:
        """Whole rows in registers; loops over T are unrolled by up to `unrolled`.

        With more threads than channels the compiler loads a vector over channels straight into the layout of the rows;
        with fewer it passes each through shared memory and a barrier.
        """
        num_tiles = triton.cdiv(self.shape[2], block_p)
        splits = triton.cdiv(num_tiles, ROWS // block_p)
        warps = min(max(self.row_width // 16, 4), 16)
        options = {"BLOCK_P": block_p, "BLOCK_C": self.row_width, "num_warps": warps, "num_stages": 1}
        options["GROUP_T"] = triton.cdiv(self.shape[1], triton.cdiv(self.shape[1], unrolled))
        return Pass(splits, triton.cdiv(num_tiles, splits), {**self.tokens, **options})

    @property
    def row_width(self) -> int:
        return max(16, triton.next_power_of_2(self.shape[3]))

    @property
    def block_c(self) -> int:
        """Channels of a program of the kernels that do not touch the tokens."""
        return min(64, self.row_width)

    def launch(self, kernel: Any, split: Pass, *args: Any) -> None:
        """A kernel takes those of the constants that it has."""
        wanted = {*kernel.arg_names, "num_warps", "num_stages"}
        options = {name: value for name, value in split.options.items() if name in wanted}
        runtime.launch(kernel, (self.shape[0] * self.shape[1] * split.splits,), *args, **options)


class TPAVIFunction(torch.autograd.Function):
    """out, and in training mode the moments of z = sum_t q_t v_t: number of tokens, mean, variance (without gradient).

    Arguments: x_BTPC, u_BTC, c_BT, mixing_BTT, matrices and biases of g and of W_z, the affine parameters of both
    normalisations, running mean and variance (eval mode) or None twice, valid_BT, l2_normalise, reduce_moments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTPC: Tensor,
        u_BTC: Tensor,
        c_BT: Tensor,
        mixing_BTT: Tensor,
        g_KC: Tensor,
        g_bias_K: Tensor,
        out_CK: Tensor,
        out_bias_C: Tensor,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        norms, (mean_C, var_C, valid_BT, l2_normalise, reduce) = Norms(*rest[:4]), rest[4:]
        plan = Plan.of(x_BTPC, l2_normalise)
        q_FPT, x_mean_BTC, mean_FST, square_FSTT = _read(plan, x_BTPC, u_BTC, c_BT, mixing_BTT, valid_BT)
        g_BTK = F.linear(x_mean_BTC, g_KC, g_bias_K)
        v_BTC = F.linear(g_BTK, out_CK)
        count: Tensor | None = None
        clip_moments: tuple[Tensor, ...] = ()
        if mean_C is None:
            clip_moments, local = _moments(plan, mean_FST, square_FSTT, v_BTC, valid_BT)
            count, mean_C, var_C = merge_ranks(local, reduce)
        else:
            mean_C = mean_C - out_bias_C  # running statistics are those of W_z y = z + b_z
        affine_2C = _affine(plan, mean_C, var_C, norms)
        out_BTPC = _write(plan, x_BTPC, q_FPT, v_BTC, affine_2C, norms, valid_BT)
        ctx.plan, ctx.reduce = plan, reduce
        saved = (valid_BT, x_BTPC, q_FPT, v_BTC, affine_2C, x_mean_BTC, g_BTK, mean_C, var_C, count, *clip_moments)
        ctx.save_for_backward(u_BTC, c_BT, mixing_BTT, g_KC, out_CK, *norms, *saved)
        if count is None:
            return out_BTPC, None, None, None
        ctx.mark_non_differentiable(count, mean_C, var_C)
        return out_BTPC, count, mean_C, var_C

    @staticmethod
    @once_differentiable
    @runtime.without_autocast
    def backward(ctx: Any, grad_BTPC: Tensor, *_: Any) -> tuple[Any, ...]:
        u_BTC, c_BT, mixing_BTT, g_KC, out_CK, *rest = ctx.saved_tensors
        norms, plan, clip_moments = Norms(*rest[:4]), ctx.plan, rest[14:]
        valid_BT, x_BTPC, q_FPT, v_BTC, affine_2C, x_mean_BTC, g_BTK, mean_C, var_C, count = rest[4:14]
        common = (x_BTPC, grad_BTPC, q_FPT, v_BTC, affine_2C, norms, valid_BT)
        sums_BRC, totals_4C = _sums(plan, *common, mean_C, var_C)
        dbn_bias_C, dbn_weight_C, dln_bias_C, dln_weight_C = totals_4C
        if count is None:
            dv_BTC, common_2C = sums_BRC[:, : plan.shape[1]] * affine_2C[0], torch.zeros_like(affine_2C)
            dout_bias_C = dbn_bias_C * affine_2C[0]
        else:
            share_2C = totals_4C[:2] if ctx.reduce is None else ctx.reduce(totals_4C[:2].contiguous())
            moments = (*clip_moments, mean_C, var_C)
            dv_BTC, common_2C = _value_gradient(
                plan, sums_BRC, v_BTC, *moments, norms.bn_weight_C, share_2C / count.clamp_min(1.0)
            )
            # b_z cancels: its gradient is zero, and not None, as every parameter must get one
            dout_bias_C = torch.zeros_like(dbn_bias_C)
        dg_BTK = dv_BTC @ out_CK
        dmean_BTC = dg_BTK @ g_KC
        dx_BTPC, outer_BFTC, dq_BFT = _token_gradient(plan, *common, u_BTC, mixing_BTT, dmean_BTC, common_2C)
        du_BTC = (mixing_BTT[..., None] * outer_BFTC).sum(1)
        dc_BT = (mixing_BTT * dq_BFT).sum(1)
        dmixing_BTT = None
        if ctx.needs_input_grad[3]:
            dmixing_BTT = (outer_BFTC * u_BTC[:, None]).sum(-1) + dq_BFT * c_BT[:, None]
        dv_MC, dg_MK = dv_BTC.flatten(0, 1), dg_BTK.flatten(0, 1)
        inputs = (dx_BTPC, du_BTC, dc_BT, dmixing_BTT)
        matrices = (dg_MK.T @ x_mean_BTC.flatten(0, 1), dg_MK.sum(0), dv_MC.T @ g_BTK.flatten(0, 1), dout_bias_C)
        return *inputs, *matrices, dbn_weight_C, dbn_bias_C, dln_weight_C, dln_bias_C, *[None] * 5


def _read(
    plan: Plan, x_BTPC: Tensor, u_BTC: Tensor, c_BT: Tensor, mixing_BTT: Tensor, valid_BT: Tensor | None
) -> tuple[Tensor, ...]:
    """Scores, means of x over the positions of a frame, and the partial moments of the scores."""
    batch, frames, positions, channels = plan.shape
    split = plan.read_pass()
    parts = batch * frames, split.splits
    q_FPT = u_BTC.new_empty(batch * frames, positions, frames)
    sums_FSC = u_BTC.new_empty(*parts, channels)
    mean_FST = u_BTC.new_empty(*parts, frames)
    square_FSTT = u_BTC.new_empty(*parts, frames, frames)
    tensors = (x_BTPC, u_BTC, c_BT, mixing_BTT, valid_BT, q_FPT, sums_FSC, mean_FST, square_FSTT)
    plan.launch(read_kernel, split, *tensors, positions, split.splits, *x_BTPC.stride())
    x_mean_BTC = sums_FSC.sum(1).div_(positions).view(batch, frames, channels)
    return q_FPT, x_mean_BTC, mean_FST, square_FSTT


def _moments(
    plan: Plan, mean_FST: Tensor, square_FSTT: Tensor, v_BTC: Tensor, valid_BT: Tensor | None
) -> tuple[tuple[Tensor, ...], Moments]:
    """Moments of q of each clip (mean_BT, centred squares_BTT, count_B), and those of z over this rank's batch."""
    batch, frames, positions, channels = plan.shape
    new = v_BTC.new_empty
    q_mean_BT, q_square_BTT, count_B = new(batch, frames), new(batch, frames, frames), new(batch)
    z_mean_BC, z_square_BC = new(batch, channels), new(batch, channels)
    results = (q_mean_BT, q_square_BTT, count_B, z_mean_BC, z_square_BC)
    split = plan.read_pass()
    runtime.launch(
        clip_moments_kernel,
        (batch, triton.cdiv(channels, plan.block_c)),
        *(mean_FST, square_FSTT, valid_BT, v_BTC, *results, positions, split.splits, split.options["BLOCK_P"]),
        **plan.constants,
        BLOCK_C=plan.block_c,
        GROUP=16,
        EXACT=plan.exact,
        ACC=plan.tokens["ACC"],
        **SMALL,
    )
    total, mean_C, var_C = new(()), new(channels), new(channels)
    runtime.launch(
        batch_moments_kernel,
        (triton.cdiv(channels, 32),),
        *(count_B, z_mean_BC, z_square_BC, total, mean_C, var_C, batch),
        C=channels,
        BLOCK_B=32,
        BLOCK_C=32,
        ACC=plan.tokens["ACC"],
        **SMALL,
    )
    return results[:3], Moments(total, mean_C, var_C)


def _affine(plan: Plan, mean_C: Tensor, var_C: Tensor, norms: Norms) -> Tensor:
    """Batch normalisation as z * scale + shift [2,C]."""
    affine_2C = mean_C.new_empty(2, len(mean_C))
    tensors = (mean_C, var_C, norms.bn_weight_C, norms.bn_bias_C, affine_2C)
    runtime.launch(affine_kernel, (1,), *tensors, C=len(mean_C), BLOCK_C=plan.row_width, **SMALL)
    return affine_2C


def _write(
    plan: Plan,
    x_BTPC: Tensor,
    q_FPT: Tensor,
    v_BTC: Tensor,
    affine_2C: Tensor,
    norms: Norms,
    valid_BT: Tensor | None,
) -> Tensor:
    out_BTPC = torch.empty(plan.shape, dtype=plan.dtype, device=x_BTPC.device)
    split = plan.row_pass(32)
    tensors = (x_BTPC, q_FPT, v_BTC, affine_2C, norms.ln_weight_C, norms.ln_bias_C, valid_BT, out_BTPC)
    plan.launch(write_kernel, split, *tensors, plan.shape[2], split.splits, split.tiles, *x_BTPC.stride())
    return out_BTPC


def _sums(
    plan: Plan,
    x_BTPC: Tensor,
    grad_BTPC: Tensor,
    q_FPT: Tensor,
    v_BTC: Tensor,
    affine_2C: Tensor,
    norms: Norms,
    valid_BT: Tensor | None,
    mean_C: Tensor,
    var_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each clip [B,T+3,C], and over all clips the gradients of the norms' parameters [4,C]."""
    batch, frames, positions, channels = plan.shape
    split = plan.row_pass(16)
    sums_FSRC = v_BTC.new_empty(batch * frames, split.splits, frames + 3, channels)
    tensors = (x_BTPC, grad_BTPC, q_FPT, v_BTC, affine_2C, norms.ln_weight_C, valid_BT, sums_FSRC)
    strides = (*x_BTPC.stride(), *grad_BTPC.stride())
    plan.launch(gradient_sums_kernel, split, *tensors, positions, split.splits, split.tiles, *strides)
    sums_BRC = sums_FSRC.view(batch, frames * split.splits, frames + 3, channels).sum(1)
    totals_4C = v_BTC.new_empty(4, channels)
    runtime.launch(
        norm_gradient_kernel,
        (triton.cdiv(channels, 16),),
        *(sums_BRC, v_BTC, mean_C, var_C, totals_4C, batch),
        **plan.constants,
        BLOCK_B=4,
        BLOCK_C=16,
        ACC=plan.tokens["ACC"],
        **SMALL,
    )
    return sums_BRC, totals_4C


def _value_gradient(plan: Plan, sums_BRC: Tensor, v_BTC: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of v [B,T,C], and what the gradient of z takes from the batch moments [2,C], in training mode."""
    batch, _, _, channels = plan.shape
    dv_BTC, common_2C = torch.empty_like(v_BTC), v_BTC.new_empty(2, channels)
    grid, tensors = (batch, triton.cdiv(channels, plan.block_c)), (sums_BRC, v_BTC, *rest, dv_BTC, common_2C)
    constants = {**plan.constants, "BLOCK_C": plan.block_c, "EXACT": plan.exact}
    runtime.launch(value_gradient_kernel, grid, *tensors, **constants, **SMALL)
    return dv_BTC, common_2C


def _token_gradient(
    plan: Plan,
    x_BTPC: Tensor,
    grad_BTPC: Tensor,
    q_FPT: Tensor,
    v_BTC: Tensor,
    affine_2C: Tensor,
    norms: Norms,
    valid_BT: Tensor | None,
    u_BTC: Tensor,
    mixing_BTT: Tensor,
    dmean_BTC: Tensor,
    common_2C: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and for each clip and frame the sums of dq_t x [B,T,T,C] and of dq_t [B,T,T] over the tokens of the frame."""
    batch, frames, positions, channels = plan.shape
    split = plan.row_pass(16, unrolled=4)  # the registers of more would spill
    dx_BTPC = torch.empty(plan.shape, dtype=plan.dtype, device=x_BTPC.device)
    outer_FSTC = v_BTC.new_empty(batch * frames, split.splits, frames, channels)
    dq_FST = v_BTC.new_empty(batch * frames, split.splits, frames)
    inputs = (x_BTPC, grad_BTPC, q_FPT, u_BTC, v_BTC, mixing_BTT, affine_2C, norms.ln_weight_C, valid_BT)
    tensors = (*inputs, common_2C, dmean_BTC, dx_BTPC, outer_FSTC, dq_FST)
    strides = (*x_BTPC.stride(), *grad_BTPC.stride())
    plan.launch(token_gradient_kernel, split, *tensors, positions, split.splits, split.tiles, *strides)
    by_clip = (batch, frames, frames)
    return dx_BTPC, outer_FSTC.sum(1).view(*by_clip, channels), dq_FST.sum(1).view(by_clip)

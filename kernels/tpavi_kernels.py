"""Triton kernels of TPAVI in rank-T form; tpavi_triton.py puts them in order and names the formulas.

A program of the kernels that touch the tokens owns one or more tiles of BLOCK_P positions of one frame. Those that
normalise over channels keep whole rows in registers; to leave room for them, vectors over channels are loaded again for
each tile (their masks depend on it, so the compiler cannot keep them). Sums over tokens leave a program as partials
[frame, split, ...]; a later kernel or torch.sum adds them in a fixed order. For tensor cores T is padded to
BLOCK_T >= 16; loops over T are unrolled by GROUP_T.

ACC is float32, or float64 for float64 tokens (tests). Frames with valid_ptr[frame] == 0 are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)  # of both normalisations, as published
L2_EPS = tl.constexpr(1e-6)  # of the L2-normalised variant, as published


@triton.jit
def _load_tile(base_ptr, rows_P, cols_C, positions, stride_p, stride_c, C: tl.constexpr, ACC: tl.constexpr):
    mask = (rows_P[:, None] < positions) & (cols_C[None, :] < C)
    offsets = rows_P[:, None].to(tl.int64) * stride_p + cols_C[None, :].to(tl.int64) * stride_c
    return tl.load(base_ptr + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def _inverse_norm(x_PC):
    """1 / sqrt(sum of squares + eps) of each row [P,1]."""
    return 1.0 / tl.sqrt(tl.sum(x_PC * x_PC, 1) + L2_EPS)[:, None]


@triton.jit
def _load_matrix(base_ptr, rows_R, cols_C, num_rows, num_cols, stride):
    mask = (rows_R[:, None] < num_rows) & (cols_C[None, :] < num_cols)
    return tl.load(base_ptr + rows_R[:, None] * stride + cols_C[None, :], mask=mask, other=0.0)


@triton.jit
def read_kernel(
    x_ptr,  # [B,T,P,C] in its own strides
    u_ptr,  # [B,T,C]
    c_ptr,  # [B,T]
    mixing_ptr,  # [B,T,T]
    valid_ptr,  # [B*T] bool, or None
    q_ptr,  # out [B*T,P,T]
    sum_ptr,  # out [B*T,splits,C]: sum of x
    mean_ptr,  # out [B*T,splits,T]: mean of q
    square_ptr,  # out [B*T,splits,T,T]: centred second moment of q
    positions,
    splits,
    stride_xb,
    stride_xt,
    stride_xp,
    stride_xc,
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    L2: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """First pass over x: mixed scores q = R (x u + c), sums of x and moments of q over BLOCK_P positions of a frame.

    A thin matrix product that walks along the channels; the L2-normalised variant walks twice, then in cache.
    """
    program = tl.program_id(0).to(tl.int64)
    frame, split = program // splits, program % splits
    clip = frame // T
    t_T = tl.arange(0, BLOCK_T)
    rows_P = split * BLOCK_P + tl.arange(0, BLOCK_P)
    live = True
    if valid_ptr is not None:
        live = tl.load(valid_ptr + frame) != 0
    limit = tl.where(live, positions, 0)
    x_base = x_ptr + clip * stride_xb + (frame % T) * stride_xt
    if L2:
        squares_P = tl.zeros([BLOCK_P], ACC)
        for start in range(0, C, BLOCK_C):
            cols_C = start + tl.arange(0, BLOCK_C)
            x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
            squares_P += tl.sum(x_PC * x_PC, 1)
        inverse_P = 1.0 / tl.sqrt(squares_P + L2_EPS)

    q_PT = tl.zeros([BLOCK_P, BLOCK_T], ACC)
    for start in range(0, C, BLOCK_C):
        cols_C = start + tl.arange(0, BLOCK_C)
        x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
        if L2:
            x_PC = x_PC * inverse_P[:, None]
        u_TC = _load_matrix(u_ptr + clip * T * C, t_T, cols_C, T, C, C)
        q_PT += tl.dot(x_PC, tl.trans(u_TC), input_precision=PRECISION)
        tl.store(sum_ptr + program * C + cols_C, tl.sum(x_PC, 0), mask=cols_C < C)

    c_T = tl.load(c_ptr + clip * T + t_T, mask=t_T < T, other=0.0)
    mixing_T = tl.load(mixing_ptr + frame * T + t_T, mask=t_T < T, other=0.0)
    inside_P = rows_P < limit
    q_PT = tl.where(inside_P[:, None], (q_PT + c_T[None, :]) * mixing_T[None, :], 0.0)
    q_offsets = (frame * positions + rows_P[:, None]) * T + t_T[None, :]
    tl.store(q_ptr + q_offsets, q_PT, mask=(rows_P[:, None] < positions) & (t_T[None, :] < T))
    # about the mean of these positions, so that a large common score loses no digits
    mean_T = tl.sum(q_PT, 0) / tl.maximum(tl.sum(inside_P.to(ACC), 0), 1.0)
    centred_PT = tl.where(inside_P[:, None], q_PT - mean_T[None, :], 0.0)
    square_TT = tl.dot(tl.trans(centred_PT), centred_PT, input_precision=EXACT)
    tl.store(mean_ptr + program * T + t_T, mean_T, mask=t_T < T)
    inside_TT = (t_T[:, None] < T) & (t_T[None, :] < T)
    tl.store(square_ptr + program * T * T + t_T[:, None] * T + t_T[None, :], square_TT, mask=inside_TT)


@triton.jit
def clip_moments_kernel(
    mean_ptr,  # [B,T*splits,T] of read_kernel
    square_ptr,  # [B,T*splits,T,T]
    valid_ptr,  # [B*T] bool, or None
    v_ptr,  # [B,T,C]
    q_mean_ptr,  # out [B,T]
    q_square_ptr,  # out [B,T,T]: centred sum over the tokens of the clip
    count_ptr,  # out [B]: tokens
    z_mean_ptr,  # out [B,C]: mean of z = sum_t q_t v_t
    z_square_ptr,  # out [B,C]: centred sum of squares of z
    positions,
    splits,
    rows,  # positions of a split
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Moments of q, and through v those of z, over the tokens of one clip (second, ordered stage of read_kernel)."""
    clip = tl.program_id(0).to(tl.int64)
    t_T = tl.arange(0, BLOCK_T)
    cols_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_TT = (t_T[:, None] < T) & (t_T[None, :] < T)
    offsets_TT = t_T[:, None] * T + t_T[None, :]
    num_parts = T * splits
    mean_ptr += clip * num_parts * T
    square_ptr += clip * num_parts * T * T

    count = tl.zeros([], ACC)
    mean_T = tl.zeros([BLOCK_T], ACC)
    for start in range(0, num_parts, GROUP):
        part_G = start + tl.arange(0, GROUP)
        count_G = _tokens(part_G, valid_ptr, clip, positions, splits, rows, T, ACC)
        count += tl.sum(count_G, 0)
        mean_T += tl.sum(_load_matrix(mean_ptr, part_G, t_T, num_parts, T, T) * count_G[:, None], 0)
    mean_T = mean_T / tl.maximum(count, 1.0)

    square_TT = tl.zeros([BLOCK_T, BLOCK_T], ACC)
    for start in range(0, num_parts, GROUP):
        part_G = start + tl.arange(0, GROUP)
        count_G = _tokens(part_G, valid_ptr, clip, positions, splits, rows, T, ACC)
        step_GT = _load_matrix(mean_ptr, part_G, t_T, num_parts, T, T) - mean_T[None, :]
        step_GT = step_GT * tl.sqrt(count_G)[:, None]
        square_TT += tl.dot(tl.trans(step_GT), step_GT, input_precision=EXACT)
        mask_GTT = (part_G < num_parts)[:, None, None] & inside_TT[None, :, :]
        part_GTT = part_G[:, None, None] * (T * T) + offsets_TT[None, :, :]
        square_TT += tl.sum(tl.load(square_ptr + part_GTT, mask=mask_GTT, other=0.0), 0)

    v_TC = _load_matrix(v_ptr + clip * T * C, t_T, cols_C, T, C, C)
    z_mean_C = tl.sum(mean_T[:, None] * v_TC, 0)
    z_square_C = tl.sum(tl.dot(square_TT, v_TC, input_precision=EXACT) * v_TC, 0)
    tl.store(z_mean_ptr + clip * C + cols_C, z_mean_C, mask=cols_C < C)
    tl.store(z_square_ptr + clip * C + cols_C, z_square_C, mask=cols_C < C)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + clip, count)
        tl.store(q_mean_ptr + clip * T + t_T, mean_T, mask=t_T < T)
        tl.store(q_square_ptr + clip * T * T + offsets_TT, square_TT, mask=inside_TT)


@triton.jit
def _tokens(part_G, valid_ptr, clip, positions, splits, rows, T: tl.constexpr, ACC: tl.constexpr):
    """Number of tokens behind each partial [frame of the clip, split]."""
    left_G = positions - (part_G % splits) * rows
    exists_G = part_G < T * splits
    if valid_ptr is not None:
        exists_G = exists_G & (tl.load(valid_ptr + clip * T + part_G // splits, mask=exists_G, other=0) != 0)
    return tl.where(exists_G, tl.minimum(tl.maximum(left_G, 0), rows), 0).to(ACC)


@triton.jit
def batch_moments_kernel(
    count_ptr,  # [B]
    z_mean_ptr,  # [B,C]
    z_square_ptr,  # [B,C]
    total_ptr,  # out []: tokens
    mean_ptr,  # out [C]
    var_ptr,  # out [C], biased
    clips,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and variance of z over all clips."""
    cols_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([], ACC)
    mean_C = tl.zeros([BLOCK_C], ACC)
    for start in range(0, clips, BLOCK_B):
        clip_B = start + tl.arange(0, BLOCK_B)
        count_B = tl.load(count_ptr + clip_B, mask=clip_B < clips, other=0.0)
        total += tl.sum(count_B, 0)
        mean_C += tl.sum(_load_matrix(z_mean_ptr, clip_B, cols_C, clips, C, C) * count_B[:, None], 0)
    mean_C = mean_C / tl.maximum(total, 1.0)
    square_C = tl.zeros([BLOCK_C], ACC)
    for start in range(0, clips, BLOCK_B):
        clip_B = start + tl.arange(0, BLOCK_B)
        count_B = tl.load(count_ptr + clip_B, mask=clip_B < clips, other=0.0)
        step_BC = _load_matrix(z_mean_ptr, clip_B, cols_C, clips, C, C) - mean_C[None, :]
        square_BC = _load_matrix(z_square_ptr, clip_B, cols_C, clips, C, C)
        square_C += tl.sum(square_BC + step_BC * step_BC * count_B[:, None], 0)
    tl.store(mean_ptr + cols_C, mean_C, mask=cols_C < C)
    tl.store(var_ptr + cols_C, tl.maximum(square_C / tl.maximum(total, 1.0), 0.0), mask=cols_C < C)
    if tl.program_id(0) == 0:
        tl.store(total_ptr, total)


@triton.jit
def affine_kernel(
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    affine_ptr,  # out [2,C]: batch normalisation as z * scale + shift
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols_C = tl.arange(0, BLOCK_C)
    inside_C = cols_C < C
    rstd_C = 1.0 / tl.sqrt(tl.load(var_ptr + cols_C, mask=inside_C, other=1.0) + NORM_EPS)
    scale_C = _load_vector(weight_ptr, cols_C, inside_C) * rstd_C
    shift_C = _load_vector(bias_ptr, cols_C, inside_C) - _load_vector(mean_ptr, cols_C, inside_C) * scale_C
    tl.store(affine_ptr + cols_C, scale_C, mask=inside_C)
    tl.store(affine_ptr + C + cols_C, shift_C, mask=inside_C)


@triton.jit
def _load_vector(base_ptr, cols_C, inside_C):
    return tl.load(base_ptr + cols_C, mask=inside_C, other=0.0)


@triton.jit
def _values(
    q_base,  # of the frame, [P,T]
    v_base,  # of the clip, [T,C]
    rows_P,
    cols_C,
    inside_P,
    inside_C,
    T: tl.constexpr,
    C: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """z = q v, second by second: T multiply-adds cost less than moving the rows into a tensor-core layout."""
    z_PC = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, T, GROUP_T):
        for step in tl.static_range(GROUP_T):
            t = first + step
            q_P = tl.load(q_base + rows_P * T + t, mask=inside_P & (t < T), other=0.0)
            z_PC += q_P[:, None] * _load_vector(v_base + t * C, cols_C, inside_C & (t < T))[None, :]
    return z_PC


@triton.jit
def _layer_norm(h_PC, cols_C, C: tl.constexpr):
    """LayerNorm without affine; also 1 / standard deviation of each row [P,1]."""
    centred_PC = tl.where(cols_C[None, :] < C, h_PC - tl.sum(h_PC, 1)[:, None] / C, 0.0)
    rstd_P1 = 1.0 / tl.sqrt(tl.sum(centred_PC * centred_PC, 1) / C + NORM_EPS)[:, None]
    return centred_PC * rstd_P1, rstd_P1


@triton.jit
def _layer_norm_backward(grad_PC, xhat_PC, rstd_P1, cols_C, C: tl.constexpr):
    """Gradient at the input of the layer normalisation, from that at its output before the affine part."""
    along_P1 = tl.sum(grad_PC * xhat_PC, 1)[:, None] / C
    grad_PC = (grad_PC - tl.sum(grad_PC, 1)[:, None] / C - xhat_PC * along_P1) * rstd_P1
    return tl.where(cols_C[None, :] < C, grad_PC, 0.0)


@triton.jit
def write_kernel(
    x_ptr,
    q_ptr,
    v_ptr,
    affine_ptr,  # [2,C]: batch normalisation as z * scale + shift
    ln_weight_ptr,
    ln_bias_ptr,
    valid_ptr,
    out_ptr,  # out [B,T,P,C], contiguous, in the type of x
    positions,
    splits,
    tiles,
    stride_xb,
    stride_xt,
    stride_xp,
    stride_xc,
    T: tl.constexpr,
    C: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    L2: tl.constexpr,
    ACC: tl.constexpr,
):
    """Second pass over x: out = LayerNorm(x + BatchNorm(q v)); zero in frames that do not exist."""
    program = tl.program_id(0).to(tl.int64)
    frame, split = program // splits, program % splits
    clip = frame // T
    cols_C = tl.arange(0, BLOCK_C)
    live = True
    if valid_ptr is not None:
        live = tl.load(valid_ptr + frame) != 0
    limit = tl.where(live, positions, 0)
    x_base = x_ptr + clip * stride_xb + (frame % T) * stride_xt
    q_base, v_base = q_ptr + frame * positions * T, v_ptr + clip * T * C
    for tile in range(tiles):
        start = (split * tiles + tile) * BLOCK_P
        rows_P = start + tl.arange(0, BLOCK_P)
        inside_P = rows_P < limit
        inside_C = (cols_C < C) & (start < positions)
        x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
        if L2:
            x_PC = x_PC * _inverse_norm(x_PC)
        z_PC = _values(q_base, v_base, rows_P, cols_C, inside_P, inside_C, T, C, GROUP_T, BLOCK_P, BLOCK_C, ACC)
        z_PC = z_PC * _load_vector(affine_ptr, cols_C, inside_C)[None, :]
        h_PC = x_PC + z_PC + _load_vector(affine_ptr + C, cols_C, inside_C)[None, :]
        xhat_PC, _ = _layer_norm(h_PC, cols_C, C)
        out_PC = xhat_PC * _load_vector(ln_weight_ptr, cols_C, inside_C)[None, :]
        out_PC += _load_vector(ln_bias_ptr, cols_C, inside_C)[None, :]
        out_PC = tl.where(inside_P[:, None], out_PC, 0.0)
        offsets = (frame * positions + rows_P[:, None]) * C + cols_C[None, :]
        mask = (rows_P[:, None] < positions) & (cols_C[None, :] < C)
        tl.store(out_ptr + offsets, out_PC.to(out_ptr.dtype.element_ty), mask=mask)

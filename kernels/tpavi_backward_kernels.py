"""Triton kernels of the backward pass of TPAVI; see tpavi_kernels.py for the conventions and tpavi_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from avs_dist.kernels.tpavi_kernels import (
    NORM_EPS,
    _inverse_norm,
    _layer_norm,
    _layer_norm_backward,
    _load_matrix,
    _load_tile,
    _load_vector,
    _values,
)


@triton.jit
def gradient_sums_kernel(
    x_ptr,
    grad_ptr,  # [B,T,P,C] in its own strides: gradient of out
    q_ptr,
    v_ptr,
    affine_ptr,
    ln_weight_ptr,
    valid_ptr,
    sums_ptr,  # out [B*T,splits,T+3,C]: sums of q_t dh (T rows), dh, grad, grad * xhat
    positions,
    splits,
    tiles,
    stride_xb,
    stride_xt,
    stride_xp,
    stride_xc,
    stride_gb,
    stride_gt,
    stride_gp,
    stride_gc,
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    L2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """First backward pass (reads x and grad): the sums that the gradients of all parameters need.

    dh is the gradient at the input of the layer normalisation; it is recomputed in both passes instead of stored.
    """
    program = tl.program_id(0).to(tl.int64)
    frame, split = program // splits, program % splits
    clip = frame // T
    t_T, cols_C = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    live = True
    if valid_ptr is not None:
        live = tl.load(valid_ptr + frame) != 0
    limit = tl.where(live, positions, 0)
    x_base = x_ptr + clip * stride_xb + (frame % T) * stride_xt
    grad_base = grad_ptr + clip * stride_gb + (frame % T) * stride_gt
    q_base, v_base = q_ptr + frame * positions * T, v_ptr + clip * T * C

    weighted_TC = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    dh_total_PC = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    grad_total_PC = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    along_total_PC = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for tile in range(tiles):
        start = (split * tiles + tile) * BLOCK_P
        rows_P = start + tl.arange(0, BLOCK_P)
        inside_P = rows_P < limit
        inside_C = (cols_C < C) & (start < positions)
        x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
        grad_PC = _load_tile(grad_base, rows_P, cols_C, limit, stride_gp, stride_gc, C, ACC)
        if L2:
            x_PC = x_PC * _inverse_norm(x_PC)
        z_PC = _values(q_base, v_base, rows_P, cols_C, inside_P, inside_C, T, C, GROUP_T, BLOCK_P, BLOCK_C, ACC)
        z_PC = z_PC * _load_vector(affine_ptr, cols_C, inside_C)[None, :]
        h_PC = x_PC + z_PC + _load_vector(affine_ptr + C, cols_C, inside_C)[None, :]
        xhat_PC, rstd_P1 = _layer_norm(h_PC, cols_C, C)
        grad_total_PC += grad_PC
        along_total_PC += grad_PC * xhat_PC
        grad_PC = grad_PC * _load_vector(ln_weight_ptr, cols_C, inside_C)[None, :]
        dh_PC = _layer_norm_backward(grad_PC, xhat_PC, rstd_P1, cols_C, C)
        dh_total_PC += dh_PC
        q_PT = _load_matrix(q_base, rows_P, t_T, limit, T, T)
        weighted_TC += tl.dot(tl.trans(q_PT), dh_PC, input_precision=PRECISION)

    inside_C = cols_C < C
    sums_ptr += program * (T + 3) * C
    mask = (t_T[:, None] < T) & inside_C[None, :]
    tl.store(sums_ptr + t_T[:, None] * C + cols_C[None, :], weighted_TC, mask=mask)
    tl.store(sums_ptr + T * C + cols_C, tl.sum(dh_total_PC, 0), mask=inside_C)
    tl.store(sums_ptr + (T + 1) * C + cols_C, tl.sum(grad_total_PC, 0), mask=inside_C)
    tl.store(sums_ptr + (T + 2) * C + cols_C, tl.sum(along_total_PC, 0), mask=inside_C)


@triton.jit
def norm_gradient_kernel(
    sums_ptr,  # [B,T+3,C]
    v_ptr,  # [B,T,C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    totals_ptr,  # out [4,C]: sums over clips of dh, dh * zhat, grad, grad * xhat
    clips,
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of the affine parameters of both normalisations; zhat is z after normalisation, without affine."""
    cols_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t_T = tl.arange(0, BLOCK_T)
    inside_C = cols_C < C
    dh_C = tl.zeros([BLOCK_C], ACC)
    grad_C = tl.zeros([BLOCK_C], ACC)
    along_C = tl.zeros([BLOCK_C], ACC)
    dh_z_C = tl.zeros([BLOCK_C], ACC)
    for start in range(0, clips, BLOCK_B):
        clip_B = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask_BTC = ((clip_B < clips)[:, None] & (t_T < T)[None, :])[:, :, None] & inside_C[None, None, :]
        sums_BTC = (clip_B[:, None] * (T + 3) + t_T[None, :])[:, :, None] * C + cols_C[None, None, :]
        v_BTC = (clip_B[:, None] * T + t_T[None, :])[:, :, None] * C + cols_C[None, None, :]
        weighted_BTC = tl.load(sums_ptr + sums_BTC, mask=mask_BTC, other=0.0)
        product_BTC = weighted_BTC * tl.load(v_ptr + v_BTC, mask=mask_BTC, other=0.0)
        dh_z_C += tl.sum(tl.sum(product_BTC, 1), 0)
        rest_ptr = sums_ptr + T * C
        dh_C += tl.sum(_load_matrix(rest_ptr, clip_B, cols_C, clips, C, (T + 3) * C), 0)
        grad_C += tl.sum(_load_matrix(rest_ptr + C, clip_B, cols_C, clips, C, (T + 3) * C), 0)
        along_C += tl.sum(_load_matrix(rest_ptr + 2 * C, clip_B, cols_C, clips, C, (T + 3) * C), 0)
    mean_C = tl.load(mean_ptr + cols_C, mask=inside_C, other=0.0)
    rstd_C = 1.0 / tl.sqrt(tl.load(var_ptr + cols_C, mask=inside_C, other=1.0) + NORM_EPS)
    tl.store(totals_ptr + cols_C, dh_C, mask=inside_C)
    tl.store(totals_ptr + C + cols_C, (dh_z_C - mean_C * dh_C) * rstd_C, mask=inside_C)
    tl.store(totals_ptr + 2 * C + cols_C, grad_C, mask=inside_C)
    tl.store(totals_ptr + 3 * C + cols_C, along_C, mask=inside_C)


@triton.jit
def value_gradient_kernel(
    sums_ptr,  # [B,T+3,C]
    v_ptr,  # [B,T,C]
    q_mean_ptr,  # [B,T]
    q_square_ptr,  # [B,T,T]
    count_ptr,  # [B]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    bn_weight_ptr,  # [C]
    share_ptr,  # [2,C]: means over all tokens of dh and dh * zhat
    dv_ptr,  # out [B,T,C]
    common_ptr,  # out [2,C], see token_gradient_kernel
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradient of v in training mode: dv_t = sum_i q_it dz_i with dz = scale (dh - m1 - zhat m2), m1, m2 = share."""
    clip = tl.program_id(0).to(tl.int64)
    t_T = tl.arange(0, BLOCK_T)
    cols_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_T, inside_C = t_T < T, cols_C < C
    square_TT = _load_matrix(q_square_ptr + clip * T * T, t_T, t_T, T, T, T)
    q_mean_T = tl.load(q_mean_ptr + clip * T + t_T, mask=inside_T, other=0.0)
    q_sum_T = q_mean_T * tl.load(count_ptr + clip)
    v_TC = _load_matrix(v_ptr + clip * T * C, t_T, cols_C, T, C, C)
    weighted_TC = _load_matrix(sums_ptr + clip * (T + 3) * C, t_T, cols_C, T, C, C)
    rstd_C = 1.0 / tl.sqrt(tl.load(var_ptr + cols_C, mask=inside_C, other=1.0) + NORM_EPS)
    m1_C = _load_vector(share_ptr, cols_C, inside_C)
    m2_C = _load_vector(share_ptr + C, cols_C, inside_C) * rstd_C
    mean_C = _load_vector(mean_ptr, cols_C, inside_C)
    scale_C = _load_vector(bn_weight_ptr, cols_C, inside_C) * rstd_C
    beside_C = tl.sum(q_mean_T[:, None] * v_TC, 0) - mean_C  # mean of z in this clip, from that of the batch
    spread_TC = tl.dot(square_TT, v_TC, input_precision=EXACT)
    dz_sum_TC = weighted_TC - q_sum_T[:, None] * (m1_C + m2_C * beside_C)[None, :] - m2_C[None, :] * spread_TC
    mask = inside_T[:, None] & inside_C[None, :]
    tl.store(dv_ptr + clip * T * C + t_T[:, None] * C + cols_C[None, :], dz_sum_TC * scale_C[None, :], mask=mask)
    if clip == 0:
        tl.store(common_ptr + cols_C, (m1_C - m2_C * mean_C) * scale_C, mask=inside_C)
        tl.store(common_ptr + C + cols_C, m2_C * scale_C, mask=inside_C)


@triton.jit
def token_gradient_kernel(
    x_ptr,
    grad_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    mixing_ptr,
    affine_ptr,
    ln_weight_ptr,
    valid_ptr,
    common_ptr,  # [2,C]: what the batch moments take from dz = scale dh - common_0 - common_1 z
    dmean_ptr,  # [B,T,C]: gradient of the mean of x over the positions of a frame
    dx_ptr,  # out [B,T,P,C], contiguous
    outer_ptr,  # out [B*T,splits,T,C]: sum of dq_t x
    dq_sum_ptr,  # out [B*T,splits,T]: sum of dq_t
    positions,
    splits,
    tiles,
    stride_xb,
    stride_xt,
    stride_xp,
    stride_xc,
    stride_gb,
    stride_gt,
    stride_gp,
    stride_gc,
    T: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    L2: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Second backward pass (reads x and grad, writes dx): dq_t = dz . v_t, dx = dh + (R dq) u + dmean / P.

    Its sums make the gradients of u, c and R.
    """
    program = tl.program_id(0).to(tl.int64)
    frame, split = program // splits, program % splits
    clip = frame // T
    t_T, cols_C = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    live = True
    if valid_ptr is not None:
        live = tl.load(valid_ptr + frame) != 0
    limit = tl.where(live, positions, 0)
    x_base = x_ptr + clip * stride_xb + (frame % T) * stride_xt
    grad_base = grad_ptr + clip * stride_gb + (frame % T) * stride_gt
    q_base = q_ptr + frame * positions * T
    u_base, v_base = u_ptr + clip * T * C, v_ptr + clip * T * C

    outer_TC = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    dq_total_PT = tl.zeros([BLOCK_P, BLOCK_T], ACC)
    for tile in range(tiles):
        start = (split * tiles + tile) * BLOCK_P
        rows_P = start + tl.arange(0, BLOCK_P)
        inside_P = rows_P < limit
        inside_C = (cols_C < C) & (start < positions)
        x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
        if L2:
            inverse_P1 = _inverse_norm(x_PC)
            x_PC = x_PC * inverse_P1
        z_PC = _values(q_base, v_base, rows_P, cols_C, inside_P, inside_C, T, C, GROUP_T, BLOCK_P, BLOCK_C, ACC)
        scale_C = _load_vector(affine_ptr, cols_C, inside_C)
        h_PC = x_PC + z_PC * scale_C[None, :] + _load_vector(affine_ptr + C, cols_C, inside_C)[None, :]
        xhat_PC, rstd_P1 = _layer_norm(h_PC, cols_C, C)
        grad_PC = _load_tile(grad_base, rows_P, cols_C, limit, stride_gp, stride_gc, C, ACC)
        grad_PC = grad_PC * _load_vector(ln_weight_ptr, cols_C, inside_C)[None, :]
        dx_PC = _layer_norm_backward(grad_PC, xhat_PC, rstd_P1, cols_C, C)
        dz_PC = dx_PC * scale_C[None, :] - _load_vector(common_ptr, cols_C, inside_C)[None, :]
        dz_PC -= z_PC * _load_vector(common_ptr + C, cols_C, inside_C)[None, :]
        dx_PC += _load_vector(dmean_ptr + frame * C, cols_C, inside_C)[None, :] / positions
        dq_PT = tl.zeros([BLOCK_P, BLOCK_T], ACC)
        for first in range(0, T, GROUP_T):
            for step in tl.static_range(GROUP_T):
                t = first + step
                here_C = inside_C & (t < T)
                dq_P = tl.sum(dz_PC * _load_vector(v_base + t * C, cols_C, here_C)[None, :], 1)
                dq_P = tl.where(inside_P, dq_P, 0.0)
                dq_PT = tl.where(t_T[None, :] == t, dq_P[:, None], dq_PT)
                mixing = tl.load(mixing_ptr + frame * T + t, mask=t < T, other=0.0)
                dx_PC += (dq_P * mixing)[:, None] * _load_vector(u_base + t * C, cols_C, here_C)[None, :]
        dq_total_PT += dq_PT
        if L2:
            dx_PC = (dx_PC - x_PC * tl.sum(x_PC * dx_PC, 1)[:, None]) * inverse_P1
        dx_PC = tl.where(inside_P[:, None], dx_PC, 0.0)
        offsets = (frame * positions + rows_P[:, None]) * C + cols_C[None, :]
        mask = (rows_P[:, None] < positions) & (cols_C[None, :] < C)
        tl.store(dx_ptr + offsets, dx_PC.to(dx_ptr.dtype.element_ty), mask=mask)
        # read again, from cache: keeping x until here costs registers that the rows above need
        x_PC = _load_tile(x_base, rows_P, cols_C, limit, stride_xp, stride_xc, C, ACC)
        if L2:
            x_PC = x_PC * inverse_P1
        outer_TC += tl.dot(tl.trans(dq_PT), x_PC, input_precision=PRECISION)

    mask = (t_T[:, None] < T) & (cols_C[None, :] < C)
    tl.store(outer_ptr + program * T * C + t_T[:, None] * C + cols_C[None, :], outer_TC, mask=mask)
    tl.store(dq_sum_ptr + program * T + t_T, tl.sum(dq_total_PT, 0), mask=t_T < T)

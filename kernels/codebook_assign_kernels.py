"""Triton kernels of the nearest code; codebook_triton.py puts them in order.

Shape letters: R a tile of tokens or codes, C a tile of codes, D dimensions, S splits; Lp and Dp fill whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base_ptr, row_R, dim_D, mask_RD, stride_row, stride_dim):
    offsets = row_R.to(tl.int64)[:, None] * stride_row + dim_D.to(tl.int64)[None, :] * stride_dim
    return tl.load(base_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)


@triton.jit
def _scale(largest_R):
    """The power of two that brings the largest value of a row to 2^9 to 2^10, far from both ends of float16."""
    exponent_R = (largest_R.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent_R = tl.minimum(tl.maximum(exponent_R, 20), 240)  # of zero or infinity: any scale will do
    return ((263 - exponent_R) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _finite(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def split_codes_kernel(
    codes_ptr,  # [L,D]
    parts_ptr,  # out [2,Lp,Dp] float16: (e - c) * scale = high + low, zero beyond L and D
    squares_ptr,  # out [Lp]: |e - c|^2, infinite for what is not to be chosen
    inverse_ptr,  # out [Lp]: 1 / scale
    centre_ptr,  # out [Dp]: c
    num_bad_ptr,  # out []: zero, for winner_kernel to count up
    num_codes,
    dims,
    padded_codes,
    padded_dims,
    stride_el,
    stride_ed,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Codes around a centre c, scaled row by row and split into two numbers of 11 bits.

    The centre changes no distance and keeps the digits when tokens and codes share a large offset. It is, component by
    component, the median of three codes: one stray code does not move it. A code that is not finite, or whose square
    is not, counts as one beyond L: it is never the nearest.
    """
    pid = tl.program_id(0)
    code_R = pid * ROWS + tl.arange(0, ROWS)
    dim_D = tl.arange(0, DIMS)
    inside_D = dim_D < dims
    step_D = dim_D.to(tl.int64) * stride_ed
    a_D = _finite(tl.load(codes_ptr + tl.cast(num_codes // 6, tl.int64) * stride_el + step_D, inside_D, other=0.0))
    b_D = _finite(tl.load(codes_ptr + tl.cast(num_codes * 3 // 6, tl.int64) * stride_el + step_D, inside_D, other=0.0))
    c_D = _finite(tl.load(codes_ptr + tl.cast(num_codes * 5 // 6, tl.int64) * stride_el + step_D, inside_D, other=0.0))
    centre_D = tl.maximum(tl.minimum(a_D, b_D), tl.minimum(tl.maximum(a_D, b_D), c_D))
    if pid == 0:
        tl.store(centre_ptr + dim_D, centre_D, mask=dim_D < padded_dims)
        tl.store(num_bad_ptr, 0)
    mask_RD = (code_R < num_codes)[:, None] & inside_D[None, :]
    e_RD = load_rows(codes_ptr, code_R, dim_D, mask_RD, stride_el, stride_ed) - centre_D[None, :]
    e_RD = tl.where(mask_RD, e_RD, 0.0)
    squares_R = tl.sum(e_RD * e_RD, 1)
    usable_R = (code_R < num_codes) & (squares_R < float("inf"))  # not NaN either
    squares_R = tl.where(usable_R, squares_R, float("inf"))
    e_RD = tl.where(usable_R[:, None], e_RD, 0.0)
    scale_R = _scale(tl.max(tl.abs(e_RD), 1))
    tl.store(squares_ptr + code_R, squares_R, mask=code_R < padded_codes)
    tl.store(inverse_ptr + code_R, 1.0 / scale_R, mask=code_R < padded_codes)
    high_RD, low_RD = _split(e_RD * scale_R[:, None])
    offsets_RD = code_R.to(tl.int64)[:, None] * padded_dims + dim_D[None, :]
    mask_RD = (code_R < padded_codes)[:, None] & (dim_D < padded_dims)[None, :]
    tl.store(parts_ptr + offsets_RD, high_RD, mask=mask_RD)
    tl.store(parts_ptr + padded_codes.to(tl.int64) * padded_dims + offsets_RD, low_RD, mask=mask_RD)


@triton.jit
def _split(value):
    """Two float16 whose sum is the value to 22 bits."""
    high = value.to(tl.float16)
    return high, (value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _load_tokens(tokens_ptr, centre_ptr, row_R, dim_D, num_tokens, dims, stride_zn, stride_zd):
    mask_RD = (row_R < num_tokens)[:, None] & (dim_D < dims)[None, :]
    return load_rows(tokens_ptr, row_R, dim_D, mask_RD, stride_zn, stride_zd) - tl.load(centre_ptr + dim_D)[None, :]


@triton.jit
def nearest_kernel(
    tokens_ptr,  # [N,D]
    parts_ptr,  # [2,Lp,Dp]
    squares_ptr,  # [Lp]
    inverse_ptr,  # [Lp]
    centre_ptr,  # [Dp]
    scores_ptr,  # out [S,N]
    best_ptr,  # out [S,N] int32
    num_tokens,
    dims,
    padded_codes,
    padded_dims,
    split_codes,
    stride_zn,
    stride_zd,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DIMS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Lowest |e - c|^2 - 2 (z - c).(e - c) among the codes of one split, and the lowest index that has it.

    (zh + zl) (eh + el) without zl el has the accuracy of float32 at three float16 products; each step over DIMS starts
    from zero and is added in float32, since tensor cores cut off digits where they accumulate.
    """
    split = tl.program_id(1)
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest_RD = tl.zeros([ROWS, DIMS], tl.float32)
    for first_dim in range(0, padded_dims, DIMS):
        dim_D = first_dim + tl.arange(0, DIMS)
        z_RD = _load_tokens(tokens_ptr, centre_ptr, row_R, dim_D, num_tokens, dims, stride_zn, stride_zd)
        largest_RD = tl.maximum(largest_RD, tl.abs(z_RD))
    scale_R1 = _scale(tl.max(largest_RD, 1))[:, None]
    inverse_R1 = 1.0 / scale_R1

    score_R = tl.full([ROWS], float("inf"), tl.float32)
    best_R = tl.zeros([ROWS], tl.int32)
    offsets_CD = tl.arange(0, CODES)[:, None] * padded_dims + tl.arange(0, DIMS)[None, :]
    for first in range(split * split_codes, tl.minimum((split + 1) * split_codes, padded_codes), CODES):
        products_RC = tl.zeros([ROWS, CODES], tl.float32)
        high_ptr = parts_ptr + tl.cast(first, tl.int64) * padded_dims
        low_ptr = high_ptr + padded_codes.to(tl.int64) * padded_dims
        for first_dim in range(0, padded_dims, DIMS):
            dim_D = first_dim + tl.arange(0, DIMS)
            z_RD = _load_tokens(tokens_ptr, centre_ptr, row_R, dim_D, num_tokens, dims, stride_zn, stride_zd)
            zh_RD, zl_RD = _split(z_RD * scale_R1)
            eh_DC = tl.trans(tl.load(high_ptr + first_dim + offsets_CD))
            if EXACT:
                el_DC = tl.trans(tl.load(low_ptr + first_dim + offsets_CD))
                small_RC = tl.dot(zl_RD, eh_DC, tl.dot(zh_RD, el_DC))
                products_RC += tl.dot(zh_RD, eh_DC, small_RC)
            else:
                products_RC += tl.dot(zh_RD, eh_DC)
        code_C = first + tl.arange(0, CODES)
        factor_C = -2.0 * tl.load(inverse_ptr + code_C)
        score_RC = tl.load(squares_ptr + code_C)[None, :] + products_RC * factor_C[None, :] * inverse_R1
        lowest_R, place_R = tl.min(score_RC, 1, return_indices=True, return_indices_tie_break_left=True)
        better_R = lowest_R < score_R  # never for NaN, and earlier tiles keep ties
        best_R = tl.where(better_R, first + place_R, best_R)
        score_R = tl.where(better_R, lowest_R, score_R)
    out_R = split.to(tl.int64) * num_tokens + row_R
    tl.store(scores_ptr + out_R, score_R, mask=row_R < num_tokens)
    tl.store(best_ptr + out_R, best_R, mask=row_R < num_tokens)


@triton.jit
def winner_kernel(
    tokens_ptr,  # [N,D]
    codes_ptr,  # [L,D]
    valid_ptr,  # [N] bool, or None
    scores_ptr,  # [S,N]
    best_ptr,  # [S,N]
    indices_ptr,  # out [N] int64
    distances_ptr,  # out [N]
    num_bad_ptr,  # in, out []
    num_tokens,
    dims,
    splits,
    stride_zn,
    stride_zd,
    stride_el,
    stride_ed,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Best split of each token, the distance to its code as a sum of squares, and the count of bad tokens."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < num_tokens
    score_R = tl.load(scores_ptr + row_R, mask=inside_R, other=0.0)
    best_R = tl.load(best_ptr + row_R, mask=inside_R, other=0)
    for split in range(1, splits):
        at_R = row_R + split * num_tokens
        other_R = tl.load(scores_ptr + at_R, mask=inside_R, other=0.0)
        better_R = other_R < score_R
        best_R = tl.where(better_R, tl.load(best_ptr + at_R, mask=inside_R, other=0), best_R)
        score_R = tl.where(better_R, other_R, score_R)
    squares_RD = tl.zeros([ROWS, DIMS], tl.float32)
    for first_dim in range(0, dims, DIMS):
        dim_D = first_dim + tl.arange(0, DIMS)
        mask_RD = inside_R[:, None] & (dim_D < dims)[None, :]
        difference_RD = load_rows(tokens_ptr, row_R, dim_D, mask_RD, stride_zn, stride_zd)
        difference_RD -= load_rows(codes_ptr, best_R, dim_D, mask_RD, stride_el, stride_ed)
        squares_RD += difference_RD * difference_RD
    distance_R = tl.sum(squares_RD, 1)
    bad_R = inside_R & ((distance_R < float("inf")) == 0)  # NaN is not less either
    distance_R = tl.where(bad_R, float("nan"), distance_R)
    index_R = tl.where(bad_R, -1, best_R)
    if valid_ptr is not None:
        valid_R = tl.load(valid_ptr + row_R, mask=inside_R, other=0) != 0
        bad_R = bad_R & valid_R
        distance_R = tl.where(valid_R, distance_R, 0.0)
        index_R = tl.where(valid_R, index_R, -1)
    tl.store(indices_ptr + row_R, index_R.to(tl.int64), mask=inside_R)
    tl.store(distances_ptr + row_R, distance_R, mask=inside_R)
    num_bad = tl.sum(bad_R.to(tl.int32), 0)
    tl.atomic_add(num_bad_ptr, num_bad, mask=num_bad > 0, sem="relaxed")  # of integers: no order to depend on

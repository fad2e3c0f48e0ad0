"""Triton kernels of the codebook's update; codebook_triton.py puts them in order.

Shape letters: N tokens, L or C codes, D dimensions, S splits, T lists of TILE codes, M modalities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from avs_dist.kernels.codebook_assign_kernels import load_rows


@triton.jit
def bucket_kernel(
    indices_ptr,  # [N] int64
    list_ptr,  # out [N] int32: token * TILE + code within the tile, grouped by tile, in token order
    starts_ptr,  # out [T+1] int32: where the list of each tile begins
    num_tokens,
    num_tiles,
    stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the tokens of the TILE codes of this program; their place is the number of tokens of lower codes."""
    tile = tl.program_id(0)
    token_N = tl.arange(0, BLOCK)
    lower_N = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_tokens, BLOCK):
        inside_N = first + token_N < num_tokens
        code_N = tl.load(indices_ptr + (first + token_N).to(tl.int64) * stride, mask=inside_N, other=-1)
        lower_N += ((code_N >= 0) & (code_N < tile * TILE)).to(tl.int32)
    end = tl.sum(lower_N, 0)
    tl.store(starts_ptr + tile, end)
    for first in range(0, num_tokens, BLOCK):
        inside_N = first + token_N < num_tokens
        code_N = tl.load(indices_ptr + (first + token_N).to(tl.int64) * stride, mask=inside_N, other=-1)
        within_N = code_N - tile * TILE
        mine_N = (within_N >= 0) & (within_N < TILE)
        place_N = end + tl.cumsum(mine_N.to(tl.int32), 0) - 1
        tl.store(list_ptr + place_N, (first + token_N) * TILE + within_N.to(tl.int32), mask=mine_N)
        end += tl.sum(mine_N.to(tl.int32), 0)
    if tile == num_tiles - 1:
        tl.store(starts_ptr + num_tiles, end)


@triton.jit
def partial_kernel(
    tokens_ptr,  # [N,D]
    teachers_ptr,  # [N,D], or None
    list_ptr,  # [N]
    starts_ptr,  # [T+1]
    counts_ptr,  # out [S,L]
    sums_ptr,  # out [S,L,D]
    num_codes,
    dims,
    splits,
    stride_zn,
    stride_zd,
    stride_rn,
    stride_rd,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Counts and sums of (z + r) / 2 over every splits-th block of the list of one tile of codes."""
    tile, split = tl.program_id(0), tl.program_id(1)
    dim_D = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    within_C = tl.arange(0, TILE)
    start, end = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    if start + split * TOKENS < end:  # combine_kernel reads no other split
        count_C = tl.zeros([TILE], tl.float32)
        sum_CD = tl.zeros([TILE, DIMS], tl.float32)
        for first in range(start + split * TOKENS, end, splits * TOKENS):
            place_T = first + tl.arange(0, TOKENS)
            entry_T = tl.load(list_ptr + place_T, mask=place_T < end, other=0)
            token_T = entry_T // TILE
            mask_TD = (place_T < end)[:, None] & (dim_D < dims)[None, :]
            value_TD = load_rows(tokens_ptr, token_T, dim_D, mask_TD, stride_zn, stride_zd)
            if teachers_ptr is not None:
                teacher_TD = load_rows(teachers_ptr, token_T, dim_D, mask_TD, stride_rn, stride_rd)
                finite_TD = tl.abs(teacher_TD) < float("inf")
                value_TD = tl.where(finite_TD, 0.5 * value_TD + 0.5 * teacher_TD, value_TD)
            chosen_CT = (within_C[:, None] == (entry_T % TILE)[None, :]) & (place_T < end)[None, :]
            chosen_CT = chosen_CT.to(tl.float32)
            count_C += tl.sum(chosen_CT, 1)
            sum_CD += tl.dot(chosen_CT, value_TD, input_precision=PRECISION)
        row_C = split.to(tl.int64) * num_codes + tile * TILE + within_C
        inside_C = tile * TILE + within_C < num_codes
        tl.store(counts_ptr + row_C, count_C, mask=inside_C & (tl.program_id(2) == 0))
        tl.store(
            sums_ptr + row_C[:, None] * dims + dim_D[None, :], sum_CD, mask=inside_C[:, None] & (dim_D < dims)[None, :]
        )


@triton.jit
def combine_kernel(
    counts_ptr,  # [M,S,L]
    sums_ptr,  # [M,S,L,D]
    starts_ptr,  # [M,T+1]
    flat_ptr,  # out [M*L + L*D]
    num_codes,
    dims,
    num_tiles,
    splits,
    MODALITIES: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Add the splits that exist, modality by modality."""
    tile = tl.program_id(0)
    code_C = tile * TILE + tl.arange(0, TILE)
    dim_D = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside_C = code_C < num_codes
    mask_CD = inside_C[:, None] & (dim_D < dims)[None, :]
    sum_CD = tl.zeros([TILE, DIMS], tl.float32)
    for modality in tl.static_range(MODALITIES):
        start_ptr = starts_ptr + modality * (num_tiles + 1) + tile
        used = tl.minimum(tl.cdiv(tl.load(start_ptr + 1) - tl.load(start_ptr), TOKENS), splits)
        count_C = tl.zeros([TILE], tl.float32)
        for split in range(used):
            row_C = code_C.to(tl.int64) + (modality * splits + split) * num_codes
            count_C += tl.load(counts_ptr + row_C, mask=inside_C, other=0.0)
            sum_CD += tl.load(sums_ptr + row_C[:, None] * dims + dim_D[None, :], mask=mask_CD, other=0.0)
        tl.store(flat_ptr + modality * num_codes + code_C, count_C, mask=inside_C & (tl.program_id(1) == 0))
    offsets_CD = (MODALITIES * num_codes + code_C.to(tl.int64) * dims)[:, None] + dim_D[None, :]
    tl.store(flat_ptr + offsets_CD, sum_CD, mask=mask_CD)


@triton.jit
def _idle(idle_ptr, flat_ptr, modality, code_C, num_codes, inside_C):
    """Batches since this modality last used the code, the present one included."""
    used_C = tl.load(flat_ptr + modality * num_codes + code_C, mask=inside_C, other=0.0) > 0
    return tl.where(used_C, 0, tl.load(idle_ptr + modality * num_codes + code_C, mask=inside_C, other=0) + 1)


@triton.jit
def _is_live(
    idle_ptr, flat_ptr, code_C, num_codes, inside_C, reset_after, MODALITIES: tl.constexpr, EVERY: tl.constexpr
):
    idle_C = _idle(idle_ptr, flat_ptr, 0, code_C, num_codes, inside_C)
    for modality in tl.static_range(1, MODALITIES):
        other_C = _idle(idle_ptr, flat_ptr, modality, code_C, num_codes, inside_C)
        idle_C = tl.maximum(idle_C, other_C) if EVERY else tl.minimum(idle_C, other_C)
    return idle_C < reset_after


@triton.jit
def plan_kernel(
    count_ptr,  # [L]
    idle_ptr,  # [M,L]
    flat_ptr,  # [M*L + ...]: counts of this batch
    permutation_ptr,  # [L] int64, or None
    next_count_ptr,  # out [L]
    next_idle_ptr,  # out [M,L]
    rank_ptr,  # out [L]: place among the live codes in the order of the permutation, L if not in it, -1 for a dead code
    dead_ptr,  # out [L]: dead codes in their own order
    census_ptr,  # out [2]: numbers of live codes in the permutation and of dead codes
    total_ptr,  # out [1]: sum of the new counts
    num_codes,
    reset_after,
    decay,
    fresh,
    MODALITIES: tl.constexpr,
    RESET: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All that is one number per code, by a single program: ranks and the total depend on all codes. Reads the state
    and writes elsewhere, since average_kernel needs both."""
    index_C = tl.arange(0, BLOCK)
    total = 0.0
    num_live = 0
    num_dead = 0
    for first in range(0, num_codes, BLOCK):
        code_C = first + index_C
        inside_C = code_C < num_codes
        used_C = tl.zeros([BLOCK], tl.float32)
        for modality in tl.static_range(MODALITIES):
            idle_C = _idle(idle_ptr, flat_ptr, modality, code_C, num_codes, inside_C)
            tl.store(next_idle_ptr + modality * num_codes + code_C, idle_C, mask=inside_C)
            used_C += tl.load(flat_ptr + modality * num_codes + code_C, mask=inside_C, other=0.0)
        count_C = decay * tl.load(count_ptr + code_C, mask=inside_C, other=0.0) + fresh * used_C
        tl.store(next_count_ptr + code_C, count_C, mask=inside_C)
        total += tl.sum(count_C, 0)
        if RESET:
            live_C = _is_live(idle_ptr, flat_ptr, code_C, num_codes, inside_C, reset_after, MODALITIES, EVERY)
            dead_C = (inside_C & (live_C == 0)).to(tl.int32)
            tl.store(dead_ptr + num_dead + tl.cumsum(dead_C, 0) - 1, code_C, mask=dead_C != 0)
            num_dead += tl.sum(dead_C, 0)
            # what stands if the permutation leaves this code out: a live one is kept, and gives no clones
            tl.store(rank_ptr + code_C, tl.where(live_C, num_codes, -1), mask=inside_C)
    if RESET:
        tl.debug_barrier()  # before ranks are written again
        for first in range(0, num_codes, BLOCK):
            place_C = first + index_C
            code_C = tl.load(permutation_ptr + place_C, mask=place_C < num_codes, other=-1)
            inside_C = (code_C >= 0) & (code_C < num_codes)
            live_C = _is_live(idle_ptr, flat_ptr, code_C, num_codes, inside_C, reset_after, MODALITIES, EVERY)
            live_C = (inside_C & live_C).to(tl.int32)
            rank_C = num_live + tl.cumsum(live_C, 0) - 1
            tl.store(rank_ptr + code_C, rank_C, mask=live_C != 0)
            num_live += tl.sum(live_C, 0)
    tl.store(total_ptr, total)
    tl.store(census_ptr, num_live)
    tl.store(census_ptr + 1, num_dead)


@triton.jit
def _mixed(x):
    return (((x ^ (x >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF) | 1).to(tl.int32)


@triton.jit
def _noise(seed_R, dim_D):
    """reference.clone_noise"""
    factor_R = _mixed((seed_R * 0x27D4EB2F + 0x165667B1) & 0x7FFFFFFF)
    factor_D = _mixed((dim_D.to(tl.int64) * 0x297A2D39 + 0x3C6EF372) & 0x7FFFFFFF)
    return (factor_R[:, None] * factor_D[None, :]).to(tl.float32) * (1.0 / 2147483648.0)


@triton.jit
def average_kernel(
    codes_ptr,  # in, out [L,D]
    count_ptr,  # out [L]
    sum_ptr,  # in, out [L,D]
    idle_ptr,  # out [M,L]
    flat_ptr,  # [M*L + L*D]
    permutation_ptr,  # [L] int64, or None
    next_count_ptr,  # [L]
    next_idle_ptr,  # [M,L]
    rank_ptr,  # [L]
    dead_ptr,  # [L]
    census_ptr,  # [2]
    total_ptr,  # [1]
    num_codes,
    dims,
    decay,
    fresh,
    eps,
    noise,
    MODALITIES: tl.constexpr,
    RESET: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Average the rows of live codes and write them; each live code also writes its clones over dead ones, so that
    every row of the state is read and written by one program."""
    code_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim_D = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    inside_R = code_R < num_codes
    inside_D = dim_D < dims
    kept_R = inside_R
    if RESET:
        num_live, num_dead = tl.load(census_ptr), tl.load(census_ptr + 1)
        rank_R = tl.load(rank_ptr + code_R, mask=inside_R, other=-1)
        kept_R = inside_R & ((rank_R >= 0) | (num_live == 0))
    count_R = tl.load(next_count_ptr + code_R, mask=inside_R, other=0.0)

    row_R = code_R.to(tl.int64) * dims
    kept_RD = kept_R[:, None] & inside_D[None, :]
    sum_RD = tl.load(sum_ptr + row_R[:, None] + dim_D[None, :], mask=kept_RD, other=0.0)
    batch_RD = tl.load(flat_ptr + MODALITIES * num_codes + row_R[:, None] + dim_D[None, :], mask=kept_RD, other=0.0)
    sum_RD = decay * sum_RD + fresh * batch_RD
    total = tl.load(total_ptr)
    smoothed_R1 = ((count_R + eps) / (total + num_codes * eps) * total)[:, None]
    code_RD = tl.load(codes_ptr + row_R[:, None] + dim_D[None, :], mask=kept_RD, other=0.0)
    code_RD = tl.where(smoothed_R1 > 0, sum_RD / smoothed_R1, code_RD)
    tl.store(sum_ptr + row_R[:, None] + dim_D[None, :], sum_RD, mask=kept_RD)
    tl.store(codes_ptr + row_R[:, None] + dim_D[None, :], code_RD, mask=kept_RD)

    if tl.program_id(1) == 0:
        tl.store(count_ptr + code_R, tl.where(kept_R, count_R, 1.0), mask=inside_R)
        for modality in tl.static_range(MODALITIES):
            idle_R = tl.load(next_idle_ptr + modality * num_codes + code_R, mask=inside_R, other=0)
            tl.store(idle_ptr + modality * num_codes + code_R, tl.where(kept_R, idle_R, 0), mask=inside_R)
    if RESET:
        for first in range(0, tl.where(num_live > 0, num_dead, 0), tl.maximum(num_live, 1)):
            place_R = first + rank_R
            mine_R = (rank_R >= 0) & (place_R < num_dead)
            clone_R = tl.load(dead_ptr + place_R, mask=mine_R, other=0)
            seed_R = tl.load(permutation_ptr + clone_R, mask=mine_R, other=0)
            clone_RD = code_RD + noise * _noise(seed_R, dim_D)
            offset_RD = (clone_R.to(tl.int64) * dims)[:, None] + dim_D[None, :]
            tl.store(sum_ptr + offset_RD, clone_RD, mask=mine_R[:, None] & inside_D[None, :])
            tl.store(codes_ptr + offset_RD, clone_RD, mask=mine_R[:, None] & inside_D[None, :])

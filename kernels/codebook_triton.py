"""The codebook in Triton: nearest code, sums per code, moving average with reset.

assign   split_codes_kernel  codes around a centre as pairs of float16, and their squares
         nearest_kernel      running best of |e|^2 - 2 z.e over code tiles, in registers: no N x L matrix
         winner_kernel       best of the code splits, its exact distance, tokens that are not finite
sums     bucket_kernel       each program owns TILE codes and lists their tokens, in token order
         partial_kernel      one-hot products over a tile's list: sums per code, a long list shared by several programs
         combine_kernel      adds splits and modalities in a fixed order into the flat buffer
apply    plan_kernel         per code, in one program: counts, idle counters, who is dead, who is whose donor
         average_kernel      moving average and division of the live codes, which also write their clones

Why lists: one-hot products over all tokens would cost as much again as the distances; the lists cost N L / TILE integer
compares, after which every token is read once; a sort would be ten launches instead of one. Nothing depends on the
device, so the sizes alone fix the order of every sum.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from avs_dist.kernels import codebook_assign_kernels, codebook_update_kernels, runtime
from avs_dist.kernels.reference import CodebookState, Observed

TILE = 16  # codes of a list: the least that tl.dot takes
TOKENS = 32  # of a list, taken at a time
LARGE = 8192  # tokens from which larger tiles fill a device
PROGRAMS = 256  # enough for any device: splits are added until a grid has as many
PARTIALS = 1 << 22  # float32 elements that the partial sums may take: 16 MiB
DIMS = 32  # of tokens and codes, multiplied at a time; codes are padded to it


def assign(
    tokens_ND: Tensor, codes_LD: Tensor, valid_N: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, distances and the number of bad tokens."""
    (num_tokens, dims), num_codes = tokens_ND.shape, len(codes_LD)
    valid_N = None if valid_N is None else valid_N.contiguous()
    large = num_tokens >= LARGE
    rows = tile = 128 if large else 64
    row_tiles, code_tiles = triton.cdiv(num_tokens, rows), triton.cdiv(num_codes, tile)
    tiles = triton.cdiv(code_tiles, min(code_tiles, triton.cdiv(PROGRAMS, max(row_tiles, 1))))
    splits = triton.cdiv(code_tiles, tiles)
    padded_codes, padded_dims = code_tiles * tile, triton.cdiv(dims, DIMS) * DIMS

    parts_2LD = codes_LD.new_empty(2, padded_codes, padded_dims, dtype=torch.float16)
    squares_L, inverse_L = codes_LD.new_empty(2, padded_codes)
    centre_D = codes_LD.new_empty(padded_dims)
    scores_SN = codes_LD.new_empty(splits, num_tokens)
    best_SN = codes_LD.new_empty(splits, num_tokens, dtype=torch.int32)
    indices_N = codes_LD.new_empty(num_tokens, dtype=torch.int64)
    distances_N = codes_LD.new_empty(num_tokens)
    num_bad = codes_LD.new_empty((), dtype=torch.int32)
    width = triton.next_power_of_2(padded_dims)
    code_rows = max(1, 1024 // width)
    runtime.launch(
        codebook_assign_kernels.split_codes_kernel,
        (triton.cdiv(padded_codes, code_rows),),
        *(codes_LD, parts_2LD, squares_L, inverse_L, centre_D, num_bad),
        *(num_codes, dims, padded_codes, padded_dims),
        *codes_LD.stride(),
        num_warps=4,
        ROWS=code_rows,
        DIMS=width,
    )
    runtime.launch(
        codebook_assign_kernels.nearest_kernel,
        (row_tiles, splits),
        *(tokens_ND, parts_2LD, squares_L, inverse_L, centre_D, scores_SN, best_SN),
        *(num_tokens, dims, padded_codes, padded_dims, tiles * tile),
        *tokens_ND.stride(),
        num_warps=8 if large else 4,
        num_stages=3,
        ROWS=rows,
        CODES=tile,
        DIMS=DIMS,
        EXACT=precision == "fp32",
    )
    runtime.launch(
        codebook_assign_kernels.winner_kernel,
        (triton.cdiv(num_tokens, 8),),
        *(tokens_ND, codes_LD, valid_N, scores_SN, best_SN, indices_N, distances_N, num_bad),
        *(num_tokens, dims, splits),
        *tokens_ND.stride(),
        *codes_LD.stride(),
        num_warps=4,
        ROWS=8,
        DIMS=min(256, triton.next_power_of_2(dims)),
    )
    return indices_N, distances_N, num_bad


def sums(observed: list[Observed], num_codes: int) -> Tensor:
    """The flat buffer [M*L + L*D]."""
    first = observed[0].tokens_ND
    modalities, dims, tiles = len(observed), first.shape[1], triton.cdiv(num_codes, TILE)
    splits = max(1, min(8, PARTIALS // (modalities * num_codes * dims)))
    block = max(16, min(64, triton.next_power_of_2(dims)))

    starts_MT = first.new_empty(modalities, tiles + 1, dtype=torch.int32)
    counts_MSL = first.new_empty(modalities, splits, num_codes, dtype=torch.float32)
    sums_MSLD = first.new_empty(modalities, splits, num_codes, dims, dtype=torch.float32)
    flat = first.new_empty(num_codes * (modalities + dims), dtype=torch.float32)
    for modality, (tokens_ND, teachers_ND, indices_N) in enumerate(observed):
        num_tokens, starts_T = len(tokens_ND), starts_MT[modality]
        list_N = starts_MT.new_empty(num_tokens)
        runtime.launch(
            codebook_update_kernels.bucket_kernel,
            (tiles,),
            *(indices_N, list_N, starts_T, num_tokens, tiles, indices_N.stride(0)),
            num_warps=8,
            TILE=TILE,
            BLOCK=4096 if num_tokens > 1024 else 1024,
        )
        runtime.launch(
            codebook_update_kernels.partial_kernel,
            (tiles, splits, triton.cdiv(dims, block)),
            *(tokens_ND, teachers_ND, list_N, starts_T, counts_MSL[modality], sums_MSLD[modality]),
            *(num_codes, dims, splits),
            *tokens_ND.stride(),
            *(tokens_ND if teachers_ND is None else teachers_ND).stride(),
            num_warps=4,
            TILE=TILE,
            TOKENS=TOKENS,
            DIMS=block,
            PRECISION=runtime.dot_precision(torch.float32),
        )
    runtime.launch(
        codebook_update_kernels.combine_kernel,
        (tiles, triton.cdiv(dims, block)),
        *(counts_MSL, sums_MSLD, starts_MT, flat, num_codes, dims, tiles, splits),
        num_warps=4,
        MODALITIES=modalities,
        TILE=TILE,
        TOKENS=TOKENS,
        DIMS=block,
    )
    return flat


def apply(
    state: CodebookState,
    flat: Tensor,
    decay: float,
    smoothing_eps: float,
    reset_after: int | None,
    permutation_L: Tensor | None,
    every_modality: bool,
    noise: float,
) -> None:
    """Second half of the update, in place."""
    num_codes, dims = state.codes_LD.shape
    flat = flat.contiguous()
    permutation_L = None if permutation_L is None else permutation_L.contiguous()
    fixed = {"MODALITIES": len(state.idle_ML), "RESET": reset_after is not None}
    next_count_L, next_idle_ML = torch.empty_like(state.count_L), torch.empty_like(state.idle_ML)
    rank_L, dead_L = flat.new_empty(2, num_codes, dtype=torch.int32)
    census, total = flat.new_empty(2, dtype=torch.int32), flat.new_empty(1)
    plan = (next_count_L, next_idle_ML, rank_L, dead_L, census, total)
    runtime.launch(
        codebook_update_kernels.plan_kernel,
        (1,),
        *(state.count_L, state.idle_ML, flat, permutation_L, *plan),
        *(num_codes, reset_after or 0, decay, 1.0 - decay),
        num_warps=8,
        EVERY=every_modality,
        BLOCK=min(1024, max(16, triton.next_power_of_2(num_codes))),
        **fixed,
    )
    block = min(256, triton.next_power_of_2(dims))
    runtime.launch(
        codebook_update_kernels.average_kernel,
        (triton.cdiv(num_codes, 2), triton.cdiv(dims, block)),
        *(*state, flat, permutation_L, *plan),
        *(num_codes, dims, decay, 1.0 - decay, smoothing_eps, noise),
        num_warps=4,
        ROWS=2,
        DIMS=block,
        **fixed,
    )

"""Codebook of several modalities: nearest code, and the joint moving average with reset (CMG, section 4.3).

    assign   index_n = argmin_l |z_n - e_l|^2
    sums     n_ml and sum_l = sum over the tokens of all modalities of (z + r) / 2, in one flat buffer
    apply    N <- g N + (1-g) sum_m n_m,   o <- g o + (1-g) sum,   e = o / smoothed(N), then reset of dead codes

Between the two halves of the update the flat buffer is summed over ranks by one all-reduce; equal buffers give equal
states bit for bit. Nothing waits for the device, and no shape depends on a value, so a whole step can be captured in a
CUDA graph. No gradient passes through; the published straight-through estimator and losses belong to the caller.

On a GPU the Triton kernels never build the N x L distances and add in a fixed order; `reference.py` holds the literal
formulas. The torch form works on any device (its sums are repeatable on a CPU; on a GPU index_add is not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from avs_dist.kernels import codebook_triton, runtime
from avs_dist.kernels.reference import CodebookState, Observed, clone_noise

CPU_CHUNK = 1 << 20  # distances at a time, so that they stay in the cache
CHUNK = 1 << 26
PRECISIONS = ("fp32", "tf32", "half")
RULES = ("all", "any")
INTEGERS = (torch.int32, torch.int64)
NOISE = 1 / 1024  # of a clone, as in the public code
MAX_TOKENS = 1 << 27  # of a modality: token * TILE + code within the tile is an int32


class Assignment(NamedTuple):
    """Code of each token."""

    indices_N: Tensor  # int64; -1 where the token is bad or not valid
    distances_N: Tensor  # float32 squared distance to the code; NaN where the token is bad, 0 where it is not valid
    num_bad: Tensor  # int32 scalar on the device: valid tokens with NaN, infinity, or a distance beyond float32


def initial_state(codes_LD: Tensor, num_modalities: int) -> CodebookState:
    """A state in which every code counts as one token, so that a code nobody chooses keeps its place.

    With the count 0 of the public code, the first update divides the sum of an unused code by the smoothing alone.
    """
    codes_LD = codes_LD.detach().float().clone(memory_format=torch.contiguous_format)
    count_L = codes_LD.new_ones(len(codes_LD))
    idle_ML = torch.zeros(num_modalities, len(codes_LD), dtype=torch.int32, device=codes_LD.device)
    return CodebookState(codes_LD, count_L, codes_LD.clone(), idle_ML)


def codebook_assign(
    tokens_ND: Tensor,
    codes_LD: Tensor,
    *,
    valid_N: Tensor | None = None,
    precision: Literal["fp32", "tf32", "half"] = "fp32",
) -> Assignment:
    """Nearest code of each token; the lowest index wins a tie.

    Args:
        tokens_ND: float32, float16 or bfloat16, any strides.
        codes_LD: float32. A code that is not finite, or so far from the middle code that the square overflows, is
            never chosen; when no code is left, all tokens are bad.
        valid_N: bool; tokens that are not valid get index -1 and distance 0, and are not looked at.
        precision: of the products inside the Triton kernel. "fp32": the accuracy of float32, by three float16 products
            of codes and tokens around a middle code, scaled row by row, so that neither a common offset nor the size of
            the numbers costs digits; two distances that differ by less than about 1e-6 of |z|^2 + |e|^2, seen from
            there, may be exchanged. "tf32" and "half": one product of 11-bit numbers, what either type keeps; faster,
            and wrong between nearly equal distances. The distance returned is that of the chosen code in float32. The
            torch form multiplies in float32 always, under autocast too (on a GPU: as torch's matmul precision is set).

    Raises:
        ValueError: shape, type, device or precision do not fit.
    """
    op = "codebook_assign"
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    device = tokens_ND.device
    runtime.check(op, "tokens_ND", tokens_ND, (None, None), runtime.FLOATS, device)
    runtime.check(op, "codes_LD", codes_LD, (None, tokens_ND.shape[1]), (torch.float32,), device)
    if valid_N is not None:
        runtime.check(op, "valid_N", valid_N, (len(tokens_ND),), (torch.bool,), device)
    if 0 in codes_LD.shape:
        raise ValueError(f"{op}: there must be at least one code of at least one dimension, got {list(codes_LD.shape)}")
    return Assignment(*_assign(tokens_ND.detach(), codes_LD.detach(), valid_N, precision))


def codebook_sums(observed: Sequence[Observed], num_codes: int) -> Tensor:
    """First half of the update: one float32 buffer [M*L + L*D] of plain sums, counts of each modality and joint sums.

    A component of a teacher that is not finite is replaced by the token's own; without teachers a token stands alone.

    Raises:
        ValueError: no modality, no dimension, 2^27 tokens or more of one modality, or shapes, types and devices that do
            not fit.
    """
    op = "codebook_sums"
    if not observed or num_codes < 1:
        raise ValueError(f"{op}: needs at least one modality and one code, got {len(observed)} and {num_codes}")
    device, dims = observed[0].tokens_ND.device, observed[0].tokens_ND.shape[-1]
    if dims < 1:
        raise ValueError(f"{op}: tokens must have at least one dimension, got {list(observed[0].tokens_ND.shape)}")
    for place, (tokens_ND, teachers_ND, indices_N) in enumerate(observed):
        runtime.check(op, f"observed[{place}].tokens_ND", tokens_ND, (None, dims), runtime.FLOATS, device)
        if len(tokens_ND) >= MAX_TOKENS:
            raise ValueError(f"{op}: observed[{place}] must have fewer than {MAX_TOKENS} tokens, got {len(tokens_ND)}")
        runtime.check(op, f"observed[{place}].indices_N", indices_N, (len(tokens_ND),), (torch.int64,), device)
        if teachers_ND is not None:
            kind = (tokens_ND.dtype,)
            runtime.check(op, f"observed[{place}].teachers_ND", teachers_ND, tokens_ND.shape, kind, device)
    return _sums(
        [o.tokens_ND.detach() for o in observed],
        [None if o.teachers_ND is None else o.teachers_ND.detach() for o in observed],
        [o.indices_N for o in observed],
        num_codes,
    )


def codebook_apply(
    state: CodebookState,
    flat: Tensor,
    *,
    decay: float,
    smoothing_eps: float = 1e-5,
    reset_after: int | None = None,
    permutation_L: Tensor | None = None,
    reset_rule: Literal["all", "any"] = "all",
    noise: float = NOISE,
) -> None:
    """Second half of the update, in place; formula and reset rule as in `reference.codebook_update`.

    A clone starts with count 1 and its own code as sum: the next averages keep it where it is, and since it is light,
    the first tokens that it gets pull it away from its donor. The noise (uniform, from a hash of permutation_L[l] and
    the dimension, hence equal on all ranks) makes it differ: of two equal codes the second would never be chosen.

    Args:
        flat: what `codebook_sums` returned, summed over ranks; any strides.
        reset_after: batches (N_re) after which an unused code is dead; None for no reset.
        permutation_L: int64, a random permutation of the codes, the same on all ranks, any strides; needed for a reset.
            Its values are not looked at beforehand: an entry outside [0, L) is passed over, so that the code that is
            missing gives no clones; when no live code is left in it, nothing is reset. With an entry twice, some dead
            codes may keep their place.
        reset_rule: "all": a code lives while every modality uses it (paper); "any": while one does (public code).
        noise: largest difference of a clone from its donor in each dimension.

    Raises:
        ValueError: shapes, types, devices or settings do not fit.
    """
    op = "codebook_apply"
    if not (0.0 <= decay <= 1.0 and smoothing_eps >= 0.0 and reset_rule in RULES):
        raise ValueError(
            f"{op}: expected decay in [0, 1], smoothing_eps >= 0 and reset_rule of {', '.join(RULES)}, got {decay}, "
            f"{smoothing_eps} and '{reset_rule}'"
        )
    if reset_after is not None and (reset_after < 1 or permutation_L is None):
        raise ValueError(f"{op}: a reset needs reset_after >= 1 and a permutation, got {reset_after}, {permutation_L}")
    device, (num_codes, dims) = flat.device, state.codes_LD.shape
    if 0 in state.codes_LD.shape:
        raise ValueError(f"{op}: there must be at least one code of at least one dimension, got {[num_codes, dims]}")
    single = (torch.float32,)
    runtime.check(op, "state.codes_LD", state.codes_LD, (None, None), single, device)
    runtime.check(op, "state.count_L", state.count_L, (num_codes,), single, device)
    runtime.check(op, "state.sum_LD", state.sum_LD, (num_codes, dims), single, device)
    runtime.check(op, "state.idle_ML", state.idle_ML, (None, num_codes), INTEGERS, device)
    runtime.check(op, "flat", flat, (num_codes * (len(state.idle_ML) + dims),), single, device)
    if permutation_L is not None:
        runtime.check(op, "permutation_L", permutation_L, (num_codes,), (torch.int64,), device)
    for name, value in zip(state._fields, state, strict=True):
        if not value.is_contiguous():
            raise ValueError(f"{op}: state.{name} must be contiguous, got strides {value.stride()}")
    permutation_L = None if reset_after is None else permutation_L
    _apply(*state, flat, decay, smoothing_eps, reset_after, permutation_L, reset_rule == "all", noise)


def codebook_update(
    state: CodebookState,
    observed: Sequence[Observed],
    *,
    decay: float,
    smoothing_eps: float = 1e-5,
    reset_after: int | None = None,
    permutation_L: Tensor | None = None,
    reset_rule: Literal["all", "any"] = "all",
    noise: float = NOISE,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Both halves of the update, in place; the caller assigned the tokens to the codes of `state` before.

    Args:
        reduce: sums the flat buffer over ranks, in place or not; None for one process. Others as in `codebook_apply`.

    Raises:
        ValueError: as the two halves, or there are not as many modalities as the state counts.
    """
    if len(observed) != len(state.idle_ML):
        raise ValueError(f"codebook_update: expected {len(state.idle_ML)} modalities, got {len(observed)}")
    flat = codebook_sums(observed, len(state.codes_LD))
    codebook_apply(
        state,
        flat if reduce is None else reduce(flat),
        decay=decay,
        smoothing_eps=smoothing_eps,
        reset_after=reset_after,
        permutation_L=permutation_L,
        reset_rule=reset_rule,
        noise=noise,
    )


@torch.library.custom_op("avs_dist::codebook_assign", mutates_args=())
def _assign(
    tokens_ND: Tensor, codes_LD: Tensor, valid_N: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    if runtime.use_triton("codebook_assign", tokens_ND):
        return codebook_triton.assign(tokens_ND, codes_LD, valid_N, precision)
    with runtime.no_autocast(tokens_ND):
        return _assign_torch(tokens_ND, codes_LD, valid_N)


@_assign.register_fake
def _(tokens_ND: Tensor, codes_LD: Tensor, valid_N: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    distances_N = codes_LD.new_empty(len(tokens_ND))
    return torch.empty_like(distances_N, dtype=torch.int64), distances_N, codes_LD.new_empty((), dtype=torch.int32)


@torch.library.custom_op("avs_dist::codebook_sums", mutates_args=())
def _sums(tokens: Sequence[Tensor], teachers: Sequence[Tensor | None], indices: Sequence[Tensor], codes: int) -> Tensor:
    observed = [Observed(*one) for one in zip(tokens, teachers, indices, strict=True)]
    if runtime.use_triton("codebook_sums", tokens[0]):
        return codebook_triton.sums(observed, codes)
    with runtime.no_autocast(tokens[0]):
        return _sums_torch(observed, codes)


@_sums.register_fake
def _(tokens: Sequence[Tensor], teachers: Sequence[Tensor | None], indices: Sequence[Tensor], codes: int) -> Tensor:
    return tokens[0].new_empty(codes * (len(tokens) + tokens[0].shape[1]), dtype=torch.float32)


@torch.library.custom_op("avs_dist::codebook_apply", mutates_args=("codes_LD", "count_L", "sum_LD", "idle_ML"))
def _apply(
    codes_LD: Tensor,
    count_L: Tensor,
    sum_LD: Tensor,
    idle_ML: Tensor,
    flat: Tensor,
    decay: float,
    smoothing_eps: float,
    reset_after: int | None,
    permutation_L: Tensor | None,
    every_modality: bool,
    noise: float,
) -> None:
    state = CodebookState(codes_LD, count_L, sum_LD, idle_ML)
    form = codebook_triton.apply if runtime.use_triton("codebook_apply", flat) else _apply_torch
    with runtime.no_autocast(flat):
        form(state, flat, decay, smoothing_eps, reset_after, permutation_L, every_modality, noise)


def _assign_torch(tokens_ND: Tensor, codes_LD: Tensor, valid_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    num_codes = len(codes_LD)
    centre_3D = torch.stack([codes_LD[num_codes * part // 6] for part in (1, 3, 5)]).nan_to_num(0.0, 0.0, 0.0)
    centre_D = centre_3D.median(0).values
    shifted_LD = codes_LD - centre_D
    squares_L = shifted_LD.square().sum(1)
    usable_L = squares_L < torch.inf  # not NaN either
    squares_L = torch.where(usable_L, squares_L, torch.inf)
    shifted_LD = torch.where(usable_L[:, None], shifted_LD, 0.0)
    indices_N = torch.empty(len(tokens_ND), dtype=torch.int64, device=tokens_ND.device)
    distances_N = codes_LD.new_empty(len(tokens_ND))
    size = max(1, (CPU_CHUNK if tokens_ND.device.type == "cpu" else CHUNK) // num_codes)
    for start in range(0, len(tokens_ND), size):
        part = slice(start, start + size)
        z_ND = tokens_ND[part].float()
        torch.argmin(torch.addmm(squares_L, z_ND - centre_D, shifted_LD.T, alpha=-2.0), 1, out=indices_N[part])
        torch.sum((z_ND - codes_LD[indices_N[part]]).square(), 1, out=distances_N[part])
    good_N = distances_N < torch.inf  # not NaN either
    indices_N = torch.where(good_N, indices_N, -1)
    distances_N = torch.where(good_N, distances_N, torch.nan)
    if valid_N is not None:
        good_N = good_N | ~valid_N
        indices_N = torch.where(valid_N, indices_N, -1)
        distances_N = torch.where(valid_N, distances_N, 0.0)
    return indices_N, distances_N, (~good_N).sum(dtype=torch.int32)


def _sums_torch(observed: list[Observed], num_codes: int) -> Tensor:
    first = observed[0].tokens_ND
    # the last row takes the tokens without a code
    counts_ML = first.new_zeros(len(observed), num_codes + 1, dtype=torch.float32)
    sum_LD = first.new_zeros(num_codes + 1, first.shape[1], dtype=torch.float32)
    for count_L, (tokens_ND, teachers_ND, indices_N) in zip(counts_ML, observed, strict=True):
        row_N = torch.where((indices_N >= 0) & (indices_N < num_codes), indices_N, num_codes)
        value_ND = tokens_ND.float()
        if teachers_ND is not None:
            # where the teacher is not finite, neither is the step towards it
            step_ND = (teachers_ND.float() - value_ND).nan_to_num_(0.0, 0.0, 0.0)
            value_ND = torch.add(value_ND, step_ND, alpha=0.5)
        sum_LD.index_add_(0, row_N, value_ND)
        count_L.index_add_(0, row_N, torch.ones_like(row_N, dtype=torch.float32))
    return torch.cat([counts_ML[:, :-1].flatten(), sum_LD[:-1].flatten()])


def _apply_torch(
    state: CodebookState,
    flat: Tensor,
    decay: float,
    smoothing_eps: float,
    reset_after: int | None,
    permutation_L: Tensor | None,
    every_modality: bool,
    noise: float,
) -> None:
    codes_LD, count_L, sum_LD, idle_ML = state
    num_codes, dims = codes_LD.shape
    used_ML = flat[: idle_ML.numel()].view(idle_ML.shape)
    count_L.mul_(decay).add_(used_ML.sum(0), alpha=1.0 - decay)
    sum_LD.mul_(decay).add_(flat[idle_ML.numel() :].view(num_codes, dims), alpha=1.0 - decay)
    idle_ML.add_(1).mul_(used_ML <= 0)
    total = count_L.sum()
    smoothed_L1 = ((count_L + smoothing_eps) / (total + num_codes * smoothing_eps) * total)[:, None]
    codes_LD.copy_(torch.where(smoothed_L1 > 0, sum_LD / smoothed_L1, codes_LD))
    if reset_after is None or permutation_L is None:
        return
    live_L = (idle_ML.amax(0) if every_modality else idle_ML.amin(0)) < reset_after
    inside_L = (permutation_L >= 0) & (permutation_L < num_codes)
    ordered_L = inside_L & live_L[torch.where(inside_L, permutation_L, 0)]
    num_live = ordered_L.sum()
    # live codes in the order of the permutation; the last place takes all other entries
    donors_L = torch.zeros(num_codes + 1, dtype=torch.int64, device=flat.device)
    donors_L.scatter_(0, torch.where(ordered_L, ordered_L.cumsum(0) - 1, num_codes), permutation_L)
    donor_L = donors_L[((~live_L).cumsum(0) - 1).clamp_min(0) % num_live.clamp_min(1)]
    kept_L = live_L | (num_live == 0)
    clones_LD = codes_LD[donor_L] + noise * clone_noise(permutation_L, dims)
    for value, reset in ((codes_LD, clones_LD), (sum_LD, clones_LD)):
        value.copy_(torch.where(kept_L[:, None], value, reset))
    count_L.copy_(torch.where(kept_L, count_L, 1.0))
    idle_ML.mul_(kept_L)

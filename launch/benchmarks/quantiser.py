"""A training step of Uni-Code's quantiser: nearest codes, straight-through, commitment, teachers, average, reset.

Forward and backward of B clips of T tokens in each of two modalities, with the settings of the public code: the tokens
of the same second as teachers, one modality averaged after the other, a code alive while any modality chooses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels import reference
from avs_dist.kernels.codebook import NOISE
from avs_dist.kernels.reference import CodebookState, Observed, clone_noise
from avs_dist.launch.benchmarks.problem import Case, Op, Problem, Size, Work, force_kernels
from avs_dist.modules.codebook import MultiModalCodebook

MODALITIES = ("audio", "visual")
DECAY, SMOOTHING, RESET_AFTER, BETA, CROSS = 0.99, 1e-5, 300, 0.25, 0.5
PUBLISHED = {"B": 80, "T": 10, "L": 400, "D": 256}

IMPLEMENTATIONS = {
    "literal": "token by token and code by code",
    "published": "as the public code, in float32: products with one-hot matrices, loops over indices and codes",
    "gemm": "distances by a GEMM, argmin, index_add_, commitment by autograd; no reset",
    "ours": "avs_dist.modules.codebook.MultiModalCodebook",
}


class Inputs(NamedTuple):
    """Tokens of each modality, the gradient of what becomes of them, and the codebook."""

    z: list[Tensor]  # [B T, D]
    grads: list[Tensor]
    state: CodebookState


class Found(NamedTuple):
    """Of each modality; the codes are those before the update."""

    indices: list[Tensor]
    quantised: list[Tensor]
    loss: Tensor


Assign = Callable[[Inputs], Found]
Move = Callable[[Inputs, Sequence[Tensor]], None]


def _sizes(device: str, tiny: bool) -> list[Size]:
    if tiny:
        return [{"B": 4, "T": 5, "L": 37, "D": 24}]
    return [PUBLISHED] if device == "cpu" else [PUBLISHED, PUBLISHED | {"B": 1024}]


def _inputs(case: Case) -> Inputs:
    """Tokens that lie around codes: which is nearest does not hang on rounding."""
    generator = torch.Generator(case.device).manual_seed(0)
    tokens, codes, dims = case.size["B"] * case.size["T"], case.size["L"], case.size["D"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    codes_LD, count_L = normal(codes, dims), 1.0 + normal(codes).abs()
    idle_ML = torch.zeros(len(MODALITIES), codes, dtype=torch.int32, device=case.device)
    nearest = [torch.randint(codes, (tokens,), generator=generator, device=case.device) for _ in MODALITIES]
    z = [codes_LD[index_N] + 0.3 * normal(tokens, dims) for index_N in nearest]
    state = CodebookState(codes_LD, count_L, codes_LD * count_L[:, None], idle_ML)
    return Inputs(z, [normal(tokens, dims) for _ in MODALITIES], state)


def _prepare(case: Case) -> Problem:
    given = _inputs(case)
    call = _ours(case, given) if case.implementation == "ours" else _steps(given, *FORMS[case.implementation])
    products = 2.0 * len(MODALITIES) * len(given.z[0]) * case.size["L"] * case.size["D"]
    work = Work(products, "tf32" if case.device == "cuda" else "float32")  # of the distances
    return Problem(
        modes={"forward+backward": call},
        exact=_steps(_double(given), *FORMS["literal" if case.tiny else "gemm"]),
        work={"forward+backward": work},
        tolerance=None if case.implementation == "literal" else 1e-3,
        capturable=case.implementation in ("gemm", "ours"),  # the others ask the device for every token
    )


def _double(given: Inputs) -> Inputs:
    state = CodebookState(*(v.double() if v.is_floating_point() else v.clone() for v in given.state))
    return Inputs([z_ND.double() for z_ND in given.z], [grad_ND.double() for grad_ND in given.grads], state)


def _ours(case: Case, given: Inputs) -> Callable[[], list[Tensor]]:
    force_kernels(case)
    module = MultiModalCodebook(
        case.size["L"],
        case.size["D"],
        DECAY,
        modalities=MODALITIES,
        update="sequential",
        teacher="time_aligned",
        beta=BETA,
        cross_commitment=CROSS,
        reset_after=RESET_AFTER,
        reset_rule="any",
    ).to(case.device)
    for buffer, value in zip(module.state, given.state, strict=True):
        buffer.copy_(value)
    shape = (case.size["B"], case.size["T"], case.size["D"])
    z = {name: z_ND.view(shape).requires_grad_() for name, z_ND in zip(MODALITIES, given.z, strict=True)}
    grads = [grad_ND.view(shape) for grad_ND in given.grads]

    def step() -> list[Tensor]:
        output = module(z)
        roots = [*output.quantised.values(), output.commitment_loss]
        slopes = torch.autograd.grad(roots, list(z.values()), [*grads, torch.ones_like(roots[-1])])
        outputs = [value.flatten(0, 1) for value in (*output.quantised.values(), *slopes)]
        return [*outputs, output.commitment_loss, *module.state[:3]]

    return step


def _steps(given: Inputs, assign: Assign, move: Move) -> Callable[[], list[Tensor]]:
    """Forward, update and backward of another form; each call goes on from the state of the one before."""
    moving = given._replace(state=CodebookState(*(value.clone() for value in given.state)))
    moving = moving._replace(z=[z_ND.detach().clone().requires_grad_() for z_ND in given.z])

    def step() -> list[Tensor]:
        found = assign(moving)
        with torch.no_grad():
            move(moving, found.indices)
        roots = [*found.quantised, found.loss]
        slopes = torch.autograd.grad(roots, moving.z, [*given.grads, torch.ones_like(found.loss)])
        return [*found.quantised, *slopes, found.loss, *moving.state[:3]]

    return step


def _literal_assign(given: Inputs) -> Found:
    codes_LD = given.state.codes_LD
    indices = [_nearest_of_each(z_ND.detach(), codes_LD) for z_ND in given.z]
    quantised, loss = [], codes_LD.new_zeros(())
    for m, z_ND in enumerate(given.z):
        rows = []
        for n, z_D in enumerate(z_ND):
            own_D, other_D = codes_LD[indices[m][n]].clone(), codes_LD[indices[1 - m][n]].clone()
            token = BETA * (((z_D - own_D) ** 2).mean() + CROSS * ((z_D - other_D) ** 2).mean())
            loss = loss + token / len(z_ND)
            rows.append(z_D + (own_D - z_D).detach())
        quantised.append(torch.stack(rows))
    return Found(indices, quantised, loss)


def _nearest_of_each(z_ND: Tensor, codes_LD: Tensor) -> Tensor:
    return torch.tensor([((z_D - codes_LD) ** 2).sum(1).argmin().item() for z_D in z_ND], device=z_ND.device)


def _literal_move(given: Inputs, indices: Sequence[Tensor]) -> None:
    state = CodebookState(*given.state)
    for m, index_N in enumerate(indices):
        observed = Observed(given.z[m], given.z[1 - m], index_N)
        alone = state._replace(idle_ML=given.state.idle_ML[m : m + 1])
        state = reference.codebook_update(alone, [observed], DECAY, SMOOTHING, None, None, "any", NOISE)
        given.state.idle_ML[m] = state.idle_ML[0]
    for value, new in zip(given.state[:3], state[:3], strict=True):
        value.copy_(new)
    _reset_code_by_code(given.state)


def _reset_code_by_code(state: CodebookState) -> None:
    """Each dead code becomes a clone of a living one, drawn on the host."""
    codes_LD, count_L, sum_LD, idle_ML = state
    order = torch.randperm(len(codes_LD)).tolist()
    donors = [code for code in order if idle_ML[:, code].min().item() < RESET_AFTER]
    for code in range(len(codes_LD)):
        if donors and idle_ML[:, code].min().item() >= RESET_AFTER:
            seed = torch.tensor([code], device=codes_LD.device)
            codes_LD[code] = codes_LD[donors[code % len(donors)]] + NOISE * clone_noise(seed, codes_LD.shape[1])[0]
            count_L[code], sum_LD[code], idle_ML[:, code] = 1, codes_LD[code], 0


def _gemm_assign(given: Inputs) -> Found:
    codes_LD = given.state.codes_LD
    squares_L = codes_LD.square().sum(1)
    indices = [torch.addmm(squares_L, z_ND.detach(), codes_LD.T, alpha=-2.0).argmin(1) for z_ND in given.z]
    chosen = [codes_LD[index_N] for index_N in indices]
    pairs = list(zip(given.z, chosen, reversed(chosen), strict=True))
    quantised = [z_ND + (own_ND - z_ND).detach() for z_ND, own_ND, _ in pairs]
    losses = [F.mse_loss(z_ND, own_ND) + CROSS * F.mse_loss(z_ND, other_ND) for z_ND, own_ND, other_ND in pairs]
    return Found(indices, quantised, BETA * torch.stack(losses).sum())


def _gemm_move(given: Inputs, indices: Sequence[Tensor]) -> None:
    """The plain fast form; the reset is left out, in its favour."""
    state = given.state
    mixed_ND = (given.z[0] + given.z[1]) / 2
    for index_N in indices:
        batch_L, batch_LD = torch.zeros_like(state.count_L), torch.zeros_like(state.sum_LD)
        batch_L.index_add_(0, index_N, torch.ones_like(index_N, dtype=batch_L.dtype))
        _average(state, batch_L, batch_LD.index_add_(0, index_N, mixed_ND))


def _average(state: CodebookState, batch_L: Tensor, batch_LD: Tensor) -> None:
    state.count_L.mul_(DECAY).add_(batch_L, alpha=1 - DECAY)
    state.sum_LD.mul_(DECAY).add_(batch_LD, alpha=1 - DECAY)
    total = state.count_L.sum()
    smoothed_L = (state.count_L + SMOOTHING) / (total + len(batch_L) * SMOOTHING) * total
    state.codes_LD.copy_(state.sum_LD / smoothed_L[:, None])


def _published_move(given: Inputs, indices: Sequence[Tensor]) -> None:
    state = given.state
    for m, index_N in enumerate(indices):
        hits_NL = F.one_hot(index_N, len(state.count_L)).to(state.count_L.dtype)
        _average(state, hits_NL.sum(0), (hits_NL.T @ given.z[m] + hits_NL.T @ given.z[1 - m]) / 2)
        state.idle_ML[m] += 1
        for place in range(len(index_N)):
            state.idle_ML[m, int(index_N[place])] = 0
    _reset_code_by_code(state)


FORMS: dict[str, tuple[Assign, Move]] = {
    "literal": (_literal_assign, _literal_move),
    "published": (_gemm_assign, _published_move),
    "gemm": (_gemm_assign, _gemm_move),
}


def _included(case: Case) -> bool:
    """The loops take seconds where there are many tokens."""
    return case.tiny or case.implementation in ("gemm", "ours") or case.size == PUBLISHED


OP = Op(
    name="quantiser",
    title="training step of the whole quantiser of Uni-Code, 2 modalities, public settings",
    implementations=IMPLEMENTATIONS,
    sizes=_sizes,
    dtypes=lambda device: ("float32",),
    included=_included,
    prepare=_prepare,
)

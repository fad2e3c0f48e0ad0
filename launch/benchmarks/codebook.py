"""One step of a codebook of two modalities: nearest codes of N tokens each, moving average, reset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from avs_dist.kernels import codebook, reference
from avs_dist.kernels.reference import CodebookState, Observed
from avs_dist.launch.benchmarks.ceilings import float32_products
from avs_dist.launch.benchmarks.problem import Case, Op, Problem, Size, Work, compiled, force_kernels, needs_memory

Precision = Literal["fp32", "tf32", "half"]

MODALITIES = 2
DECAY, SMOOTHING, RESET_AFTER = 0.99, 1e-5, 300
# (N, L): the literal step takes seconds, and compiling takes longer than measuring
MEASURED_LITERALLY = {(160, 400), (1600, 400), (2560, 400)}
COMPILED = {(1600, 400), (2560, 400), (16384, 1024)}
# fp32 is exact between distances that differ by more than rounding; the fast modes pick a code that is nearly nearest
TOLERANCES = {"gemm": 2e-3, "gemm tf32": 2e-2, "compiled": 2e-3, "ours": 2e-3, "ours tf32": 2e-2, "ours half": 5e-2}
PRECISIONS: dict[str, Precision] = {"ours": "fp32", "ours tf32": "tf32", "ours half": "half"}

IMPLEMENTATIONS = {
    "literal": "token by token and code by code, as in the published code",
    "gemm": "distances by a GEMM, argmin, index_add_; no reset",
    "gemm tf32": "the same with TF32 products",
    "compiled": "torch.compile of the GEMM form",
    "ours": "what the library runs, float32-accurate",
    "ours tf32": "ours with TF32 products",
    "ours half": "ours with bfloat16 products",
}


class Found(NamedTuple):
    """Of each modality."""

    indices: list[Tensor]
    distances: list[Tensor]


class Inputs(NamedTuple):
    """Tokens and teachers of each modality, the codebook, a permutation for the reset."""

    tokens: list[Tensor]
    teachers: list[Tensor]
    state: CodebookState
    permutation_L: Tensor


class Form(NamedTuple):
    """An implementation: nearest codes of all tokens, and the moving average, which changes the state in place."""

    assign: Callable[[Inputs], Found]
    update: Callable[[Inputs, Sequence[Tensor]], None]


def _sizes(device: str, tiny: bool) -> list[Size]:
    if tiny:
        return [{"N": 40, "L": 37, "D": 24}]
    if device == "cpu":
        return [{"N": 1600, "L": 400, "D": 256}, {"N": 16384, "L": 1024, "D": 256}]
    return [{"N": n, "L": l, "D": 256} for l in (400, 1024) for n in (160, 2560, 16384, 131072)]


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(0)
    tokens, codes, dims = case.size["N"], case.size["L"], case.size["D"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    count_L = 1.0 + normal(codes).abs()
    codes_LD = normal(codes, dims)
    idle_ML = torch.zeros(MODALITIES, codes, dtype=torch.int32, device=case.device)
    state = CodebookState(codes_LD, count_L, codes_LD * count_L[:, None], idle_ML)
    pairs = [[normal(tokens, dims) for _ in range(MODALITIES)] for _ in range(2)]
    permutation_L = torch.randperm(codes, generator=torch.Generator().manual_seed(0)).to(case.device)
    return Inputs(pairs[0], pairs[1], state, permutation_L)


def _prepare(case: Case) -> Problem:
    given = _inputs(case)
    form = _form(case)
    moving = [given._replace(state=CodebookState(*(value.clone() for value in given.state))) for _ in range(2)]
    indices = _gemm_assign(given).indices

    def update() -> list[Tensor]:
        form.update(moving[0], indices)
        return list(moving[0].state[:3])

    def step() -> list[Tensor]:
        return _step(form, moving[1])

    if case.implementation == "compiled":
        compiled_step = compiled(_step, case)
        modes = {"assign+update": lambda: compiled_step(form, moving[1])}
    else:
        modes = {"assign": lambda: form.assign(given).distances, "update": update, "assign+update": step}
    return Problem(
        modes=modes,
        exact=lambda: _exact(case, given),
        work=_work(case),
        tolerance=TOLERANCES.get(case.implementation),
        capturable=case.implementation != "literal",  # which asks the device for every token
    )


def _step(form: Form, given: Inputs) -> list[Tensor]:
    found = form.assign(given)
    form.update(given, found.indices)
    return [*found.distances, *given.state[:3]]


def _exact(case: Case, given: Inputs) -> list[Tensor]:
    state = CodebookState(*(value.double() if value.is_floating_point() else value.clone() for value in given.state))
    tokens, teachers = ([value.double() for value in values] for values in (given.tokens, given.teachers))
    return _step(LITERAL if case.tiny else GEMM, Inputs(tokens, teachers, state, given.permutation_L))


def _work(case: Case) -> dict[str, Work]:
    """Products of the distances; tokens, teachers and state that the update reads and writes."""
    n, l, d = (case.size[name] for name in "NLD")
    products = 2.0 * MODALITIES * n * l * d
    exact_products = "tf32" if case.device == "cuda" else "float32"
    assign = Work(products, "bfloat16" if case.implementation == "ours half" else exact_products)
    return {"assign": assign, "update": Work(4.0 * d * (2 * MODALITIES * n + 4 * l), "copy"), "assign+update": assign}


def _form(case: Case) -> Form:
    name = case.implementation
    if name in PRECISIONS:
        force_kernels(case)
        return Form(partial(_our_assign, precision=PRECISIONS[name]), _our_update)
    if name == "literal":
        return LITERAL
    needs_memory(case, 4 * MODALITIES * case.size["N"] * case.size["L"] * 4)
    if name != "gemm tf32":
        return GEMM

    def assign(given: Inputs) -> Found:
        with float32_products("tf32"):
            return _gemm_assign(given)

    return GEMM._replace(assign=assign)


def _observed(given: Inputs, indices: Sequence[Tensor]) -> list[Observed]:
    return [Observed(*one) for one in zip(given.tokens, given.teachers, indices, strict=True)]


def _our_assign(given: Inputs, precision: Precision) -> Found:
    found = [codebook.codebook_assign(t, given.state.codes_LD, precision=precision) for t in given.tokens]
    return Found([one.indices_N for one in found], [one.distances_N for one in found])


def _our_update(given: Inputs, indices: Sequence[Tensor]) -> None:
    codebook.codebook_update(
        given.state,
        _observed(given, indices),
        decay=DECAY,
        smoothing_eps=SMOOTHING,
        reset_after=RESET_AFTER,
        permutation_L=given.permutation_L,
    )


def _literal_assign(given: Inputs) -> Found:
    found = [reference.codebook_assign(tokens_ND, given.state.codes_LD) for tokens_ND in given.tokens]
    like = given.state.codes_LD
    indices = [torch.tensor(index, device=like.device) for index, _, _ in found]
    return Found(indices, [torch.tensor(distance, dtype=like.dtype, device=like.device) for _, distance, _ in found])


def _literal_update(given: Inputs, indices: Sequence[Tensor]) -> None:
    settings = (DECAY, SMOOTHING, RESET_AFTER, given.permutation_L, "all", codebook.NOISE)
    moved = reference.codebook_update(given.state, _observed(given, indices), *settings)
    for value, new in zip(given.state, moved, strict=True):
        value.copy_(new)


def _gemm_assign(given: Inputs) -> Found:
    codes_LD = given.state.codes_LD
    squares_L = codes_LD.square().sum(1)
    found = Found([], [])
    for tokens_ND in given.tokens:
        least_N, index_N = torch.addmm(squares_L, tokens_ND, codes_LD.T, alpha=-2.0).min(1)
        found.indices.append(index_N)
        found.distances.append(least_N + tokens_ND.square().sum(1))
    return found


def _gemm_update(given: Inputs, indices: Sequence[Tensor]) -> None:
    """The plain fast form; the reset is left out, in its favour."""
    codes_LD, count_L, sum_LD, _ = given.state
    batch_count_L, batch_LD = torch.zeros_like(count_L), torch.zeros_like(sum_LD)
    for tokens_ND, teachers_ND, index_N in zip(given.tokens, given.teachers, indices, strict=True):
        batch_count_L.index_add_(0, index_N, torch.ones_like(index_N, dtype=count_L.dtype))
        batch_LD.index_add_(0, index_N, (tokens_ND + teachers_ND) / 2)
    count_L.mul_(DECAY).add_(batch_count_L, alpha=1 - DECAY)
    sum_LD.mul_(DECAY).add_(batch_LD, alpha=1 - DECAY)
    total = count_L.sum()
    smoothed_L = (count_L + SMOOTHING) / (total + len(count_L) * SMOOTHING) * total
    codes_LD.copy_(sum_LD / smoothed_L[:, None])


LITERAL = Form(_literal_assign, _literal_update)
GEMM = Form(_gemm_assign, _gemm_update)


def _included(case: Case) -> bool:
    name, on_gpu = case.implementation, case.device == "cuda" or case.tiny
    size = (case.size["N"], case.size["L"])
    if name == "literal":
        return case.tiny or size in MEASURED_LITERALLY
    if name == "compiled":
        return case.tiny or size in COMPILED
    return on_gpu or name not in ("gemm tf32", "ours tf32", "ours half")  # elsewhere all products are float32


OP = Op(
    name="codebook",
    title=f"codebook step, {MODALITIES} modalities of N tokens each",
    implementations=IMPLEMENTATIONS,
    sizes=_sizes,
    dtypes=lambda device: ("float32",),
    included=_included,
    prepare=_prepare,
)

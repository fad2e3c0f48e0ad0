"""TPAVI at the four stages of a 224 x 224 frame, 5 seconds, 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from avs_dist.kernels import reference, tpavi
from avs_dist.kernels.reference import TPAVIWeights
from avs_dist.launch.benchmarks.problem import (
    TOLERANCES,
    Case,
    Op,
    Problem,
    Size,
    Work,
    compiled,
    floating_type,
    force_kernels,
    free_bytes,
    needs_memory,
)

LITERAL_MATRICES = 5  # of N x N elements that the literal block holds at a time, about
MOST_EXACT = {"cuda": 16e9, "cpu": 0.5e9}  # bytes of a float64 N x N matrix up to which the literal block is the truth
COMPILED_ON_GPU = {(56, 16), (14, 16)}  # (hw, B): compiling takes longer than measuring

IMPLEMENTATIONS = {
    "literal": "the published N x N block",
    "torch": "rank-T form in torch operations",
    "compiled": "torch.compile of the rank-T form",
    "ours": "what the library runs: Triton on a GPU, else torch",
}

Forward = Callable[[Tensor, Tensor, TPAVIWeights], Tensor]


def _sizes(device: str, tiny: bool) -> list[Size]:
    if tiny:
        return [{"hw": 3, "B": 2, "T": 3, "C": 20}]
    batches = (4, 16, 64) if device == "cuda" else (1,)
    return [{"hw": hw, "B": batch, "T": 5, "C": 256} for hw in (7, 14, 28, 56) for batch in batches]


def _prepare(case: Case) -> Problem:
    x, audio, weights, grad = _inputs(case)
    needs_memory(case, 10 * x.numel() * 4)
    forward = _forward(case)

    def forward_only() -> Sequence[Tensor]:
        return [forward(x, audio, weights)]

    def both() -> Sequence[Tensor]:
        return _with_gradients(forward, x, audio, weights, grad)

    def exact() -> Sequence[Tensor]:
        double = [value.detach().double().requires_grad_() for value in (x, audio, *weights)]
        matrix = _matrix_bytes(case, 8)
        small = matrix <= MOST_EXACT[case.device] and LITERAL_MATRICES * matrix < free_bytes(case.device)
        truth = _literal if small else _torch  # their float64 results are equal, as the tests show
        return _with_gradients(truth, double[0], double[1], TPAVIWeights(*double[2:]), grad.double())

    size = x.numel() * x.element_size()
    return Problem(
        modes={"forward": forward_only, "forward+backward": both},
        exact=exact,
        # forward reads x twice and writes out; backward reads x and the gradient twice and writes the gradient of x
        work={"forward": Work(3.0 * size, "copy"), "forward+backward": Work(8.0 * size, "copy")},
        tolerance=None if case.implementation == "literal" else TOLERANCES[case.dtype],
        capturable=case.implementation != "literal",  # which copies a number to the device
    )


def _inputs(case: Case) -> tuple[Tensor, Tensor, TPAVIWeights, Tensor]:
    """Visual tokens, audio, weights (all with gradient) and the gradient of the output."""
    generator = torch.Generator(case.device).manual_seed(0)
    channels, inner = case.size["C"], case.size["C"] // 2

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=case.device)
        scaled = values / (shape[-1] ** 0.5 if len(shape) == 2 else 1.0)
        return scaled.to(floating_type(case)).requires_grad_()

    projections = [normal(*shape) for _ in range(3) for shape in ((inner, channels), (inner,))]
    others = [normal(*shape) for shape in ((channels, inner), *[(channels,)] * 5)]
    x_BTPC = normal(case.size["B"], case.size["T"], case.size["hw"] ** 2, channels)
    audio_BTC = normal(case.size["B"], case.size["T"], channels)
    return x_BTPC, audio_BTC, TPAVIWeights(*projections, *others), normal(*x_BTPC.shape).detach()


def _forward(case: Case) -> Forward:
    """The implementation of the case."""
    if case.implementation == "literal":
        needs_memory(case, LITERAL_MATRICES * _matrix_bytes(case, floating_type(case).itemsize))
        return _literal
    if case.implementation == "ours":
        force_kernels(case)
        return _ours
    return compiled(_torch, case) if case.implementation == "compiled" else _torch


def _literal(x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights) -> Tensor:
    return reference.tpavi(x_BTPC, audio_BTC[:, :, None], weights)[0]


def _torch(x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights) -> Tensor:
    return tpavi.tpavi_torch(x_BTPC, audio_BTC, weights)[0]


def _ours(x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights) -> Tensor:
    return tpavi.tpavi(x_BTPC, audio_BTC, weights)[0]


def _with_gradients(
    forward: Forward, x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights, grad_BTPC: Tensor
) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    out_BTPC = forward(x_BTPC, audio_BTC, weights)
    return [out_BTPC.detach(), *torch.autograd.grad(out_BTPC, [x_BTPC, audio_BTC, *weights], grad_BTPC)]


def _matrix_bytes(case: Case, itemsize: int) -> float:
    """Of the N x N scores of all clips."""
    tokens = case.size["T"] * case.size["hw"] ** 2
    return float(case.size["B"] * tokens**2 * itemsize)


def _included(case: Case) -> bool:
    if case.implementation == "torch":
        return case.device == "cuda" or case.tiny  # elsewhere it is ours
    if case.implementation == "compiled" and case.device == "cuda" and not case.tiny:
        return case.dtype == "bfloat16" and (case.size["hw"], case.size["B"]) in COMPILED_ON_GPU
    return True


OP = Op(
    name="tpavi",
    title="TPAVI block, training mode",
    implementations=IMPLEMENTATIONS,
    sizes=_sizes,
    dtypes=lambda device: ("bfloat16", "float32") if device == "cuda" else ("float32",),
    included=_included,
    prepare=_prepare,
)

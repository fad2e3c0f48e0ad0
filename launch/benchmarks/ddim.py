"""DDIM sampling of latents: 10 steps of an eight-layer denoiser, latent and condition of 24 numbers each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels import reference
from avs_dist.kernels.denoise import ddim_sample, pack
from avs_dist.kernels.reference import DDIMSteps, DenoiserWeights
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
)

LAYERS = 8
# (H, B): compiling takes longer than measuring
COMPILED_ON_GPU = {(128, 1024), (128, 4096), (128, 16384), (256, 65536)}

IMPLEMENTATIONS = {
    "literal": "row by row, neuron by neuron",
    "scheduler": "eager loop, the schedule in host scalars, as samplers that call a scheduler object do",
    "torch": "eager loop, all on the device",
    "compiled": "loop over the torch.compile of one step; its graph replay is the CUDA-graphed compiled loop",
    "ours": "what the library runs: one launch on a GPU, else the loop in torch",
}

Sample = Callable[[], Tensor]


def _sizes(device: str, tiny: bool) -> list[Size]:
    shared = {"steps": 10, "D": 24, "E": 24}
    if tiny:
        return [{"H": 32, "B": 5, "steps": 2, "D": 5, "E": 3}]
    if device == "cpu":
        return [{"H": 128, "B": batch, **shared} for batch in (64, 1024, 4096)]
    return [{"H": width, "B": batch, **shared} for width in (64, 128, 256) for batch in (1024, 4096, 16384, 65536)]


def _prepare(case: Case) -> Problem:
    size = case.size
    noise_BD, condition_BE, weights, steps = _inputs(case)
    sample = _sample(case, noise_BD, condition_BE, weights, steps)

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return [sample()]

    def exact() -> Sequence[Tensor]:
        double = weights._replace(
            matrices=tuple(m.double() for m in weights.matrices),
            biases=tuple(b.double() for b in weights.biases),
            step_SH=weights.step_SH.double(),
        )
        given = noise_BD.double(), condition_BE.double(), double, DDIMSteps(*(a.double() for a in steps))
        return [_literal(*given) if case.tiny else _loop(_step, *given)]

    products = size["D"] + size["E"] + (LAYERS - 2) * size["H"] + size["D"]
    work = Work(2.0 * size["steps"] * size["B"] * size["H"] * products, _ceiling(case))
    return Problem(
        modes={"forward": run},
        exact=exact,
        work={"forward": work},
        tolerance=None if case.implementation == "literal" else TOLERANCES[case.dtype],
        capturable=case.implementation not in ("literal", "scheduler"),
    )


def _ceiling(case: Case) -> str:
    if case.device == "cpu":
        return "float32"
    return "tf32" if case.dtype == "float32" else "bfloat16"


def _inputs(case: Case) -> tuple[Tensor, Tensor, DenoiserWeights, DDIMSteps]:
    generator = torch.Generator(case.device).manual_seed(0)
    dtype, size = floating_type(case), case.size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    widths = [size["D"] + size["E"], *[size["H"]] * (LAYERS - 1), size["D"]]
    matrices = tuple((normal(o, i) * (2 / i) ** 0.5).to(dtype) for i, o in zip(widths, widths[1:], strict=False))
    biases = tuple((0.1 * normal(o)).to(dtype) for o in widths[1:])
    weights = DenoiserWeights(matrices, biases, normal(size["steps"], size["H"]).to(dtype))
    # a cosine schedule, from nearly noise to the latent itself
    alpha_S = torch.linspace(0.9 * math.pi / 2, 0.0, size["steps"] + 1, device=case.device).cos().square()
    return (
        normal(size["B"], size["D"]),
        normal(size["B"], size["E"]).to(dtype),
        weights,
        DDIMSteps(alpha_S[:-1], alpha_S[1:]),
    )


def _sample(case: Case, noise_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, steps: DDIMSteps) -> Sample:
    """The implementation of the case."""
    name = case.implementation
    if name == "literal":
        return lambda: _literal(noise_BD, condition_BE.float(), _float(weights), steps)
    if name == "scheduler":
        on_host = DDIMSteps(*(alpha_S.cpu() for alpha_S in steps))
        return lambda: _loop(_scheduler_step, noise_BD, condition_BE, weights, on_host)
    if name == "compiled":
        step = compiled(_step, case)
        return lambda: _loop(step, noise_BD, condition_BE, weights, steps)
    if name == "torch":
        return lambda: _loop(_step, noise_BD, condition_BE, weights, steps)
    force_kernels(case)
    packed = pack(weights)
    return lambda: ddim_sample(noise_BD, condition_BE, packed, steps)


def _float(weights: DenoiserWeights) -> DenoiserWeights:
    matrices, biases = ([value.float() for value in values] for values in weights[:2])
    return DenoiserWeights(tuple(matrices), tuple(biases), weights.step_SH.float())


def _literal(noise_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, steps: DDIMSteps) -> Tensor:
    return reference.ddim_sample(noise_BD, condition_BE, weights, steps, "eps", 0.0, None, None)


Step = Callable[[Tensor, Tensor, DenoiserWeights, Tensor, Tensor, Tensor], Tensor]


def _loop(step: Step, z_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, steps: DDIMSteps) -> Tensor:
    for embedding_H, a, a_next in zip(weights.step_SH, *steps, strict=True):
        z_BD = step(z_BD, condition_BE, weights, embedding_H, a, a_next)
    return z_BD


def _step(
    z_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, embedding_H: Tensor, a: Tensor, a_next: Tensor
) -> Tensor:
    eps_BD = _denoise(z_BD, condition_BE, weights, embedding_H)
    x0_BD = (z_BD - (1 - a).sqrt() * eps_BD) / a.sqrt()
    return a_next.sqrt() * x0_BD + (1 - a_next).sqrt() * eps_BD


def _scheduler_step(
    z_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, embedding_H: Tensor, a: Tensor, a_next: Tensor
) -> Tensor:
    """The operations of a scheduler object: all coefficients in each step, from scalars on the host, eta in them."""
    eps_BD = _denoise(z_BD, condition_BE, weights, embedding_H)
    b, b_next = 1 - a, 1 - a_next
    variance = (b_next / b) * (1 - a / a_next)
    sigma = 0.0 * variance**0.5
    x0_BD = (z_BD - b**0.5 * eps_BD) / a**0.5
    return a_next**0.5 * x0_BD + (1 - a_next - sigma**2) ** 0.5 * eps_BD


def _denoise(z_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, embedding_H: Tensor) -> Tensor:
    value = torch.cat([z_BD.to(condition_BE.dtype), condition_BE], 1)
    for layer, (matrix, bias) in enumerate(zip(weights.matrices, weights.biases, strict=True)):
        value = F.linear(value, matrix, bias)
        if layer == 0:
            value = value + embedding_H
        if layer < LAYERS - 1:
            value = F.leaky_relu(value, weights.slope)
    return value.to(z_BD.dtype)


def _included(case: Case) -> bool:
    if case.implementation == "literal":
        return case.tiny
    if case.implementation == "compiled" and case.device == "cuda" and not case.tiny:
        return case.dtype == "bfloat16" and (case.size["H"], case.size["B"]) in COMPILED_ON_GPU
    if case.implementation == "compiled" and not case.tiny:
        return case.size["B"] == 1024
    return case.implementation != "torch" or case.device == "cuda" or case.tiny  # elsewhere it is ours


OP = Op(
    name="ddim",
    title=f"DDIM sampling, {LAYERS} layers",
    implementations=IMPLEMENTATIONS,
    sizes=_sizes,
    dtypes=lambda device: ("bfloat16", "float32") if device == "cuda" else ("float32",),
    included=_included,
    prepare=_prepare,
)

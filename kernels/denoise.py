"""Batched DDIM sampling: all denoising steps of a batch of latents in one launch.

    per step   output = denoiser(z, condition, step)        L fully connected layers with LeakyReLU, optional skip links
               z' = sqrt(a') clamp(x0) + sqrt(1 - a' - sigma^2) eps + sigma noise

The formulas are those of `reference.ddim_sample`. A loop of separate operations makes some 3 L launches a step for very
little work; the kernel makes one in all, and activations never go to memory that is not cached. Rows do not see each
other: a row has the same result, to the bit, in whatever batch it comes.

Arithmetic: latents and their update are float32. The matrices may be float32, float16 or bfloat16; latent, condition
and activations are rounded to their type before each product, and products are summed in float32. Only the torch form
takes float64, and then everything must be float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels import denoise_triton, runtime
from avs_dist.kernels.reference import DDIMSteps, DenoiserWeights, skip_pairs

OP = "ddim_sample"
Prediction = Literal["eps", "v", "x0"]
MAX_WIDTH = denoise_triton.MAX_WIDTH


class PackedDenoiser(NamedTuple):
    """Weights and the zero-padded copies that the kernel reads; made by `pack`, good until the weights change."""

    weights: DenoiserWeights
    matrices_LHH: Tensor
    bias_RH: Tensor


def pack(weights: DenoiserWeights) -> PackedDenoiser:
    """Copy the weights as the kernel reads them: a handful of small copies, worth keeping when sampling repeatedly.

    Raises:
        ValueError: shapes, types or devices of the weights do not fit together; a layer is wider than MAX_WIDTH; the
            slope is not a Python number.
    """
    _check_weights(weights)
    _check_gradient(*weights.matrices, *weights.biases, weights.step_SH)
    return PackedDenoiser(weights, *denoise_triton.flatten(weights))


def ddim_sample(
    noise_BD: Tensor,
    condition_BE: Tensor,
    weights: DenoiserWeights | PackedDenoiser,
    steps: DDIMSteps,
    *,
    prediction: Prediction = "eps",
    eta: float = 0.0,
    step_noise_SBD: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Latents [B,D] denoised from `noise_BD` under the condition (DDIM, eq. 12 and 16); inference only.

    Conventions are those of diffusers' DDIMScheduler: `clip` bounds the predicted x0, and eps is not recomputed from
    the bounded value (its `use_clipped_model_output=False`).

    Args:
        noise_BD: float32, any strides: where the noisiest step starts.
        condition_BE: float32, float16 or bfloat16, any strides.
        weights: widths up to MAX_WIDTH; packed ones spare the packing at each call. `step_SH` has the steps in the
            order of `steps`.
        steps: float32.
        prediction: what the denoiser predicts.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        step_noise_SBD: standard normal float32, one tensor a step; needed when eta > 0, not used otherwise.
        clip: bound of the predicted x0, or None.

    Raises:
        ValueError: shapes, types or devices do not fit, a setting is out of range or not a Python number (a tensor
            would have to be waited for), or a gradient is asked for.
    """
    flat: list[Tensor] = []
    if isinstance(weights, PackedDenoiser):
        weights, *flat = weights
    else:
        _check_weights(weights)
    _check_inputs(noise_BD, condition_BE, weights, steps)
    step_noise_SBD = _check_settings(noise_BD, steps, prediction, eta, step_noise_SBD, clip)
    tensors = (noise_BD, condition_BE, *weights.matrices, *weights.biases, weights.step_SH, *steps)
    _check_gradient(*tensors, *([] if step_noise_SBD is None else [step_noise_SBD]))
    run = torch.ops.avs_dist.ddim_sample if torch.compiler.is_compiling() else _run
    return run(
        noise_BD,
        condition_BE,
        list(weights.matrices),
        list(weights.biases),
        weights.step_SH,
        flat,
        *steps,
        step_noise_SBD,
        weights.skips,
        weights.slope,
        prediction,
        eta,
        clip,
    )


def _check_weights(weights: DenoiserWeights) -> None:
    matrices, biases, step_SH = weights.matrices, weights.biases, weights.step_SH
    if not matrices or len(matrices) != len(biases):
        raise ValueError(f"{OP}: needs as many biases as matrices, got {len(biases)} and {len(matrices)}")
    _check_number("slope", weights.slope)
    device, dtype = matrices[0].device, matrices[0].dtype
    any_dtype = (*runtime.FLOATS, torch.float64)
    runtime.check(OP, "matrices[0]", matrices[0], (None, None), any_dtype, device)
    for layer, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        inputs = matrices[layer - 1].shape[0] if layer else matrix.shape[1]
        runtime.check(OP, f"matrices[{layer}]", matrix, (None, inputs), (dtype,), device)
        runtime.check(OP, f"biases[{layer}]", bias, (matrix.shape[0],), any_dtype, device)
        if not 1 <= max(matrix.shape) <= MAX_WIDTH or 0 in matrix.shape:
            raise ValueError(f"{OP}: layers have 1 to {MAX_WIDTH} inputs and outputs, got {list(matrix.shape)}")
    runtime.check(OP, "step_SH", step_SH, (None, matrices[0].shape[0]), any_dtype, device)
    for giver, taker in skip_pairs(len(matrices)) if weights.skips else ():
        given, taken = matrices[giver].shape[0], matrices[taker].shape[1]
        if given != taken:
            raise ValueError(
                f"{OP}: skips add the output of layer {giver} to the input of layer {taker}: widths {given} and {taken}"
            )


def _check_inputs(noise_BD: Tensor, condition_BE: Tensor, weights: DenoiserWeights, steps: DDIMSteps) -> None:
    device, dtype = noise_BD.device, weights.matrices[0].dtype
    latent, inputs, num_steps = weights.matrices[-1].shape[0], weights.matrices[0].shape[1], len(weights.step_SH)
    exact = (torch.float64,) if dtype == torch.float64 else (torch.float32,)
    runtime.check(OP, "noise_BD", noise_BD, (None, latent), exact, device)
    some = exact if dtype == torch.float64 else runtime.FLOATS
    runtime.check(OP, "condition_BE", condition_BE, (len(noise_BD), inputs - latent), some, device)
    runtime.check(OP, "matrices[0]", weights.matrices[0], (None, None), (dtype,), device)
    if num_steps == 0:
        raise ValueError(f"{OP}: step_SH must have at least one step, got {list(weights.step_SH.shape)}")
    for name, alpha_S in steps._asdict().items():
        runtime.check(OP, name, alpha_S, (num_steps,), exact, device)


def _check_settings(
    noise_BD: Tensor,
    steps: DDIMSteps,
    prediction: str,
    eta: float,
    step_noise_SBD: Tensor | None,
    clip: float | None,
) -> Tensor | None:
    """The noise of the steps if it is used."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"{OP}: prediction must be one of {', '.join(get_args(Prediction))}, got '{prediction}'")
    _check_number("eta", eta)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"{OP}: eta must be between 0 and 1, got {eta}")
    if clip is not None:
        _check_number("clip", clip)
        if not clip > 0.0:
            raise ValueError(f"{OP}: clip must be positive or None, got {clip}")
    if eta == 0.0:
        return None
    if step_noise_SBD is None:
        raise ValueError(f"{OP}: eta = {eta} needs step_noise_SBD, got None")
    shape = (len(steps.alpha_S), *noise_BD.shape)
    runtime.check(OP, "step_noise_SBD", step_noise_SBD, shape, (noise_BD.dtype,), noise_BD.device)
    return step_noise_SBD


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise ValueError(f"{OP}: {name} must be a Python number, got {type(value).__name__}")


def _check_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{OP}: has no gradient, got an input that requires one; sample under torch.no_grad(), and train with the "
            "plain module"
        )


def _run(
    noise_BD: Tensor,
    condition_BE: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor],
    step_SH: Tensor,
    flat: list[Tensor],
    alpha_S: Tensor,
    alpha_next_S: Tensor,
    step_noise_SBD: Tensor | None,
    skips: bool,
    slope: float,
    prediction: str,
    eta: float,
    clip: float | None,
) -> Tensor:
    weights = DenoiserWeights(tuple(matrices), tuple(biases), step_SH, skips, slope)
    steps = DDIMSteps(alpha_S, alpha_next_S)
    settings = (weights, steps, prediction, eta, step_noise_SBD, clip)
    # never measured to lose; but float64 is for the torch form alone
    if matrices[0].dtype != torch.float64 and runtime.use_triton(OP, noise_BD):
        return denoise_triton.sample(noise_BD, condition_BE, flat or denoise_triton.flatten(weights), *settings)
    with runtime.no_autocast(noise_BD):
        return _torch_form(noise_BD, condition_BE, *settings)


# torch.compile does not look into it
_op = torch.library.custom_op("avs_dist::ddim_sample", _run, mutates_args=())


@_op.register_fake
def _(noise_BD: Tensor, *others: object) -> Tensor:
    return torch.empty_like(noise_BD, memory_format=torch.contiguous_format)


def _torch_form(
    noise_BD: Tensor,
    condition_BE: Tensor,
    weights: DenoiserWeights,
    steps: DDIMSteps,
    prediction: str,
    eta: float,
    step_noise_SBD: Tensor | None,
    clip: float | None,
) -> Tensor:
    """The plain loop; the layers compute in the type of the matrices, under autocast too."""
    dtype = weights.matrices[0].dtype
    weights = weights._replace(biases=tuple(b.to(dtype) for b in weights.biases), step_SH=weights.step_SH.to(dtype))
    condition_BE = condition_BE.to(dtype)
    z_BD = noise_BD
    for step, (a, a_next) in enumerate(zip(*steps, strict=True)):
        output_BD = _denoise(torch.cat([z_BD.to(dtype), condition_BE], 1), step, weights).to(z_BD.dtype)
        signal, spread = a.sqrt(), (1 - a).sqrt()
        if prediction == "eps":
            x0_BD, eps_BD = (z_BD - spread * output_BD) / signal, output_BD
        elif prediction == "v":
            x0_BD, eps_BD = signal * z_BD - spread * output_BD, signal * output_BD + spread * z_BD
        else:
            x0_BD, eps_BD = output_BD, (z_BD - signal * output_BD) / spread
        if clip is not None:
            x0_BD = x0_BD.clamp(-clip, clip)
        z_BD = a_next.sqrt() * x0_BD
        if step_noise_SBD is None:
            z_BD = z_BD + (1 - a_next).sqrt() * eps_BD
        else:
            # 1 - a' - sigma^2 as a sum of positive terms, which no rounding makes negative
            share = a * (1 - a_next) / (a_next * (1 - a))
            sigma = eta * ((1 - a_next) * (1 - share)).sqrt()
            direction = ((1 - a_next) * (1 - eta**2 + eta**2 * share)).sqrt()
            z_BD = z_BD + direction * eps_BD + sigma * step_noise_SBD[step]
    return z_BD


def _denoise(value: Tensor, step: int, weights: DenoiserWeights) -> Tensor:
    """Output of the denoiser for latent and condition side by side."""
    givers = {taker: giver for giver, taker in skip_pairs(len(weights.matrices))} if weights.skips else {}
    kept: dict[int, Tensor] = {}
    for layer, (matrix, bias) in enumerate(zip(weights.matrices, weights.biases, strict=True)):
        if layer in givers:
            value = value + kept.pop(givers[layer])
        value = F.linear(value, matrix, bias)
        if layer == 0:
            value = value + weights.step_SH[step]
        if layer < len(weights.matrices) - 1:
            value = F.leaky_relu(value, weights.slope)
        if layer in givers.values():
            kept[layer] = value
    return value

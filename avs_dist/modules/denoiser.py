"""The denoiser of latent diffusion (eps_theta) and its DDIM sampler.

Paper: contrastive latent diffusion for audio-visual segmentation, section III-A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.kernels.denoise import MAX_WIDTH, DDIMSteps, DenoiserWeights, Prediction, ddim_sample
from avs_dist.kernels.reference import skip_pairs
from avs_dist.modules.noise_schedule import Kind, NoiseSchedule, Spacing, check_prediction, visited_levels

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # model(z_BD, condition_BD, step_B) -> [B,D]
STEP_FEATURES = 64
SLOPE = 0.01


@dataclass(frozen=True)
class DDIMPlan:
    """What `Denoiser` needs to sample by itself; made by `DDIMSampler`."""

    timesteps_S: Tensor  # int64, the noisiest first
    steps: DDIMSteps  # in the type of the latents, as the noise
    prediction: Prediction
    eta: float
    clip: float | None
    step_noise_SBD: Tensor | None


class Denoiser(nn.Module):
    """eps_theta: fully connected layers with LeakyReLU; all the formulas are those of `DenoiserWeights`.

    The input is z_k beside c. The paper does not say how it learns of k: here sines and cosines of k go through two
    small layers, and the result is added to what the first layer puts out, before its activation.

    The layers are parameters of this module and not of sub-modules, because the sampling kernel uses them directly and
    ZeRO-3 gathers a parameter only for the forward of the module that owns it.

    Args:
        dim: D, numbers in a latent.
        condition_dim: E, numbers in a condition; 0 = unconditional.
        widths: outputs of all layers but the last (the paper has eight layers).
        skips: add the output of layer j to the input of layer L-1-j, from 0 (ours; the paper says the first four layers
            are an encoder and the last four a decoder).

    Raises:
        ValueError: layers wider than the sampling kernel takes, or widths that do not fit the skips.
    """

    weight_0: nn.Parameter  # and weight_1, ...; bias_0, ...

    def __init__(self, dim: int, condition_dim: int, widths: tuple[int, ...], skips: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.skips = skips
        self.num_layers = len(widths) + 1
        _check_widths(dim, condition_dim, tuple(widths), skips)
        for layer, (inputs, outputs) in enumerate(itertools.pairwise((dim + condition_dim, *widths, dim))):
            linear = nn.Linear(inputs, outputs)
            setattr(self, f"weight_{layer}", linear.weight)
            setattr(self, f"bias_{layer}", linear.bias)
        self.step_embedding = nn.Sequential(
            nn.Linear(STEP_FEATURES, STEP_FEATURES),
            nn.LeakyReLU(SLOPE),
            nn.Linear(STEP_FEATURES, (*widths, dim)[0]),
        )

    def forward(self, z_BD: Tensor, condition_BE: Tensor, steps: Tensor | DDIMPlan) -> Tensor:
        """Output of the denoiser; or with a plan, latents sampled from z, without gradient.

        Sampling is a mode and not a method, because ZeRO-3 gathers parameters at __call__.

        Args:
            z_BD: noisy latents, in float32 or float64 whatever the weights are.
            condition_BE: in any precision; [B,0] for none.
            steps: level of each row [B] (int64), or the plan.

        Returns:
            [B,D] in the type of z.
        """
        if isinstance(steps, DDIMPlan):
            return self._sample(z_BD, condition_BE, steps)
        weights = self._weights(steps)
        dtype = self.weight_0.dtype
        givers = {taker: giver for giver, taker in skip_pairs(self.num_layers)} if self.skips else {}
        outputs: list[Tensor] = []
        value = torch.cat([z_BD.to(dtype), condition_BE.to(dtype)], 1)
        for layer, (matrix, bias) in enumerate(zip(weights.matrices, weights.biases, strict=True)):
            if layer in givers:
                value = value + outputs[givers[layer]]
            value = F.linear(value, matrix, bias)
            if layer == 0:
                value = value + weights.step_SH
            if layer < self.num_layers - 1:
                value = F.leaky_relu(value, SLOPE)
            outputs.append(value)
        return value.to(z_BD.dtype)

    def _sample(self, noise_BD: Tensor, condition_BE: Tensor, plan: DDIMPlan) -> Tensor:
        return ddim_sample(
            noise_BD,
            condition_BE.to(self.weight_0.dtype),  # as the layers do
            self._weights(plan.timesteps_S),
            plan.steps,
            prediction=plan.prediction,
            eta=plan.eta,
            step_noise_SBD=plan.step_noise_SBD,
            clip=plan.clip,
        )

    @property
    def latent_dtype(self) -> torch.dtype:
        """Type in which latents are sampled."""
        return torch.promote_types(self.weight_0.dtype, torch.float32)

    def _weights(self, steps_S: Tensor) -> DenoiserWeights:
        """The layers, with an embedding for each of these steps."""
        features = step_features(steps_S.to(self.weight_0.device), STEP_FEATURES)
        return DenoiserWeights(
            tuple(self.get_parameter(f"weight_{layer}") for layer in range(self.num_layers)),
            tuple(self.get_parameter(f"bias_{layer}") for layer in range(self.num_layers)),
            self.step_embedding(features.to(self.weight_0.dtype)),
            self.skips,
            SLOPE,
        )


def step_features(steps_S: Tensor, count: int) -> Tensor:
    """Sines and cosines of k times frequencies from 1 down to 1e-4 (Ho et al. 2020, after Vaswani et al. 2017).

    Returns:
        float64 [S,count], the sines first.
    """
    half = count // 2
    rate_F = 1e-4 ** (torch.arange(half, device=steps_S.device, dtype=torch.float64) / (half - 1))
    angle_SF = steps_S[:, None] * rate_F
    return torch.cat([angle_SF.sin(), angle_SF.cos()], 1)


def _check_widths(dim: int, condition_dim: int, widths: tuple[int, ...], skips: bool) -> None:
    key = f"model.diffusion.widths={widths}"
    if any(not 1 <= width <= MAX_WIDTH for width in widths):
        raise ValueError(f"{key}: each must be from 1 to {MAX_WIDTH}")
    if dim + condition_dim > MAX_WIDTH:
        raise ValueError(
            f"model.diffusion.dim={dim}: latent and condition together have {dim + condition_dim} numbers, at most "
            f"{MAX_WIDTH} are expected"
        )
    for giver, taker in skip_pairs(len(widths) + 1) if skips else ():
        given, taken = widths[giver], widths[taker - 1]
        if given != taken:
            raise ValueError(
                f"{key}: with model.diffusion.skips numbers {giver} and {taker - 1} (from 0) must be equal, "
                f"got {given} and {taken}"
            )


class DDIMSampler:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16): latents from noise in a few steps.

    Conventions are those of diffusers' DDIMScheduler: `clip` bounds the estimated latent and leaves eps as it was, and
    the last step goes to a latent without noise. One thing differs: each step goes to the level of the next step. That
    of diffusers goes to k - K // num_steps, which is another level where "trailing" steps do not divide K; the denoiser
    is then told of less noise than there is (at K = 20 and 11 steps that moves means by a quarter).

    Args:
        num_train_steps: K, levels of the noise in training.
        num_steps: of a sample, up to K.
        schedule: see `NoiseSchedule`, as are the betas.
        prediction: what the model puts out.
        spacing: see `visited_levels`.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        clip: bound of the estimated latent, or None.

    Attributes:
        noise_schedule: the levels.
        alphas_cumprod: its cumulative products of 1 - beta, float64 [K].
        timesteps: visited levels, int64 [num_steps], the noisiest first.

    Raises:
        ValueError: a setting out of its range; more steps than levels.
    """

    def __init__(
        self,
        num_train_steps: int,
        num_steps: int,
        schedule: Kind = "cosine",
        *,
        prediction: Prediction = "eps",
        spacing: Spacing = "leading",
        eta: float = 0.0,
        clip: float | None = None,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        check_prediction(prediction)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"model.diffusion.eta={eta}: must be from 0 to 1")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"model.diffusion.clip={clip}: must be positive or none")
        self.noise_schedule = NoiseSchedule(num_train_steps, schedule, beta_start, beta_end)
        self.alphas_cumprod = self.noise_schedule.alphas_cumprod
        self.timesteps = visited_levels(num_train_steps, num_steps, spacing)
        self.prediction = prediction
        self.eta = eta
        self.clip = clip
        alpha_S = self.alphas_cumprod[self.timesteps]
        self._steps = DDIMSteps(alpha_S, torch.cat([alpha_S[1:], alpha_S.new_ones(1)]))

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser | Model,
        condition_BD: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise_BD: Tensor | None = None,
        step_noise_SBD: Tensor | None = None,
    ) -> Tensor:
        """One latent for each condition, without gradient; repeat the conditions for several.

        Args:
            model: a `Denoiser`, which samples in one launch of a kernel, or any model(z_BD, condition_BD, step_B).
            condition_BD: [B, any]; [B,0] for none.
            generator: of the noise that is not given.
            noise_BD: standard normal, where the noisiest step starts. It says how wide a latent is; without it a
                Denoiser knows, and latents of any other model are as wide as the condition (as in the paper).
            step_noise_SBD: standard normal, noise that each step adds where eta > 0 (else it is not used).

        Returns:
            [B,D]; of a Denoiser float64 if its weights are, of any other model float64 if noise or condition is; else
            float32.

        Raises:
            ValueError: shapes do not fit, or nothing says how wide a latent is.
        """
        dtype, dim = _latents_of(model, condition_BD, noise_BD)
        shape = (len(condition_BD), dim)

        def draw() -> Tensor:
            device = condition_BD.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return noise.to(condition_BD.device)

        noise_BD = draw() if noise_BD is None else noise_BD.to(condition_BD.device, dtype)
        _check_shape("noise_BD", noise_BD, shape)
        if self.eta == 0.0:
            step_noise_SBD = None
        else:
            if step_noise_SBD is None:
                step_noise_SBD = torch.stack([draw() for _ in self.timesteps])
            _check_shape("step_noise_SBD", step_noise_SBD, (len(self.timesteps), *shape))
            step_noise_SBD = step_noise_SBD.to(condition_BD.device, dtype)
        if isinstance(model, Denoiser):
            steps = DDIMSteps(*(alpha_S.to(noise_BD.device, dtype) for alpha_S in self._steps))
            plan = DDIMPlan(self.timesteps, steps, self.prediction, self.eta, self.clip, step_noise_SBD)
            return model(noise_BD, condition_BD, plan)
        return self._loop(model, noise_BD, condition_BD, step_noise_SBD)

    def _loop(self, model: Model, z_BD: Tensor, condition_BD: Tensor, step_noise_SBD: Tensor | None) -> Tensor:
        """The steps of any model; `Denoiser` leaves them to the kernel."""
        alphas, alphas_next = (alpha_S.tolist() for alpha_S in self._steps)
        for step, (k, a, a_next) in enumerate(zip(self.timesteps.tolist(), alphas, alphas_next, strict=True)):
            k_B = torch.full((len(z_BD),), k, device=z_BD.device)
            output_BD = model(z_BD, condition_BD, k_B).to(z_BD.dtype)
            x0_BD, eps_BD = self.noise_schedule.estimates(z_BD, output_BD, k_B, self.prediction)
            if self.clip is not None:
                x0_BD = x0_BD.clamp(-self.clip, self.clip)
            # sigma^2 and 1 - a' - sigma^2 as products of positive terms, which no rounding makes negative
            share = (1.0 - a / a_next) / (1.0 - a)
            sigma = self.eta * math.sqrt((1.0 - a_next) * share)
            direction = math.sqrt((1.0 - a_next) * (1.0 - self.eta**2 * share))
            z_BD = math.sqrt(a_next) * x0_BD + direction * eps_BD
            if step_noise_SBD is not None:
                z_BD = z_BD + sigma * step_noise_SBD[step]
        return z_BD


def _latents_of(model: Denoiser | Model, condition_BD: Tensor, noise_BD: Tensor | None) -> tuple[torch.dtype, int]:
    """Type of the latents and how wide they are."""
    if isinstance(model, Denoiser):
        return model.latent_dtype, model.dim
    width = (condition_BD if noise_BD is None else noise_BD).shape[-1]
    if width == 0:
        raise ValueError("DDIM sampling: neither noise nor condition says how wide a latent is; give noise_BD")
    dtype = torch.promote_types(condition_BD.dtype, torch.float32)
    return dtype if noise_BD is None else torch.promote_types(dtype, noise_BD.dtype), width


def _check_shape(name: str, noise: Tensor, shape: tuple[int, ...]) -> None:
    if noise.shape != shape:
        raise ValueError(f"DDIM sampling: {name} must be {list(shape)}, got {list(noise.shape)}")

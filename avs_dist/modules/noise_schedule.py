"""Noise of a diffusion over K levels, and the ways between a latent, its noise and what a denoiser predicts.

    z_k = sqrt(a_k) z_0 + sqrt(1 - a_k) eps          (contrastive latent diffusion, eq. 4)

a_k, the cumulative product of 1 - beta, falls with k: level 0 has the least noise, level K - 1 the most.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from avs_dist.kernels.denoise import Prediction

Kind = Literal["cosine", "linear"]
Spacing = Literal["leading", "trailing"]
MAX_BETA = 0.999  # no level is pure noise, so that the latent can always be estimated
COSINE_OFFSET = 0.008


class NoiseSchedule:
    """The K levels of noise, and formulas that hold at each; all of them have a gradient.

    Args:
        num_levels: K.
        kind: "cosine" (Nichol and Dhariwal 2021, eq. 17; betas up to 0.999) or "linear" betas (Ho et al. 2020).
        beta_start: first beta of "linear".
        beta_end: its last; for few levels see `linear_betas`.

    Attributes:
        alphas_cumprod: a_k, float64 [K] on the CPU.

    Raises:
        ValueError: unknown kind, no level, or betas that are not 0 < beta_start <= beta_end < 1.
    """

    def __init__(
        self, num_levels: int, kind: Kind = "cosine", beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        if num_levels < 1:
            raise ValueError(f"model.diffusion.train_steps={num_levels}: must be at least 1")
        if kind == "cosine":
            betas_K = _cosine_betas(num_levels)
        elif kind == "linear":
            if not 0.0 < beta_start <= beta_end < 1.0:
                raise ValueError(f"linear schedule needs 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")
            betas_K = torch.linspace(beta_start, beta_end, num_levels, dtype=torch.float64)
        else:
            raise ValueError(f"model.diffusion.schedule={kind}: must be one of {', '.join(get_args(Kind))}")
        self.alphas_cumprod = (1.0 - betas_K).cumprod(0)

    def add_noise(self, z0_BD: Tensor, eps_BD: Tensor, k_B: Tensor) -> Tensor:
        """z_k [B,D] (eq. 4).

        Args:
            z0_BD: latents, float32 or float64.
            eps_BD: standard normal noise.
            k_B: int64, level of each row, from 0 to K - 1.
        """
        signal_B1, spread_B1 = self._shares(k_B, z0_BD)
        return signal_B1 * z0_BD + spread_B1 * eps_BD

    def target(self, z0_BD: Tensor, eps_BD: Tensor, k_B: Tensor, prediction: Prediction) -> Tensor:
        """What a denoiser should put out for z_k: eps, z_0, or v = sqrt(a) eps - sqrt(1-a) z_0 (Salimans and Ho 2022).

        Raises:
            ValueError: unknown prediction.
        """
        check_prediction(prediction)
        if prediction == "eps":
            return eps_BD
        if prediction == "x0":
            return z0_BD
        signal_B1, spread_B1 = self._shares(k_B, z0_BD)
        return signal_B1 * eps_BD - spread_B1 * z0_BD

    def estimates(self, zk_BD: Tensor, output_BD: Tensor, k_B: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """z_0 and eps that z_k and the output of a denoiser imply.

        Raises:
            ValueError: unknown prediction.
        """
        check_prediction(prediction)
        signal_B1, spread_B1 = self._shares(k_B, zk_BD)
        if prediction == "eps":
            return (zk_BD - spread_B1 * output_BD) / signal_B1, output_BD
        if prediction == "x0":
            return output_BD, (zk_BD - signal_B1 * output_BD) / spread_B1
        return signal_B1 * zk_BD - spread_B1 * output_BD, signal_B1 * output_BD + spread_B1 * zk_BD

    def estimate_x0(self, zk_BD: Tensor, output_BD: Tensor, k_B: Tensor, prediction: Prediction) -> Tensor:
        """z_0 that z_k and the output of a denoiser imply: the paper's one-step denoising in training."""
        return self.estimates(zk_BD, output_BD, k_B, prediction)[0]

    def _shares(self, k_B: Tensor, like_BD: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a) of each row, rounded once."""
        a_B1 = self.alphas_cumprod.to(k_B.device)[k_B].unsqueeze(-1)
        return a_B1.sqrt().to(like_BD), (1.0 - a_B1).sqrt().to(like_BD)


def check_prediction(prediction: str) -> None:
    """Refuse an unknown kind of prediction.

    Raises:
        ValueError: naming those there are.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"model.diffusion.prediction={prediction}: must be one of {', '.join(get_args(Prediction))}")


def linear_betas(num_levels: int) -> tuple[float, float]:
    """First and last beta of a linear schedule that reaches noise in K levels.

    The usual 1e-4 and 0.02 are meant for 1000 levels; with 20 levels a_K would still be 0.82. Both are scaled by
    1000 / K, as in the public code of Nichol and Dhariwal 2021, and here capped at 0.999, which is met at K = 20.
    """
    scale = 1000.0 / num_levels
    return min(scale * 1e-4, MAX_BETA), min(scale * 0.02, MAX_BETA)


def visited_levels(num_levels: int, num_steps: int, spacing: Spacing) -> Tensor:
    """Levels that a sampler of fewer steps visits: int64 [num_steps], the noisiest first; those of diffusers.

    Args:
        num_levels: K.
        num_steps: from 1 to K.
        spacing: "leading": multiples of K // num_steps from level 0 on; "trailing": from level K - 1 down by
            K / num_steps, rounded.

    Raises:
        ValueError: more steps than levels, no step, or unknown spacing.
    """
    if not 1 <= num_steps <= num_levels:
        raise ValueError(
            f"model.diffusion.steps={num_steps}: must be from 1 to model.diffusion.train_steps={num_levels}, "
            "the levels of noise that a denoiser knows"
        )
    if spacing == "leading":
        return torch.arange(num_steps).flip(0) * (num_levels // num_steps)
    if spacing != "trailing":
        raise ValueError(f"model.diffusion.spacing={spacing}: must be one of {', '.join(get_args(Spacing))}")
    # numpy's sums and its rounding to even decide ties as diffusers does; for some sizes rounding adds a step below 0
    counts = np.arange(num_levels, 0, -num_levels / num_steps)[:num_steps]
    return torch.from_numpy(counts.round().astype(np.int64) - 1)


def _cosine_betas(num_levels: int) -> Tensor:
    def alpha_bar(share: float) -> float:
        return math.cos((share + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * math.pi / 2) ** 2

    levels = [alpha_bar(k / num_levels) for k in range(num_levels + 1)]
    betas = [min(1.0 - levels[k + 1] / levels[k], MAX_BETA) for k in range(num_levels)]
    return torch.tensor(betas, dtype=torch.float64)

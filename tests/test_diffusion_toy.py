"""Denoiser, noise schedule and DDIM sampler together learn a distribution that is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from avs_dist.modules.denoiser import DDIMSampler, Denoiser

LEVELS, STEPS, DRAWS = 100, 50, 8000
# condition -> weight, mean and standard deviation of each component of a mixture over one number
MIXTURES = {0: ((0.5, -1.2, 0.3), (0.5, 1.0, 0.4)), 1: ((0.2, -1.0, 0.35), (0.8, 1.2, 0.3))}


def draw(classes_B: Tensor, generator: torch.Generator) -> Tensor:
    """A latent [B,1] of the mixture of each condition."""
    uniform_B, normal_B = (
        torch.rand(len(classes_B), generator=generator),
        torch.randn(len(classes_B), generator=generator),
    )
    table = torch.tensor([MIXTURES[c] for c in (0, 1)])  # condition, component, number
    component_B = (uniform_B > table[classes_B, 0, 0]).long()
    _, mean_B, std_B = table[classes_B, component_B].unbind(1)
    return (mean_B + std_B * normal_B)[:, None]


def moments_below_and_above_zero(mixture: tuple[tuple[float, float, float], ...]) -> dict[str, float]:
    """Probability of each side of 0, and mean and standard deviation there: moments of truncated normals."""
    sides = {}
    for name, sign in (("below", -1.0), ("above", 1.0)):
        mass = first = second = 0.0
        for weight, mean, std in mixture:
            m = sign * mean  # the side is now z > 0
            p = 0.5 * math.erfc(-m / std / math.sqrt(2))
            density = math.exp(-0.5 * (m / std) ** 2) / math.sqrt(2 * math.pi)
            mass += weight * p
            first += weight * (m * p + std * density)
            second += weight * ((m * m + std * std) * p + m * std * density)
        mean = first / mass
        sides |= {f"weight {name}": mass, f"mean {name}": sign * mean}
        sides |= {f"std {name}": math.sqrt(second / mass - mean**2)}
    return sides


def measured(z_B: Tensor) -> dict[str, float]:
    sides = {}
    for name, part in (("below", z_B[z_B < 0]), ("above", z_B[z_B >= 0])):
        sides |= {f"weight {name}": len(part) / len(z_B), f"mean {name}": part.mean().item()}
        sides |= {f"std {name}": part.std().item()}
    return sides


def train(sampler: DDIMSampler, optimiser_steps: int = 800) -> Denoiser:
    generator = torch.Generator().manual_seed(1)
    denoiser = Denoiser(1, 2, (48, 48, 48))
    optimiser = torch.optim.Adam(denoiser.parameters(), 5e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, optimiser_steps)
    noise = sampler.noise_schedule
    for _ in range(optimiser_steps):
        classes_B = torch.randint(0, 2, (512,), generator=generator)
        k_B = torch.randint(0, LEVELS, (512,), generator=generator)
        z0_BD = draw(classes_B, generator)
        eps_BD = torch.randn(z0_BD.shape, generator=generator)
        output_BD = denoiser(noise.add_noise(z0_BD, eps_BD, k_B), F.one_hot(classes_B, 2).float(), k_B)
        loss = F.mse_loss(output_BD, noise.target(z0_BD, eps_BD, k_B, sampler.prediction))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return denoiser


@pytest.mark.parametrize(
    ("prediction", "spacing", "eta"), [("eps", "leading", 0.5), ("v", "trailing", 1.0), ("x0", "trailing", 0.0)]
)
def test_conditional_mixture_is_learnt_and_sampled(prediction, spacing, eta):
    sampler = DDIMSampler(LEVELS, STEPS, prediction=prediction, spacing=spacing, eta=eta)
    denoiser = train(sampler)
    for name, mixture in MIXTURES.items():
        condition_BC = F.one_hot(torch.full((DRAWS,), name), 2).float()
        z_BD = sampler.sample(denoiser, condition_BC, generator=torch.Generator().manual_seed(5))
        got, want = measured(z_BD[:, 0]), moments_below_and_above_zero(mixture)
        for key, value in want.items():
            tolerance = 0.05 if key.startswith("weight") else 0.08
            assert got[key] == pytest.approx(value, abs=tolerance), (name, key)

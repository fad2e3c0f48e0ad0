"""The Barber-Agakov bound against the true mutual information of correlated Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from avs_dist.gaussian import Gaussian
from avs_dist.losses.information import barber_agakov

COUNT, L = 500, 3
CORRELATIONS = torch.tensor([0.3, -0.7, 0.9], dtype=torch.float64)  # of each dimension of source and target
INFORMATION = -0.5 * (1 - CORRELATIONS.square()).log().sum().item()
ENTROPY = 0.5 * L * math.log(2 * math.pi * math.e)  # of a standard normal target


def correlated() -> tuple[Tensor, Tensor]:
    """Source and target [COUNT,L] whose sample means, variances and correlations are exactly those wanted."""
    white = torch.randn(COUNT, 2 * L, dtype=torch.float64)
    white = white - white.mean(0)
    white = torch.linalg.qr(white)[0] * math.sqrt(COUNT)
    source, rest = white[:, :L], white[:, L:]
    return source, CORRELATIONS * source + (1 - CORRELATIONS.square()).sqrt() * rest


def head(source: Tensor, slope: Tensor, variance: Tensor, offset: float = 0.0) -> Gaussian:
    return Gaussian(slope * source + offset, variance.log().expand_as(source))


def test_it_is_the_log_density_plus_the_entropy():
    predicted, target = Gaussian(torch.randn(4, L), torch.randn(4, L)), torch.randn(4, L)
    want = torch.distributions.Normal(predicted.mean, (predicted.log_var / 2).exp()).log_prob(target).sum(-1)
    torch.testing.assert_close(barber_agakov(target, predicted), want)
    torch.testing.assert_close(barber_agakov(target, predicted, entropy=1.5), want + 1.5)
    torch.testing.assert_close(barber_agakov(target, predicted, entropy=torch.arange(4.0)), want + torch.arange(4.0))


def test_the_right_head_makes_the_bound_tight():
    source, target = correlated()
    predicted = head(source, CORRELATIONS, 1 - CORRELATIONS.square())
    assert barber_agakov(target, predicted, ENTROPY).mean().item() == pytest.approx(INFORMATION, rel=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slope": 0.5 * CORRELATIONS},
        {"variance": torch.ones(L, dtype=torch.float64)},
        {"variance": 0.5 * (1 - CORRELATIONS.square())},
        {"offset": 0.2},
        {"slope": torch.zeros(L, dtype=torch.float64), "variance": torch.ones(L, dtype=torch.float64)},
    ],
)
def test_every_other_head_stays_below_the_true_information(wrong):
    source, target = correlated()
    chosen = {"slope": CORRELATIONS, "variance": 1 - CORRELATIONS.square()} | wrong
    got = barber_agakov(target, head(source, **chosen), ENTROPY).mean().item()
    # the gap is the mean KL of the true conditional from the head
    true = head(source, CORRELATIONS, 1 - CORRELATIONS.square())
    normals = [torch.distributions.Normal(g.mean, (g.log_var / 2).exp()) for g in (true, head(source, **chosen))]
    gap = torch.distributions.kl_divergence(*normals).sum(-1).mean().item()
    assert gap > 0.01
    assert got == pytest.approx(INFORMATION - gap, rel=1e-9, abs=1e-12)


def test_training_the_head_reaches_the_true_information_from_below():
    source, target = correlated()
    slope, log_var = (torch.zeros(L, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.Adam([slope, log_var], lr=0.05)
    seen = []
    for _ in range(300):
        bound = barber_agakov(target, Gaussian(slope * source, log_var.expand_as(source)), ENTROPY).mean()
        optimiser.zero_grad()
        (-bound).backward()
        optimiser.step()
        seen.append(bound.item())
    assert max(seen) <= INFORMATION + 1e-9
    assert seen[-1] == pytest.approx(INFORMATION, abs=1e-4)
    torch.testing.assert_close(log_var.exp(), 1 - CORRELATIONS.square(), atol=1e-3, rtol=0)


def test_gradients_reach_target_mean_and_variance():
    values = [torch.randn(4, L, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda t, m, v: barber_agakov(t, Gaussian(m, v)), values)

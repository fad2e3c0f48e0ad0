"""Bounds of mutual information against the truth for correlated Gaussians, and InfoNCE by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from avs_dist.gaussian import Gaussian
from avs_dist.losses.information import barber_agakov, cosine_scores, info_nce

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


def test_info_nce_by_hand():
    scores = torch.tensor([[0.5, -1.0, 0.25], [0.0, 2.0, 1.0]], dtype=torch.float64)
    got = info_nce(scores, torch.tensor([0, 2]), temperature=0.5)
    by_hand = [
        -math.log(math.exp(1.0) / (math.exp(1.0) + math.exp(-2.0) + math.exp(0.5))),
        -math.log(math.exp(2.0) / (math.exp(0.0) + math.exp(4.0) + math.exp(2.0))),
    ]
    torch.testing.assert_close(got, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-14, atol=0)


def test_info_nce_leaves_out_what_is_excluded_but_never_the_positive():
    scores = torch.randn(2, 4, dtype=torch.float64)
    excluded = torch.tensor([[True, True, False, False], [False, False, False, True]])
    got = info_nce(scores, torch.tensor([0, 3]), excluded_MN=excluded)
    want = [info_nce(scores[:1, [0, 2, 3]], torch.tensor([0])), info_nce(scores[1:], torch.tensor([3]))]
    torch.testing.assert_close(got, torch.cat(want))
    alone = info_nce(scores[:1], torch.tensor([1]), excluded_MN=torch.ones(1, 4, dtype=torch.bool))
    assert alone.item() == 0.0  # no negatives: nothing to tell apart
    with pytest.raises(ValueError, match="temperature is 0"):
        info_nce(scores, torch.tensor([0, 1]), temperature=0.0)


def test_cosine_scores_are_cosines_and_survive_zeros():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    want = torch.tensor([[float(x @ y / (x.norm() * y.norm())) for y in b] for x in a], dtype=torch.float64)
    torch.testing.assert_close(cosine_scores(a, b), want)
    zero = torch.zeros(1, 5, requires_grad=True)
    cosine_scores(zero, torch.randn(4, 5)).sum().backward()
    assert zero.grad.isfinite().all()


def test_info_nce_of_the_true_density_ratio_is_a_tight_bound_below_log_n():
    """Scores log p(y|x) / p(y) of correlated Gaussians: the bound is below the information and near it, and with
    little information far below its ceiling log N."""
    source, target = correlated()
    rho, count = CORRELATIONS, len(source)
    variance = 1 - rho.square()
    error = target[None] - rho * source[:, None]
    scores = (-0.5 * error.square() / variance - 0.5 * variance.log() + 0.5 * target[None].square()).sum(-1)
    bound = math.log(count) - info_nce(scores, torch.arange(count)).mean().item()
    assert INFORMATION - 0.15 < bound < INFORMATION + 0.02
    shuffled = math.log(count) - info_nce(scores, torch.arange(count).roll(1)).mean().item()
    assert shuffled < 0

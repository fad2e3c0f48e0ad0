"""CLUB and Cross-CPC of Uni-Code against literal loops, as if over ranks, and on Gaussians of known information."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from ranks_in_threads import Reduce, on_ranks
from torch import Tensor, nn

from avs_dist.gaussian import Gaussian
from avs_dist.losses.information import club, club_sampled, cpc

N, T, D = 5, 3, 4
DIM, BATCH = 20, 64  # of the experiment in the paper of CLUB
INFORMATION = (4.0, 6.0, 8.0)  # nats


def inputs(requires_grad: bool = True) -> list[Tensor]:
    """Mean, log-variance and target [N,T,D]."""
    return [torch.randn(N, T, D, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def literal_club(mean: Tensor, log_var: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Eq. 5 as it stands, with torch's normal distribution: every clip with every other."""
    rows = []
    for i, t in itertools.product(range(N), range(T)):
        q = torch.distributions.Normal(mean[i, t], (log_var[i, t] / 2).exp())
        others = [q.log_prob(target[j, t]).sum() for j in range(N) if counted[j, t]]
        value = q.log_prob(target[i, t]).sum() - torch.stack(others).mean() if counted[i, t] else target.new_zeros(())
        rows.append(value)
    return torch.stack(rows).view(N, T)


def gradients(function: Callable[..., Tensor], values: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((function(*values) * weight).sum(), values)


# ---- CLUB by hand


@pytest.mark.parametrize("absent", [[], [(0, 0), (3, 0), (2, 2)]])
def test_club_is_eq_5_with_all_gradients(absent):
    values, weight = inputs(), torch.randn(N, T, dtype=torch.float64)
    counted = torch.ones(N, T, dtype=torch.bool)
    for entry in absent:
        counted[entry] = False
    argument = counted if absent else None
    got = club(Gaussian(*values[:2]), values[2], counted_NT=argument)
    torch.testing.assert_close(got, literal_club(*values, counted), rtol=1e-12, atol=1e-12)
    have = gradients(lambda m, v, y: club(Gaussian(m, v), y, counted_NT=argument), values, weight)
    want = gradients(lambda m, v, y: literal_club(m, v, y, counted), values, weight)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_what_is_not_counted_has_no_part_and_a_second_without_clips_is_zero():
    values = inputs()
    counted = torch.ones(N, T, dtype=torch.bool)
    counted[1, 1] = False
    counted[:, 2] = False
    for value in values:
        value.data[~counted] = float("nan")
    got = club(Gaussian(*values[:2]), values[2], counted_NT=counted)
    assert torch.equal(got == 0, ~counted)
    for gradient in torch.autograd.grad(got.sum(), values):
        assert gradient.isfinite().all()
        assert torch.equal((gradient == 0).all(-1), ~counted)


@pytest.mark.parametrize("split", [[2, 3], [1, 4], [1, 1, 3]])
def test_club_of_several_ranks_is_that_of_one(split):
    values, weight = inputs(), torch.randn(N, T, dtype=torch.float64)
    counted = torch.rand(N, T) < 0.7

    def over_ranks(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
        parts = [each.split(split) for each in (mean, log_var, target, counted)]

        def of_rank(rank: int, reduce: Reduce) -> Tensor:
            m, v, y, c = (part[rank] for part in parts)
            return club(Gaussian(m, v), y, counted_NT=c, reduce=reduce)

        return torch.cat(on_ranks(len(split), of_rank))

    def on_one(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
        return club(Gaussian(mean, log_var), target, counted_NT=counted)

    torch.testing.assert_close(over_ranks(*values), on_one(*values), rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(over_ranks, values, weight), gradients(on_one, values, weight), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_club_of_one_clip_is_zero_and_a_large_offset_changes_nothing():
    mean, log_var, target = inputs(requires_grad=False)
    alone = club(Gaussian(mean[:1], log_var[:1]), target[:1])
    assert torch.equal(alone, torch.zeros_like(alone))
    small = Gaussian(mean.float(), log_var.float())
    want = club(small, target.float())
    got = club(Gaussian(small.mean + 1000, small.log_var), target.float() + 1000)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)  # the offset itself costs ten bits of the inputs


def test_bfloat16_targets_are_taken_in_float32():
    mean, log_var, target = (each.to(torch.bfloat16) for each in inputs(requires_grad=False))
    got = club(Gaussian(mean, log_var), target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, club(Gaussian(mean.float(), log_var.float()), target.float()), rtol=0, atol=0)


def test_sampled_club_by_hand_and_its_mean_over_all_partners_is_club():
    values = inputs()
    mean, log_var, target = values
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    want = (q.log_prob(target) - q.log_prob(target.roll(1, 0))).sum(-1)
    torch.testing.assert_close(club_sampled(Gaussian(mean, log_var), target, target.roll(1, 0)), want)
    shifts = [club_sampled(Gaussian(mean, log_var), target, target.roll(shift, 0)) for shift in range(N)]
    torch.testing.assert_close(torch.stack(shifts).mean(0), club(Gaussian(mean, log_var), target))


# ---- Gaussians of known information


def rho_of(information: float) -> float:
    return math.sqrt(1 - math.exp(-2 * information / DIM))


def draw(rho: float, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, DIM)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(*shape, DIM)


def estimates(q: Callable[[Tensor], Gaussian], rho: float) -> tuple[float, float]:
    """Both estimates, each the mean over 200 batches of 64 pairs (the batches lie along time)."""
    with torch.no_grad():
        x_NTD, y_NTD = draw(rho, BATCH, 200)
        sampled = club_sampled(q(x_NTD), y_NTD, y_NTD.roll(1, 0))
        return club(q(x_NTD), y_NTD).mean().item(), sampled.mean().item()


@pytest.mark.parametrize("information", INFORMATION)
def test_club_of_the_true_conditional_is_the_bound_in_closed_form(information):
    """The information plus KL(p(x) p(y) || p(x, y)): D rho^2 / (1 - rho^2), more than twice the information."""
    rho = rho_of(information)
    bound = DIM * rho**2 / (1 - rho**2)
    assert bound > 2 * information
    log_var = torch.tensor(math.log(1 - rho**2))
    all_others, one_other = estimates(lambda x: Gaussian(rho * x, log_var.expand_as(x)), rho)
    assert all_others == pytest.approx(bound * (1 - 1 / BATCH), rel=0.03)  # the clip itself is one of the others
    assert one_other == pytest.approx(bound, rel=0.03)


def test_club_in_the_experiment_of_its_paper_is_within_30_percent_of_the_information():
    """The network of Cheng et al. 2020: 7 hidden units, too few for 20 dimensions, which takes as much off the bound
    as the bound is above the information. Batches of 64, learning rate 0.005, the information rises in training."""

    def layers(*last: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(DIM, 7), nn.ReLU(), nn.Linear(7, DIM), *last)

    mean, log_var = layers(), layers(nn.Tanh())
    optimiser = torch.optim.Adam([*mean.parameters(), *log_var.parameters()], 0.005)
    for information in INFORMATION:
        rho = rho_of(information)
        for _ in range(1500):
            x, y = draw(rho, BATCH)
            loss = -Gaussian(mean(x), log_var(x)).log_prob(y).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        for estimate in estimates(lambda x: Gaussian(mean(x), log_var(x)), rho):
            assert estimate == pytest.approx(information, rel=0.3)


def test_info_nce_by_cpc_grows_with_the_information_below_log_of_the_batch():
    """The best critic there is, log p(y|x) / p(y) less what is the same for all y, written as a dot product."""
    bounds = []
    for information in INFORMATION:
        rho = rho_of(information)
        x, y = draw(rho, 100, BATCH)
        slope = rho / (1 - rho**2)
        prediction = torch.cat([slope * x, x.new_ones(100, BATCH, 1)], -1)
        candidates = torch.cat([y, -0.5 * rho * slope * y.square().sum(-1, keepdim=True)], -1)
        own = torch.arange(BATCH)
        losses = torch.stack([cpc(p, c, own).mean() for p, c in zip(prediction, candidates, strict=True)])
        assert losses.min() > 0  # no batch says more than log N
        bounds.append(math.log(BATCH) - losses.mean().item())
    assert bounds == sorted(bounds)
    assert bounds[0] > 0.7 * INFORMATION[0]
    assert 0.9 * math.log(BATCH) < bounds[-1] < math.log(BATCH)


# ---- Cross-CPC


def test_cpc_is_eq_6():
    prediction, candidates = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (2, N))
    positive, counted = torch.tensor([1, 4]), torch.tensor([True, True, False, True, True])
    want = []
    for i, own in enumerate(positive.tolist()):
        scores = [(prediction[i] @ candidates[j]).exp() for j in range(N) if counted[j]]
        want.append(-((prediction[i] @ candidates[own]).exp() / torch.stack(scores).sum()).log())
    got = cpc(prediction, candidates, positive, counted_N=counted)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (prediction, candidates)),
        torch.autograd.grad(torch.stack(want).sum(), (prediction, candidates)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    all_counted = cpc(prediction, candidates, positive, counted_N=torch.ones(N, dtype=torch.bool))
    torch.testing.assert_close(cpc(prediction, candidates, positive), all_counted)
    assert (all_counted > got).all()


def test_cpc_multiplies_bfloat16_in_float32():
    prediction, candidates = (torch.randn(n, 256).to(torch.bfloat16) for n in (2, N))
    got = cpc(prediction, candidates, torch.tensor([0, 1]))
    torch.testing.assert_close(got, cpc(prediction.float(), candidates.float(), torch.tensor([0, 1])), rtol=0, atol=0)

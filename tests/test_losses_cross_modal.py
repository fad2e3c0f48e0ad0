"""Losses of the baselines of Uni-Code against literal formulas, with gradients; the transport plan as if over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from ranks_in_threads import Reduce, on_ranks
from torch import Tensor

from avs_dist.losses.cross_modal import (
    adaptive_margin,
    code_matching,
    code_posterior,
    swapped_prediction,
    transport_plan,
)

N, T, L, D = 4, 3, 6, 5
FIRST, OWN = 1, 2  # the clips of this rank: two of the four, from the second on
POSITIVE = torch.arange(FIRST, FIRST + OWN)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(got: Tensor, want: Tensor, inputs: Sequence[Tensor]) -> None:
    """Values and, for a random weight of the results, gradients."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(got)
    pairs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want))
    for have, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-9, atol=1e-11)


# ---- CMCM


def test_code_posterior_is_the_mean_softmax_of_minus_the_distance():
    z, codes = leaf(N, T, D), leaf(L, D)
    valid = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    want = []
    for n in range(N):
        each = [torch.stack([-(z[n, t] - e).norm() for e in codes]).softmax(0) for t in range(T) if valid[n, t]]
        want.append(torch.stack(each).mean(0) if each else z.new_zeros(L))
    got = code_posterior(z, codes, valid)
    assert_same(got, torch.stack(want), (z, codes))
    torch.testing.assert_close(got.sum(1), valid.any(1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_finite_where_a_vector_is_a_code_itself(dtype):
    codes = 10 * torch.randn(L, 256, dtype=dtype)
    z = codes[:N].repeat(1, T).view(N, T, -1).clone().requires_grad_()
    posterior = code_posterior(z, codes, torch.ones(N, T, dtype=torch.bool))
    assert posterior.isfinite().all()
    assert torch.equal(posterior.argmax(1), torch.arange(N))
    posterior.square().sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.norm(dim=-1).max() <= 2.0  # a softmax of distances has slopes below 2


def test_posterior_of_bfloat16_vectors_is_that_in_float32():
    z, codes, valid = torch.randn(N, T, 64).bfloat16(), torch.randn(L, 64), torch.ones(N, T, dtype=torch.bool)
    assert torch.equal(code_posterior(z, codes, valid), code_posterior(z.float(), codes, valid))


def posterior(rows: int) -> Tensor:
    return torch.randn(rows, L, dtype=torch.float64).softmax(1).requires_grad_()


def test_code_matching_by_loops_with_candidates_of_all_ranks():
    own, other = posterior(OWN), posterior(N)
    want = []
    for i in range(OWN):
        scores = [own[i] @ (other[j] + 1e-10).log() + other[j] @ (own[i] + 1e-10).log() for j in range(N)]
        want.append(-(scores[FIRST + i].exp() / sum(s.exp() for s in scores)).log())
    assert_same(code_matching(own, other, POSITIVE), torch.stack(want), (own, other))


def test_the_shift_and_the_eps_of_the_public_code_change_nothing_of_note():
    a, v = posterior(N), posterior(N)
    scores = a @ (v.T + 1e-10).log() + (a + 1e-10).log() @ v.T
    exponentials = (scores + (-scores).max()).exp()
    public = -(exponentials.diag() / (exponentials.sum(1) + 1e-5)).log()
    torch.testing.assert_close(code_matching(a, v, torch.arange(N)), public, rtol=0, atol=1e-5 / N)


def test_code_matching_is_safe_for_codes_that_are_certain():
    own, other = (torch.eye(L)[:N].clone().requires_grad_() for _ in range(2))
    loss = code_matching(own, other, torch.arange(N))
    assert (loss < 1e-6).all()
    wrong = code_matching(own, other, torch.arange(N).roll(1))
    torch.testing.assert_close(wrong, torch.full((N,), -2 * math.log(1e-10)), rtol=1e-4, atol=0)
    (loss + wrong).sum().backward()
    assert own.grad.isfinite().all()
    assert other.grad.isfinite().all()


# ---- S-MiT


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_adaptive_margin_is_eq_3_in_the_margin_softmax(alpha):
    scores, want = leaf(OWN, N), []
    for i in range(OWN):
        negatives = [scores[i, j] for j in range(N) if j != FIRST + i]
        margin = alpha * (scores[i, FIRST + i] - sum(negatives) / (N - 1))
        positive = (scores[i, FIRST + i] - margin).exp()
        want.append(-(positive / (positive + sum(s.exp() for s in negatives))).log())
    assert_same(adaptive_margin(scores, POSITIVE, alpha), torch.stack(want), (scores,))


def test_the_margin_is_half_of_the_lead_and_one_clip_alone_costs_nothing():
    scores = torch.tensor([[3.0, 1.0, 1.0]])
    assert adaptive_margin(scores, torch.tensor([0])).item() == pytest.approx(math.log(1 + 2 * math.exp(-1)))
    assert adaptive_margin(torch.tensor([[5.0]]), torch.tensor([0])).item() == 0.0


# ---- CODIS


def literal_plan(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn without logarithms."""
    plan = (scores / epsilon).exp()
    plan = plan / plan.sum(1, keepdim=True)
    for _ in range(iterations):
        plan = plan / plan.sum(0) * (len(scores) / scores.shape[1])
        plan = plan / plan.sum(1, keepdim=True)
    return plan


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_transport_plan_is_sinkhorn(iterations):
    scores = leaf(N, L)
    got = transport_plan(scores, epsilon=0.3, iterations=iterations)
    torch.testing.assert_close(got, literal_plan(scores.detach(), 0.3, iterations), rtol=1e-12, atol=0)
    assert not got.requires_grad
    torch.testing.assert_close(got.sum(1), torch.ones(N, dtype=torch.float64))


def test_transport_plan_balances_the_codes_and_is_optimal():
    scores, epsilon = torch.randn(40, L, dtype=torch.float64), 0.5
    scores[:, 0] += 3  # without balance nearly all would take this code
    plan = transport_plan(scores, epsilon=epsilon, iterations=300)
    torch.testing.assert_close(plan.sum(0), torch.full((L,), 40 / L, dtype=torch.float64))
    # optimal with entropy: log plan less scores / epsilon is a number of the row and one of the code
    rest = plan.log() - scores / epsilon
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-9)


def test_rows_that_are_not_counted_take_no_share():
    scores, counted = torch.randn(8, L, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    scores[~counted] += 9.0
    got = transport_plan(scores, counted_N=counted)
    torch.testing.assert_close(got[counted], transport_plan(scores[counted]), rtol=1e-10, atol=1e-300)
    assert (got[~counted] == 0).all()


@pytest.mark.parametrize("split", [[4, 4], [1, 5, 2]])
def test_transport_plan_of_several_ranks_is_that_of_one(split):
    scores, counted = torch.randn(8, L, dtype=torch.float64), torch.rand(8) < 0.8
    parts = [each.split(split) for each in (scores, counted)]

    def of_rank(rank: int, reduce: Reduce) -> Tensor:
        return transport_plan(parts[0][rank], epsilon=0.2, counted_N=parts[1][rank], reduce=reduce)

    want = transport_plan(scores, epsilon=0.2, counted_N=counted)
    torch.testing.assert_close(torch.cat(on_ranks(len(split), of_rank)), want, rtol=1e-10, atol=1e-300)


def test_transport_plan_bears_large_scores_and_codes_out_of_reach():
    scores = 30 * torch.randn(40, L)
    scores[:, 2] = -1e4
    plan = transport_plan(scores)
    assert plan.dtype == torch.float32
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), torch.ones(40))
    assert transport_plan(scores.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_swapped_prediction_is_the_cross_entropy_of_the_plan(temperature):
    scores, plan = leaf(OWN, L), transport_plan(torch.randn(OWN, L, dtype=torch.float64), epsilon=0.5)
    want = []
    for i in range(OWN):
        exponentials = [(s / temperature).exp() for s in scores[i]]
        want.append(-sum(p * (e / sum(exponentials)).log() for p, e in zip(plan[i], exponentials, strict=True)))
    assert_same(swapped_prediction(scores, plan, temperature), torch.stack(want), (scores,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transport_plan(torch.randn(2, 2), epsilon=0.0), "epsilon is 0"),
        (lambda: swapped_prediction(torch.randn(2, 2), torch.randn(2, 2), -1.0), "temperature is -1"),
    ],
)
def test_what_must_be_positive(call: Callable[[], Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        call()

"""Divergences of latent codes against torch.distributions, closed forms and quadrature; orthogonality against loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad, quad
from torch import Tensor

from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.losses import latent

N, L = 4, 3
LN2 = math.log(2.0)
Distribution = Gaussian | Mixture


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> Gaussian:
    return Gaussian(torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype))


def scalar(mean: float, log_var: float) -> Gaussian:
    """A Gaussian of one dimension, [1]."""
    return Gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([log_var], dtype=torch.float64))


def mixture(*parameters: tuple[float, float]) -> Mixture:
    return Mixture(tuple(scalar(*each) for each in parameters))


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def density(of: Distribution) -> Callable[[float], float]:
    """Density in one dimension, by the formula of the textbook."""
    experts = of.experts if isinstance(of, Mixture) else (of,)
    pairs = [(e.mean.item(), math.exp(e.log_var.item())) for e in experts]
    return lambda x: (
        sum(math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v) for m, v in pairs) / len(pairs)
    )


def integral(function: Callable[[float], float]) -> float:
    # in pieces, so that narrow peaks are not missed
    return sum(quad(function, start, start + 2, epsabs=1e-11)[0] for start in range(-30, 30, 2))


def true_kl(a: Callable[[float], float], b: Callable[[float], float]) -> float:
    return integral(lambda x: a(x) * math.log(a(x) / b(x)) if a(x) > 1e-200 and b(x) > 0 else 0.0)


def true_js(q: Distribution, p: Distribution) -> float:
    a, b = density(q), density(p)

    def m(x: float) -> float:
        return (a(x) + b(x)) / 2

    return (true_kl(a, m) + true_kl(b, m)) / 2


def estimate(q: Distribution, p: Distribution, draws: int, *shape: int) -> Tensor:
    """js_divergence with fresh draws; the samples get `shape` before the dimensions."""
    noise = torch.randn(2, draws, *shape, dtype=torch.float64)
    choice = torch.rand(2, draws, *shape[:-1])
    return latent.js_divergence(q, p, noise[0], noise[1], choice[0], choice[1])


# ---- Kullback-Leibler


def test_gaussian_kl_equals_torch_distributions():
    q, p = gaussian(2, N, L), gaussian(2, N, L)
    normals = [torch.distributions.Normal(g.mean, (g.log_var / 2).exp()) for g in (q, p)]
    want = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(latent.kl_per_dimension(q, p), want)
    torch.testing.assert_close(latent.gaussian_kl(q, p), want.sum(-1))
    single = [Gaussian(*(t.float() for t in g)) for g in (q, p)]
    torch.testing.assert_close(latent.gaussian_kl(*single), want.sum(-1).float(), rtol=1e-5, atol=1e-6)
    values = leaves(*q, *p)
    assert torch.autograd.gradcheck(lambda *t: latent.gaussian_kl(Gaussian(*t[:2]), Gaussian(*t[2:])), values)


def test_gaussian_kl_of_nearly_equal_variances_keeps_its_precision():
    q = Gaussian(torch.zeros(1, 1), torch.full((1, 1), 1e-3))
    got = latent.gaussian_kl(q, Gaussian(torch.zeros(1, 1), torch.zeros(1, 1))).item()
    assert got == pytest.approx((1e-3) ** 2 / 4, rel=1e-3)
    assert latent.gaussian_kl(q, q).item() == 0


def test_weighted_kl_is_the_mean_over_experts_and_bounds_the_kl_of_the_mixtures():
    q = mixture((-1.0, 0.2), (1.5, -0.7), (0.3, 0.0))
    p = mixture((-0.5, 0.0), (2.5, 0.4), (0.0, 1.0))
    got = latent.weighted_kl(q, p).item()
    each = [true_kl(density(a), density(b)) for a, b in zip(q.experts, p.experts, strict=True)]
    assert got == pytest.approx(sum(each) / 3, rel=1e-8)
    assert got > true_kl(density(q), density(p)) + 0.05
    # tight where all experts are the same
    same_q, same_p = Mixture((q.experts[0],) * 3), Mixture((p.experts[1],) * 3)
    assert latent.weighted_kl(same_q, same_p).item() == pytest.approx(true_kl(density(same_q), density(same_p)))


def test_weighted_kl_needs_as_many_experts_on_both_sides():
    with pytest.raises(ValueError, match="got 2 in q and 1 in p"):
        latent.weighted_kl(mixture((0.0, 0.0), (1.0, 0.0)), mixture((0.0, 0.0)))


# ---- Jensen-Shannon

PAIRS = {
    "near": (scalar(0.0, 0.0), scalar(0.3, 0.1)),
    "shifted": (scalar(-1.0, 0.0), scalar(1.0, 0.0)),
    "narrow in wide": (scalar(0.2, -3.0), scalar(0.0, 1.0)),
    "mixtures": (mixture((-2.0, -1.0), (1.0, 0.5)), mixture((-1.0, 0.0), (2.0, -0.5))),
    "one shared expert": (mixture((-2.0, -1.0), (1.0, 0.5)), mixture((-2.0, -1.0), (4.0, 0.5))),
    "mixture and Gaussian": (mixture((-2.0, -1.0), (2.0, -1.0)), scalar(0.0, 1.5)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_js_divergence_is_unbiased(pair):
    q, p = PAIRS[pair]
    got = estimate(q, p, 2, 100_000, 1)  # 100,000 estimates of two draws each
    want = true_js(q, p)
    error = got.std().item() / math.sqrt(len(got))
    assert error < 0.01 * want
    assert got.mean().item() == pytest.approx(want, abs=4.5 * error)


def test_js_divergence_is_that_of_the_joint_distribution():
    q = Gaussian(torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[0.0, -0.4]]).double())
    p = Gaussian(torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[0.6, 0.2]]).double())
    parts = [[density(scalar(g.mean[0, d].item(), g.log_var[0, d].item())) for d in range(2)] for g in (q, p)]

    def integrand(y: float, x: float) -> float:
        a, b = (of[0](x) * of[1](y) for of in parts)
        return 0.5 * (a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)))

    want = dblquad(integrand, -8, 8, -8, 8, epsabs=1e-5)[0]
    apart = sum(true_js(*(scalar(g.mean[0, d].item(), g.log_var[0, d].item()) for g in (q, p))) for d in range(2))
    got = estimate(q, p, 200_000, 1, 2).item()
    assert got == pytest.approx(want, abs=0.003)
    assert abs(apart - want) > 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_js_divergence_of_identical_distributions_is_zero_for_any_draws(dtype):
    a, b = gaussian(N, L, dtype=dtype), gaussian(N, L, dtype=dtype)
    for q in (a, Mixture((a, b))):
        noise, choice = torch.randn(2, 8, N, L, dtype=dtype), torch.rand(2, 8, N)
        got = latent.js_divergence(q, q, noise[0], noise[1], choice[0], choice[1])
        assert got.dtype == dtype
        assert got.shape == (N,)
        assert bool((got == 0).all())


@pytest.mark.parametrize("log_ratio", [1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_js_divergence_of_disjoint_distributions_is_ln_2_with_finite_gradients(log_ratio, dtype):
    far = math.sqrt(2 * log_ratio)
    values = leaves(*(torch.full((2, 1), v, dtype=dtype) for v in (-far / 2, 0.0, far / 2, 0.0)))
    experts = Gaussian(*values[:2]), Gaussian(*values[2:])
    noise, choice = torch.randn(2, 4, 2, 1, dtype=dtype), torch.rand(2, 4, 2)
    for q, p in (experts, [Mixture((e, e)) for e in experts]):
        got = latent.js_divergence(q, p, noise[0], noise[1], choice[0], choice[1])
        torch.testing.assert_close(got, torch.full((2,), LN2, dtype=dtype))
        for gradient in torch.autograd.grad(got.sum(), values):
            assert bool((gradient.abs() < 1e-6).all())


def test_every_estimate_of_js_divergence_is_between_0_and_ln_2():
    top = torch.tensor(LN2)  # as float32
    for distance in (0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 5.0, 100.0):
        q = gaussian(10_000, L, dtype=torch.float32)
        p = Gaussian(q.mean + distance, q.log_var - min(distance, 10.0))
        got = latent.js_divergence(q, p, torch.randn(1, 10_000, L), torch.randn(1, 10_000, L))
        assert bool((got >= 0).all()), distance
        assert bool((got <= top).all()), distance
        assert distance == 0 or bool((got > 0).any())


def test_a_small_js_divergence_keeps_its_precision_in_float32():
    q, p = scalar(0.0, 0.0), scalar(2e-3, 0.0)  # about 2e-3**2 / 8, where ln 2 is 1.4 million times as large
    noise = torch.randn(2, 64, 1, dtype=torch.float64)
    want = latent.js_divergence(q, p, noise[0], noise[1]).item()
    single = [Gaussian(*(t.float() for t in g)) for g in (q, p)]
    assert want == pytest.approx(true_js(q, p), rel=0.1)
    assert latent.js_divergence(*single, *noise.float()).item() == pytest.approx(want, rel=2e-3)


def test_js_divergence_is_symmetric_and_mixtures_need_a_choice():
    q, p, noise = gaussian(N, L), gaussian(N, L), torch.randn(2, 5, N, L).double()
    there, back = latent.js_divergence(q, p, *noise), latent.js_divergence(p, q, *noise.flip(0))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="needs a choice"):
        latent.js_divergence(q, Mixture((p, p)), *noise)


def test_gradients_of_js_divergence_pass_through_samples_and_densities():
    values = leaves(*gaussian(2, L), *gaussian(2, L), *gaussian(2, L))
    noise, choice = torch.randn(2, 3, 2, L).double(), torch.rand(2, 3, 2)

    def of_gaussians(*t: Tensor) -> Tensor:
        return latent.js_divergence(Gaussian(*t[:2]), Gaussian(*t[2:]), *noise)

    def of_mixtures(*t: Tensor) -> Tensor:
        a, b, c = Gaussian(*t[:2]), Gaussian(*t[2:4]), Gaussian(*t[4:])
        return latent.js_divergence(Mixture((a, b)), Mixture((b, c)), *noise, *choice)

    assert torch.autograd.gradcheck(of_gaussians, values[:4])
    assert torch.autograd.gradcheck(of_mixtures, values)


def quadrature_js(q: Distribution, p: Distribution) -> Tensor:
    """JS in one dimension as a differentiable sum over a grid."""
    grid = torch.linspace(-25, 25, 40_001, dtype=torch.float64)
    log_q, log_p = (d.log_prob(grid[:, None]) for d in (q, p))
    log_m = torch.logaddexp(log_q, log_p) - LN2
    return torch.trapezoid(log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m), grid) / 2


@pytest.mark.parametrize("experts", [1, 2])
def test_the_gradient_of_js_divergence_is_unbiased(experts):
    """Mean over 50,000 gradients of 4 draws each, against the gradient of the exact integral."""
    parameters = ((-0.6, 0.3), (0.9, -0.5)) if experts == 1 else ((-2.0, -0.5), (1.0, 0.4), (-1.0, 0.2), (2.5, -0.3))
    copies = 50_000

    def pair(values: tuple[Tensor, ...]) -> list[Distribution]:
        each = [Gaussian(*values[i : i + 2]) for i in range(0, len(values), 2)]
        return list(each) if experts == 1 else [Mixture(tuple(each[:2])), Mixture(tuple(each[2:]))]

    exact = leaves(*(torch.tensor([v]).double() for both in parameters for v in both))
    want = torch.autograd.grad(quadrature_js(*pair(exact)), exact)
    many = leaves(*(torch.full((copies, 1), v.item()).double() for v in exact))
    noise, choice = torch.randn(2, 4, copies, 1).double(), torch.rand(2, 4, copies)
    loss = latent.js_divergence(*pair(many), noise[0], noise[1], choice[0], choice[1]).sum()
    for got, true in zip(torch.autograd.grad(loss, many), want, strict=True):
        error = got.std().item() / math.sqrt(copies)
        assert error < 0.05 * max(abs(t.item()) for t in want)
        assert got.mean().item() == pytest.approx(true.item(), abs=4.5 * error)


# ---- Jensen-Shannon with the geometric mean


@pytest.mark.parametrize(("q", "p"), [((0.0, 0.0), (1.0, 0.0)), ((-0.5, 1.0), (1.5, -1.0)), ((-4.0, 0.0), (4.0, 0.2))])
def test_geometric_js_equals_quadrature(q, p):
    a, b = density(scalar(*q)), density(scalar(*p))
    norm = integral(lambda x: math.sqrt(a(x) * b(x)))

    def g(x: float) -> float:
        return math.sqrt(a(x) * b(x)) / norm

    want = (true_kl(a, g) + true_kl(b, g)) / 2
    assert latent.geometric_js(scalar(*q), scalar(*p)).item() == pytest.approx(want, rel=1e-7)
    assert latent.geometric_js(scalar(*p), scalar(*q)).item() == pytest.approx(want, rel=1e-7)


def test_geometric_js_is_zero_for_equal_unbounded_for_distant_and_sums_over_dimensions():
    q = gaussian(N, L)
    torch.testing.assert_close(latent.geometric_js(q, q), torch.zeros(N).double(), atol=1e-15, rtol=0)
    far = Gaussian(q.mean + 10.0, q.log_var)  # the distance to the middle is 5 in every dimension
    torch.testing.assert_close(latent.geometric_js(q, far), (12.5 * (-q.log_var).exp()).sum(-1))
    both = leaves(*q, *gaussian(N, L))
    assert torch.autograd.gradcheck(lambda *t: latent.geometric_js(Gaussian(*t[:2]), Gaussian(*t[2:])), both)


# ---- Orthogonality


def test_orthogonality_equals_literal_loops_over_the_frames_that_exist():
    b, t, length = 2, 3, 4
    codes = [torch.randn(b, t, length, dtype=torch.float64) for _ in range(3)]
    valid = torch.tensor([[True, True, True], [True, False, True]])
    got = latent.orthogonality(codes, valid)
    assert got.shape == (b,)
    for clip in range(b):
        want = 0.0
        for one, two in ((0, 1), (0, 2), (1, 2)):
            for i in range(length):
                for j in range(length):
                    frames = [k for k in range(t) if valid[clip, k]]
                    want += sum(codes[one][clip, k, i].item() * codes[two][clip, k, j].item() for k in frames) ** 2
        assert got[clip].item() == pytest.approx(want, rel=1e-10)
    assert torch.autograd.gradcheck(lambda *c: latent.orthogonality(c, valid), leaves(*codes))


def test_orthogonal_codes_cost_nothing():
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]  # over the frames
    codes = [(directions[:, i : i + 2] @ torch.randn(2, 5, dtype=torch.float64))[None] for i in (0, 2, 4)]
    valid = torch.ones(1, 8, dtype=torch.bool)
    assert latent.orthogonality(codes, valid).item() < 1e-25
    assert latent.orthogonality([codes[0], codes[1] + 0.1 * codes[0]], valid).item() > 1e-3


def test_frames_that_do_not_exist_have_no_part_in_orthogonality():
    codes = leaves(*(torch.randn(1, 3, L, dtype=torch.float64) for _ in range(2)))
    valid = torch.tensor([[True, True, False]])
    poisoned = [code.masked_fill(~valid[..., None], math.nan) for code in codes]
    got = latent.orthogonality(poisoned, valid)
    shorter = latent.orthogonality([code[:, :2] for code in codes], valid[:, :2])
    torch.testing.assert_close(got, shorter)
    got.sum().backward()
    assert bool((codes[0].grad[:, 2] == 0).all())
    assert bool((codes[0].grad[:, :2] != 0).all())


def test_orthogonality_needs_two_codes():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        latent.orthogonality([torch.zeros(1, 1, 1)], torch.ones(1, 1, dtype=torch.bool))


def test_correlation_is_that_of_numpy_whatever_the_scale():
    codes = [torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 2.0 for _ in range(3)]
    codes[2] = codes[2] + codes[0]
    want = 0.0
    for a, b in itertools.combinations(codes, 2):
        want += (np.corrcoef(a.numpy(), b.numpy(), rowvar=False)[:3, 3:] ** 2).sum()

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return latent.correlation([latent.standardised(v, one_rank) for v in values], one_rank)

    assert loss(*codes).item() == pytest.approx(want, rel=1e-4)
    assert loss(*(0.05 * code - 1.0 for code in codes)).item() == pytest.approx(want, rel=1e-2)
    assert torch.autograd.gradcheck(loss, leaves(*codes))


def test_correlation_of_parts_of_the_batch_is_that_of_the_whole():
    """Ranks as parts whose sums are put together: here one after the other, with the sums of the whole."""
    codes = [torch.randn(12, 4, dtype=torch.float64) for _ in range(3)]
    whole = latent.correlation([latent.standardised(code, one_rank) for code in codes], one_rank)
    first = [latent.standardised(code, one_rank)[:5] for code in codes]
    rest = [latent.standardised(code, one_rank)[5:] for code in codes]

    def sums(pairs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.tensor(float(len(pairs[0])))] + [a.T @ b for a, b in itertools.combinations(pairs, 2)]

    others = iter([sums(rest)[0], torch.stack(sums(rest)[1:])])
    assert latent.correlation(first, lambda value: value + next(others)).item() == pytest.approx(whole.item())


def test_only_counted_frames_give_mean_and_variance():
    code = torch.randn(6, 4, dtype=torch.float64)
    counted = torch.tensor([True, True, False, True, True, False])
    got = latent.standardised(code, one_rank, counted)
    own = code[counted]
    torch.testing.assert_close(got, (code - own.mean(0)) / (own.var(0, correction=0) + latent.VARIANCE_EPS).sqrt())


def one_rank(value: torch.Tensor) -> torch.Tensor:
    return value

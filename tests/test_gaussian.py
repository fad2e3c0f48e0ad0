"""Gaussians, their mixtures and products against torch.distributions and quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from avs_dist.gaussian import Gaussian, Mixture, product

N, L = 4, 3


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> Gaussian:
    return Gaussian(torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype))


def reference(g: Gaussian) -> Independent:
    return Independent(Normal(g.mean, torch.exp(g.log_var / 2)), 1)


def test_log_density_of_a_gaussian_sums_over_the_last_dimension():
    g, value = gaussian(N, L), torch.randn(5, N, L, dtype=torch.float64)
    torch.testing.assert_close(g.log_prob(value), reference(g).log_prob(value))
    assert torch.autograd.gradcheck(lambda m, v, x: Gaussian(m, v).log_prob(x), leaves(*g, value))


def test_a_sample_is_the_mean_plus_the_deviation_times_the_noise():
    g, noise = gaussian(N, L), torch.randn(5, N, L, dtype=torch.float64)
    torch.testing.assert_close(g.sample(noise), reference(g).mean + reference(g).stddev * noise)
    assert torch.autograd.gradcheck(lambda m, v: Gaussian(m, v).sample(noise), leaves(*g))
    # its density is that of the noise, less the log of the deviations
    want = Normal(0.0, 1.0).log_prob(noise).sum(-1) - g.log_var.sum(-1) / 2
    torch.testing.assert_close(g.log_prob(g.sample(noise)), want)


def test_log_density_of_a_mixture_has_equal_weights():
    mixture, value = Mixture((gaussian(N, L), gaussian(N, L), gaussian(N, L))), torch.randn(5, N, L).double()
    stacked = Gaussian(*(torch.stack(part, 1) for part in zip(*mixture.experts, strict=True)))
    want = MixtureSameFamily(Categorical(logits=torch.zeros(N, 3).double()), reference(stacked))
    torch.testing.assert_close(mixture.log_prob(value), want.log_prob(value))
    torch.testing.assert_close(mixture.mean, want.mean)


def test_a_mixture_of_equal_experts_is_that_expert_and_far_values_stay_finite():
    g = gaussian(N, L, dtype=torch.float32)
    value = torch.full((N, L), 300.0)
    torch.testing.assert_close(Mixture((g, g)).log_prob(value), g.log_prob(value))
    assert torch.isfinite(Mixture((g, gaussian(N, L, dtype=torch.float32))).log_prob(value)).all()


def test_the_choice_falls_on_each_expert_for_an_equal_share_of_the_unit_interval():
    experts = tuple(Gaussian(torch.full((1, 1), float(k)), torch.zeros(1, 1)) for k in range(3))
    last = math.nextafter(1.0, 0.0)  # 3 times its float32 is 3
    choice = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, last])
    got = Mixture(experts).sample(torch.zeros(6, 1, 1), choice[:, None])
    assert got.flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_each_row_of_a_mixture_has_its_own_choice_and_only_the_chosen_expert_gets_a_gradient():
    one, two = leaves(*gaussian(2, L)), leaves(*gaussian(2, L))
    noise, choice = torch.randn(5, 2, L).double(), torch.tensor([0.2, 0.7]).expand(5, 2)
    got = Mixture((Gaussian(*one), Gaussian(*two))).sample(noise, choice)
    torch.testing.assert_close(got[:, 0], Gaussian(*one).sample(noise)[:, 0])
    torch.testing.assert_close(got[:, 1], Gaussian(*two).sample(noise)[:, 1])
    got.sum().backward()
    assert one[0].grad[:, 0].tolist() == [5.0, 0.0]
    assert two[0].grad[:, 0].tolist() == [0.0, 5.0]
    assert bool(two[1].grad[1].abs().min() > 0)


def test_samples_of_a_mixture_have_its_moments():
    means, log_vars, count = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.0, -2.0, 1.0]), 400_000
    experts = tuple(Gaussian(m.reshape(1, 1), v.reshape(1, 1)) for m, v in zip(means, log_vars, strict=True))
    drawn = Mixture(experts).sample(torch.randn(count, 1, 1), torch.rand(count, 1)).double()
    mean = means.mean().item()
    variance = (log_vars.exp() + means.square()).mean().item() - mean**2
    third = ((means - mean) ** 3 + 3 * (means - mean) * log_vars.exp()).mean().item()
    # 5 standard errors; those of the higher moments from the sample
    for power, want in ((1, 0.0), (2, variance), (3, third)):
        moment = (drawn - mean) ** power
        assert moment.mean().item() == pytest.approx(want, abs=5 * moment.std().item() / math.sqrt(count)), power


def test_a_mixture_cannot_be_sampled_without_a_choice():
    with pytest.raises(ValueError, match="needs a choice"):
        Mixture((gaussian(N, L),)).sample(torch.randn(N, L))


def test_product_is_the_normalised_product_of_the_densities():
    experts = [Gaussian(torch.tensor([[m]]).double(), torch.tensor([[v]]).double()) for m, v in ((-1, 0.3), (2, -0.8))]
    experts.append(gaussian(1, 1))
    grid = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
    density = sum(expert.log_prob(grid[:, None, None])[:, 0] for expert in experts).exp()
    density = density / torch.trapezoid(density, grid)
    mean = torch.trapezoid(density * grid, grid)
    variance = torch.trapezoid(density * (grid - mean) ** 2, grid)
    got = product(experts)
    assert got.mean.item() == pytest.approx(mean.item(), rel=1e-9)
    assert got.log_var.exp().item() == pytest.approx(variance.item(), rel=1e-9)
    torch.testing.assert_close(got.log_prob(grid[:, None, None])[:, 0].exp(), density, atol=1e-10, rtol=1e-9)


def test_product_keeps_dimensions_apart_and_has_gradients():
    a, b = gaussian(N, L), gaussian(N, L)
    got = product([a, b])
    torch.testing.assert_close(got.log_var.exp(), 1 / (1 / a.log_var.exp() + 1 / b.log_var.exp()))
    weight = b.log_var.exp() / (a.log_var.exp() + b.log_var.exp())
    torch.testing.assert_close(got.mean, weight * a.mean + (1 - weight) * b.mean)
    together = torch.autograd.gradcheck(lambda *p: tuple(product([Gaussian(*p[:2]), Gaussian(*p[2:])])), leaves(*a, *b))
    assert together


def test_product_of_very_sharp_and_very_flat_experts_stays_finite():
    sharp = Gaussian(torch.ones(1, 1), torch.full((1, 1), -120.0))  # its precision is not a float32
    flat = Gaussian(torch.zeros(1, 1), torch.full((1, 1), 120.0))
    for pair in ((sharp, flat), (sharp, sharp), (flat, flat)):
        got = product(pair)
        assert got.log_var.item() == pytest.approx(min(e.log_var.item() for e in pair), abs=0.7)
        assert got.mean.item() == (pair[0].mean.item())


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)

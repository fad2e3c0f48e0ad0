"""The network of CLUB against nn.Linear and torch.optim.Adam; its state in casts, on resume and over ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ranks_in_threads import Reduce, on_ranks
from sync_guard import no_host_sync
from torch import Tensor, nn

from avs_dist.losses.information import club, club_sampled
from avs_dist.modules.conditional_gaussian import ConditionalGaussian

IN, OUT, HIDDEN, N = 5, 3, 6, 40
STATE = ["weights", "exp_avg", "exp_avg_sq", "step"]


def small(dtype: torch.dtype = torch.float32) -> ConditionalGaussian:
    """A small network; in float64 for comparisons, which no cast gives."""
    module = ConditionalGaussian(IN, OUT, HIDDEN, learning_rate=0.01)
    for name in STATE[:3]:
        setattr(module, name, getattr(module, name).to(dtype))
    return module


def literal(module: ConditionalGaussian) -> tuple[nn.Sequential, nn.Sequential]:
    """Mean and log-variance as the usual layers, with the weights of `module`."""
    widths = [IN, HIDDEN, HIDDEN, HIDDEN, OUT]
    networks = []
    for last in ([], [nn.Tanh()]):
        layers: list[nn.Module] = []
        for before, width in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, width), nn.ReLU()]
        networks.append(nn.Sequential(*layers[:-1], *last).to(module.weights.dtype))
    start = 0
    for parameter in nn.ModuleList(networks).parameters():
        piece = module.weights[start : start + parameter.numel()]
        parameter.data.copy_(piece.view_as(parameter))
        start += parameter.numel()
    assert start == len(module.weights)
    return networks[0], networks[1]


def pairs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, IN, dtype=dtype)
    return x, 2 * x[:, :OUT].sin() + 0.5 * torch.randn(N, OUT, dtype=dtype) + 3


def fitted_by_torch(
    module: ConditionalGaussian, x: Tensor, y: Tensor, steps: int, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights after `steps` of torch.optim.Adam on -mean log q, and the last mean log q."""
    mean, log_var = literal(module)
    parameters = [*mean.parameters(), *log_var.parameters()]
    optimiser = torch.optim.Adam(parameters, module.learning_rate)
    for _ in range(steps):
        normal = torch.distributions.Normal(mean(x), (log_var(x) / 2).exp())
        likelihood = normal.log_prob(y).sum(-1)[counted].mean()
        optimiser.zero_grad()
        (-likelihood).backward()
        optimiser.step()
    return torch.cat([p.detach().flatten() for p in parameters]), likelihood.detach()


# ---- forward


def test_forward_is_two_stacks_of_linear_layers_with_gradient_to_x():
    module, x = small(torch.float64), torch.randn(2, 7, IN, dtype=torch.float64, requires_grad=True)
    for got, network in zip(module(x), literal(module), strict=True):
        torch.testing.assert_close(got, network(x), rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(got)
        have, want = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (got, network(x)))
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_initial_weights_are_distributed_as_those_of_linear_layers():
    module = ConditionalGaussian(64, 32, 16)
    first, second = module.weights.split(len(module.weights) // 2)
    assert not torch.equal(first, second)
    for half in (first, second):
        for piece, fan_in in ((half[: 64 * 16 + 16], 64), (half[64 * 16 + 16 :], 16)):
            bound = fan_in**-0.5
            assert piece.abs().max() <= bound
            assert piece.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert piece.mean().abs() < 0.1 * bound


def test_the_main_loss_reaches_x_but_has_no_weights_to_train():
    module, x = small(), torch.randn(N, IN, requires_grad=True)
    assert list(module.parameters()) == []
    sum(out.sum() for out in module(x)).backward()
    assert x.grad.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_computes_in_float32_for_bfloat16_and_under_autocast(dtype):
    module, (x, y) = small(), pairs()
    x, y = x.to(dtype), y.to(dtype)
    want = module(x.float())
    other = copy.deepcopy(module)
    likelihood = other.fit(x.float(), y.float(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(module(x), want, strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)
        assert torch.equal(module.fit(x, y, 3), likelihood)
    assert torch.equal(module.weights, other.weights)


# ---- fit


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("every", [True, False])
def test_fit_is_adam_on_the_likelihood_of_the_counted_rows(steps, every):
    module, (x, y) = small(torch.float64), pairs(torch.float64)
    counted = torch.rand(N) < 0.6
    y[~counted] = 100.0
    if every:
        counted[:] = True
    weights, likelihood = fitted_by_torch(module, x, y, steps, counted)
    before = module.weights.clone()
    got = module.fit(x, y, steps, counted_N=None if every else counted)
    torch.testing.assert_close(got, likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.weights, weights, rtol=1e-10, atol=1e-12)
    assert (module.weights - before).abs().max() > 0.005
    assert module.step.item() == steps


def test_fit_goes_on_where_the_last_one_stopped():
    module, (x, y) = small(torch.float64), pairs(torch.float64)
    weights, _ = fitted_by_torch(module, x, y, 6, torch.ones(N, dtype=torch.bool))
    module.fit(x, y, 2)
    module.fit(x, y, 4)
    torch.testing.assert_close(module.weights, weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [[20, 20], [3, 30, 7]])
def test_fit_on_several_ranks_is_that_of_one_and_the_same_on_all(split):
    one, (x, y) = small(torch.float64), pairs(torch.float64)
    counted = torch.rand(N) < 0.6
    modules = [copy.deepcopy(one) for _ in split]
    parts = [each.split(split) for each in (x, y, counted)]

    def of_rank(rank: int, reduce: Reduce) -> Tensor:
        own_x, own_y, own_counted = (part[rank] for part in parts)
        return modules[rank].fit(own_x, own_y, 4, own_counted, reduce)

    likelihoods = on_ranks(len(split), of_rank)
    want = one.fit(x, y, 4, counted)
    for module, likelihood in zip(modules, likelihoods, strict=True):
        assert torch.equal(module.weights, modules[0].weights)
        torch.testing.assert_close(likelihood, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(module.weights, one.weights, rtol=1e-9, atol=1e-12)


def test_fit_works_under_no_grad_and_leaves_no_trace_in_the_graph():
    module, (x, y) = small(), pairs()
    x.requires_grad_()
    y.requires_grad_()
    other = copy.deepcopy(module)
    with torch.no_grad():
        assert not module.fit(x, y, 2).requires_grad
    assert not other.fit(x * 1, y * 1, 2).requires_grad
    assert torch.equal(module.weights, other.weights)
    assert x.grad is None
    assert y.grad is None
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_fit_after_forward_is_told_of_instead_of_a_wrong_gradient():
    module, (x, y) = small(), pairs()
    mean = module(x.requires_grad_()).mean
    module.fit(x, y, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mean.sum().backward()


def test_without_counted_rows_nothing_breaks():
    module, (x, y) = small(), pairs()
    before = module.weights.clone()
    assert module.fit(x, y, 1, torch.zeros(N, dtype=torch.bool)).item() == 0.0
    assert torch.equal(module.weights, before)
    with pytest.raises(ValueError, match="steps is 0"):
        module.fit(x, y, 0)


def test_the_host_waits_for_nothing():
    module, (x, y) = small(), pairs()
    with no_host_sync():
        module.fit(x, y, 2, torch.rand(N) < 0.6)
        sum(out.sum() for out in module(x.requires_grad_())).backward()


@pytest.mark.gpu
def test_fit_on_a_gpu_is_that_on_the_cpu_without_a_wait():
    module, (x, y) = small(), pairs()
    counted = torch.rand(N) < 0.6
    on_gpu, *moved = (each.cuda() for each in (copy.deepcopy(module), x, y, counted))
    torch.cuda.set_sync_debug_mode("error")
    try:
        likelihood = on_gpu.fit(moved[0], moved[1], 5, moved[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(likelihood.cpu(), module.fit(x, y, 5, counted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(on_gpu.weights.cpu(), module.weights, rtol=1e-3, atol=1e-4)


# ---- state


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    module, (x, y) = small(), pairs()
    module.fit(x, y, 3)
    assert sorted(module.state_dict()) == sorted(STATE)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    resumed = small()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(module.fit(x, y, 3), resumed.fit(x, y, 3))
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert value.abs().sum() > 0


def test_a_cast_of_the_model_keeps_the_state_in_float32():
    parent = nn.ModuleDict({"layer": nn.Linear(2, 2), "information": small()})
    before = {name: value.clone() for name, value in parent["information"].state_dict().items()}
    parent.bfloat16()
    parent.to(torch.float16)
    assert parent["layer"].weight.dtype == torch.float16
    for name, value in parent["information"].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


# ---- what it is for


@pytest.mark.parametrize("information", [4.0, 6.0, 8.0])
def test_trained_by_fit_it_finds_the_bound_of_correlated_gaussians(information):
    """Dimension 20, estimates over batches of 64. The bound of CLUB is D rho^2 / (1 - rho^2) nats for the true q."""
    dim, batch = 20, 64
    rho = math.sqrt(1 - math.exp(-2 * information / dim))

    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*shape, dim)
        return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(*shape, dim)

    module, bound = ConditionalGaussian(dim, dim), dim * rho**2 / (1 - rho**2)
    for _ in range(60):
        likelihood = module.fit(*draw(256), 5)
    entropy = 0.5 * dim * math.log(2 * math.pi * math.e)
    assert information - 1.0 < likelihood.item() + entropy < information + 0.5  # the lower bound of the same q
    x_NTD, y_NTD = draw(batch, 200)
    predicted = module(x_NTD)
    for each in (club(predicted, y_NTD), club_sampled(predicted, y_NTD, y_NTD.roll(1, 0))):
        assert information < each.mean().item()
        assert each.mean().item() == pytest.approx(bound, rel=0.15)

"""The denoiser against its literal formula, and its fused sampling against the loop that calls the module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from avs_dist.kernels import reference, runtime
from avs_dist.kernels.reference import DenoiserWeights
from avs_dist.modules.denoiser import STEP_FEATURES, DDIMSampler, Denoiser, step_features

D, E, WIDTHS = 5, 3, (20, 17, 16, 18, 16, 17, 20)  # widths that skips accept: output 0 meets the input of the last
PREDICTIONS = ("eps", "v", "x0")


def literal_weights(denoiser: Denoiser, steps: list[int]) -> DenoiserWeights:
    """From the state dict, the step embedding written out number by number."""
    state = {name: value.double() for name, value in denoiser.state_dict().items()}
    half = STEP_FEATURES // 2
    rows = []
    for k in steps:
        angles = [k * 10_000 ** (-i / (half - 1)) for i in range(half)]
        features = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
        inner = state["step_embedding.0.weight"] @ features + state["step_embedding.0.bias"]
        inner = torch.where(inner > 0, inner, 0.01 * inner)
        rows.append(state["step_embedding.2.weight"] @ inner + state["step_embedding.2.bias"])
    layers = range(sum(name.startswith("weight_") for name in state))
    matrices, biases = (tuple(state[f"{kind}_{layer}"] for layer in layers) for kind in ("weight", "bias"))
    return DenoiserWeights(matrices, biases, torch.stack(rows), denoiser.skips, 0.01)


@pytest.mark.parametrize(("widths", "skips"), [((), False), ((9,), False), (WIDTHS, False), (WIDTHS, True)])
@pytest.mark.parametrize("condition_dim", [0, E])
def test_output_is_the_literal_formula(widths, skips, condition_dim):
    denoiser = Denoiser(D, condition_dim, widths, skips).double()
    z_BD, condition_BE = torch.randn(4, D, dtype=torch.float64), torch.randn(4, condition_dim, dtype=torch.float64)
    steps = [0, 19, 3, 3]
    got = denoiser(z_BD, condition_BE, torch.tensor(steps))
    weights = literal_weights(denoiser, steps)
    assert len(weights.matrices) == len(widths) + 1
    want = [reference.denoise(z_BD[row], condition_BE[row], row, weights) for row in range(4)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=1e-10)


def test_gradient_is_right_and_reaches_every_parameter():
    denoiser = Denoiser(D, E, WIDTHS, skips=True).double()
    z_BD, condition_BE = torch.randn(4, D, dtype=torch.float64), torch.randn(4, E, dtype=torch.float64)
    step_B = torch.tensor([0, 5, 12, 19])
    inputs = (z_BD.requires_grad_(), condition_BE.requires_grad_())
    assert torch.autograd.gradcheck(lambda z, c: denoiser(z, c, step_B), inputs)
    denoiser(z_BD, condition_BE, step_B).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


def test_layers_begin_as_linear_layers_do():
    denoiser = Denoiser(40, 60, (400, 300))
    for layer, inputs in enumerate((100, 400, 300)):
        for name in (f"weight_{layer}", f"bias_{layer}"):
            values = denoiser.get_parameter(name)
            bound = 1 / math.sqrt(inputs)
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def sample_both(denoiser: Denoiser, sampler: DDIMSampler, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents of the fused op, and of the plain loop that calls the module step by step."""
    rows, condition_dim = 6, denoiser.weight_0.shape[1] - D
    noise_BD, condition_BE = torch.randn(rows, D, dtype=dtype), torch.randn(rows, condition_dim, dtype=dtype)
    step_noise_SBD = torch.randn(len(sampler.timesteps), rows, D, dtype=dtype)
    given = {"noise_BD": noise_BD, "step_noise_SBD": step_noise_SBD}
    fused_BD = sampler.sample(denoiser, condition_BE, **given)
    return fused_BD, sampler.sample(lambda z, c, k: denoiser(z, c, k), condition_BE, **given)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("eta", "clip"), [(0.0, None), (0.5, 0.8), (1.0, None)])
@pytest.mark.parametrize("skips", [False, True])
def test_fused_sampling_is_the_loop_in_float64(prediction, eta, clip, skips):
    denoiser = Denoiser(D, E, WIDTHS, skips).double()
    for spacing, steps in (("leading", 10), ("trailing", 10), ("trailing", 7)):
        sampler = DDIMSampler(20, steps, prediction=prediction, spacing=spacing, eta=eta, clip=clip)
        fused_BD, loop_BD = sample_both(denoiser, sampler, torch.float64)
        assert fused_BD.dtype == torch.float64
        torch.testing.assert_close(fused_BD, loop_BD, rtol=1e-9, atol=1e-9)
        assert not fused_BD.requires_grad


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("condition_dim", [0, E])
def test_fused_sampling_is_the_loop_in_float32(form, prediction, condition_dim, monkeypatch):
    monkeypatch.setenv("AVS_KERNELS", form)
    denoiser = Denoiser(D, condition_dim, (20, 16, 20), skips=condition_dim > 0)
    sampler = DDIMSampler(20, 4, prediction=prediction, eta=0.5, clip=2.0)
    fused_BD, loop_BD = sample_both(denoiser, sampler, torch.float32)
    assert runtime.last_choice["ddim_sample"] == (form == "triton")
    assert fused_BD.dtype == torch.float32
    torch.testing.assert_close(fused_BD, loop_BD, rtol=1e-4, atol=1e-4)


def test_sampling_depends_on_condition_step_and_every_layer():
    denoiser = Denoiser(D, E, (20, 16, 20)).double()
    sampler = DDIMSampler(20, 4, prediction="v")
    given = {"noise_BD": torch.randn(3, D, dtype=torch.float64)}
    condition_BE = torch.randn(3, E, dtype=torch.float64)
    before_BD = sampler.sample(denoiser, condition_BE, **given)
    assert (sampler.sample(denoiser, 2 * condition_BE, **given) - before_BD).abs().min() > 1e-6
    for name, parameter in denoiser.named_parameters():
        with torch.no_grad():
            parameter *= 1.1
        after_BD = sampler.sample(denoiser, condition_BE, **given)
        assert (after_BD - before_BD).abs().max() > 1e-6, name
        before_BD = after_BD


def test_the_sampler_draws_latents_of_the_denoiser():
    denoiser = Denoiser(D, E, (16,))
    sampler = DDIMSampler(20, 4, eta=0.3)
    draws = [
        sampler.sample(denoiser, torch.zeros(7, E), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert draws[0].shape == (7, D)
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().min() > 1e-6
    with pytest.raises(ValueError, match=r"noise_BD must be \[7, 5\], got \[7, 3\]"):
        sampler.sample(denoiser, torch.zeros(7, E), noise_BD=torch.zeros(7, E))


def test_bfloat16_weights_take_and_give_float32():
    plain = Denoiser(D, E, WIDTHS, skips=True)
    low = Denoiser(D, E, WIDTHS, skips=True).bfloat16()
    low.load_state_dict(plain.state_dict())
    z_BD, step_B = torch.randn(200, D), torch.randint(0, 20, (200,))
    condition_BE = torch.randn(200, E)
    for condition in (condition_BE, condition_BE.bfloat16(), condition_BE.double()):
        got, want = low(z_BD, condition, step_B), plain(z_BD, condition, step_B)
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        sampler = DDIMSampler(20, 5, prediction="v")
        got, want = (sampler.sample(model, condition, noise_BD=z_BD) for model in (low, plain))
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_every_module_owns_the_parameters_it_uses():
    """ZeRO-3 gathers a module's own parameters for the time of its __call__; here they are NaN at any other time."""
    denoiser = Denoiser(D, E, (20, 16, 20), skips=True)
    sampler = DDIMSampler(20, 4)
    z_BD, condition_BE, step_B = torch.randn(3, D), torch.randn(3, E), torch.tensor([0, 3, 19])
    calls = (
        lambda: denoiser(z_BD, condition_BE, step_B),
        lambda: sampler.sample(denoiser, condition_BE, noise_BD=z_BD),
    )
    with torch.no_grad():
        want = [call() for call in calls]
        shards = {parameter: parameter.clone() for parameter in denoiser.parameters()}

        def gather(module: nn.Module, args: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.copy_(shards[parameter])

        def release(module: nn.Module, args: object, output: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(math.nan)

        for module in denoiser.modules():
            release(module, (), None)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
        assert all(parameter.isnan().all() for parameter in denoiser.parameters())
        for call, value in zip(calls, want, strict=True):
            assert torch.equal(call(), value)


def test_step_features_tell_all_levels_apart():
    features_KF = step_features(torch.arange(1000), STEP_FEATURES)
    assert features_KF.shape == (1000, STEP_FEATURES)
    distance_KK = torch.cdist(features_KF, features_KF) + 100 * torch.eye(1000)
    assert distance_KK.min() > 0.3
    torch.testing.assert_close(features_KF.square().sum(1), torch.full((1000,), 32.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dims", "widths", "skips", "message"),
    [
        (
            (D, E),
            (16, 16, 17),
            True,
            r"model.diffusion.widths=\(16, 16, 17\): with model.diffusion.skips numbers 0 and 2",
        ),
        ((D, E), (16, 8, 9, 10, 16), True, "numbers 1 and 3 .* got 8 and 10"),
        ((D, E), (16, 513), False, "model.diffusion.widths=.*from 1 to 512"),
        ((D, E), (16, 0), False, "model.diffusion.widths=.*from 1 to 512"),
        ((300, 300), (16,), False, "model.diffusion.dim=300: .* 600 numbers, at most 512"),
    ],
)
def test_widths_that_do_not_fit_are_refused(dims, widths, skips, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(*dims, widths, skips)

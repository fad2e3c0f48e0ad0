"""Noise schedules and the DDIM sampler against diffusers, closed forms and a denoiser that is exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from avs_dist.modules.denoiser import DDIMSampler
from avs_dist.modules.noise_schedule import NoiseSchedule, linear_betas, visited_levels

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


def diffusers_scheduler(sampler: DDIMSampler, num_steps: int, spacing: str = "leading") -> DDIMScheduler:
    """The scheduler of the same settings, in float64."""
    scheduler = DDIMScheduler(
        num_train_timesteps=len(sampler.alphas_cumprod),
        prediction_type=PREDICTIONS[sampler.prediction],
        timestep_spacing=spacing,
        clip_sample=sampler.clip is not None,
        clip_sample_range=sampler.clip or 1.0,
    )
    scheduler.alphas_cumprod = sampler.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    return scheduler


def curved(z_BD: Tensor, condition_BD: Tensor, step_B: Tensor) -> Tensor:
    """Some model of every input."""
    return torch.tanh(1.3 * z_BD.flip(1) - condition_BD) + 0.5 * z_BD + 0.1 * step_B[:, None].sin()


@pytest.mark.parametrize("levels", [2, 20, 50, 1000])
def test_cosine_levels_are_the_closed_form(levels):
    got = NoiseSchedule(levels).alphas_cumprod
    assert (got.dtype, got.shape) == (torch.float64, (levels,))
    angle = [math.pi / 2 * ((k + 1) / levels + 0.008) / 1.008 for k in range(levels - 1)]
    start = math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    want = torch.tensor([math.cos(a) ** 2 / start for a in angle], dtype=torch.float64)
    torch.testing.assert_close(got[:-1], want, rtol=1e-11, atol=0.0)
    assert got[-1].item() == pytest.approx(got[-2].item() * 0.001, rel=1e-12)  # the last beta is bounded


@pytest.mark.parametrize("levels", [1, 20, 1000])
def test_linear_levels_are_the_product(levels):
    for start, end in ((1e-4, 0.02), linear_betas(levels)):
        product, want = 1.0, []
        for k in range(levels):
            product *= 1 - (start + (end - start) * k / max(levels - 1, 1))
            want.append(product)
        got = NoiseSchedule(levels, "linear", beta_start=start, beta_end=end).alphas_cumprod
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("levels", [1, 7, 20, 1000])
def test_levels_are_those_of_diffusers(kind, levels):
    theirs = DDIMScheduler(num_train_timesteps=levels, beta_schedule=SCHEDULES[kind]).alphas_cumprod
    # float32 there: each factor is rounded, the last one to 6e-8 of a thousandth
    torch.testing.assert_close(DDIMSampler(levels, 1, kind).alphas_cumprod.float(), theirs, rtol=2e-4, atol=0.0)


def test_scaled_linear_betas_reach_noise_in_few_levels():
    assert linear_betas(1000) == (1e-4, 0.02)
    assert linear_betas(100) == pytest.approx((1e-3, 0.2))
    assert linear_betas(20) == pytest.approx((5e-3, 0.999))
    assert NoiseSchedule(20, "linear").alphas_cumprod[-1] > 0.8
    for levels in (1, 5, 20, 50, 1000):
        alphas_K = NoiseSchedule(levels, "linear", *linear_betas(levels)).alphas_cumprod
        assert alphas_K[-1] < 1e-4 or levels == 1
        assert alphas_K.min() > 0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_visited_levels_are_those_of_diffusers(spacing):
    too_long = 0
    for levels in (1, 2, 3, 15, 17, 20, 21, 22, 50, 100, 1000):
        scheduler = DDIMScheduler(num_train_timesteps=levels, timestep_spacing=spacing)
        for steps in range(1, levels + 1) if levels <= 100 else (1, 3, 7, 10, 30, 50, 999, 1000):
            scheduler.set_timesteps(steps)
            got = visited_levels(levels, steps, spacing)
            assert (got.dtype, got.shape) == (torch.int64, (steps,))
            # of some sizes their list has a level -1 more
            assert got.tolist() == scheduler.timesteps.tolist()[:steps], (levels, steps)
            assert got.min() >= 0
            too_long += len(scheduler.timesteps) > steps
    assert (too_long > 0) == (spacing == "trailing")


def trajectories(sampler: DDIMSampler, scheduler: DDIMScheduler) -> tuple[Tensor, Tensor]:
    """Every latent on the way, ours and theirs: [num_steps + 1, 4, 3]."""
    steps, ours = len(sampler.timesteps), []
    noise_BD, condition_BD = torch.randn(2, 4, 3, dtype=torch.float64)
    step_noise_SBD = torch.randn(steps, 4, 3, dtype=torch.float64)

    def watched(z_BD: Tensor, condition_BD: Tensor, step_B: Tensor) -> Tensor:
        assert step_B.tolist() == [sampler.timesteps[len(ours)]] * 4
        ours.append(z_BD)
        return curved(z_BD, condition_BD, step_B)

    ours.append(sampler.sample(watched, condition_BD, noise_BD=noise_BD, step_noise_SBD=step_noise_SBD))
    theirs = [noise_BD]
    for step, k in enumerate(scheduler.timesteps):
        output_BD = curved(theirs[-1], condition_BD, k.expand(4))
        given = {"eta": sampler.eta, "variance_noise": step_noise_SBD[step]}
        theirs.append(scheduler.step(output_BD, int(k), theirs[-1], **given).prev_sample)
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_trajectories_are_those_of_diffusers(prediction, eta, clip):
    sizes = [(20, 10), (20, 20), (20, 1), (50, 10), (100, 25)]
    cases = [(kind, spacing, size) for kind in SCHEDULES for spacing in ("leading", "trailing") for size in sizes]
    cases += [("cosine", "leading", (20, 7)), ("cosine", "leading", (50, 11))]
    for kind, spacing, (levels, steps) in cases:
        sampler = DDIMSampler(levels, steps, kind, prediction=prediction, spacing=spacing, eta=eta, clip=clip)
        ours, theirs = trajectories(sampler, diffusers_scheduler(sampler, steps, spacing))
        assert ours.dtype == torch.float64
        scale = theirs.abs().amax((1, 2), keepdim=True).clamp_min(1.0)  # without a bound eps divides by 0.002
        assert ((ours - theirs) / scale).abs().max() < 1e-10, (kind, spacing, levels, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_velocity_and_estimates_are_those_of_diffusers(prediction):
    sampler = DDIMSampler(20, 10, prediction=prediction)
    scheduler, schedule = diffusers_scheduler(sampler, 10), sampler.noise_schedule
    z0_BD, eps_BD = torch.randn(2, 20, 3, dtype=torch.float64)
    k_B = torch.arange(20)
    zk_BD = schedule.add_noise(z0_BD, eps_BD, k_B)
    torch.testing.assert_close(zk_BD, scheduler.add_noise(z0_BD, eps_BD, k_B), rtol=1e-12, atol=1e-12)
    target_BD = schedule.target(z0_BD, eps_BD, k_B, prediction)
    want = {"eps": eps_BD, "v": scheduler.get_velocity(z0_BD, eps_BD, k_B), "x0": z0_BD}
    torch.testing.assert_close(target_BD, want[prediction], rtol=1e-12, atol=1e-12)
    for k in (0, 9, 19):
        output_BD = torch.randn(20, 3, dtype=torch.float64)
        theirs = scheduler.step(output_BD, k, zk_BD).pred_original_sample
        got = schedule.estimate_x0(zk_BD, output_BD, torch.full((20,), k), prediction)
        torch.testing.assert_close(got, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_the_right_output_gives_latent_and_noise_back(prediction, dtype, tolerance):
    schedule = NoiseSchedule(20)
    z0_FBD, eps_FBD = torch.randn(2, 5, 20, 3, dtype=dtype)  # any number of leading dimensions
    k_FB = torch.arange(20).expand(5, 20)
    zk_FBD = schedule.add_noise(z0_FBD, eps_FBD, k_FB)
    output_FBD = schedule.target(z0_FBD, eps_FBD, k_FB, prediction)
    both = schedule.estimates(zk_FBD, output_FBD, k_FB, prediction)
    for got, want in zip(both, (z0_FBD, eps_FBD), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_flow_through_noise_targets_and_estimates(prediction):
    schedule, k_B = NoiseSchedule(20), torch.tensor([0, 7, 18])
    values = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def all_of_them(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        target = schedule.target(first, second, k_B, prediction)
        return (
            schedule.add_noise(first, second, k_B),
            1.0 * target,
            schedule.estimate_x0(first, second, k_B, prediction),
        )

    assert torch.autograd.gradcheck(all_of_them, values)


def exact_denoiser(schedule: NoiseSchedule, mean: float, std: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[z_0 | z_k] of latents N(mean, std^2), as an x0 prediction."""

    def model(z_BD: Tensor, condition_BD: Tensor, step_B: Tensor) -> Tensor:
        a_B1 = schedule.alphas_cumprod[step_B][:, None]
        gain_B1 = a_B1.sqrt() * std**2 / (a_B1 * std**2 + 1 - a_B1)
        return mean + gain_B1 * (z_BD - a_B1.sqrt() * mean)

    return model


def test_steps_go_to_the_level_of_the_next_step_also_where_they_do_not_divide_the_levels():
    # diffusers goes to k - K // num_steps there: with 11 of 20 steps its mean is 0.75
    noise_BD = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # the map from noise to sample is linear
    for levels, steps in [(20, 3), (20, 7), (20, 11), (50, 17), (50, 20), (20, 10), (50, 50)]:
        sampler = DDIMSampler(levels, steps, prediction="x0", spacing="trailing")
        model = exact_denoiser(sampler.noise_schedule, 1.0, 0.3)
        mean, other = sampler.sample(model, torch.zeros_like(noise_BD), noise_BD=noise_BD).flatten().tolist()
        assert mean == pytest.approx(1.0, abs=2e-3), (levels, steps)
        assert 0.1 < other - mean < 0.3, (levels, steps)  # few steps make the spread too small


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_of_an_exact_denoiser_give_the_exact_distribution(eta):
    sampler = DDIMSampler(400, 400, prediction="x0", spacing="trailing", eta=eta)
    condition_BD = torch.zeros(20_000, 1, dtype=torch.float64)
    z_BD = sampler.sample(
        exact_denoiser(sampler.noise_schedule, 0.7, 0.5), condition_BD, generator=torch.Generator().manual_seed(2)
    )
    assert z_BD.mean().item() == pytest.approx(0.7, abs=0.015)
    assert z_BD.std().item() == pytest.approx(0.5, rel=0.02)


def test_generator_draws_the_numbers_that_diffusers_draws():
    sampler = DDIMSampler(20, 5, eta=1.0)
    condition_BD = torch.randn(4, 3, dtype=torch.float64)
    ours = sampler.sample(curved, condition_BD, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    scheduler = diffusers_scheduler(sampler, 5)
    z_BD = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    for k in scheduler.timesteps:
        output_BD = curved(z_BD, condition_BD, k.expand(4))
        z_BD = scheduler.step(output_BD, int(k), z_BD, eta=1.0, generator=generator).prev_sample
    torch.testing.assert_close(ours, z_BD, rtol=1e-10, atol=1e-10)
    other = sampler.sample(curved, condition_BD, generator=torch.Generator().manual_seed(4))
    assert (ours - other).abs().min() > 1e-4


def test_latents_are_as_wide_as_the_noise_or_else_the_condition():
    sampler = DDIMSampler(20, 4)

    def halved(z_BD: Tensor, condition_BD: Tensor, step_B: Tensor) -> Tensor:
        return 0.5 * z_BD

    assert sampler.sample(halved, torch.zeros(5, 3)).shape == (5, 3)
    assert sampler.sample(halved, torch.zeros(5, 0), noise_BD=torch.zeros(5, 2)).shape == (5, 2)
    assert sampler.sample(halved, torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="neither noise nor condition says how wide"):
        sampler.sample(halved, torch.zeros(5, 0))


def test_latents_are_float32_at_least_and_have_no_gradient():
    types = (torch.bfloat16, torch.float32, torch.float64)
    layer = torch.nn.Linear(3, 3)

    def model(z_BD: Tensor, condition_BD: Tensor, step_B: Tensor) -> Tensor:
        return layer(z_BD.float() + condition_BD.float())

    for condition_type, noise_type in itertools.product(types, types):
        condition_BD, noise_BD = torch.zeros(2, 3, dtype=condition_type), torch.zeros(2, 3, dtype=noise_type)
        z_BD = DDIMSampler(20, 4).sample(model, condition_BD, noise_BD=noise_BD)
        assert z_BD.dtype == (torch.float64 if torch.float64 in (condition_type, noise_type) else torch.float32)
        assert not z_BD.requires_grad


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        ((20, 21), {}, r"model.diffusion.steps=21: must be from 1 to model.diffusion.train_steps=20"),
        ((20, 0), {}, "model.diffusion.steps=0"),
        ((0, 1), {}, "model.diffusion.train_steps=0"),
        ((20, 10, "sigmoid"), {}, "model.diffusion.schedule=sigmoid: must be one of cosine, linear"),
        ((20, 10), {"prediction": "score"}, "model.diffusion.prediction=score: must be one of eps, v, x0"),
        ((20, 10), {"spacing": "even"}, "model.diffusion.spacing=even: must be one of leading, trailing"),
        ((20, 10), {"eta": 1.5}, "model.diffusion.eta=1.5"),
        ((20, 10), {"clip": 0.0}, "model.diffusion.clip=0.0"),
        ((20, 10, "linear"), {"beta_end": 1.0}, "beta_end < 1, got 0.0001, 1.0"),
    ],
)
def test_bad_settings_are_refused_by_name(args, settings, message):
    with pytest.raises(ValueError, match=message):
        DDIMSampler(*args, **settings)


def test_noise_of_other_shapes_is_refused():
    sampler, condition_BD = DDIMSampler(20, 4, eta=0.5), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"noise_BD must be \[5, 3\], got \[4, 3\]"):
        sampler.sample(curved, condition_BD, noise_BD=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"step_noise_SBD must be \[4, 5, 3\], got \[3, 5, 3\]"):
        sampler.sample(curved, condition_BD, step_noise_SBD=torch.zeros(3, 5, 3))

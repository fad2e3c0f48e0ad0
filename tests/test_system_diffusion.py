"""Latent diffusion as a whole: every term against the formulas, draws, padding, ablations, sampled predictions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_system_tpavi import doubled, gradients, learn, make_clip, make_config, pad
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import (
    Config,
    DecoderConfig,
    DiffusionConfig,
    DiffusionLossConfig,
    LossConfig,
    TPAVIConfig,
)
from avs_dist.draws import ClipDraws
from avs_dist.kernels import reference
from avs_dist.systems import build_system
from avs_dist.systems.diffusion import DiffusionSystem, set_num_steps
from avs_dist.systems.generator import see_and_hear

SMALL = DiffusionConfig(dim=4, hidden=8, widths=(16,) * 7, steps=3, spacing="trailing", samples=2)


def diffusion_config(loss: DiffusionLossConfig | None = None, model: dict | None = None, **diffusion: object) -> Config:
    config = make_config(system="diffusion", diffusion=replace(SMALL, **diffusion), **(model or {}))
    return replace(config, loss=LossConfig(diffusion=loss or DiffusionLossConfig()))


def build(config: Config) -> DiffusionSystem:
    torch.manual_seed(0)
    system = build_system(config)
    assert isinstance(system, DiffusionSystem)
    return system


def warm(config: Config) -> DiffusionSystem:
    """In eval mode and float64, where a clip's losses are those of the formulas, clip by clip."""
    system = build(config).double()
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    return system.eval()


def exact(clip: Clip) -> Clip:
    return clip.to("cpu", torch.float64)


def test_it_learns_a_batch_and_every_parameter_has_a_gradient():
    history = learn(build(diffusion_config()), make_clip())
    assert set(history[0]) == {"bce", "denoising", "contrastive"}
    assert history[-1]["bce"] < 0.7 * history[0]["bce"]


class Literal:
    """The objective of eq. 12 from the encoders' outputs and the draws, frame by frame in plain arithmetic."""

    def __init__(self, system: DiffusionSystem, clip: Clip, step: int) -> None:
        self.system, self.config, self.clip = system, system.config.model.diffusion, clip
        seen = see_and_hear(system.trunk, clip)
        self.seen, self.scene = seen, system.generator.prepare(system.trunk, seen)
        self.draws = ClipDraws(system.config.seed, step, clip.key)
        masks_N1HW = clip.masks_BTHW.flatten(0, 1)[:, None].double()
        self.codes = system.mask_encoder(masks_N1HW)
        if self.config.normalise:
            spread = self.codes.var(0, correction=0) + 1e-6
            self.codes = (self.codes - self.codes.mean(0)) / spread.sqrt()
        self.conditions = system.condition_encoder(seen.frames_NCHW, seen.audio_ND)
        self.level = [int(u * self.config.train_steps) for u in self.draws.uniform("level", 3).flatten()]
        self.noise = self.draws.normal("noise", 3, self.config.dim).flatten(0, 1).double()

    def alpha_bar(self, level: int) -> float:
        return float(self.system.sampler.alphas_cumprod[level])

    def frames(self) -> tuple[Tensor, Tensor]:
        """Denoising error of each frame, and the estimated codes."""
        errors, estimates = [], []
        for code, eps, level, condition in zip(self.codes, self.noise, self.level, self.conditions, strict=True):
            a = self.alpha_bar(level)
            noisy = a**0.5 * code + (1 - a) ** 0.5 * eps
            out = self.system.denoiser(noisy[None], condition[None], torch.tensor([level]))[0]
            if self.config.prediction == "eps":
                error, estimate = out - eps, (noisy - (1 - a) ** 0.5 * out) / a**0.5
            elif self.config.prediction == "x0":
                error, estimate = out - code, out
            else:
                error = out - (a**0.5 * eps - (1 - a) ** 0.5 * code)
                estimate = a**0.5 * noisy - (1 - a) ** 0.5 * out
            errors.append((error**2).mean())
            estimates.append(estimate)
        return torch.stack(errors), torch.stack(estimates)

    def painted(self, codes_ND: Tensor) -> Tensor:
        """Segmentation loss of masks painted for these codes."""
        masks = self.system.generator.paint(self.system.trunk, self.seen, self.scene, codes_ND)
        return F.binary_cross_entropy_with_logits(masks.logits_BTHW.double(), self.clip.masks_BTHW.double())

    def contrastive(self) -> Tensor:
        losses = []
        for i, condition in enumerate(self.conditions):
            score = [torch.cosine_similarity(condition, code, dim=0).exp() for code in self.codes]
            others = [s for j, s in enumerate(score) if j // 3 != i // 3]
            losses.append(-(score[i] / (score[i] + sum(others))).log())
        return torch.stack(losses).mean()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_term_equals_the_formulas(prediction, normalise):
    """Eq. 8, 11 and 12; the decoder gets the code estimated in one step."""
    weights = DiffusionLossConfig(denoising=0.7, contrastive=0.3)
    system = warm(diffusion_config(weights, prediction=prediction, normalise=normalise))
    clip = exact(make_clip())
    literal = Literal(system, clip, step=4)
    assert len(set(literal.level)) > 2
    errors, estimates = literal.frames()
    want = {
        "bce": literal.painted(estimates),
        "denoising": 0.7 * errors.mean(),
        "contrastive": 0.3 * literal.contrastive(),
    }
    got = system.loss_terms(clip, 4)
    assert set(got) == set(want)
    for name, value in want.items():
        tolerance = 2e-5 if name == "bce" else 1e-6  # noise and codes are mixed in float32 steps of the draws
        torch.testing.assert_close(
            got[name].double(), value, rtol=tolerance, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_codes_and_scores_are_observed():
    system, clip = warm(diffusion_config()), exact(make_clip())
    system.loss_terms(clip, 0)
    observed, literal = system.take_observed(), Literal(system, clip, 0)
    assert system.take_observed() == {}
    torch.testing.assert_close(observed["observed/code_std"], literal.codes.std(0, correction=0).mean())
    cosine = torch.stack([torch.cosine_similarity(c[None], literal.codes) for c in literal.conditions])
    other = torch.arange(6)[:, None] // 3 != torch.arange(6) // 3
    torch.testing.assert_close(observed["observed/score_positive"], cosine.diag().mean())
    torch.testing.assert_close(observed["observed/score_negative"], cosine[other].mean())
    assert not any(value.requires_grad for value in observed.values())


@pytest.mark.parametrize("per", ["frame", "clip"])
@pytest.mark.parametrize("normalise", [False, True])
def test_padding_changes_neither_losses_nor_gradients_nor_predictions(per, normalise):
    config = diffusion_config(per=per, normalise=normalise, sampled_share=0.5, clip=5.0, eta=0.5)
    system, clip = build(config).double(), make_clip()
    short, padded = exact(clip), exact(pad(clip, 2))
    want, got = gradients(system, short), gradients(system, padded)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    one, other = system.predict(short), system.predict(padded)
    torch.testing.assert_close(other.logits_BTHW[:, :3], one.logits_BTHW)
    torch.testing.assert_close(other.variance_BTHW[:, :3], one.variance_BTHW)
    assert other.logits_BTHW[:, 3:].abs().max() == 0


def test_losses_do_not_depend_on_the_batch_but_for_the_negatives():
    system, clip = warm(diffusion_config(sampled_share=0.5)), exact(make_clip())
    once, twice = system.loss_terms(clip, 2), system.loss_terms(doubled(clip), 2)
    for name in ("bce", "denoising"):
        torch.testing.assert_close(twice[name], once[name], rtol=1e-6, atol=1e-9)


def test_predictions_depend_on_the_clip_not_on_its_batch():
    system, clip = warm(diffusion_config(eta=1.0)), exact(make_clip())
    alone = Clip(*(getattr(clip, f)[1:] for f in ("frames_BTCHW", "mel_BTFM", "masks_BTHW")),
                 clip.labelled_BT[1:], clip.valid_BT[1:], clip.key[1:])  # fmt: skip
    torch.testing.assert_close(system.predict(alone).logits_BTHW, system.predict(clip).logits_BTHW[1:])
    assert torch.equal(system.predict(clip).logits_BTHW, system.predict(clip).logits_BTHW)
    same = [system.predict(clip, torch.Generator().manual_seed(3)).logits_BTHW for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.allclose(same[0], system.predict(clip).logits_BTHW)


@pytest.mark.parametrize(("prediction", "eta"), [("eps", 0.0), ("v", 0.7), ("x0", 0.0)])
def test_predictions_are_painted_from_codes_sampled_by_the_literal_loop(prediction, eta):
    """Three DDIM steps of 20, trailing: levels 19, 12 (13.33 rounded, less 1) and 6."""
    system, clip = warm(diffusion_config(prediction=prediction, eta=eta)), exact(make_clip())
    draws, sampler = ClipDraws(0, -1, clip.key), system.sampler
    assert sampler.timesteps.tolist() == [19, 12, 6]
    with torch.no_grad():
        seen = see_and_hear(system.trunk, clip)
        scene = system.generator.prepare(system.trunk, seen)
        condition = system.condition_encoder(seen.frames_NCHW, seen.audio_ND)
        alpha = sampler.alphas_cumprod[sampler.timesteps]
        steps = reference.DDIMSteps(alpha, torch.cat([alpha[1:], torch.ones(1, dtype=torch.float64)]))
        weights = system.denoiser._weights(sampler.timesteps)
        each = []
        for name in ("noise/1", "noise/2"):
            noise = draws.normal(name, 3, 4).flatten(0, 1).double()
            inner = draws.normal(f"{name}/steps", 3, 3, 4).flatten(0, 1).transpose(0, 1).double()
            code = reference.ddim_sample(noise, condition, weights, steps, prediction, eta, inner, None)
            each.append(system.generator.paint(system.trunk, seen, scene, code).logits_BTHW.double().sigmoid())
    got = system.predict(clip)
    torch.testing.assert_close(got.probabilities_BTHW.double(), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got.variance_BTHW.double(), torch.stack(each).var(0, correction=0), rtol=1e-2, atol=1e-10
    )
    system.num_samples = 1
    assert system.predict(clip).variance_BTHW is None


def test_the_number_of_denoising_steps_can_be_changed():
    system, clip = warm(diffusion_config()), exact(make_clip())
    before = system.predict(clip).logits_BTHW
    set_num_steps(system, 20)
    assert system.sampler.timesteps.tolist() == list(range(19, -1, -1))
    assert not torch.allclose(system.predict(clip).logits_BTHW, before)
    set_num_steps(system, 3)
    torch.testing.assert_close(system.predict(clip).logits_BTHW, before)
    with pytest.raises(ValueError, match="21"):
        set_num_steps(system, 21)
    with pytest.raises(ValueError, match="TPAVISystem does not denoise"):
        set_num_steps(build_system(make_config()), 2)


def test_a_share_of_the_clips_is_painted_from_sampled_codes():
    """All of them here: then neither mask nor denoiser has a part in what the decoder gets."""
    clip = exact(make_clip())
    paper, sampled = warm(diffusion_config()), warm(diffusion_config(sampled_share=1.0))
    inverted = replace(clip, masks_BTHW=1 - clip.masks_BTHW)

    def logits(system: DiffusionSystem, seen: Clip) -> Tensor:
        painted = []
        forward = system.generator.paint
        system.generator.paint = lambda *args: painted.append(forward(*args)) or painted[-1]  # type: ignore[method-assign]
        system.loss_terms(seen, 0)
        del system.generator.paint
        return painted[0].logits_BTHW

    assert torch.equal(logits(sampled, clip), logits(sampled, inverted))
    assert not torch.allclose(logits(paper, clip), logits(paper, inverted))
    half = warm(diffusion_config(sampled_share=0.5))
    shares = ClipDraws(0, 0, clip.key).uniform("sampled/share") < 0.5
    same_B = (logits(half, clip) == logits(half, inverted)).flatten(1).all(1)
    assert torch.equal(same_B, shares)
    assert shares.tolist() != [False, False]


ABLATIONS = {
    "Table IV none": diffusion_config(DiffusionLossConfig(contrastive=0.0), condition="none"),
    "Table IV audio": diffusion_config(DiffusionLossConfig(contrastive=0.0), condition="audio"),
    "Table IV visual": diffusion_config(DiffusionLossConfig(contrastive=0.0), condition="visual"),
    "visual with contrast, without sound": diffusion_config(
        condition="visual", model={"tpavi": TPAVIConfig(stages=())}
    ),
    "first version": diffusion_config(DiffusionLossConfig(trains="condition")),
    "both directions": diffusion_config(DiffusionLossConfig(symmetric=True)),
    "Table VI": diffusion_config(dim=8),
    "Table VII": diffusion_config(model={"decoder": DecoderConfig("transformer", queries=4, layers=1, heads=4)}),
    "per clip": diffusion_config(per="clip"),
    "skips": diffusion_config(skips=True),
    "linear": diffusion_config(schedule="linear", train_steps=50),
    "sampled": diffusion_config(sampled_share=0.5),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_all_their_parameters_and_predict(name):
    config = ABLATIONS[name]
    system, clip = build(config), make_clip()
    terms = system.loss_terms(clip, 0)
    want = {"bce", "denoising"}
    want |= {"contrastive"} if config.loss.diffusion.contrastive else set()
    want |= {"mix"} if config.model.decoder.kind == "transformer" else set()
    assert set(terms) == want
    torch.stack(list(terms.values())).sum().backward()
    assert [n for n, p in system.named_parameters() if p.grad is None] == []
    assert system.predict(clip).logits_BTHW.isfinite().all()


def test_bfloat16_parameters_give_float32_losses_and_logits():
    system, clip = build(diffusion_config(sampled_share=0.5, normalise=True)).bfloat16(), make_clip()
    terms = system.loss_terms(clip.to("cpu", torch.bfloat16), 0)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in system.parameters())
    assert system.predict(clip.to("cpu", torch.bfloat16)).logits_BTHW.dtype == torch.float32


def test_what_does_not_fit_is_named():
    silent = {"tpavi": TPAVIConfig(stages=())}
    with pytest.raises(ValueError, match="model.diffusion.condition=audio_visual"):
        build(diffusion_config(model=silent))
    with pytest.raises(ValueError, match="loss.diffusion.contrastive=0"):
        build(diffusion_config(condition="none"))
    with pytest.raises(ValueError, match="no public code"):
        build(diffusion_config(model={"compat": "published_code"}))
    with pytest.raises(ValueError, match="model.diffusion.widths"):
        build(diffusion_config(widths=(16, 8, 8), skips=True))


def test_the_codes_do_not_train_the_audio_encoder():
    system, clip = build(diffusion_config()), make_clip()
    terms = system.loss_terms(clip, 0)
    audio = list(system.trunk.audio_encoder.parameters())
    for name, heard in itertools.product(("denoising", "contrastive"), (False,)):
        grads = torch.autograd.grad(terms[name], audio, retain_graph=True, allow_unused=True)
        assert any(g is not None for g in grads) == heard, name
    assert all(g is not None for g in torch.autograd.grad(terms["bce"], audio))


def test_the_masks_train_encoders_and_denoiser_end_to_end():
    """Through the code estimated in one step (section III-C)."""
    system = warm(diffusion_config())
    terms = system.loss_terms(exact(make_clip()), 0)
    for module in (system.mask_encoder, system.condition_encoder, system.denoiser):
        for grad in torch.autograd.grad(terms["bce"], list(module.parameters()), retain_graph=True):
            assert grad.abs().max() > 0

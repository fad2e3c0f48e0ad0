"""ECMVAE as a whole: padding, draws, ablations, the public code; its terms are in test_system_ecmvae_terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_system_tpavi import doubled, gradients, learn, make_clip, make_config, pad

from avs_dist.clip import Clip
from avs_dist.config import Config, DecoderConfig, LatentConfig, LatentLossConfig, LossConfig, NeckConfig, TPAVIConfig
from avs_dist.draws import ClipDraws
from avs_dist.systems import build_system
from avs_dist.systems.ecmvae import ECMVAESystem
from avs_dist.systems.generator import posterior_masks, see_and_hear
from avs_dist.systems.trunk import Existing

TERMS = {"prior", "posterior", "kl", "divergence", "orthogonality", "information"}
ONE_CODE = TERMS - {"kl", "orthogonality", "information"}


def ecmvae_config(latent: LatentConfig | None = None, loss: LatentLossConfig | None = None, **model: object) -> Config:
    config = make_config(system="ecmvae", latent=latent or LatentConfig(dim=4, samples=3), **model)
    return replace(config, loss=LossConfig(segmentation="structure", latent=loss or LatentLossConfig(draws=3)))


def build(config: Config) -> ECMVAESystem:
    torch.manual_seed(0)
    system = build_system(config)
    assert isinstance(system, ECMVAESystem)
    return system


PUBLISHED = ecmvae_config(
    LatentConfig(dim=4, inject="before_tpavi", spatial_noise=0.0),
    compat="published_code",
    neck=NeckConfig("three_layer", 128),
    decoder=DecoderConfig("nearest"),
    tpavi=TPAVIConfig(l2_normalise=True, align_audio=False),
)


def test_it_learns_a_batch_and_every_parameter_has_a_gradient():
    config = ecmvae_config()
    system = build(replace(config, loss=replace(config.loss, segmentation="bce")))
    history = learn(system, make_clip())
    assert set(history[0]) == TERMS
    first, last = (terms["prior"] + terms["posterior"] for terms in (history[0], history[-1]))
    assert last < 0.6 * first


@pytest.fixture
def warm() -> ECMVAESystem:
    """In eval mode and float64, where a clip's losses are those of the formulas, clip by clip."""
    system = build(ecmvae_config()).double()
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    return system.eval()


def exact(clip: Clip) -> Clip:
    return clip.to("cpu", torch.float64)


def test_standardised_codes_leave_nothing_to_gain_from_shrinking(warm):
    """Ours: L_diff and L_sic do not change when the codes are scaled and shifted; as printed they fall."""
    path = warm._paint("prior", warm.generator, *seen_scene_codes(warm), ClipDraws(0, 0, make_clip().key))
    clip, exist = exact(make_clip()), Existing(make_clip().valid_BT)
    small = path._replace(
        codes={name: 0.1 * code + 3.0 for name, code in path.codes.items()},
        fused=[0.1 * code - 2.0 for code in path.fused],
    )
    tiny = path._replace(codes={name: 0.01 * code for name, code in path.codes.items()})
    printed = warm.objective
    assert printed._orthogonality(tiny, clip, exist) < 1e-6 * printed._orthogonality(path, clip, exist)
    ours = build(ecmvae_config(loss=LatentLossConfig(standardise=True))).double().objective
    for name in ("_orthogonality", "_information"):
        arguments = (clip, exist) if name == "_orthogonality" else ()
        want, got = (getattr(ours, name)(p, *arguments) for p in (path, small))
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)  # what VARIANCE_EPS leaves of it
    scaled_NL = ours._scaled(path.codes["c"])
    assert scaled_NL.mean(0).abs().max() < 1e-9
    assert (scaled_NL.var(0, correction=0) - 1).abs().max() < 1e-3


def seen_scene_codes(system: ECMVAESystem) -> tuple:
    with torch.no_grad():
        seen = see_and_hear(system.trunk, exact(make_clip()))
        return seen, system.generator.prepare(system.trunk, seen), system._prior_codes(seen)


def test_padding_changes_neither_losses_nor_gradients_nor_predictions():
    system, clip = build(ecmvae_config()).double(), make_clip()
    short, padded = exact(clip), exact(pad(clip, 2))
    want, got = gradients(system, short), gradients(system, padded)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    one, other = system.predict(short), system.predict(padded)
    torch.testing.assert_close(other.logits_BTHW[:, :3], one.logits_BTHW)
    torch.testing.assert_close(other.variance_BTHW[:, :3], one.variance_BTHW)
    assert other.variance_BTHW[:, 3:].abs().max() == 0


def test_predictions_depend_on_the_clip_not_on_its_batch(warm):
    clip = exact(make_clip())
    alone = Clip(*(getattr(clip, f)[1:] for f in ("frames_BTCHW", "mel_BTFM", "masks_BTHW")),
                 clip.labelled_BT[1:], clip.valid_BT[1:], clip.key[1:])  # fmt: skip
    torch.testing.assert_close(warm.predict(alone).logits_BTHW, warm.predict(clip).logits_BTHW[1:])
    assert torch.equal(warm.predict(clip).logits_BTHW, warm.predict(clip).logits_BTHW)
    same = [warm.predict(clip, torch.Generator().manual_seed(3)).logits_BTHW for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.allclose(same[0], warm.predict(clip).logits_BTHW)


def test_prediction_is_mean_and_variance_over_prior_samples(warm):
    clip = exact(make_clip())
    warm.num_samples = 3
    prediction = warm.predict(clip)
    draws = ClipDraws(0, -1, clip.key)
    with torch.no_grad():
        seen = see_and_hear(warm.trunk, clip)
        scene, codes = warm.generator.prepare(warm.trunk, seen), warm._prior_codes(seen)
        each = torch.stack(
            [
                warm._paint(f"prior/{i}", warm.generator, seen, scene, codes, draws).masks.logits_BTHW.sigmoid()
                for i in (1, 2, 3)
            ]
        )
    torch.testing.assert_close(prediction.probabilities_BTHW, each.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prediction.variance_BTHW, each.var(0, correction=0), rtol=1e-4, atol=1e-8)
    assert prediction.variance_BTHW.max() > 1e-8
    warm.num_samples = 1
    assert warm.predict(clip).variance_BTHW is None


def test_draws_change_with_the_step_and_repeat_with_it(warm):
    clip = exact(make_clip())
    first, again, later = (sum(warm.loss_terms(clip, step).values()).item() for step in (3, 3, 4))
    assert first == again
    assert later != pytest.approx(first, rel=1e-6)


def test_losses_do_not_depend_on_the_batch(warm):
    clip = exact(make_clip())
    once, twice = warm.loss_terms(clip, 2), warm.loss_terms(doubled(clip), 2)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_mask_stands_for_all_seconds_of_an_s4_clip(warm):
    clip = exact(make_clip())
    clip.labelled_BT[:, 1:] = False
    clip.masks_BTHW[:, 1:] = 0
    assert torch.equal(posterior_masks(clip), clip.masks_BTHW[:, :1].expand_as(clip.masks_BTHW))
    repeated = replace(clip, masks_BTHW=clip.masks_BTHW[:, :1].expand_as(clip.masks_BTHW))
    for name, value in warm.loss_terms(repeated, 0).items():
        torch.testing.assert_close(warm.loss_terms(clip, 0)[name], value)
    other = replace(clip, masks_BTHW=clip.masks_BTHW.clone())
    other.masks_BTHW[:, 0] = 1 - clip.masks_BTHW[:, 0]
    for name in ("s_v", "s_a", "c"):
        moved_BTL = (warm.latents(other).posterior[name].mean - warm.latents(clip).posterior[name].mean).abs()
        assert (moved_BTL.amax(2) > 1e-6).all()  # also of the seconds without a mask of their own


def test_masks_are_carried_forward_and_the_first_one_back():
    clip = make_clip(batch=2, frames=5, size=8)
    clip.labelled_BT[:] = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    own = clip.masks_BTHW
    got = posterior_masks(clip)
    for row, source in ((0, [1, 1, 1, 3, 3]), (1, [0, 0, 0, 0, 4])):
        assert torch.equal(got[row], own[row, source])


ABLATIONS = {
    "Table 2 CVAE": (ecmvae_config(LatentConfig(factorise=False), tpavi=TPAVIConfig(stages=())), ONE_CODE),
    "Table 2 CMVAE": (ecmvae_config(LatentConfig(factorise=False), LatentLossConfig("kl")), ONE_CODE),
    "Table 3 48": (ecmvae_config(LatentConfig(factorise=False, dim=48), LatentLossConfig("kl")), ONE_CODE),
    "Table 3 AE": (ecmvae_config(LatentConfig(kind="ae")), {"prior", "orthogonality", "information"}),
    "Table 4 KL": (ecmvae_config(loss=LatentLossConfig("kl")), TERMS),
    "Table 4 PoE": (ecmvae_config(LatentConfig(joint="poe"), LatentLossConfig("kl")), TERMS),
    "Table 4 MoE": (ecmvae_config(LatentConfig(joint="moe"), LatentLossConfig("kl")), TERMS),
    "MoE with JS": (ecmvae_config(LatentConfig(joint="moe"), LatentLossConfig("js")), TERMS),
    "geometric JS": (ecmvae_config(loss=LatentLossConfig("js_geometric")), TERMS),
    "Table 5 none": (
        ecmvae_config(loss=LatentLossConfig(orthogonality=0.0, information=0.0)),
        TERMS - {"orthogonality", "information"},
    ),
    "Table 5 diff": (ecmvae_config(loss=LatentLossConfig(information=0.0)), TERMS - {"information"}),
    "Table 5 sic": (ecmvae_config(loss=LatentLossConfig(orthogonality=0.0)), TERMS - {"orthogonality"}),
    "standardised": (ecmvae_config(loss=LatentLossConfig(standardise=True)), TERMS),
    "before TPAVI": (ecmvae_config(LatentConfig(inject="before_tpavi")), TERMS),
    "public code": (PUBLISHED, TERMS),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_have_their_terms_and_train_all_their_parameters(name):
    config, terms = ABLATIONS[name]
    system, clip = build(config), make_clip()
    assert set(system.loss_terms(clip, 0)) == terms
    sum(system("loss_terms", clip, 0).values()).backward()
    left = [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert left == []
    prediction = system.predict(clip)
    assert (prediction.variance_BTHW is None) == (system.num_samples is None) == (config.model.latent.kind == "ae")
    codes = system.latents(clip)
    assert set(codes.prior) == ({"s_v", "s_a", "c"} if config.model.latent.factorise else {"z"})
    assert set(codes.posterior) == (set() if config.model.latent.kind == "ae" else set(codes.prior))


def test_public_code_paints_the_posterior_with_a_generator_of_its_own():
    """Its necks, fusion and decoder; test_system_ecmvae_terms has the losses."""
    system, clip = build(PUBLISHED).eval(), make_clip()
    assert system.posterior_generator is not None
    terms = system.loss_terms(clip, 0)
    for parameter in system.posterior_generator.parameters():
        torch.nn.init.normal_(parameter)
    changed = system.loss_terms(clip, 0)
    assert changed["prior"].item() == terms["prior"].item()
    assert changed["posterior"].item() != pytest.approx(terms["posterior"].item(), rel=1e-3)


def test_bfloat16_parameters_give_float32_losses_and_predictions():
    system = build(ecmvae_config()).bfloat16()
    clip = make_clip().to("cpu", torch.bfloat16)
    terms = system.loss_terms(clip, 0)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())
    prediction = system.predict(clip)
    assert prediction.logits_BTHW.dtype == prediction.variance_BTHW.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ecmvae_config(tpavi=TPAVIConfig(stages=())), r"model\.latent: without sound.*factorise=false"),
        (ecmvae_config(LatentConfig(factorise=False, joint="poe"), tpavi=TPAVIConfig(key="visual")), "joint=fused"),
        (ecmvae_config(LatentConfig(joint="moe"), LatentLossConfig("js_geometric")), r"joint=moe.*geometric mean"),
        (ecmvae_config(LatentConfig(kind="ae", joint="poe")), r"joint=poe.*kind=ae"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


def test_frames_of_any_size():
    """Frames need not be square, nor of 224 pixels."""
    system = build(ecmvae_config())
    clip = make_clip(size=64)
    wide = replace(clip, frames_BTCHW=F.pad(clip.frames_BTCHW, (0, 32)), masks_BTHW=F.pad(clip.masks_BTHW, (0, 32)))
    assert system.predict(wide).logits_BTHW.shape == (2, 3, 64, 96)
    sum(system.loss_terms(wide, 0).values()).backward()

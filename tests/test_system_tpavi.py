"""The TPAVI system as a whole: losses, padding, prediction, freezing, precision, every option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avs_dist.clip import Clip
from avs_dist.config import (
    AudioConfig,
    BackboneConfig,
    Config,
    LossConfig,
    ModelConfig,
    NeckConfig,
    TPAVIConfig,
)
from avs_dist.losses.alignment import ms3_kl
from avs_dist.modules.audio import VGGish
from avs_dist.systems import build_system
from avs_dist.systems.base import System
from avs_dist.systems.tpavi import TPAVISystem

BATCH, FRAMES, SIZE = 2, 3, 64


def make_config(**model) -> Config:
    small = ModelConfig(
        backbone=BackboneConfig("resnet10t"),
        audio=AudioConfig("logmel_cnn"),
        neck=NeckConfig("one_layer", 16),
        tpavi=TPAVIConfig(time_aligned=True),
    )
    return Config(model=replace(small, **model))


def make_clip(batch: int = BATCH, frames: int = FRAMES, size: int = SIZE) -> Clip:
    torch.manual_seed(7)
    return Clip(
        frames_BTCHW=torch.randn(batch, frames, 3, size, size),
        mel_BTFM=torch.randn(batch, frames, 96, 64),
        masks_BTHW=torch.randint(0, 2, (batch, frames, size, size), dtype=torch.uint8),
        labelled_BT=torch.ones(batch, frames, dtype=torch.bool),
        valid_BT=torch.ones(batch, frames, dtype=torch.bool),
        key=tuple(f"clip{i}" for i in range(batch)),
    )


def doubled(clip: Clip) -> Clip:
    """The same clips twice in one batch."""
    fields = ("frames_BTCHW", "mel_BTFM", "masks_BTHW", "labelled_BT", "valid_BT")
    return Clip(*(torch.cat([getattr(clip, field)] * 2) for field in fields), clip.key * 2)


def pad(clip: Clip, frames: int) -> Clip:
    """The clip with `frames` padded frames of rubbish behind."""

    def rubbish(value: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([value, torch.full_like(value[:, :frames], fill)], 1)

    return replace(
        clip,
        frames_BTCHW=rubbish(clip.frames_BTCHW, 3.0),
        mel_BTFM=rubbish(clip.mel_BTFM, -2.0),
        masks_BTHW=rubbish(clip.masks_BTHW, 1),
        labelled_BT=rubbish(clip.labelled_BT, True),
        valid_BT=rubbish(clip.valid_BT, False),
    )


@pytest.fixture
def system() -> TPAVISystem:
    torch.manual_seed(0)
    built = build_system(make_config())
    assert isinstance(built, TPAVISystem)
    for block in built.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)  # zero at initialisation: the sound would have no influence yet
    return built


def gradients(system: TPAVISystem, clip: Clip) -> dict[str, torch.Tensor]:
    system.zero_grad()
    sum(system("loss_terms", clip, 0).values()).backward()
    return {name: p.grad.clone() for name, p in system.named_parameters()}


def learn(system: System, clip: Clip, steps: int = 12) -> list[dict[str, float]]:
    """Loss terms of steps on one batch, whose masks are a fixed corner; every parameter must get a gradient."""
    clip.masks_BTHW.zero_()
    clip.masks_BTHW[:, :, :20, :30] = 1
    optimiser = torch.optim.AdamW(system.parameter_groups(), lr=3e-3)
    history = []
    for step in range(steps):
        optimiser.zero_grad()
        terms = system.loss_terms(clip, step)
        torch.stack(list(terms.values())).sum().backward()
        assert all(p.grad is not None for p in system.parameters())
        optimiser.step()
        history.append({name: value.item() for name, value in terms.items()})
    return history


def test_it_learns_a_batch_and_every_parameter_has_a_gradient(system):
    history = learn(system, make_clip())
    assert set(history[0]) == {"bce"}
    assert history[0]["bce"] == pytest.approx(0.69, abs=0.15)
    assert history[-1]["bce"] < 0.5 * history[0]["bce"]


def test_padding_changes_neither_losses_nor_gradients_nor_masks(system):
    clip = make_clip()
    system.double()
    short, padded = clip.to("cpu", torch.float64), pad(clip, 2).to("cpu", torch.float64)
    want, got = gradients(system, short), gradients(system, padded)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    want_logits, got_logits = (system.predict(c).logits_BTHW for c in (short, padded))
    torch.testing.assert_close(got_logits[:, :FRAMES], want_logits)
    assert got_logits[:, FRAMES:].abs().max() == 0


def test_only_labelled_frames_are_counted(system):
    clip = make_clip()
    clip.labelled_BT[:, 1:] = False
    other = replace(clip, masks_BTHW=clip.masks_BTHW.clone())
    other.masks_BTHW[:, 1:] = 1 - other.masks_BTHW[:, 1:]
    first, second = (system.loss_terms(c, 0)["bce"].item() for c in (clip, other))
    assert first == pytest.approx(second)
    other.masks_BTHW[:, 0] = 1 - other.masks_BTHW[:, 0]
    assert system.loss_terms(other, 0)["bce"].item() != pytest.approx(first, rel=1e-6)


def test_predict_is_deterministic_without_gradient_and_leaves_the_mode(system):
    clip = make_clip(size=72)
    system.train()
    first, second = system("predict", clip).logits_BTHW, system.predict(clip).logits_BTHW
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.dtype == torch.float32
    assert first.shape == (BATCH, FRAMES, 72, 72)
    assert system.training
    assert system.trunk.blocks["0"].training


@pytest.mark.parametrize("time_aligned", [True, False])
def test_only_the_time_aligned_block_tells_seconds_of_equal_frames_apart(time_aligned):
    """A still picture whose sound changes each second: the published block cannot follow (sound interruption)."""
    torch.manual_seed(0)
    system = build_system(make_config(tpavi=TPAVIConfig(time_aligned=time_aligned))).double()
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    clip = make_clip().to("cpu", torch.float64)
    still = replace(clip, frames_BTCHW=clip.frames_BTCHW[:, :1].expand_as(clip.frames_BTCHW))
    with torch.no_grad():  # in training mode, as running statistics have not been collected yet
        logits_BTHW = system._paint(still)[1].logits_BTHW
    difference = (logits_BTHW - logits_BTHW[:, :1]).abs().max().item()
    assert (difference > 1e-3) if time_aligned else (difference < 1e-6), difference


@pytest.mark.parametrize("avm", ["s4_cosine", "ms3_kl", "ms3_euclidean", "visual_visual", "avss_kl"])
def test_matching_losses_do_not_depend_on_the_batch(avm):
    torch.manual_seed(0)
    system = build_system(replace(make_config(), loss=LossConfig(avm=avm, avm_weight=0.5))).eval()
    clip = make_clip()
    once_value = system.loss_terms(clip, 0)["avm"]
    twice_value = system.loss_terms(doubled(clip), 0)["avm"]
    if avm == "visual_visual":  # the nearest other frame is now the frame's own copy
        assert once_value > 1e-6
        assert twice_value.item() == pytest.approx(0.0, abs=1e-6)
    else:
        assert twice_value.item() == pytest.approx(once_value.item(), rel=1e-5)


def test_published_code_sums_the_kl_over_frames_and_rectifies_the_features():
    config = replace(make_config(), loss=LossConfig(avm="ms3_kl", avm_weight=1.0))
    torch.manual_seed(0)
    paper = build_system(config).eval()
    code = build_system(replace(config, model=replace(config.model, compat="published_code"))).eval()
    code.load_state_dict(paper.state_dict())
    clip = make_clip()
    seen, masks = code._paint(clip)
    features = code.generator.prepare(code.trunk, seen).features
    want = 0.0
    for stage in range(4):
        audio = code.trunk.project_audio(seen.audio_BTD, stage)
        want += ms3_kl(masks.logits_BTHW, features[stage].relu(), audio).sum().item() / 4
    assert code.loss_terms(clip, 0)["avm"].item() == pytest.approx(want, rel=1e-5)
    assert code.loss_terms(doubled(clip), 0)["avm"].item() == pytest.approx(2 * want, rel=1e-5)
    assert not torch.allclose(paper.predict(clip).logits_BTHW, code.predict(clip).logits_BTHW)


def test_vggish_is_frozen_and_not_optimised(tmp_path):
    torch.manual_seed(0)
    torch.save(VGGish().state_dict(), tmp_path / "vggish.pth")
    audio = AudioConfig("vggish", str(tmp_path / "vggish.pth"))
    system = build_system(make_config(audio=audio, tpavi=TPAVIConfig(stages=(3,))))
    optimised = {id(p) for group in system.parameter_groups() for p in group["params"]}
    assert not optimised & {id(p) for p in system.trunk.audio_encoder.parameters()}
    assert optimised == {id(p) for p in system.parameters() if p.requires_grad}
    system.train()
    assert not system.trunk.audio_encoder.training
    sum(system.loss_terms(make_clip(), 0).values()).backward()
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)
    # a checkpoint is enough to predict: the weights file is not asked for
    build_system(make_config(audio=AudioConfig("vggish", "gone.pth"), tpavi=TPAVIConfig(stages=(3,))), False)


@pytest.mark.parametrize("stages", [(), (1, 3)])
@pytest.mark.parametrize("key", ["audio", "visual", "both"])
def test_stages_and_keys(stages, key):
    system = build_system(make_config(tpavi=TPAVIConfig(stages=stages, key=key)))
    assert (system.trunk.audio_encoder is not None) == (bool(stages) and key != "visual")
    system.loss_terms(make_clip(), 0)["bce"].backward()
    assert all(p.grad is not None for p in system.parameters())


def test_published_configuration_and_literal_block():
    tpavi = TPAVIConfig(stages=(2, 3), implementation="literal")
    torch.manual_seed(0)
    slow = build_system(make_config(neck=NeckConfig("dilated", 16), tpavi=tpavi))
    fast = build_system(make_config(neck=NeckConfig("dilated", 16), tpavi=replace(tpavi, implementation="auto")))
    fast.load_state_dict(slow.state_dict())
    clip = make_clip()
    torch.testing.assert_close(slow.loss_terms(clip, 0)["bce"], fast.loss_terms(clip, 0)["bce"])


def test_bfloat16_parameters_give_float32_losses_and_logits(system):
    system.bfloat16()
    clip = make_clip().to("cpu", torch.bfloat16)
    loss = system.loss_terms(clip, 0)["bce"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())
    assert system.predict(clip).logits_BTHW.dtype == torch.float32


def test_wrong_stages_are_named():
    with pytest.raises(ValueError, match=r"model\.tpavi\.stages.*\[4\]"):
        build_system(make_config(tpavi=TPAVIConfig(stages=(4,))))
    loss = LossConfig(avm="ms3_kl", avm_stages=(0, 1))
    with pytest.raises(ValueError, match=r"loss\.avm_stages.*\[0, 1\].*\[1\]"):
        build_system(replace(make_config(tpavi=TPAVIConfig(stages=(1,))), loss=loss))
    with pytest.raises(ValueError, match=r"loss\.avm_stages.*at least one"):
        build_system(replace(make_config(), loss=LossConfig(avm="ms3_kl", avm_stages=())))

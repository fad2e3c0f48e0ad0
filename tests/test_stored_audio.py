"""Sound that the shards hold encoded: the systems get the same numbers without their encoder, or refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from query_runs import UNICODE, build_query, query_config, save_run, text_clip, unicode_run
from safetensors.torch import save_file
from test_system_tpavi import make_config
from torch import Tensor, nn

from avs_dist import trainer
from avs_dist.clip import Clip
from avs_dist.config import AudioConfig, BackboneConfig, Config, DataConfig, TPAVIConfig, TrainConfig
from avs_dist.launch.evaluate import load_for_shards
from avs_dist.modules.audio import VGGish, build_audio_encoder
from avs_dist.sequences import Sequences
from avs_dist.shards.index import ShardIndex
from avs_dist.stored_audio import check_stored_audio, weights_sha256
from avs_dist.systems import build_system

VGGISH = AudioConfig("vggish", "not-read.pth")


@pytest.fixture(scope="module")
def vggish() -> VGGish:
    """Seeded weights; the numbers differ between seconds."""
    torch.manual_seed(11)
    network = VGGish()
    with torch.no_grad():
        network.embeddings[4].weight.mul_(50)
    return network


@pytest.fixture
def clip(vggish: VGGish) -> Clip:
    """Two clips of three and two seconds that also hold what VGGish makes of their sound; the encoder may not run."""
    clip = text_clip()
    clip.valid_BT[1, 2] = False
    clip.labelled_BT[1, 2] = False
    heard_BTD = vggish(clip.mel_BTFM.flatten(0, 1)).unflatten(0, (2, 3)) * clip.valid_BT[..., None]
    assert heard_BTD.flatten(0, 1)[:5].std(0).max() > 0.1
    return replace(clip, audio_BTD=heard_BTD)


def must_not_run(module: nn.Module, args: Any) -> None:
    raise AssertionError("the encoder runs")


def losses(system: nn.Module, batch: Clip | Sequences) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return system.loss_terms(batch, 0)


def assert_the_same_without_encoder(system: nn.Module, encoder: nn.Module, stored: Clip | Sequences) -> None:
    """Losses and gradients; and that the sound matters to them."""
    results = []
    for batch in (replace(stored, audio_BTD=None), stored):
        hook = encoder.register_forward_pre_hook(must_not_run) if batch is stored else None
        system.zero_grad()
        state = {name: value.clone() for name, value in system.named_buffers()}
        terms = losses(system, batch)
        torch.stack(list(terms.values())).sum().backward()
        for name, value in system.named_buffers():
            value.copy_(state[name])
        results.append((terms, {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}))
        if hook is not None:
            other = losses(system, replace(stored, audio_BTD=stored.audio_BTD.flip(0) + 1))
            hook.remove()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-5)
    assert any(abs(other[name] - value) > 1e-4 for name, value in results[0][0].items())


@pytest.mark.parametrize("name", ["tpavi", "ecmvae", "diffusion"])
def test_losses_are_those_of_the_encoder_which_does_not_run(name, clip, vggish):
    torch.manual_seed(0)
    system = build_system(make_config(system=name, audio=VGGISH), load_pretrained=False).train()
    system.trunk.audio_encoder = vggish
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)  # zero at initialisation: the sound would have no influence yet
    assert_the_same_without_encoder(system, vggish, clip)
    with torch.no_grad():
        with_encoder = system.predict(replace(clip, audio_BTD=None)).logits_BTHW
        torch.testing.assert_close(system.predict(clip).logits_BTHW, with_encoder, rtol=1e-4, atol=1e-5)


def test_queries_hear_the_stored_sound(clip, vggish, tmp_path):
    settings = replace(UNICODE, inputs="features", modalities=("audio", "text"))
    trained = unicode_run(tmp_path / "unicode", settings)
    system = build_query(query_config(tmp_path, unicode=settings, audio=VGGISH), load_pretrained=False)
    weights = trained.state_dict()
    system.encoder.unicode.load_state_dict({name: weights[name] for name in system.encoder.unicode.state_dict()})
    system.encoder.audio_encoder = vggish
    assert_the_same_without_encoder(system, vggish, clip)


def test_queries_of_media_hear_the_stored_sound(clip, vggish, tmp_path):
    settings = replace(UNICODE, modalities=("audio", "text"))
    system = build_query(query_config(tmp_path, unicode=settings, audio=VGGISH), load_pretrained=False)
    system.encoder.unicode.inputs.audio_encoder = vggish
    assert_the_same_without_encoder(system, vggish, clip)


def test_codebooks_of_media_hear_the_stored_sound(clip, vggish):
    settings = replace(UNICODE, modalities=("audio", "visual"), dropout=0.0)
    config = make_config(system="unicode", unicode=settings, audio=VGGISH, backbone=BackboneConfig("test_resnet"))
    torch.manual_seed(0)
    system = build_system(config, load_pretrained=False).train()
    system.inputs.audio_encoder = vggish
    inputs = {"audio": clip.mel_BTFM * clip.valid_BT[..., None, None], "visual": clip.frames_BTCHW}
    valid = {"audio": clip.valid_BT, "visual": clip.valid_BT}
    assert_the_same_without_encoder(system, vggish, Sequences(inputs, valid, {}, clip.key, clip.audio_BTD))


def test_weights_are_known_by_their_values_not_their_file(vggish, tmp_path):
    save_file(vggish.state_dict(), tmp_path / "vggish.safetensors")
    known = weights_sha256(vggish)
    assert re.fullmatch("[0-9a-f]{64}", known)
    assert weights_sha256(build_audio_encoder("vggish", str(tmp_path / "vggish.safetensors"))) == known
    linear, same = nn.Linear(2, 3), nn.Linear(2, 3)
    same.load_state_dict(linear.state_dict())
    assert weights_sha256(same) == weights_sha256(linear)
    assert weights_sha256(nn.Sequential(linear)) != weights_sha256(linear)  # the same values under other names
    with torch.no_grad():
        same.bias[1] += 1e-6
    assert weights_sha256(same) != weights_sha256(linear)


def index_of(shards: Path, folder: Path, sha256: str) -> ShardIndex:
    """An index that says its clips hold the output of such an encoder."""
    folder.mkdir()
    index = ShardIndex.load(shards)
    encoder = {"kind": "vggish", "weights_sha256": sha256, "silence": [0.0] * 128}
    marked = replace(index, directory=folder, settings={**index.settings, "audio_encoder": encoder})
    marked.save()
    return marked


def test_only_the_same_frozen_encoder_takes_stored_sound(vggish, ms3_shards, tmp_path):
    right, wrong = (index_of(ms3_shards, tmp_path / s[0], s) for s in (weights_sha256(vggish), "f" * 64))
    system = build_system(make_config(audio=VGGISH), load_pretrained=False)
    system.trunk.audio_encoder = vggish
    check_stored_audio(system, right)
    check_stored_audio(system, ShardIndex.load(ms3_shards))
    said = f"holds the output of vggish with weights {'f' * 12}, those of this model's vggish are "
    with pytest.raises(ValueError, match=f"{said}{weights_sha256(vggish)[:12]}: .*shards embed"):
        check_stored_audio(system, wrong)
    learns = build_system(make_config())
    with pytest.raises(ValueError, match="model.audio.kind=logmel_cnn learns its own: .*model.audio.kind=vggish"):
        check_stored_audio(learns, right)
    # a system that does not listen
    check_stored_audio(build_system(make_config(tpavi=TPAVIConfig(stages=()))), wrong)


def test_training_and_evaluation_look_before_they_begin(ms3_shards, tmp_path):
    index = index_of(ms3_shards, tmp_path / "shards", "f" * 64)
    data = DataConfig(shards=str(index.directory), workers=0)
    config: Config = replace(make_config(), data=data, train=TrainConfig(max_steps=1, out_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="logmel_cnn learns its own"):
        trainer.train(config)
    plain = replace(config, data=replace(data, shards=str(ms3_shards)))
    save_run(tmp_path / "saved", plain, build_system(plain))
    load_for_shards(str(tmp_path / "saved"), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="logmel_cnn learns its own"):
        load_for_shards(str(tmp_path / "saved"), str(index.directory), torch.device("cpu"))

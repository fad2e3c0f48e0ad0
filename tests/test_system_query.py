"""Segmentation by queries: what TPAVI hears, what is frozen, what learns, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from query_runs import UNICODE, WORD, build_query, one, query_config, save_run, text_clip, unicode_run
from test_system_tpavi import make_clip, make_config, pad
from torch import Tensor

from avs_dist.checkpoint import load_system
from avs_dist.clip import Clip
from avs_dist.config import AudioConfig, BackboneConfig, Config, DecoderConfig, LossConfig, QueryConfig, TPAVIConfig
from avs_dist.modules.audio import VGGish
from avs_dist.systems import build_system
from avs_dist.systems.query import QuerySystem, set_query
from avs_dist.systems.unicode import UnicodeSystem

QUERIES = ["audio", "text"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unicode"
    unicode_run(folder)
    return folder


@pytest.fixture
def system(run) -> QuerySystem:
    return build_query(query_config(run))


def heard(system: QuerySystem, clip: Clip) -> list[Tensor]:
    """What each TPAVI block gets beside the picture in a prediction."""
    found: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, given: found.append(given[1])) for b in system.trunk.blocks.values()]
    system.predict(clip)
    for hook in hooks:
        hook.remove()
    return found


def codes_by_hand(unicode: UnicodeSystem, query: str, features_SC: Tensor) -> Tensor:
    """Nearest code of each second or word of one clip [S,D]."""
    with torch.no_grad():
        everything = torch.ones(1, len(features_SC), dtype=torch.bool)
        read = unicode.networks[query].semantic_features(features_SC[None], everything)
        encoder = unicode.encoders["shared" if "shared" in unicode.encoders else query]
        z_SD = encoder(unicode.projections[query](read), everything)[0].double()
    codes_LD = unicode.codebook.codes.double()
    return codes_LD[(z_SD[:, None] - codes_LD).square().sum(2).argmin(1)].float()


@pytest.mark.parametrize("shared", [False, True])
def test_tpavi_hears_the_code_of_each_second_or_the_mean_code_of_the_words(tmp_path, shared):
    settings = replace(UNICODE, shared_encoder=shared)
    unicode = unicode_run(tmp_path / "unicode", settings)
    system, clip = build_query(query_config(tmp_path / "unicode", unicode=settings)), text_clip()
    clip.valid_BT[1, 2] = False
    sound = [
        codes_by_hand(unicode, "audio", unicode.inputs.audio_encoder(clip.mel_BTFM[b, :n])) for b, n in ((0, 3), (1, 2))
    ]
    words = [codes_by_hand(unicode, "text", clip.text_BWE[b, :n]).mean(0).expand(3, -1) for b, n in ((0, 5), (1, 2))]
    want = {"audio": torch.nn.utils.rnn.pad_sequence(sound, batch_first=True), "text": torch.stack(words)}
    want["text"] = want["text"] * clip.valid_BT[..., None]
    assert len({tuple(code.tolist()) for code in want["audio"][0]}) > 1
    for query in QUERIES:
        set_query(system, query)
        blocks = heard(system, clip)
        assert len(blocks) == 4
        for codes_BTD in blocks:
            torch.testing.assert_close(codes_BTD, want[query])


def test_stored_features_of_sound_are_those_of_vggish(tmp_path):
    settings = replace(UNICODE, inputs="features", modalities=("audio", "text"))
    unicode = unicode_run(tmp_path / "unicode", settings)
    torch.manual_seed(5)
    vggish = VGGish()
    torch.save(vggish.state_dict(), tmp_path / "vggish.pth")
    audio = AudioConfig("vggish", str(tmp_path / "vggish.pth"))
    system = build_query(query_config(tmp_path / "unicode", unicode=settings, audio=audio))
    clip = text_clip()
    clip.mel_BTFM.mul_(torch.linspace(1, 50, 6).view(2, 3, 1, 1))
    clip.valid_BT[1, 2] = False
    second = codes_by_hand(unicode, "audio", vggish(clip.mel_BTFM[1, :2]))
    for codes_BTD in heard(system, clip):
        torch.testing.assert_close(codes_BTD[0], codes_by_hand(unicode, "audio", vggish(clip.mel_BTFM[0])))
        torch.testing.assert_close(codes_BTD[1, :2], second)
        assert codes_BTD[1, 2].abs().max() == 0
    optimised = {id(p) for group in system.parameter_groups() for p in group["params"]}
    assert not optimised & {id(p) for p in system.encoder.audio_encoder.parameters()}
    # a checkpoint is enough to predict
    gone = query_config(tmp_path / "gone", unicode=settings, audio=AudioConfig("vggish", "gone.pth"))
    build_system(gone, load_pretrained=False)


def train(system: QuerySystem, clip: Clip, steps: int = 12) -> list[float]:
    optimiser = torch.optim.AdamW(system.parameter_groups(), lr=3e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = system("loss_terms", clip, step)["bce"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("query", QUERIES)
def test_it_learns_while_all_of_the_encoder_stays_as_it_was(run, query):
    system, clip = build_query(query_config(run, query=QueryConfig(str(run), query))), text_clip()

    def summing(value: Tensor) -> Tensor:
        raise AssertionError("a frozen codebook waits for other ranks")

    system.encoder.unicode.codebook.reduce = summing
    before, trunk = copy.deepcopy(system.encoder.state_dict()), copy.deepcopy(system.trunk.state_dict())
    assert system.query == query
    first = system.encoder(clip, query)
    losses = train(system, clip)
    assert losses[-1] < 0.5 * losses[0]
    assert system.training
    assert system.trunk.training
    assert not any(module.training for module in system.encoder.modules())
    assert torch.equal(system.encoder(clip, query), first)  # half of the network would be dropped
    assert not first.requires_grad
    for name, value in system.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = {name for name, value in system.trunk.state_dict().items() if not torch.equal(value, trunk[name])}
    assert any("running_var" in name for name in moved)
    assert {name for name, _ in system.trunk.named_parameters()} <= moved


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ({}, LossConfig(avm="ms3_kl")),
        ({"tpavi": TPAVIConfig(stages=(3,), key="both")}, LossConfig(avm="visual_visual", avm_stages=(3,))),
        ({"decoder": DecoderConfig("transformer", 4, 1, 2), "tpavi": TPAVIConfig(stages=())}, LossConfig("dice")),
    ],
    ids=["audio", "both", "transformer"],
)
@pytest.mark.parametrize("query", QUERIES)
def test_every_trainable_parameter_gets_a_gradient(run, model, loss, query):
    config = query_config(run, query=QueryConfig(str(run), query), **model)
    system = build_query(replace(config, loss=loss))
    terms = system.loss_terms(text_clip(), 0)
    assert set(terms) == {loss.segmentation} | ({"mix"} if "decoder" in model else {"avm"})
    sum(terms.values()).backward()
    missing = [name for name, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = {name for name, p in system.named_parameters() if not p.requires_grad}
    assert frozen == {f"encoder.{name}" for name, _ in system.encoder.named_parameters()}


def test_training_asks_as_configured_whatever_predictions_ask(system):
    clip = text_clip()
    before = system.loss_terms(clip, 0)["bce"].item()
    set_query(system, "text")
    assert system.loss_terms(clip, 0)["bce"].item() == pytest.approx(before, rel=1e-6)


def test_each_query_asks_alone(system):
    clip = text_clip()
    other_words = replace(clip, text_BWE=-clip.text_BWE)
    other_sound = replace(clip, mel_BTFM=-3 * clip.mel_BTFM)
    by_sound, deaf = (system.predict(c).logits_BTHW for c in (clip, other_sound))
    assert torch.equal(system.predict(replace(clip, text_BWE=None, text_valid_BW=None)).logits_BTHW, by_sound)
    assert not torch.allclose(by_sound, deaf)
    set_query(system, "text")
    by_words = system.predict(clip).logits_BTHW
    assert torch.equal(system.predict(other_sound).logits_BTHW, by_words)
    assert not torch.allclose(system.predict(other_words).logits_BTHW, by_words)
    assert not torch.allclose(by_sound, by_words)
    assert by_words.shape == (2, 3, 64, 64)
    assert by_words.dtype == torch.float32


@pytest.mark.parametrize("query", QUERIES)
def test_a_clip_has_the_same_masks_in_any_batch(system, query):
    set_query(system.double(), query)
    clip = text_clip().to("cpu", torch.float64)
    padded = system.predict(pad(clip, 2)).logits_BTHW
    assert padded[:, 3:].abs().max() == 0
    for index, words in ((0, 5), (1, 2)):
        alone = system.predict(one(clip, index, words)).logits_BTHW[0]
        torch.testing.assert_close(padded[index, :3], alone, rtol=1e-6, atol=1e-8)


def test_bfloat16_parameters_give_float32_losses_and_logits(system):
    system.bfloat16()
    clip = text_clip().to("cpu", torch.bfloat16)
    assert clip.text_BWE.dtype == torch.bfloat16
    for query in QUERIES:
        set_query(system, query)
        assert system.predict(clip).logits_BTHW.dtype == torch.float32
    loss = system.loss_terms(clip, 0)["bce"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.requires_grad)


def test_the_checkpoint_needs_no_run_of_unicode_and_holds_no_picture_of_it(tmp_path):
    trained = unicode_run(tmp_path / "unicode")
    config = query_config(tmp_path / "unicode")
    system, clip = build_query(config), text_clip()
    kept = {name.removeprefix("unicode."): value for name, value in system.encoder.state_dict().items()}
    parts = ("inputs.audio_encoder.", "networks.audio.", "networks.text.", "projections.", "encoders.", "codebook.")
    heard = {name for name in trained.state_dict() if name.startswith(parts) and ".visual." not in name}
    assert set(kept) == heard
    assert all(torch.equal(kept[name], trained.state_dict()[name]) for name in heard - {"codebook.idle"})
    save_run(tmp_path / "query", config, system)
    (tmp_path / "unicode").rename(tmp_path / "elsewhere")
    again, _ = load_system(tmp_path / "query")
    for query in QUERIES:
        for each in (system, again):
            set_query(each, query)
        assert torch.equal(again.predict(clip).logits_BTHW, system.predict(clip).logits_BTHW)


def refused(config: Config, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        build_system(config)


def test_settings_that_do_not_fit_are_named(run):
    other = replace(UNICODE, layers=2, codebook=replace(UNICODE.codebook, num_codes=9))
    refused(
        query_config(run, unicode=other),
        r"model\.query\.checkpoint: .*set model\.unicode\.layers=1 \(here 2\), "
        r"model\.unicode\.codebook\.num_codes=256 \(here 9\)$",
    )
    refused(
        query_config(run, audio=AudioConfig("vggish", "w.pth")), r"set model\.audio\.kind=logmel_cnn \(here vggish\)$"
    )
    pair = replace(UNICODE, modalities=("audio", "visual"))
    refused(query_config(run, unicode=pair), r"model\.unicode\.modalities=.*audio and text")
    stored = replace(UNICODE, inputs="features")
    refused(query_config(run, unicode=stored), r"model\.audio\.kind=logmel_cnn, .*vggish")
    wide = query_config(run, unicode=replace(stored, audio_channels=64), audio=AudioConfig("vggish", "w.pth"))
    refused(wide, r"audio_channels=64.*gives 128")
    refused(query_config(run, tpavi=TPAVIConfig(stages=())), r"model\.tpavi\.stages=\[\].*nothing listens")
    refused(query_config(run, tpavi=TPAVIConfig(key="visual")), r"model\.tpavi\.key=visual.*nothing listens")
    loss = LossConfig(avm="ms3_kl", avm_stages=(0,))
    refused(replace(query_config(run, tpavi=TPAVIConfig(stages=(1,))), loss=loss), r"loss\.avm_stages")
    refused(query_config(run, num_classes=3), r"loss\.segmentation=bce")
    # settings of Uni-Code's picture are of no concern, but for what the codes were trained with
    build_system(query_config(run, backbone=BackboneConfig("test_resnet")))


def test_checkpoints_that_are_none_of_unicode_are_refused(run, tmp_path):
    refused(query_config(run, query=QueryConfig()), r"model\.query\.checkpoint: name a run")
    gone = query_config(tmp_path / "gone")
    refused(gone, r"model\.query\.checkpoint: no checkpoint in .*gone", FileNotFoundError)
    plain = make_config()
    save_run(tmp_path / "tpavi", plain, build_system(plain))
    refused(query_config(tmp_path / "tpavi"), r"tpavi was trained with model\.system=tpavi, expected unicode")


def test_queries_that_cannot_be_asked_are_refused(system):
    set_query(system, "text")
    with pytest.raises(ValueError, match=r"clip0, clip1 have no text.*--prompts"):
        system.predict(make_clip())
    wide = replace(text_clip(), text_BWE=torch.zeros(2, 5, WORD + 1))
    with pytest.raises(ValueError, match=rf"clip0: .*{WORD + 1} numbers.*text_channels={WORD}.*--word-vectors"):
        system.predict(wide)
    with pytest.raises(ValueError, match="TPAVISystem answers no queries"):
        set_query(build_system(make_config()), "text")

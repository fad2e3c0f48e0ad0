"""AVSS from clips to scores: all systems on 5- and 10-second clips in one batch, and the public commands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_system_tpavi import make_clip, make_config, pad
from untrained import small_model, write_checkpoint

from avs_dist import checkpoint
from avs_dist.clip import Clip
from avs_dist.config import Config, DecoderConfig, DiffusionConfig, LatentConfig, LossConfig
from avs_dist.evaluate import evaluate
from avs_dist.launch import cli
from avs_dist.systems import build_system
from avs_dist.systems.base import System
from avs_dist.systems.diffusion import DiffusionSystem
from avs_dist.systems.generator import posterior_pictures, see_and_hear

CLASSES = 7
MODELS = {
    "tpavi": {"system": "tpavi"},
    "ecmvae": {"system": "ecmvae", "latent": LatentConfig(dim=4, samples=2)},
    "diffusion": {
        "system": "diffusion",
        "diffusion": DiffusionConfig(dim=4, hidden=8, widths=(16,) * 7, steps=2, samples=2),
    },
    "transformer": {"decoder": DecoderConfig("transformer", queries=4, layers=1, heads=4)},
}


def config_of(name: str, **loss: object) -> Config:
    config = make_config(num_classes=CLASSES, **MODELS[name])
    return replace(config, loss=LossConfig(segmentation="cross_entropy", **loss))  # type: ignore[arg-type]


def build(config: Config) -> System:
    torch.manual_seed(0)
    system = build_system(config)
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    return system


def mixed_clip() -> Clip:
    """A clip of 4 seconds and one of 2, the second padded; classes 0 to 6."""
    clip = make_clip(frames=4)
    clip.masks_BTHW.random_(0, CLASSES)
    clip.valid_BT[1, 2:] = False
    clip.labelled_BT[1, 2:] = False
    return clip


@pytest.mark.parametrize("name", MODELS)
def test_every_system_trains_and_paints_classes(name):
    system, clip = build(config_of(name)), mixed_clip()
    terms = system.loss_terms(clip, 0)
    torch.stack(list(terms.values())).sum().backward()
    assert [n for n, p in system.named_parameters() if p.grad is None] == []
    prediction = system.predict(clip)
    assert prediction.class_logits_BTKHW.shape == (2, 4, CLASSES, 64, 64)
    assert prediction.class_logits_BTKHW.dtype == torch.float32
    sounding = 1 - prediction.class_logits_BTKHW.softmax(2)[:, :, 0]
    torch.testing.assert_close(prediction.probabilities_BTHW[0], sounding[0], rtol=1e-4, atol=1e-5)
    assert prediction.class_logits_BTKHW[1, 2:].abs().max() == 0
    assert prediction.logits_BTHW[1, 2:].abs().max() == 0
    assert (prediction.variance_BTHW is not None) == (name in ("ecmvae", "diffusion"))


@pytest.mark.parametrize("name", MODELS)
def test_longer_padding_changes_nothing(name):
    system, clip = build(config_of(name)).double(), mixed_clip()
    short, long = clip.to("cpu", torch.float64), pad(clip, 2).to("cpu", torch.float64)
    want, got = system.loss_terms(short, 1), system.loss_terms(long, 1)
    for term, value in want.items():
        torch.testing.assert_close(got[term], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=term: f"{n}: {m}")
    one, other = system.predict(short), system.predict(long)
    torch.testing.assert_close(other.class_logits_BTKHW[:, :4], one.class_logits_BTKHW)


def test_the_loss_is_the_cross_entropy_of_labelled_frames():
    system, clip = build(config_of("tpavi")).eval(), mixed_clip()
    clip.labelled_BT[0, 1:] = False  # as in v1s training
    logits = system.predict(clip).class_logits_BTKHW
    counted = [(0, 0), (1, 0), (1, 1)]
    want = [F.cross_entropy(logits[b, t][None], clip.masks_BTHW[b, t][None].long()) for b, t in counted]
    got = system.loss_terms(clip, 0)
    assert set(got) == {"cross_entropy"}
    torch.testing.assert_close(got["cross_entropy"], torch.stack(want).mean())


@pytest.mark.parametrize("name", ["ecmvae", "diffusion"])
def test_latent_encoders_see_the_class_of_a_mask(name):
    """Two masks of the same shape and other classes have other codes."""
    system, clip = build(config_of(name)).eval(), mixed_clip()
    clip.masks_BTHW.clamp_(0, 1)
    codes = []
    for seen in (clip, replace(clip, masks_BTHW=clip.masks_BTHW * 5)):
        if isinstance(system, DiffusionSystem):
            codes.append(system.mask_encoder(posterior_pictures(seen, see_and_hear(system.trunk, seen), CLASSES)))
        else:
            codes.append(system.latents(seen).posterior["c"].mean.flatten(0, 1))
    one_ND, two_ND = codes
    assert ((one_ND - two_ND).abs().amax(1)[:4] > 1e-4).all()


def test_padded_frames_are_not_counted():
    """The public code counts them as background that was found."""
    system, clip = build(config_of("tpavi")).eval(), mixed_clip()
    padded = pad(clip, 3)
    results = [evaluate(system.predict, [(c, [0, 1])]) for c in (clip, padded)]
    assert results[0] == results[1]
    assert results[0]["frames"] == 6


def test_losses_and_classes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"loss.segmentation=bce .* model.num_classes=7"):
        build_system(make_config(num_classes=7))
    with pytest.raises(ValueError, match=r"cross_entropy .* model.num_classes=1"):
        build_system(replace(make_config(), loss=LossConfig(segmentation="cross_entropy")))


@pytest.fixture(scope="module")
def avss_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("avss")
    synth = [
        "synth",
        "--setting",
        "avss",
        "--clips",
        "20",
        "--size",
        "64",
        "--out",
        f"{folder}/clips",
        "--workers",
        "1",
    ]
    build_ = ["shards", "build", "--source", "avss", "--root", f"{folder}/clips", "--out", f"{folder}/shards"]
    assert cli.main(synth) == 0
    assert cli.main([*build_, "--size", "64"]) == 0
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["demo", "demo_ecmvae", "demo_diffusion"])
def test_synth_to_shards_to_training_to_scores(demo, avss_shards, tmp_path):
    configs = ["--config", f"configs/{demo}.yaml", "--config", "configs/demo_avss.yaml"]
    small = ["--data.shards", str(avss_shards), "--train.out_dir", str(tmp_path / "run"), "--train.max_steps", "3"]
    more = ["--train.eval_every", "0", "--data.workers", "0", "--train.log_every", "1"]
    assert cli.main(["train", *configs, *small, *more]) == 0
    scores = tmp_path / "scores.json"
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--split", "val", "--json", str(scores)]) == 0
    found = json.loads(scores.read_text())
    real = found["results"]["real"]
    # of 20 clips two are for validation, one of 5 seconds and one of 10, all labelled
    assert real["frames"] == 15
    assert 0 <= real["miou"] <= 1
    assert {"miou_no_background", "miou_dataset", "miou_dataset_no_background", "f_score"} <= set(real)
    assert [row["name"] for row in found["classes"]["real"]] == [
        "background", "disc", "square", "triangle", "star", "cross", "ring"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_semantic_checkpoint_paints_classes_on_a_video(avss_shards, ms3_clips, tmp_path):
    configs = ["--config", "configs/demo.yaml", "--config", "configs/demo_avss.yaml", "--data.workers", "0"]
    small = ["--data.shards", str(avss_shards), "--train.out_dir", str(tmp_path / "run"), "--train.max_steps", "2"]
    assert cli.main(["train", *configs, *small, "--train.eval_every", "0"]) == 0
    video = next(ms3_clips.rglob("*.mp4"))
    assert cli.main(["predict", "--checkpoint", str(tmp_path / "run"), str(video), "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / video.stem
    with Image.open(folder / "classes" / "0001.png") as picture:
        assert picture.mode == "P"
        assert np.asarray(picture).max() < CLASSES
    assert json.loads((folder / "summary.json").read_text())["class_names"][1] == "disc"


def test_training_refuses_shards_of_other_classes(avss_shards, tmp_path, capsys):
    words = ["--config", "configs/demo.yaml", "--data.shards", str(avss_shards), "--train.out_dir", str(tmp_path / "r")]
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "model.num_classes=1" in said
    assert "model.num_classes=7 and loss.segmentation=cross_entropy" in said


@pytest.mark.parametrize(
    ("learnt", "there", "said"),
    [
        (None, ("background", "disc"), "trained on sounding or silent, the masks in S have 2 classes"),
        (("background", "disc"), None, "trained on 2 classes, the masks in S have sounding or silent"),
        (
            ("background", "disc", "ring"),
            ("background", "ring", "disc"),
            "'disc' as class 1, the masks in S have 'ring'",
        ),
        (("background", "disc"), ("background", "disc", "ring"), "'none' as class 2, the masks in S have 'ring'"),
    ],
)
def test_shards_of_other_classes_than_those_learnt_are_refused(learnt, there, said, monkeypatch):
    monkeypatch.setattr(checkpoint, "class_names", lambda _: learnt)
    with pytest.raises(ValueError, match=re.escape(said)):
        checkpoint.check_classes("run", there, "S")
    checkpoint.check_classes("run", learnt, "S")


def test_evaluation_refuses_shards_of_other_classes(avss_shards, ms3_shards, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "binary", small_model())
    words = ["evaluate", "--checkpoint", str(folder), "--shards"]
    assert cli.main([*words, str(avss_shards), "--split", "val"]) == 2
    assert "trained on sounding or silent" in capsys.readouterr().err
    assert cli.main([*words, str(ms3_shards), "--split", "val"]) == 0

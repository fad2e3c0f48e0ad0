"""`avs-dist downstream` on shards of synthetic features, and the encoding of their splits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from untrained import small_model, write_checkpoint

from avs_dist.checkpoint import load_system
from avs_dist.config import CodebookConfig, ModelConfig, UnicodeConfig
from avs_dist.downstream import coded
from avs_dist.downstream.coded import encode_split
from avs_dist.launch import shards, synth
from avs_dist.launch.cli import run
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.systems.unicode import UnicodeSystem

CLIPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of both synthetic sets."""
    out = tmp_path_factory.mktemp("cmg")
    assert synth.main(["--out", str(out), "--setting", "cmg", "--clips", str(CLIPS), "--seed", "2"]) == 0
    found = {}
    for source, folder in (("vggsound-avel", "VGGSound-AVEL"), ("avvp", "AVVP")):
        found[source] = out / source
        options = ["--source", source, "--root", str(out / folder), "--out", str(found[source])]
        assert shards.main(["build", *options]) == 0
    return found


def unicode_model(shapes: dict[str, tuple[int, ...]], *modalities: str, **changes: object) -> ModelConfig:
    unicode = UnicodeConfig(
        modalities=modalities,  # type: ignore[arg-type]
        visual_shape=shapes["visual"],  # type: ignore[arg-type]
        audio_channels=shapes["audio"][0],
        text_channels=shapes["text"][0],
        dim=16,
        layers=1,
        specific=8,
        visual_specific=8,
        dropout=0.5,
        codebook=CodebookConfig(num_codes=24),
    )
    return ModelConfig(system="unicode", unicode=dataclasses.replace(unicode, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoints(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of systems that were never trained."""
    out = tmp_path_factory.mktemp("runs")
    shapes = ShardIndex.load(data["vggsound-avel"]).feature_shapes
    found = {}
    for name, modalities in (("av", ("audio", "visual")), ("vt", ("visual", "text"))):
        model = unicode_model(shapes, *modalities)
        found[name] = write_checkpoint(out / name, model, data["vggsound-avel"])
    return found


def test_a_split_is_encoded_as_the_clips_are_one_by_one(data, checkpoints, monkeypatch):
    system, config = load_system(checkpoints["vt"])
    assert isinstance(system, UnicodeSystem)
    index = ShardIndex.load(data["vggsound-avel"])
    monkeypatch.setattr(coded, "BATCH", 5)  # of 32 clips: the last batch is padded
    system.train()  # encoding must not follow
    clips = encode_split(system, config, index, "train", keep=("audio",))
    assert system.training
    samples = list(ClipReader(index, "train").samples(range(32)))
    assert clips.names == tuple(sample.name for sample in samples)
    assert clips.events == index.events
    assert set(clips.codes) == {"visual", "text"}
    assert set(clips.features) == {"audio"}
    assert set(clips.valid) == set(clips.labels) == set(clips.labelled) == {"visual", "text", "audio"}
    for n, sample in enumerate(samples):
        for m, codes in clips.codes.items():
            length = min(len(sample.features[m]), index.clip_seconds)
            assert clips.valid[m][n].tolist() == [t < length for t in range(index.clip_seconds)]
            assert (codes[n, length:] == 0).all()
        assert torch.equal(clips.features["audio"][n], torch.from_numpy(sample.features["audio"]))
        for m in ("visual", "audio"):
            assert torch.equal(clips.labels[m][n], torch.from_numpy(sample.labels[m]))
            assert clips.labelled[m][n]
        assert not clips.labelled["text"][n]
        assert not clips.labels["text"][n].any()
    again = encode_split(system.eval(), config, index, "train")
    book = system.codebook.codes
    for m, codes in clips.codes.items():
        torch.testing.assert_close(again.codes[m], codes)
        there = torch.cdist(codes[clips.valid[m]], book).amin(1)
        assert there.max() < 1e-3  # every vector is a code


def with_shapes(index: ShardIndex, **shapes: list[int]) -> ShardIndex:
    return dataclasses.replace(index, settings=index.settings | {"feature_shapes": shapes})


def test_what_cannot_be_encoded_is_refused(data, checkpoints, tmp_path):
    system, config = load_system(checkpoints["av"])
    index = ShardIndex.load(data["vggsound-avel"])
    clips = dataclasses.replace(index, settings={**index.settings, "kind": "clips"})
    with pytest.raises(ValueError, match="holds clips and the checkpoint was trained on features"):
        encode_split(system, config, clips, "test")
    with pytest.raises(ValueError, match="has no split 'dev'"):
        encode_split(system, config, index, "dev")
    seen = with_shapes(index, visual=[3, 3, 24])
    with pytest.raises(ValueError, match="has no audio features, which the task needs"):
        encode_split(system, config, seen, "test", keep=("audio",))
    with pytest.raises(ValueError, match=r"audio features in .* are \[128\], the checkpoint was trained on \[16\]"):
        encode_split(system, config, with_shapes(index, audio=[128]), "test")
    with pytest.raises(ValueError, match="holds text, the checkpoint knows only audio, visual"):
        encode_split(system, config, with_shapes(index, text=[768]), "test")
    tpavi, config = load_system(write_checkpoint(tmp_path / "tpavi", small_model()))
    with pytest.raises(ValueError, match="tpavi has no codebook"):
        encode_split(tpavi, config, index, "test")


def test_classify(data, checkpoints, tmp_path, capsys):
    out = tmp_path / "results" / "classify.json"
    options = ["--checkpoint", str(checkpoints["av"]), "--json", str(out), "--epochs", "2", "--seed", "3"]
    assert run("downstream", ["classify", *options]) == 0
    printed = capsys.readouterr().out
    assert "32 clips to train on, 4 to choose the epoch, 4 to test on; as published: 32 to train on, 32 to" in printed
    found = json.loads(out.read_text())
    assert found["shards"] == str(data["vggsound-avel"])
    assert found["heads"] == {"epochs": 2, "lr": 4e-4, "batch": 80, "seed": 3}
    assert [each["name"] for each in found["results"]] == ["accuracy", "accuracy_published"]
    for each in found["results"]:
        assert set(each["scores"]) == set(each["chance"]) == {"audio", "visual"}
        assert f"{each['name']}: " in printed
        assert f"{each['scores']['audio']['visual']:.4f}" in printed


def test_localise_within_one_data_set_and_across(data, checkpoints, tmp_path, capsys):
    out = tmp_path / "localise.json"
    options = ["--checkpoint", str(checkpoints["av"]), "--epochs", "2", "--json", str(out), "--train-on", "visual"]
    assert run("downstream", ["localise", *options, "--shards", str(data["avvp"])]) == 0
    found = json.loads(out.read_text())
    assert found["clips"]["published_train"] == found["clips"]["published_test"] == CLIPS
    assert [each["name"] for each in found["results"]] == ["segment_f1", "accuracy_published", "f1_published"]
    assert [list(each["scores"]) for each in found["results"]] == [["visual"]] * 3
    events = tmp_path / "events.csv"
    pairs = [["event_0", "event_1"], *([f"event_{k}"] * 2 for k in range(2, 8))]
    events.write_text("".join(f"{one},{other}\n" for one, other in pairs))
    across = ["--test-shards", str(data["avvp"]), "--events", str(events)]
    assert run("downstream", ["localise", *options, *across]) == 0
    found = json.loads(out.read_text())
    assert found["events"] == pairs
    assert found["test_shards"] == str(data["avvp"])
    assert 0 < found["clips"]["published_train"] < CLIPS
    assert "events: event_0 = event_1, event_2" in capsys.readouterr().out


def test_retrieve(checkpoints, tmp_path, capsys):
    out = tmp_path / "retrieve.json"
    options = ["--checkpoint", str(checkpoints["vt"]), "--epochs", "1", "--json", str(out)]
    assert run("downstream", ["retrieve", *options]) == 0
    found = json.loads(out.read_text())["results"]
    assert [(r["trained"], r["tested"]) for r in found[::2]] == [
        *(("visual", "visual"), ("visual", "text"), ("text", "visual"), ("text", "text"))
    ]
    assert found[0]["chance"]["1"] == pytest.approx(0.25)  # of 4 test clips
    assert "random order" in capsys.readouterr().out


def test_errors_are_one_line(data, checkpoints, tmp_path, capsys, monkeypatch):
    base = ["classify", "--checkpoint", str(checkpoints["av"])]
    for options, message in (
        (["--epochs", "0"], "epochs is 0"),
        (["--events", "x.csv"], "give --test-shards too"),
        (["--shards", str(tmp_path)], "not a folder of finished shards"),
        (["--test-shards", str(data["avvp"]), "--events", str(tmp_path / "no.csv")], "no.csv is not a file"),
        (["--train-on", "text"], "--train-on text: "),
    ):
        assert run("downstream", [*base, *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("avs-dist downstream: error: ")
        assert message in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("downstream", base) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classify", "localise"])
def test_a_missing_list_of_events_is_told_before_anything_is_read(tmp_path, task, capsys):
    folders = ["--checkpoint", str(tmp_path / "no"), "--test-shards", str(tmp_path / "no")]
    assert run("downstream", [task, *folders, "--events", str(tmp_path / "no.csv")]) == 2
    assert f"error: --events {tmp_path / 'no.csv'} is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("task", [[], ["classify"], ["localise"], ["retrieve"]])
def test_help(task, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("downstream", [*task, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"avs-dist downstream {task[0] if task else 'classify'} --checkpoint" in text

"""Sources of features: the public layouts, what is wrong with them, and builds that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import CATEGORIES, audio_of, label_of, put, visual_of, write_avel

from avs_dist.launch import shards as command
from avs_dist.shards.build import build
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import FeatureSample
from avs_dist.shards.text import WordVectors

EVENTS = tuple(sorted(CATEGORIES))


def built(root: Path, out: Path, source: str = "vggsound-avel", **settings: Any) -> ShardIndex:
    return build(BuildConfig(source, root, out, **{"workers": 2, "features": "float32", **settings}), progress=False)


def samples(index: ShardIndex, split: str) -> dict[str, FeatureSample]:
    reader = ClipReader(index, split)
    return {sample.name: sample for sample in reader.samples(range(len(reader)))}


@pytest.mark.parametrize("place", ["feature/{}/zip", "{}/zip", "feature/{}", "{}"])
def test_vggsound_avel(tmp_path: Path, place: str):
    index = built(write_avel(tmp_path / "raw", place=place), tmp_path / "out")
    assert index.events == EVENTS
    assert index.settings["clips"] == 8
    assert index.splits == ("train", "val", "test")
    found = {name: sample for split in index.splits for name, sample in samples(index, split).items()}
    assert sorted(found) == [f"v{number}" for number in range(8)]
    vectors = WordVectors.hashed()
    for number in range(8):
        sample, category = found[f"v{number}"], CATEGORIES[number % 3]
        prompt = f"a {category.replace(',', '')} sounds"
        assert sample.meta == {"category": category, "prompt": prompt}
        np.testing.assert_array_equal(sample.features["visual"], visual_of(number).astype(np.float32), strict=True)
        np.testing.assert_array_equal(sample.features["audio"], audio_of(number).astype(np.float32), strict=True)
        np.testing.assert_array_equal(sample.features["text"], vectors.of(prompt), strict=True)
        for labels_TK in sample.labels.values():
            expected_TK = np.zeros((10, 3), np.uint8)
            expected_TK[:, EVENTS.index(category)] = label_of(number)[0]
            np.testing.assert_array_equal(labels_TK, expected_TK, strict=True)


def test_vggsound_avel_without_prompts_and_with_ids(tmp_path: Path):
    root = write_avel(tmp_path / "raw", prompts=False)
    (root / "vggsound-avel40k.csv").write_text("category,id\nbell,v1.mp4\nbell,v2.mp4\n")
    index = built(root, tmp_path / "out")
    assert index.feature_shapes == {"visual": (2, 2, 3), "audio": (4,)}
    assert list(samples(index, "train")) == ["v1", "v2"]


def test_audio_is_fitted_to_the_picture(tmp_path: Path):
    root = write_avel(tmp_path / "raw")
    put(root, "feature/audio/zip", "v0", audio_of(0, 8))
    put(root, "feature/audio/zip", "v1", audio_of(1, 12))
    put(root, "feature/video/zip", "v1", visual_of(1, 12))
    train = samples(built(root, tmp_path / "out"), "train")
    audio_TC = train["v0"].features["audio"]
    np.testing.assert_array_equal(audio_TC, audio_of(0, 8)[[*range(8), 7, 7]].astype(np.float32))
    np.testing.assert_array_equal(train["v1"].features["audio"], audio_of(1, 12)[:10].astype(np.float32))
    assert len(train["v1"].features["visual"]) == 10
    short = samples(built(root, tmp_path / "short", clip_s=4), "train")["v0"]
    assert {len(array) for array in (short.features["visual"], short.features["audio"], *short.labels.values())} == {4}
    np.testing.assert_array_equal(short.labels["audio"].sum(1), label_of(0)[0, :4])


def test_clips_that_cannot_be_used_are_listed(tmp_path: Path):
    root = write_avel(tmp_path / "raw", clips=24)
    put(root, "feature/video/zip", "v0", np.array([print], dtype=object))
    put(root, "feature/video/zip", "v1", visual_of(1, 9))
    put(root, "feature/audio/zip", "v4", audio_of(4).reshape(-1))
    put(root, "feature/audio/zip", "v5", np.where(audio_of(5) > 0, np.nan, 1.0))
    put(root, "feature/label/zip", "v8", label_of(8) * 2)
    put(root, "feature/label/zip", "v9", label_of(9)[:, :9])
    put(root, "feature/audio/zip", "v12", audio_of(12) * 1e5)
    put(root, "feature/audio/zip", "v20", np.ones((10, 5)))
    (root / "feature/label/zip/v16.zip").unlink()
    with pytest.raises(RuntimeError, match="9 of 24 clips cannot be used, --max-skipped allows 10.00%"):
        built(root, tmp_path / "out", max_skipped=0.1, features="float16")
    index = built(root, tmp_path / "out", max_skipped=0.5, features="float16")
    reasons = {clip["name"]: (clip["path"], clip["reason"]) for clip in index.skipped}
    for name, folder, message in (
        ("v0", "video", "not the pickle of one plain array: met values of type 'O8'"),
        ("v1", "video", "9 s, expected 10"),
        ("v4", "audio", "audio features are (40,), expected 2 dimensions"),
        ("v5", "", "audio features hold infinite values or NaN"),
        ("v8", "label", "expected 0 or 1 for each of 10 s"),
        ("v9", "label", "expected 0 or 1 for each of 10 s, got (9,)"),
        ("v12", "", "more than float16 holds: build with --features float32"),
        ("v20", "video", "'audio': (5,)"),
        ("v16", "label", "No such file"),
    ):
        path, reason = reasons.pop(name)
        assert path == f"feature/video/zip/{name}.zip"
        assert message in reason
        assert (f"feature/{folder}/zip/{name}.zip" in reason) == bool(folder)
    assert not reasons
    assert sum(len(shard.clips) for shard in index.shards) == 15


def test_no_usable_clip(tmp_path: Path):
    root = write_avel(tmp_path / "raw", clips=1)
    (root / "feature/audio/zip/v0.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no usable clip: .*v0.zip: File is not a zip file"):
        built(root, tmp_path / "out")


def test_a_build_goes_on_and_gives_the_same_bytes(tmp_path: Path):
    root = write_avel(tmp_path / "raw", clips=16)
    (root / "feature/label/zip/v9.zip").unlink()
    with pytest.raises(RuntimeError, match="1 of 16 clips cannot be used"):
        built(root, tmp_path / "again", shard_mb=0.03)
    first = tmp_path / "again/train-00000.tar"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "again/index.json").exists()
    built(root, tmp_path / "again", shard_mb=0.03, max_skipped=0.1)
    assert first.stat().st_mtime_ns == written
    whole = built(root, tmp_path / "whole", shard_mb=0.03, max_skipped=0.1, workers=1)
    assert len(whole.shards) > 3
    for name in ("index.json", *(shard.name for shard in whole.shards)):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_other_files_are_another_build(tmp_path: Path):
    root = write_avel(tmp_path / "raw")
    built(root, tmp_path / "out")
    built(root, tmp_path / "out")  # built already: nothing to do
    label, prompts_csv = root / "feature/label/zip/v0.zip", root / "vggsoundCategories2Prompts.csv"
    for path, content in ((label, label.read_bytes() + b" "), (prompts_csv, prompts_csv.read_bytes() + b"gong,g\n")):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match="other settings: clips_sha256"):
            built(root, tmp_path / "out")
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "vggsound-avel40k.csv").unlink(), "expected exactly one vggsound-avel"),
        (lambda root: (root / "vggsound-avel81k.csv").write_text("x"), "found vggsound-avel40k.csv, vggsound-avel81k"),
        (lambda root: (root / "feature/audio").rename(root / "sound"), "no folder with zips of audio features"),
        (lambda root: (root / "feature").rename(root / "x"), "no folder with zips of visual or audio features"),
        (lambda root: (root / "feature/label").rename(root / "x"), "no folder with zips of labels"),
        (lambda root: table(root, "category,video_id,split\nbell,../v1,train"), "expected a plain file name"),
        (lambda root: table(root, "category,video_id,split\nbell,v1,train\nbell,v1,val"), "clip v1 is listed twice"),
        (lambda root: table(root, "category,video_id,split\n,v1,train"), "clip v1 has no category"),
        (lambda root: table(root, "category,video_id,split\nbell,v1,dev"), "split 'dev' is none of"),
        (lambda root: table(root, "category,name\nbell,v1"), "no column video_id or id"),
        (lambda root: table(root, "video_id\nv1"), "no column category"),
        (lambda root: table(root, "category,video_id,split\ngong,v1,train"), "no prompt for gong"),
        (lambda root: prompts(root, "label,words\nbell,a bell"), "no column prompt"),
        (lambda root: prompts(root, 'label,prompt\nbell,12\ndog barking,a\n"car, engine",b'), None),
    ],
)
def test_what_is_wrong_with_the_folder_is_named(tmp_path: Path, change: Any, message: str | None):
    root = write_avel(tmp_path / "raw")
    change(root)
    if message is None:  # a prompt without words concerns the clips of one category only
        index = built(root, tmp_path / "out", max_skipped=0.5)
        assert {clip["reason"] for clip in index.skipped} == {"no word of the prompt '12' has a vector"}
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        built(root, tmp_path / "out")


def table(root: Path, text: str) -> None:
    (root / "vggsound-avel40k.csv").write_text(text + "\n")


def prompts(root: Path, text: str) -> None:
    (root / "vggsoundCategories2Prompts.csv").write_text(text + "\n")


def write_avvp(root: Path, split: bool = False) -> Path:
    lists = {
        "visual": [
            ("abcdefghijk_30_40", "Dog,Car", "0,3.5", "2,4.2", "train"),
            ("ABCDEFGHIJK_0_10", "", "", "", "val"),
        ],
        "audio": [("abcdefghijk_30_40", "Car", "9", "12", "train"), ("0123456789a_1_11", "Bell", "0", "10", "test")],
    }
    for number, name in enumerate(("abcdefghijk", "ABCDEFGHIJK", "0123456789a")):
        put(root, "video", name, visual_of(number))
        put(root, "audio", name, audio_of(number))
    for modality, rows in lists.items():
        header = ("filename", "event_labels", "onset", "offset", "split")
        lines = ["\t".join(row if split else row[:4]) for row in (header, *rows)]
        (root / f"AVVP_eval_{modality}_checked_combined.csv").write_text("\n".join(lines) + "\n")
    return root


def test_avvp(tmp_path: Path):
    index = built(write_avvp(tmp_path / "raw"), tmp_path / "out", "avvp")
    assert index.events == ("Bell", "Car", "Dog")
    assert index.splits == ("test",)
    found = samples(index, "test")
    assert list(found) == ["abcdefghijk_30_40", "ABCDEFGHIJK_0_10", "0123456789a_1_11"]
    both, seen, heard = found.values()
    np.testing.assert_array_equal(both.features["visual"], visual_of(0).astype(np.float32))
    np.testing.assert_array_equal(heard.features["audio"], audio_of(2).astype(np.float32))
    expected = {modality: np.zeros((10, 3), np.uint8) for modality in ("visual", "audio")}
    expected["visual"][0:2, 2] = 1
    expected["visual"][3:5, 1] = 1
    expected["audio"][9, 1] = 1
    for modality, labels_TK in expected.items():
        np.testing.assert_array_equal(both.labels[modality], labels_TK, strict=True)
    assert list(seen.labels) == ["visual"]
    assert not seen.labels["visual"].any()
    assert list(heard.labels) == ["audio"]
    assert heard.labels["audio"].sum(0).tolist() == [10, 0, 0]
    assert both.meta == {}


def test_avvp_with_splits_and_names(tmp_path: Path):
    root = write_avvp(tmp_path / "raw", split=True)
    (root / "classes.txt").write_text("Dog\nCar\nBell\nSinging\n")
    index = built(root, tmp_path / "out", "avvp")
    assert index.events == ("Dog", "Car", "Bell", "Singing")
    assert index.splits == ("train", "val", "test")
    assert samples(index, "train")["abcdefghijk_30_40"].labels["visual"].sum(0).tolist() == [2, 2, 0, 0]
    (root / "classes.txt").write_text("Dog\n")
    with pytest.raises(ValueError, match="classes.txt lacks Bell, Car"):
        built(root, tmp_path / "other", "avvp")


def test_avvp_clips_in_two_splits(tmp_path: Path):
    root = write_avvp(tmp_path / "raw", split=True)
    path = root / "AVVP_eval_audio_checked_combined.csv"
    path.write_text(path.read_text().replace("12\ttrain", "12\ttest"))
    with pytest.raises(ValueError, match=f"{root}: clip abcdefghijk_30_40 is in train and in test; a clip must be"):
        built(root, tmp_path / "out", "avvp")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a\tDog\t0,1\t2", "clip a: as many numbers as events"),
        ("a\tDog,Car\t0\t2", "clip a: as many numbers as events"),
        ("a\tDog\tx\t2", "clip a: as many numbers as events: could not convert"),
        ("a\tDog\t2\t2", "expected 0 <= onset < offset"),
        ("a\tDog\t-1\t2", "expected 0 <= onset < offset"),
        ("a\tDog\t0\tinf", "expected 0 <= onset < offset"),
        ("a\tDog\tnan\t2", "expected 0 <= onset < offset"),
        ("../a\tDog\t0\t2", "expected a plain file name"),
    ],
)
def test_lists_of_avvp_that_make_no_sense(tmp_path: Path, row: str, message: str):
    root = write_avvp(tmp_path / "raw")
    path = root / "AVVP_eval_audio_checked_combined.csv"
    path.write_text(f"filename\tevent_labels\tonset\toffset\n{row}\n")
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        built(root, tmp_path / "out", "avvp")
    path.write_text("filename,event_labels,onset,offset\na,Dog,0,2\n")
    with pytest.raises(ValueError, match="no column event_labels, filename, offset, onset"):
        built(root, tmp_path / "out", "avvp")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {path.name}"):
        built(root, tmp_path / "out", "avvp")


@pytest.mark.parametrize("modalities", [("visual",), ("audio",), ("visual", "audio")])
def test_feature_list(tmp_path: Path, modalities: tuple[str, ...]):
    root = tmp_path / "raw"
    for number in range(3):
        for modality in modalities:
            put(root, modality, f"u{number}", (visual_of if modality == "visual" else audio_of)(number, 6 + 3 * number))
    (root / "ucf_vgg.csv").write_text("category,video_id\nbell,u0\ndrum,u1\nbell,u2\n")
    index = built(root, tmp_path / "out", "feature-list")
    assert (index.events, index.splits) == (("bell", "drum"), ("test",))
    found = samples(index, "test")
    assert [sample.seconds for sample in found.values()] == [6, 9, 10]
    for number, (event, sample) in enumerate(zip((0, 1, 0), found.values(), strict=True)):
        assert tuple(sample.features) == tuple(sample.labels) == modalities
        for labels_TK in sample.labels.values():
            np.testing.assert_array_equal(labels_TK, np.eye(2, dtype=np.uint8)[[event] * min(10, 6 + 3 * number)])
        assert sample.meta == {"category": ("bell", "drum")[event]}


def test_command_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = write_avel(tmp_path / "raw")
    options = ["build", "--source", "vggsound-avel", "--root", str(root), "--out", str(tmp_path / "out")]
    assert command.main([*options, "--workers", "1"]) == 0
    assert "features visual 2x2x3, audio 4, text 768 float16" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out/index.json").read_text())["settings"]
    assert (settings["feature_dtype"], settings["word_vectors"], settings["kind"]) == ("float16", "hashed", "features")
    assert not {"image_size", "frame_format", "decode_video"} & set(settings)
    with pytest.raises(ValueError, match="feature_dtype .there 'float16', now 'float32'."):
        command.main([*options, "--features", "float32"])

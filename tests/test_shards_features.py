"""Shards of features: members, index, streams, checks; what is damaged or hostile is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import CATEGORIES, audio_of, members_of, visual_of, write_avel
from tampered_shards import rewrite, with_members

from avs_dist.launch import shards as command
from avs_dist.shards.build import build
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.faults import DamagedClipError
from avs_dist.shards.feature_members import decode_features, encode_features
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.pipeline import EvalStream, TrainStream
from avs_dist.shards.plan import StepPlan
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import MAX_MEMBER_BYTES, FeatureSample
from avs_dist.shards.segment import decode_npy, encode_npy, tar_segment
from avs_dist.shards.verify import describe, verify


def clip(**changes: Any) -> FeatureSample:
    """10 s that are seen, 8 s that are heard, 3 words."""
    features = {"visual": visual_of(1).astype(np.float16), "audio": audio_of(1, 8).astype(np.float32)}
    features["text"] = np.arange(6, dtype=np.float16).reshape(3, 2)
    labels = {"visual": np.eye(10, 5, dtype=np.uint8), "audio": np.ones((8, 5), np.uint8)}
    return replace(FeatureSample("a.b/ü", features, labels, {"category": "x", "prompt": "y"}), **changes)


def test_members_come_back():
    sample = clip()
    members = members_of(encode_features(sample))
    assert sorted(members) == [
        *("audio.npy", "json", "labels_audio.npy", "labels_visual.npy", "text.npy", "visual.npy")
    ]
    assert json.loads(members["json"]) == {
        "name": "a.b/ü", "kind": "features", "seconds": 10, "category": "x", "prompt": "y", "schema_version": 1
    }  # fmt: skip
    found = decode_features(members)
    assert (found.name, found.meta) == (sample.name, sample.meta)
    for ours, theirs in ((sample.features, found.features), (sample.labels, found.labels)):
        assert sorted(ours) == sorted(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
            assert theirs[name].flags.writeable
    np.testing.assert_array_equal(
        np.load(io.BytesIO(members["audio.npy"]), allow_pickle=False), sample.features["audio"]
    )
    assert (found.seconds, found.labelled_seconds, found.sound) == (10, 10, "ok")


def test_equal_clips_give_equal_bytes():
    backwards = {name: clip().features[name] for name in ("text", "audio", "visual")}
    columns = {name: np.asfortranarray(array) for name, array in backwards.items()}
    assert encode_features(clip(features=columns)) == encode_features(clip())


def test_modalities_may_be_absent():
    silent = clip(features={"visual": clip().features["visual"]}, labels={})
    found = decode_features(members_of(encode_features(silent)))
    assert (found.seconds, found.labelled_seconds, found.sound) == (10, 0, "none")
    assert list(found.features) == ["visual"]
    heard = clip(features={"audio": clip().features["audio"]}, labels={"audio": clip().labels["audio"]})
    assert (heard.seconds, heard.labelled_seconds, heard.sound) == (8, 8, "ok")


def with_feature(name: str, array: np.ndarray) -> FeatureSample:
    return clip(features={**clip().features, name: array})


def with_labels(**labels: np.ndarray) -> FeatureSample:
    return clip(labels={**clip().labels, **labels})


BAD = {
    "unknown modality smell": with_feature("smell", np.ones((10, 2), np.float32)),
    "unknown modality text": with_labels(text=np.ones((3, 5), np.uint8)),
    "have 0 s": clip(features={"text": clip().features["text"]}, labels={}),
    "have 3601 s": with_feature("audio", np.ones((3601, 1), np.float16)),
    "audio is float64": with_feature("audio", audio_of(1, 8)),
    "audio is int16": with_feature("audio", np.ones((8, 4), np.int16)),
    r"visual is float32 \(10, 3\)": with_feature("visual", np.ones((10, 3), np.float32)),
    r"text is float32 \(3,\)": with_feature("text", np.ones(3, np.float32)),
    r"text is float32 \(0, 2\)": with_feature("text", np.ones((0, 2), np.float32)),
    "audio holds infinite": with_feature("audio", np.full((8, 4), np.inf, np.float16)),
    "text holds infinite": with_feature("text", np.full((1, 4), np.nan, np.float32)),
    "labels_visual is int64": with_labels(visual=np.ones((10, 5), np.int64)),
    r"labels_visual is uint8 \(9, 5\)": with_labels(visual=np.ones((9, 5), np.uint8)),
    r"labels_audio is uint8 \(8,\)": with_labels(audio=np.ones(8, np.uint8)),
    r"labels_audio is uint8 \(8, 0\)": with_labels(audio=np.ones((8, 0), np.uint8)),
    "labels_audio holds 2": with_labels(audio=np.full((8, 5), 2, np.uint8)),
    "different numbers of events": with_labels(audio=np.ones((8, 4), np.uint8)),
    r"labels_visual is uint8 \(10, 5\), expected uint8 \[0": clip(features={"audio": clip().features["audio"]}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_breaks_the_promises_is_neither_written_nor_read(message: str):
    with pytest.raises(ValueError, match=f"clip a.b/ü: .*{message}"):
        encode_features(BAD[message])
    facts = {"name": "a", "kind": "features", "seconds": 10}
    members = {"json": json.dumps(facts).encode()}
    members |= {f"{name}.npy": encode_npy(array) for name, array in BAD[message].features.items()}
    members |= {f"labels_{name}.npy": encode_npy(array) for name, array in BAD[message].labels.items()}
    if not message.startswith("unknown"):  # members of other names are not looked at
        with pytest.raises(ValueError, match=message):
            decode_features(members)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data


HOSTILE_NPY = {
    "no npy": (b"PK", "EOF|magic"),
    "objects": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n"), "holds object"),
    "fields": (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", b"abcd"), "expected numbers"),
    "columns": (npy("{'descr': '<f4', 'fortran_order': True, 'shape': (1,)}", b"abcd"), "expected numbers in C order"),
    "huge": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2000000000000,)}"), "but has 0 bytes"),
    "negative": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", b"abcd"), r"\(-1, -1\)"),
    "short": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"abcd"), "but has 4 bytes"),
    "long": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"abcdefgh"), "but has 8 bytes"),
    "version 2": (npy("", version=b"\x02\x00"), "npy version"),
    "a deep header": (npy("-" * 9000 + "1"), "longer than 512"),
    "code": (npy("__import__('os').system('touch ran')"), "audio.npy: "),
}


@pytest.mark.parametrize("name", HOSTILE_NPY)
def test_hostile_arrays_are_refused(name: str):
    data, message = HOSTILE_NPY[name]
    with pytest.raises(ValueError, match=message):
        decode_npy({"audio.npy": data}, "audio.npy")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"[]", "an object with a 'name'"),
        (b'{"name": 3, "seconds": 10, "kind": "features"}', "an object with a 'name'"),
        (b'{"name": "a", "kind": "features"}', "whole number from 1 to 3600, got None"),
        (b'{"name": "a", "seconds": 9, "kind": "features"}', "have 10 s, json says 9"),
        (b'{"name": "a", "seconds": 10}', "'kind' must be 'features', got None"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
    ],
)
def test_hostile_facts_are_refused(facts: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        decode_features({**members_of(encode_features(clip())), "json": facts})


def test_members_that_readers_refuse_are_not_written():
    with pytest.raises(ValueError, match=f"has {MAX_MEMBER_BYTES + 1} bytes"):
        tar_segment("a", {"x": bytes(MAX_MEMBER_BYTES + 1)})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """16 clips: 8 in train (several shards), 4 in val, 4 in test."""
    root = write_avel(tmp_path_factory.mktemp("raw"), clips=16)
    out = tmp_path_factory.mktemp("shards")
    return build(BuildConfig("vggsound-avel", root, out, shard_mb=0.03), progress=False)


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index.directory, tmp_path / "copy"))


def test_index_of_features(index: ShardIndex):
    assert index.kind == "features"
    assert index.events == tuple(sorted(CATEGORIES))
    assert index.feature_shapes == {"visual": (2, 2, 3), "audio": (4,), "text": (768,)}
    assert (index.image_size, index.classes) == (0, None)
    assert index.settings["clip_seconds"] == 10
    assert len(index.split("train")) > 1
    entries = [entry for shard in index.split("val") for entry in shard.clips]
    assert [(e.name, e.seconds, e.labelled, e.sound) for e in entries] == [
        (f"v{n}", 10, 10, "ok") for n in (2, 6, 10, 14)
    ]


def test_streams_of_features(index: ShardIndex):
    reader = ClipReader(index, "val")
    samples = list(reader.samples(range(4)))
    for number, sample in zip((2, 6, 10, 14), samples, strict=True):
        assert isinstance(sample, FeatureSample)
        np.testing.assert_array_equal(sample.features["visual"], visual_of(number).astype(np.float16))
    plan = StepPlan(start=0, num_steps=2, global_batch=4, accumulation=1, rank=0, world_size=1)
    train = TrainStream(ClipReader(index, "train"), plan, seed=1, window=8, collate=lambda s: [x.name for x in s])
    expected = {f"v{n}" for n in range(16) if n % 4 < 2}
    assert {name for batch, _, _ in train for name in batch} == expected
    evaluated = EvalStream(
        ClipReader(index, "test"), batch_size=3, rank=0, world_size=1, collate=lambda s: [x.name for x in s]
    )
    assert list(evaluated) == [(["v3", "v7", "v11"], [0, 1, 2], ()), (["v15"] * 3, [3, -1, -1], ())]


@pytest.mark.parametrize("audio", ["muted", "swapped"])
def test_sound_of_features_is_not_replaced(index: ShardIndex, audio: Any):
    with pytest.raises(ValueError, match=f"holds features, not log-mels that audio='{audio}' could replace"):
        ClipReader(index, "val", audio)


def test_verify_and_info(index: ShardIndex, capsys: pytest.CaptureFixture[str]):
    assert verify(index, progress=False) == []
    text = describe(index)
    assert "vggsound-avel, features visual 2x2x3, audio 4, text 768 float16, clips of at most 10 s" in text
    assert f"3 events, from 0: {', '.join(sorted(CATEGORIES))}" in text
    assert command.main(["verify", str(index.directory)]) == 0
    assert "all well" in capsys.readouterr().out


def edited(directory: Path, **settings: Any) -> ShardIndex:
    path = directory / "index.json"
    data = json.loads(path.read_text())
    data["settings"] |= settings
    path.write_text(json.dumps(data))
    return ShardIndex.load(directory)


def test_verify_compares_features_with_the_index(copy: Path):
    problems = verify(edited(copy, events=["one", "two"]), progress=False)
    assert len(problems) == 16
    assert "clip v0: labels of 3 events, the index names 2" in problems[0]
    other = edited(copy, events=["a", "b", "c"], feature_shapes={"visual": [2, 2, 3], "audio": [5], "text": [768]})
    assert "shapes {'audio': (4,)" in verify(other, progress=False)[0].replace("'visual': (2, 2, 3), ", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "films"}, "settings.kind must be 'clips' or 'features'"),
        ({"events": []}, "settings.events must list"),
        ({"events": ["a", "a"]}, "settings.events must list"),
        ({"events": "abc"}, "settings.events must list"),
        ({"events": [1]}, "settings.events must list"),
        ({"classes": ["a", "b"]}, "settings.classes are for masks"),
        ({"feature_shapes": {"audio": [4, 4]}}, "settings.feature_shapes: audio"),
        ({"feature_shapes": {"audio": [0]}}, "settings.feature_shapes: audio"),
        ({"feature_shapes": {"audio": [True]}}, "settings.feature_shapes: audio"),
        ({"feature_shapes": {"audio": 4}}, "settings.feature_shapes: audio"),
        ({"feature_shapes": {"smell": [4]}}, "settings.feature_shapes: smell"),
        ({"feature_shapes": None}, "index.json is damaged"),
    ],
)
def test_settings_that_readers_rely_on_are_checked(copy: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"{copy}.*{message}"):
        edited(copy, **settings)


def replaced(directory: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> ShardIndex:
    """The first clip of val with other members, and a matching index."""
    return rewrite(directory, with_members(change))


def test_damaged_clips_are_named_by_readers_and_verify(copy: Path):
    array = encode_npy(np.full((10, 4), np.nan, np.float16))
    index = replaced(copy, lambda members: {**members, "audio.npy": array})
    message = "val-00000.tar, offset 0, clip v2: audio holds infinite values or NaN"
    with pytest.raises(DamagedClipError, match=message):
        list(ClipReader(index, "val").samples([0]))
    assert any(message in problem for problem in verify(index, progress=False))
    index = replaced(copy, lambda members: {name: m for name, m in members.items() if name != "json"})
    with pytest.raises(DamagedClipError, match="clip v2: member json is missing"):
        list(ClipReader(index, "val").samples([0]))


def test_settings_of_older_shards(tmp_path: Path):
    """Clips have no kind in their settings, and none of what features have."""
    index = ShardIndex(tmp_path, {"image_size": 32, "classes": ["background", "a"]}, (), ())
    assert (index.kind, index.events, index.feature_shapes) == ("clips", (), {})
    assert (index.image_size, index.classes) == (32, ("background", "a"))

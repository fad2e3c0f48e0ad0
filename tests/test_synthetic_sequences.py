"""The synthetic cross-modal benchmark: layouts, determinism, labels that agree, shards that can be built."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from avs_dist.launch import shards, synth
from avs_dist.shards.build import build
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.plain_pickle import read_zip_array
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import FeatureSample
from avs_dist.shards.sequence_world import make_sequence, make_world
from avs_dist.shards.synthetic_sequences import FOLDERS, sequence_of, write_sequences

CLIPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cmg")
    assert write_sequences(out, CLIPS, seed=3, progress=False) == [out / "VGGSound-AVEL", out / "AVVP"]
    return out


def rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_vggsound_avel_layout(data: Path):
    root, world = data / "VGGSound-AVEL", make_world(3)
    table = rows(root / "vggsound-avel40k.csv")
    assert list(table[0]) == ["category", "video_id", "split"]
    splits = [row["split"] for row in table]
    assert [splits.count(split) for split in ("train", "val", "test")] == [16, 2, 2]
    for index, row in enumerate(table):
        visual_THWC, audio_TC, labels_TK, category = sequence_of(world, 3, "VGGSound-AVEL", index)
        stored = {
            m: read_zip_array(root / f"feature/{m}/zip/{row['video_id']}.zip") for m in ("video", "audio", "label")
        }
        np.testing.assert_array_equal(stored["video"], visual_THWC, strict=True)
        np.testing.assert_array_equal(stored["audio"], audio_TC, strict=True)
        assert stored["label"].shape == (1, 10)
        np.testing.assert_array_equal(stored["label"][0], labels_TK[:, world.events.index(category)])
        assert row["category"] == category
    prompts = rows(root / "vggsoundCategories2Prompts.csv")
    assert tuple(row["label"] for row in prompts) == world.events
    assert len({row["prompt"] for row in prompts}) == len(world.events)


def test_avvp_layout(data: Path):
    root, world = data / "AVVP", make_world(3)
    for modality in ("visual", "audio"):
        table = rows(root / f"AVVP_eval_{modality}_checked_combined.csv", "\t")
        assert list(table[0]) == ["filename", "event_labels", "onset", "offset", "split"]
        for index, row in enumerate(table):
            _, _, labels_TK, category = sequence_of(world, 3, "AVVP", index)
            seconds = np.flatnonzero(labels_TK.any(axis=1))
            expected = (category, seconds[0], seconds[-1] + 1)
            assert (row["event_labels"], int(row["onset"]), int(row["offset"])) == expected
            assert (root / "feature/video/zip" / f"{row['filename'][:11]}.zip").is_file()


def test_clips_depend_on_seed_and_number_only(data: Path, tmp_path: Path):
    write_sequences(tmp_path / "less", 5, seed=3, progress=False)
    few, many = content(tmp_path / "less"), content(data)
    assert {name: many[name] for name in few if name.endswith(".zip")} == {
        name: bytes_ for name, bytes_ in few.items() if name.endswith(".zip")
    }
    write_sequences(tmp_path / "other", 5, seed=4, progress=False)
    other = content(tmp_path / "other")
    assert not any(other[name] == few[name] for name in few if "/video/" in name)
    world = make_world(3)
    clips_THWC = [sequence_of(world, 3, folder, number)[0] for folder in FOLDERS for number in range(3)]
    assert len({visual_THWC.tobytes() for visual_THWC in clips_THWC}) == 6


def test_the_world():
    """Events last as long as they should, in both modalities at once, and stand out against the rest of their clip."""
    world = make_world(0)
    counts = np.zeros(len(world.events))
    for number in range(200):
        visual_THWC, audio_TC, labels_TK, category = make_sequence(np.random.default_rng(number), world)
        assert visual_THWC.dtype == audio_TC.dtype == np.float32
        assert labels_TK.dtype == np.uint8
        assert len(visual_THWC) == len(audio_TC) == len(labels_TK) == world.seconds
        on = labels_TK[:, world.events.index(category)].astype(bool)
        assert world.shortest_s <= on.sum() <= world.seconds
        assert np.abs(np.diff(on.astype(int), prepend=0, append=0)).sum() == 2
        assert labels_TK.sum() == on.sum()
        counts[world.events.index(category)] += 1
        if on.all():
            continue
        for features in (visual_THWC.reshape(len(on), -1), audio_TC):
            contrast = np.linalg.norm(features[on].mean(0) - features[~on].mean(0))
            within = features[on].std(0).mean() * np.sqrt(features.shape[1])
            assert contrast > within
    assert counts.min() > 5


@pytest.mark.parametrize(("source", "folder"), [("vggsound-avel", "VGGSound-AVEL"), ("avvp", "AVVP")])
def test_shards_of_both(data: Path, tmp_path: Path, source: str, folder: str):
    index = build(BuildConfig(source, data / folder, tmp_path / "out"), progress=False)
    world = make_world(3)
    assert index.splits == ("train", "val", "test")
    assert not index.skipped
    assert set(index.events) <= set(world.events)
    sample = next(ClipReader(index, "val").samples([0]))
    assert isinstance(sample, FeatureSample)
    visual_THWC, audio_TC, labels_TK, category = sequence_of(world, 3, folder, 1)
    np.testing.assert_array_equal(sample.features["visual"], visual_THWC.astype(np.float16))
    np.testing.assert_array_equal(sample.features["audio"], audio_TC.astype(np.float16))
    assert ("text" in sample.features) == (folder == "VGGSound-AVEL")
    at = index.events.index(category)
    for stored_TK in sample.labels.values():
        np.testing.assert_array_equal(stored_TK[:, at], labels_TK[:, world.events.index(category)])
        assert stored_TK.sum() == labels_TK.sum()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--out", str(tmp_path), "--setting", "cmg", "--clips", "12"]
    assert synth.main(options) == 0
    assert f"12 clips in each of {tmp_path / 'VGGSound-AVEL'}, {tmp_path / 'AVVP'}" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="VGGSound-AVEL already holds data"):
        synth.main(options)
    built = tmp_path / "shards"
    assert shards.main(["build", "--source", "avvp", "--root", str(tmp_path / "AVVP"), "--out", str(built)]) == 0
    assert ShardIndex.load(built).kind == "features"
    for clips, seed in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="at least 1 clip and no negative seed"):
            write_sequences(tmp_path / "x", clips, seed)

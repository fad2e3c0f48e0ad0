"""`shards build --check`: what is missing on disk, what is not listed, and lists that are not whole."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from feature_files import write_avel
from media_files import write_ms3, write_png, write_video

from avs_dist.launch import shards as command
from avs_dist.shards import check as module
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.check import PUBLISHED, Report, check

SHARED = Path(__file__).resolve().parents[2] / "shared"


def checked(source: str, root: Path, **settings: bool) -> Report:
    return check(BuildConfig(source, root, root / "never", **settings), progress=False)


def lacking(report: Report) -> dict[str, tuple[str, ...]]:
    return {clip.name: clip.parts for clip in report.incomplete}


def tree(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


@pytest.fixture
def small_ms3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published MS3 of four clips."""
    monkeypatch.setitem(module.PUBLISHED, "avsbench-ms3", {"train": 2, "val": 1, "test": 1})


@pytest.mark.usefixtures("small_ms3")
def test_a_whole_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_ms3(tmp_path, {"a": "train", "b.c": "train", "-v": "val", "t": "test"})
    before = tree(tmp_path)
    assert command.main(["build", "--source", "avsbench-ms3", "--root", str(tmp_path), "--check"]) == 0
    assert tree(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"avsbench-ms3 in {tmp_path}"
    assert lines[1].split("  ")[0] == "split"
    assert [line.split() for line in lines[2:5]] == [
        ["train", "2", "2", "2", "0", "0", "0", "0", "0"],
        ["val", "1", "1", "1", "0", "0", "0", "0", "0"],
        ["test", "1", "1", "1", "0", "0", "0", "0", "0"],
    ]
    assert lines[5:] == ["all that is listed is there"]


def test_what_is_missing_is_told_by_part(tmp_path: Path):
    names = ["good", "frame", "frames", "mask", "masks", "sound", "empty", "mixed", "twice"]
    data = write_ms3(tmp_path, dict.fromkeys(names, "train"))
    (data / "visual_frames/frame/frame.mp4_2.png").unlink()
    for path in (data / "visual_frames/frames").iterdir():
        path.unlink()
    (data / "gt_masks/train/mask/mask_5.png").unlink()
    for path in (data / "gt_masks/train/masks").iterdir():
        path.unlink()
    (data / "audio_wav/train/sound.wav").unlink()
    (data / "audio_wav/train/empty.wav").write_bytes(b"")
    (data / "gt_masks/train/empty/empty_3.png").write_bytes(b"")
    (data / "visual_frames/mixed/mixed.mp4_1.png").rename(data / "visual_frames/mixed/mixed.mp4_0.png")
    write_png(data / "visual_frames/twice/twice_3.jpg", np.zeros((8, 8, 3), np.uint8))
    report = checked("avsbench-ms3", tmp_path)
    assert lacking(report) == {
        "frame": ("frames",),
        "frames": ("frames",),
        "mask": ("masks",),
        "masks": ("masks",),
        "sound": ("sound",),
        "empty": ("masks", "sound"),
        "mixed": ("frames",),
        "twice": ("other",),
    }
    reasons = {clip.name: clip.reason for clip in report.incomplete}
    assert "frame.mp4_2.png" in reasons["frame"]
    assert "neither" in reasons["frames"]
    assert reasons["masks"].startswith("no masks: masks_1.png, masks_2.png, masks_3.png and 2 more in ")
    assert reasons["masks"].endswith("gt_masks/train/masks")
    assert re.search(r"no masks: empty_3\.png in .*; no sound: empty\.wav in", reasons["empty"])
    assert "from 0" in reasons["mixed"]
    assert "twice_3.jpg" in reasons["twice"]
    assert report.missing
    assert report.parts == ("frames", "masks", "sound", "other")
    train = next(line.split() for line in str(report).splitlines() if line.startswith("train"))
    assert train == ["train", "296", "9", "1", "8", "3", "3", "2", "1", "0"]


@pytest.mark.usefixtures("small_ms3")
def test_what_is_not_listed_is_told_and_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_ms3(tmp_path, {"a": "train", "b": "train", "v": "val", "t": "test"})
    for place in ("visual_frames/old/old_1.png", "gt_masks/val/old/old_1.png", "visual_frames/new/new_1.png"):
        write_png(data / place, np.zeros((8, 8), np.uint8))
    (data / "audio_wav/val/sole.wav").write_bytes(b"sound")
    (data / "audio_wav/val/notes.txt").write_bytes(b"no sound")
    (data / "audio_wav/val/.hidden.wav").write_bytes(b"no clip")
    (data / "audio_wav/val/a.wav").write_bytes(b"of a listed clip")
    (data / "raw_videos").mkdir()
    (data / "raw_videos/film.mp4").write_bytes(b"nothing is taken from here")
    report = checked("avsbench-ms3", tmp_path)
    below = "Multi-sources/ms3_data"
    assert set(report.extra) == {
        ("val", f"{below}/gt_masks/val/old"),
        ("", f"{below}/visual_frames/new"),
        ("val", f"{below}/audio_wav/val/sole.wav"),
    }
    assert not report.missing
    assert command.main(["build", "--source", "avsbench-ms3", "--root", str(tmp_path), "--check"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^val .* 2$", out, re.MULTILINE)
    assert re.search(r"^unknown +- .* 1$", out, re.MULTILINE)
    assert "on disk but not listed: 3\n" in out


@pytest.mark.usefixtures("small_ms3")
def test_a_list_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_ms3(tmp_path, {"a": "train", "v": "val", "w": "val"})
    assert command.main(["build", "--source", "avsbench-ms3", "--root", str(tmp_path), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[5:] == [
        "the list has 1 of 2 published train clips",
        "the list has 2 val clips, published are 1",
        "the list has 0 of 1 published test clips",
        "something is missing",
    ]
    assert lines[4].split()[:4] == ["test", "1", "0", "0"]


def test_long_lists_are_cut(tmp_path: Path):
    data = write_ms3(tmp_path, {f"clip{i:02d}": "train" for i in range(13)}, size=8)
    for i in range(12):
        (data / f"audio_wav/train/clip{i:02d}.wav").unlink()
    text = str(checked("avsbench-ms3", tmp_path))
    assert "incomplete: 12\n" in text
    assert "clip09" in text
    assert "clip10" not in text
    assert "  ... and 2 more" in text


def test_stored_log_mel_takes_the_place_of_sound(tmp_path: Path):
    data = write_ms3(tmp_path, {"a": "train", "b": "train"})
    (data / "audio_log_mel/train").mkdir(parents=True)
    (data / "audio_log_mel/train/a.pkl").write_bytes(b"log-mel")
    (data / "audio_log_mel/train/c.pkl").write_bytes(b"log-mel")
    (data / "audio_wav/train/a.wav").unlink()
    report = checked("avsbench-ms3", tmp_path, stored_mel=True)
    (clip,) = report.incomplete
    assert (clip.name, clip.parts) == ("b", ("sound",))
    assert report.extra == (("train", "Multi-sources/ms3_data/audio_log_mel/train/c.pkl"),)


def test_published_counts_are_those_of_the_real_list():
    path = SHARED / "data/metadata/gavs_v3_metadata.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open(newline="") as file:
        counts = Counter(f"{row['label']} {row['split']}" for row in csv.DictReader(file))
    assert counts == PUBLISHED["avss"]
    assert counts.total() == 11_356
    for source, subset in (("avsbench-s4", "v1s"), ("avsbench-ms3", "v1m")):
        assert PUBLISHED[source] == {split: counts[f"{subset} {split}"] for split in ("train", "val", "test")}


def test_the_real_list_of_avss(tmp_path: Path):
    path = SHARED / "data/metadata/gavs_v3_metadata.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    base = tmp_path / "avs_released"
    (base / "v2/unlisted/frames").mkdir(parents=True)
    (base / "pretrained/x").mkdir(parents=True)
    lines = path.read_text().splitlines()
    (base / "metadata.csv").write_text("\n".join(line for line in lines if not line.endswith(",train,v2")))
    (base / "label2idx.json").write_text('{"background": 0, "dog": 1}')
    report = checked("avss", tmp_path)
    assert report.listed == {group: count for group, count in PUBLISHED["avss"].items() if group != "v2 train"}
    assert "the list has 0 of 4,750 published v2 train clips" in str(report)
    assert len(report.incomplete) == 11_356 - 4_750
    assert {clip.parts for clip in report.incomplete} == {("frames", "masks", "sound")}
    assert report.extra == (("", "avs_released/v2/unlisted"),)


def test_zips_of_features(tmp_path: Path):
    write_avel(tmp_path)
    assert not checked("vggsound-avel", tmp_path).missing
    (tmp_path / "feature/label/zip/v3.zip").unlink()
    (tmp_path / "feature/audio/zip/v3.zip").write_bytes(b"")
    (tmp_path / "feature/video/zip/v9.zip").write_bytes(b"more")
    report = checked("vggsound-avel", tmp_path)
    (clip,) = report.incomplete
    assert (clip.group, clip.name, clip.parts) == ("test", "v3", ("files",))
    places = [tmp_path / f"feature/{modality}/zip/v3.zip" for modality in ("audio", "label")]
    assert clip.reason == f"no files: {places[0]}, {places[1]}"
    assert report.extra == (("", "feature/video/zip/v9.zip"),)
    assert report.listed == {"train": 4, "val": 2, "test": 2}


def test_films(tmp_path: Path):
    films = tmp_path / "films"
    write_video(films / "a.mp4", 25)
    (films / "b.mp4").write_bytes(b"no film")
    report = checked("videos", films)
    assert lacking(report) == {"b": ("video",)}
    (films / "vggsound.csv").write_text("a,0,dog,train\nb,1,dog,test\n")
    (films / "a.mp4").rename(films / "a_0.mp4")
    report = checked("vggsound", films)
    assert lacking(report) == {"b_000001": ("video",)}
    assert report.extra == (("", "b.mp4"),)

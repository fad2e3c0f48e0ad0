"""Building shards: AVSBench layouts, malformed input, restart after a kill, hangs, limits on skipped clips."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from media_files import disc_mask, ms3_frame, tone, write_ms3, write_png, write_video, write_wav
from PIL import Image

from avs_dist.launch import shards as command
from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.images import open_image, read_binary_mask
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import SILENT_LOG_MEL, Sample, key_of, name_of
from avs_dist.shards.sources.avsbench import read_metadata
from avs_dist.shards.sources.videos import unique_labels

SHARED = Path(__file__).resolve().parents[2] / "shared"


def built(root: Path, out: Path, source: str = "avsbench-ms3", **settings) -> ShardIndex:
    options = {"size": 32, "deadline_s": 20.0, "workers": 1, **settings}
    return build(BuildConfig(source, root, out, **options), progress=False)


def samples(index: ShardIndex, split: str) -> dict[str, Sample]:
    reader = ClipReader(index, split)
    return {sample.name: sample for sample in reader.samples(range(len(reader)))}


@pytest.mark.parametrize("inside", [False, True])
def test_ms3_round_trip_is_lossless(tmp_path: Path, inside: bool):
    names = {"a": "train", "b.c_0": "train", "Zürich – 東京 100%": "val", "--x": "test", "__y__": "test"}
    data = write_ms3(tmp_path, names)
    index = built(tmp_path / "Multi-sources" if inside else tmp_path, tmp_path / "out")
    assert index.splits == ("train", "val", "test")
    assert not index.skipped
    found = {split: samples(index, split) for split in index.splits}
    for name, split in names.items():
        sample = found[split].pop(name)
        for t in range(5):
            np.testing.assert_array_equal(sample.frames_THWC[t], ms3_frame(data, name, t))
            np.testing.assert_array_equal(sample.masks_THW[t], disc_mask(32, t))
        assert sample.labelled_T.all()
        assert sample.meta["sound"] == "ok"
    assert not any(found.values())


def test_keys_have_no_dot_and_come_back():
    for name in ("a.b.c", "Zürich – 東京", "x/y.mp4", "100%2E", "__a__"):
        key = key_of(name)
        assert "." not in key
        assert "/" not in key
        assert name_of(key) == name
    assert len({key_of("a.b"), key_of("a%2Eb"), key_of("a_b")}) == 3


def write_s4(root: Path, header: bool = True, frames: bool = True, nested: bool = True) -> Path:
    """Two clips: one for training (first mask only) and one for testing; real media files beside the pictures."""
    base = root / "Single-source"
    data = base / "s4_data"
    rows = [("tr.1", "0", "male_speech", "train"), ("te_1", "3", "race_car", "test")]
    for name, _, category, split in rows:
        where = f"{split}/{category}/{name}"
        write_video(data / f"raw_videos/{where if nested else name}.mp4", 125, sound=tone(5.0, 16_000), rate=16_000)
        for t in range(5):
            if frames:
                write_png(data / f"visual_frames/{where}/{name}_{t + 1}.png", np.full((32, 32, 3), 10 * t, np.uint8))
            if split == "test" or t == 0:
                write_png(data / f"gt_masks/{where}/{name}_{t + 1}.png", Image.fromarray(disc_mask(32, t)))
    lines = [",".join(row) for row in rows]
    (base / "s4_meta_data.csv").write_text("\n".join((["name,start,category,split"] if header else []) + lines) + "\n")
    return data


@pytest.mark.parametrize("header", [True, False])
def test_s4_labels_the_first_frame_only_in_training(tmp_path: Path, header: bool):
    write_s4(tmp_path, header)
    index = built(tmp_path, tmp_path / "out", "avsbench-s4")
    train, test = samples(index, "train")["tr.1"], samples(index, "test")["te_1"]
    assert train.labelled_T.tolist() == [True, False, False, False, False]
    assert test.labelled_T.all()
    assert not train.masks_THW[1:].any()
    assert train.masks_THW[0].any()
    assert train.meta["category"] == "male_speech"
    assert [int(frame.max()) for frame in train.frames_THWC] == [0, 10, 20, 30, 40]
    assert train.meta["sound"] == "ok"  # there is no wav: the sound is that of the raw video


@pytest.mark.parametrize(("frames", "decode_video", "nested"), [(True, True, True), (False, False, False)])
def test_frames_of_the_raw_video(tmp_path: Path, frames: bool, decode_video: bool, nested: bool):
    write_s4(tmp_path, frames=frames, nested=nested)
    index = built(tmp_path, tmp_path / "out", "avsbench-s4", decode_video=decode_video, size=160)
    sample = samples(index, "test")["te_1"]
    assert sample.meta["decoder"] == "decord"
    assert (sample.meta["fps"], sample.meta["width"], sample.meta["height"]) == (25.0, 160, 96)
    assert sample.frames_THWC.shape == (5, 160, 160, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,start,category,split\na,4,dog,val\n", ("a", "val", "dog")),
        ("split,category,name\nval,dog,a\n", ("a", "val", "dog")),
        ("video_id,sounding_objects,split\na,dog,val\n", ("a", "val", "dog")),
        ("a,4,dog,val\nb,3,cat,train\n", ("a", "val", "dog")),
        ("a,dog,4.0,val\n", ("a", "val", "dog")),
        ("\ufeffname,split\na,val\n", ("a", "val", "")),
        ("a,val\n", ("a", "val", "")),
    ],
)
def test_metadata_in_every_published_order(tmp_path: Path, text: str, expected: tuple[str, str, str]):
    path = tmp_path / "meta.csv"
    path.write_text(text, encoding="utf-8")
    row = read_metadata(path)[0]
    assert (row.name, row.split, row.category) == expected


@pytest.mark.parametrize(("setting", "counts"), [("s4", (3452, 740, 740)), ("ms3", (296, 64, 64))])
def test_real_metadata(setting: str, counts: tuple[int, int, int]):
    path = SHARED / f"data/metadata/{setting}_meta_data.reconstructed.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = read_metadata(path)
    assert tuple(sum(row.split == split for row in rows) for split in ("train", "val", "test")) == counts
    assert all(row.category for row in rows)


def mask_forms(mask_HW: np.ndarray) -> dict[str, Image.Image]:
    """The same mask in every way that masks are stored."""
    grey = Image.fromarray(mask_HW.astype(np.uint8) * 255)
    low = Image.fromarray(mask_HW.astype(np.uint8))  # {0, 1} in 8 bits, nearly black
    palette = Image.fromarray(mask_HW.astype(np.uint8))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    inverted = Image.fromarray((~mask_HW).astype(np.uint8))
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    red = Image.fromarray(np.stack([mask_HW * 200, mask_HW * 0, mask_HW * 0], axis=2).astype(np.uint8))
    alpha = Image.merge("RGBA", (*grey.convert("RGB").split(), Image.new("L", grey.size, 255)))
    deep = Image.fromarray(mask_HW.astype(np.uint16) * 300)
    forms = {"1-bit": Image.fromarray(mask_HW), "grey": grey, "low grey": low, "palette": palette}
    return {**forms, "inverted palette": inverted, "rgb": red, "rgba": alpha, "la": grey.convert("LA"), "16-bit": deep}


def test_masks_of_every_storage_form_are_the_same(tmp_path: Path):
    expected = disc_mask(32, 1)
    for form, image in mask_forms(expected).items():
        path = write_png(tmp_path / f"{form}.png", image)
        np.testing.assert_array_equal(read_binary_mask(path, 32), expected, err_msg=form)
    doubled = write_png(tmp_path / "big.png", np.kron(expected, np.ones((2, 2))).astype(np.uint8))
    np.testing.assert_array_equal(read_binary_mask(doubled, 32), expected)


def test_malformed_clips_are_listed_by_name_and_the_rest_is_built(tmp_path: Path):
    names = ["good", "no_masks", "no_frame", "bad_png", "no_sound_file", "bad_wav", "late", "no_track", "silent"]
    data = write_ms3(tmp_path, dict.fromkeys(names, "train"))
    for t in (2, 5):
        (data / f"gt_masks/train/no_masks/no_masks_{t}.png").unlink()
    (data / "visual_frames/no_frame/no_frame.mp4_3.png").unlink()
    (data / "visual_frames/bad_png/bad_png.mp4_3.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (data / "audio_wav/train/no_sound_file.wav").unlink()
    (data / "audio_wav/train/bad_wav.wav").write_bytes(b"RIFFrubbish")
    write_wav(data / "audio_wav/train/late.wav", tone(2.5, 44_100, 2), 44_100)
    (data / "audio_wav/train/no_track.wav").unlink()
    write_video(data / "raw_videos/train/no_track.mp4", 125)
    write_wav(data / "audio_wav/train/silent.wav", np.zeros((1, 80_000), np.float32))
    index = built(tmp_path, tmp_path / "out", max_skipped=0.6)
    reasons = {clip["name"]: clip["reason"] for clip in index.skipped}
    assert set(reasons) == {"no_masks", "no_frame", "bad_png", "no_sound_file", "bad_wav"}
    assert "no_masks_2.png, no_masks_5.png" in reasons["no_masks"]
    assert "no_frame.mp4_3.png" in reasons["no_frame"]
    assert "bad_png.mp4_3.png" in reasons["bad_png"]
    assert "no_sound_file.wav" in reasons["no_sound_file"]
    found = samples(index, "train")
    assert {name: sample.meta["sound"] for name, sample in found.items()} == {
        **{"good": "ok", "late": "ok", "no_track": "none", "silent": "silent"}
    }
    for name in ("no_track", "silent"):
        np.testing.assert_allclose(found[name].mel_TFM, SILENT_LOG_MEL)
    np.testing.assert_allclose(found["late"].mel_TFM[3:], SILENT_LOG_MEL)
    assert found["late"].mel_TFM[0].max() > 0


def test_too_many_skipped_clips_fail_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_ms3(tmp_path, {f"clip{i}": "train" for i in range(4)})
    (data / "gt_masks/train/clip2/clip2_4.png").unlink()
    for _ in range(2):  # a second run finds the records of the first and must come to the same end
        with pytest.raises(RuntimeError, match=r"1 of 4 clips cannot.*1\.00%.*clip2: missing mask files.*clip2_4"):
            built(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
    assert "skipped clip2" in capsys.readouterr().err
    assert len(built(tmp_path, tmp_path / "out", max_skipped=0.25).skipped) == 1


def test_a_hanging_clip_costs_its_deadline_and_not_the_others(tmp_path: Path):
    data = write_ms3(tmp_path, {f"clip{i}": "train" for i in range(6)})
    (data / "audio_wav/train/clip1.wav").unlink()
    (data / "raw_videos").mkdir()
    video = write_video(data / "raw_videos/clip1.mp4", 5)
    # under a lease the others' open() blocks; the signal that tells its holder would end the process
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    begin = time.monotonic()
    with video.open("r+b") as held:
        try:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"the file system has no leases, which make a file hang: {error}")
        index = built(tmp_path, tmp_path / "out", deadline_s=2.0, workers=2, max_skipped=0.5)
    signal.signal(signal.SIGIO, before)
    assert time.monotonic() - begin < 20
    assert [clip["name"] for clip in index.skipped] == ["clip1"]
    assert index.skipped[0]["path"] == "Multi-sources/ms3_data/visual_frames/clip1"
    assert re.search(r"hung \(sound .*clip1.mp4\): no answer within 2 s", index.skipped[0]["reason"])
    assert sorted(samples(index, "train")) == ["clip0", "clip2", "clip3", "clip4", "clip5"]


def test_files_that_are_no_regular_ones_count_as_missing(tmp_path: Path):
    data = write_ms3(tmp_path, dict.fromkeys(["good", "mask", "frame", "sound"], "train"))
    harmed = {
        "mask": data / "gt_masks/train/mask/mask_2.png",
        "frame": data / "visual_frames/frame/frame.mp4_2.png",
        "sound": data / "audio_wav/train/sound.wav",
    }
    for path in harmed.values():
        path.unlink()
        path.symlink_to(os.devnull)
    index = built(tmp_path, tmp_path / "out", max_skipped=1.0)
    reasons = {clip["name"]: clip["reason"] for clip in index.skipped}
    assert re.search(r"missing mask files in .*: mask_2\.png", reasons["mask"])
    assert re.search(r"missing frame files in .*: frame\.mp4_2\.png", reasons["frame"])
    assert "no sound.wav in" in reasons["sound"]


@pytest.mark.parametrize("name", ["../../x", "/x", "..", ".", "", "a/b", "a\0b", "x" * 241])
def test_names_and_categories_must_be_plain_file_names(tmp_path: Path, name: str):
    path = tmp_path / "meta.csv"
    category = name or ".."  # MS3 needs none
    for line in (f"{name},dog,val", f"a,{category + 15 * 'x' if len(name) > 99 else category},val"):
        path.write_text(f"name,category,split\n{line}\n")
        with pytest.raises(ValueError, match=r"meta\.csv: line '.*': expected a plain file name"):
            read_metadata(path)


def test_equal_input_gives_equal_bytes_for_any_number_of_workers(tmp_path: Path):
    write_ms3(tmp_path, {f"clip{i}": "train" for i in range(8)})
    one = built(tmp_path, tmp_path / "one", shard_mb=0.2)
    two = built(tmp_path, tmp_path / "two", shard_mb=0.2, workers=2)
    assert len(one.shards) > 2
    assert one.shards == two.shards
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()


def test_other_settings_or_foreign_files_are_refused(tmp_path: Path):
    write_ms3(tmp_path, {"a": "train", "b": "train"})
    built(tmp_path, tmp_path / "out")
    before = stamp(tmp_path / "out/index.json")
    assert len(built(tmp_path, tmp_path / "out", workers=2).shards) == 1  # nothing to do
    assert stamp(tmp_path / "out/index.json") == before
    with pytest.raises(ValueError, match=r"image_size \(there 32, now 64\)"):
        built(tmp_path, tmp_path / "out", size=64)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"something else \(x.tar\)"):
        built(tmp_path, tmp_path / "other")


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def any_shard_half_done(out: Path, finished: int) -> bool:
    """Whether so many shards are recorded and bytes of another one, under whatever name, are in the folder."""
    records = list(out.glob(".build/train-*.json"))
    names = os.listdir(out) if out.is_dir() else []
    started = {name.removeprefix(".").removesuffix(".tmp") for name in names if ".tar" in name}
    return len(records) >= finished and len(started) > len(records)


@pytest.mark.parametrize("finished", [1, 4])
def test_kill_and_run_again(tmp_path: Path, finished: int):
    """SIGKILL while shards are written: finished ones stay untouched, none is half, the end is as without the kill."""
    write_ms3(tmp_path, {f"clip{i:03d}": "train" if i < 50 else "val" for i in range(60)}, size=64)
    reference = built(tmp_path, tmp_path / "reference", shard_mb=0.5, size=64)
    out = tmp_path / "out"
    arguments = ["shards", "build", "--source", "avsbench-ms3", "--root", str(tmp_path), "--out", str(out)]
    arguments += ["--size", "64", "--shard-mb", "0.5", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "avs_dist.launch.cli", *arguments], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not any_shard_half_done(out, finished) and time.monotonic() < limit:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded = [out / f"{path.stem}.tar" for path in sorted(out.glob(".build/train-*.json"))]
    assert finished <= len(recorded) < len(reference.shards)
    assert not (out / "index.json").exists()
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "reference" / path.name).read_bytes()
    stamps = {path: stamp(path) for path in recorded}
    assert command.main(arguments[1:]) == 0
    assert {path: stamp(path) for path in recorded} == stamps
    assert ShardIndex.load(out).shards == reference.shards
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "reference").iterdir())


def test_videos_in_windows_with_unique_names(tmp_path: Path):
    write_video(tmp_path / "in/film.mp4", 125 + 38)
    write_video(tmp_path / "in/sub/film.webm", 50, codec="libvpx", sound=tone(2.0, 48_000, 2), audio_codec="libopus")
    write_video(tmp_path / "in/sub/other.v1.mp4", 60)
    (tmp_path / "in/notes.txt").write_text("not a film")
    index = built(tmp_path / "in", tmp_path / "out", "videos")
    found = samples(index, "test")
    assert {name: len(sample.frames_THWC) for name, sample in found.items()} == {
        **{"film.mp4_0000": 5, "film.mp4_0001": 2, "sub/film_0000": 2, "other.v1_0000": 2}
    }
    assert not any(sample.labelled_T.any() for sample in found.values())
    assert found["sub/film_0000"].meta["sound"] == "ok"
    assert found["film.mp4_0001"].meta["start_s"] == 5.0


def test_unique_labels():
    root = Path("/r")
    paths = [root / p for p in ("a.mp4", "a.webm", "s/b.mp4", "t/b.mp4", "c.mp4")]
    assert unique_labels(paths, root) == ["a.mp4", "a.webm", "s/b", "t/b", "c"]


def test_user_errors_are_clear(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="ms3_data"):
        built(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no media file"):
        built(tmp_path, tmp_path / "out", "videos")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        built(tmp_path / "nowhere", tmp_path / "out")
    for settings, message in (
        ({"size": 9000}, "--size 9000: at most 8192"),
        ({"clip_s": 4000}, "--clip-s 4000: at most 3600"),
        ({"deadline_s": 1e12}, r"--deadline-s 1e\+12: at most"),
    ):
        with pytest.raises(ValueError, match=message):
            built(tmp_path, tmp_path / "out", **settings)
    for place in ("http:/host/x", "s3:/bucket/x"):
        with pytest.raises(ValueError, match="--out .*must be a folder on this machine"):
            built(tmp_path, Path(place))
    (tmp_path / "films").mkdir()
    (tmp_path / os.fsdecode(b"films/bad\xe9.mp4")).write_bytes(b"")
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        built(tmp_path / "films", tmp_path / "out", "videos")
    (tmp_path / "m.csv").write_text("name,split\na,train\na,train\n")
    with pytest.raises(ValueError, match="clip a is listed twice"):
        read_metadata(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("name,split\na,dev\n")
    with pytest.raises(ValueError, match="clip a: split 'dev'"):
        read_metadata(tmp_path / "m.csv")
    for content, message in (
        (b"name,split\n", "lists no clip"),
        (b"name,split\n" + b"a" * 131_073 + b",val\n", "expected comma-separated .* field larger"),
        (b"name,split\n\xff,val\n", "expected comma-separated lines in UTF-8"),
    ):
        (tmp_path / "m.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"m\.csv: {message}"):
            read_metadata(tmp_path / "m.csv")


def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path):
    path = tmp_path / "bomb.png"
    Image.new("1", (9_000, 9_000)).save(path)
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        open_image(path, str(path))


def test_real_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = SHARED / "data/video"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    out = str(tmp_path / "out")
    assert command.main(["build", "--source", "videos", "--root", str(root), "--out", out, "--size", "96"]) == 0
    assert command.main(["verify", out]) == 0
    found = samples(ShardIndex.load(out), "test")
    files = {json.dumps(sample.meta["file"]) for sample in found.values()}
    assert len(files) == 6
    silent = [name for name, sample in found.items() if sample.meta["sound"] == "silent"]
    assert silent == ["flower_silent_track_0000"]
    assert "silent" in capsys.readouterr().out

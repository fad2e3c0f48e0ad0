"""AVSS from the published folder to batches: geometry, partial labels, what is skipped, names of the classes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_files import tone, write_png, write_wav
from PIL import Image

from avs_dist.config import from_dict
from avs_dist.launch import shards as command
from avs_dist.launch import synth
from avs_dist.loader import TrainBatches, eval_loader
from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.images import read_class_mask, read_frame
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.palette import colours
from avs_dist.shards.read import ClipReader
from avs_dist.shards.render import render_scene
from avs_dist.shards.schema import SILENT_LOG_MEL, Sample
from avs_dist.shards.sources.avss import read_classes, read_metadata
from avs_dist.shards.synthetic import scene_of, subset_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
SECONDS = {"v1s": 5, "v1m": 5, "v2": 10}
# name: (split, label)
CLIPS = {"a": ("train", "v1s"), "b": ("train", "v1m"), "c.d": ("train", "v2"), "e": ("val", "v1s"), "f": ("test", "v2")}
WIDTH, HEIGHT = 40, 24


def mask_classes(name: str, t: int) -> np.ndarray:
    """int [HEIGHT,WIDTH], blocks of classes that differ between clips and seconds."""
    rng = np.random.default_rng([*name.encode(), t])
    return np.kron(rng.integers(0, 71, (HEIGHT // 4, WIDTH // 4)), np.ones((4, 4), dtype=int))


def write_avss(root: Path, clips: dict[str, tuple[str, str]]) -> Path:
    """An avs_released folder of 71 classes with noise frames that are not square; v1s train clips have one mask."""
    base = root / "avs_released"
    lines = ["vid,uid,s_min,s_sec,a_obj,split,label"]
    for number, (name, (split, label)) in enumerate(clips.items()):
        noise, folder = np.random.default_rng(number), base / label / name
        for t in range(SECONDS[label]):
            frame = Image.fromarray(noise.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            write_png(folder / f"frames/{t}.jpg", frame)
            if t == 0 or (split, label) != ("train", "v1s"):
                write_png(folder / f"labels_rgb/{t}.png", colours()[mask_classes(name, t)])
        write_wav(folder / "audio.wav", tone(SECONDS[label], 16_000, hertz=200 + 50 * number))
        lines.append(f"{name}_video,{name},0,{number},dog_guitar,{split},{label}")
    (base / "metadata.csv").write_text("\n".join(lines) + "\n")
    names = ["background", *(f"class {i}" for i in range(1, 71))]
    (base / "label2idx.json").write_text(json.dumps({name: names.index(name) for name in reversed(names)}))
    return base


def built(root: Path, out: Path, **settings: Any) -> ShardIndex:
    return build(BuildConfig("avss", root, out, **{"size": 16, "deadline_s": 20.0, **settings}), progress=False)


def samples(index: ShardIndex) -> dict[str, Sample]:
    readers = [ClipReader(index, split) for split in index.splits]
    return {sample.name: sample for reader in readers for sample in reader.samples(range(len(reader)))}


@pytest.mark.parametrize("inside", [False, True])
def test_clips_of_both_lengths_and_their_labels(tmp_path: Path, inside: bool):
    base = write_avss(tmp_path, CLIPS)
    index = built(base if inside else tmp_path, tmp_path / "out")
    found = samples(index)
    assert not index.skipped
    assert {name: len(sample.frames_THWC) for name, sample in found.items()} == {
        **{"a": 5, "b": 5, "c.d": 10, "e": 5, "f": 10}
    }
    labelled = {name: np.flatnonzero(sample.labelled_T).tolist() for name, sample in found.items()}
    ten, five = list(range(10)), list(range(5))
    assert labelled == {"a": [0], "b": five, "c.d": ten, "e": five, "f": ten}
    assert not found["a"].masks_THW[1:].any()
    assert all(sample.mel_TFM.max() > 0 for sample in found.values())
    assert found["f"].meta["subset"] == "v2"
    assert (found["f"].meta["width"], found["f"].meta["height"]) == (WIDTH, HEIGHT)
    assert index.classes == ("background", *(f"class {i}" for i in range(1, 71)))
    assert index.settings["clip_seconds"] == 10


def test_held_out_clips_are_squashed_and_training_clips_cropped(tmp_path: Path):
    base = write_avss(tmp_path, CLIPS)
    found = samples(built(tmp_path, tmp_path / "out"))
    for name, fit in (("f", "squashed"), ("c.d", "cropped")):
        for t in (0, 9):
            with Image.open(base / f"v2/{name}/frames/{t}.jpg") as image:
                whole = image.resize((16, 16) if fit == "squashed" else (26, 16), Image.Resampling.BILINEAR)
            expected_HWC = np.asarray(whole) if fit == "squashed" else np.asarray(whole)[:, 5:21]
            np.testing.assert_array_equal(found[name].frames_THWC[t], expected_HWC)
            # nearest neighbour: the pixel under the middle of each new one
            rows = ((np.arange(16) + 0.5) * HEIGHT / 16).astype(int)
            width = 16 if fit == "squashed" else 26
            columns = ((np.arange(width) + 0.5) * WIDTH / width).astype(int)[0 if fit == "squashed" else 5 :][:16]
            expected_HW = mask_classes(name, t)[rows][:, columns]
            np.testing.assert_array_equal(found[name].masks_THW[t], expected_HW, err_msg=f"{name} {fit}")


def test_a_mask_lies_on_its_frame_whatever_its_own_size(tmp_path: Path):
    """Left half class 1, right half class 2; a square mask of a wide frame is cropped as the frame is."""
    halves_HW = np.repeat([[1] * 6 + [2] * 6], 12, axis=0)
    mask = write_png(tmp_path / "mask.png", colours()[halves_HW])
    found_HW = read_class_mask(mask, 8, "cropped", (64, 16), 71)
    np.testing.assert_array_equal(found_HW, np.repeat([[1] * 4 + [2] * 4], 8, axis=0))
    quarter_HW = np.repeat([[1] * 3 + [2] * 9], 12, axis=0)
    mask = write_png(tmp_path / "mask.png", colours()[quarter_HW])
    assert (read_class_mask(mask, 8, "cropped", (64, 16), 71) == 2).all()


def test_a_frame_too_narrow_to_crop_is_refused(tmp_path: Path):
    path = write_png(tmp_path / "line.png", Image.new("RGB", (60_000, 1)))
    with pytest.raises(ValueError, match=r"line\.png: 60000 x 1 pixels are too narrow"):
        read_frame(path, 224, "cropped")


def drop(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def stain(folder: Path) -> None:
    rgb_HWC = colours()[mask_classes("x", 0)]
    rgb_HWC[8:12, 16:24] = (1, 2, 3)
    write_png(folder / "labels_rgb/3.png", rgb_HWC)


def spoil(folder: Path) -> None:
    (folder / "frames/1.jpg").write_bytes(b"\xff\xd8\xff rubbish")


def device(file: str) -> Callable[[Path], None]:
    """In place of the file a device without bytes."""

    def harm(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(os.devnull)

    return harm


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (drop("labels_rgb/2.png"), r"missing mask files in .*v1m.x.labels_rgb: 2\.png"),
        (drop("frames/4.jpg"), r"missing frame files in .*v1m.x.frames: 4\.jpg"),
        (drop("audio.wav"), r"missing sound file .*v1m.x.audio\.wav"),
        (device("labels_rgb/2.png"), r"missing mask files in .*v1m.x.labels_rgb: 2\.png"),
        (device("frames/4.jpg"), r"missing frame files in .*v1m.x.frames: 4\.jpg"),
        (device("audio.wav"), r"missing sound file .*v1m.x.audio\.wav"),
        (stain, r"labels_rgb.3\.png: \d+ pixels .*\(1, 2, 3\)"),
        (spoil, r"frames.1\.jpg"),
    ],
    ids=["mask", "frame", "sound", "mask device", "frame device", "sound device", "colour", "picture"],
)
def test_damaged_clips_are_skipped_with_the_file_in_the_reason(tmp_path: Path, harm: Any, reason: str):
    base = write_avss(tmp_path, {"x": ("train", "v1m"), "y": ("train", "v1m")})
    harm(base / "v1m/x")
    index = built(tmp_path, tmp_path / "out", max_skipped=0.5)
    assert set(samples(index)) == {"y"}
    [skipped] = index.skipped
    assert (skipped["name"], skipped["split"]) == ("x", "train")
    assert skipped["path"] == "avs_released/v1m/x/frames"
    assert re.search(reason, skipped["reason"])


def test_metadata_and_classes_that_make_no_sense_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"neither avs_released/metadata\.csv nor metadata\.csv"):
        built(tmp_path, tmp_path / "out")
    base = write_avss(tmp_path, {"a": ("train", "v1s")})
    table = base / "metadata.csv"
    header = "vid,uid,s_min,s_sec,a_obj,split,label\n"
    for text, message in (
        (header + "a,a,0,0,dog,train,v3\n", "clip a: label 'v3' is none of v1s, v1m, v2"),
        (header + "a,a,0,0,dog,dev,v2\n", "clip a: split 'dev'"),
        (header + "a,a,0,0,dog,val,v2\nb,a,0,0,dog,val,v1m\n", "clip 'a' .* listed twice in val"),
        ("vid,uid,a_obj\na,a,dog\n", "no column label, split"),
        (header, "lists no clip"),
        (header + "a," + "a" * 131_073 + ",0,0,dog,val,v2\n", "expected comma-separated .* field larger"),
        (header + "a,\xff,0,0,dog,val,v2\n", "expected comma-separated lines in UTF-8"),
    ):
        table.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"metadata\.csv: {message}"):
            read_metadata(table)
    for indices in (
        {"background": 0, "dog": 2},
        {"background": 0, "dog": 0},
        {"dog": "0", "cat": "1"},
        ["dog"],
        {"a": 0},
        {"background": 0.0, "dog": 1},
        {"background": 0, "dog": True},
        {"dog": 0, "background": 1},
    ):
        (base / "label2idx.json").write_text(json.dumps(indices))
        with pytest.raises(ValueError, match=r"label2idx\.json: expected"):
            read_classes(tmp_path)
    (base / "label2idx.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"label2idx\.json: maximum recursion"):
        read_classes(tmp_path)


@pytest.mark.parametrize("uid", ["../../outside", "/outside", "..", ".", "", "v1m/x", "a\0b", "é" * 128])
def test_a_uid_that_leads_elsewhere_is_refused(tmp_path: Path, uid: str):
    base = write_avss(tmp_path, {"a": ("train", "v1s")})
    table = base / "metadata.csv"
    table.write_text(f"uid,a_obj,split,label\n{uid},dog,val,v2\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: line '.*,dog,val,v2': expected a plain file name") as caught:
        built(tmp_path, tmp_path / "out")
    assert repr(uid)[1:-1] in str(caught.value)
    longest = "é" * 127 + "x"
    table.write_text(f"uid,a_obj,split,label\n{longest},dog,val,v2\n")
    assert read_metadata(table)[0].uid == longest


def test_real_metadata():
    path = SHARED / "data/metadata/gavs_v3_metadata.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = read_metadata(path)
    counts = Counter((row.subset, row.split) for row in rows)
    expected = {"v1s": (3452, 740, 740), "v1m": (296, 64, 64), "v2": (4750, 500, 750)}
    for subset, numbers in expected.items():
        assert tuple(counts[subset, split] for split in ("train", "val", "test")) == numbers
    assert len(rows) == 11_356
    assert all(row.category for row in rows)


def test_only_the_first_seconds_when_asked(tmp_path: Path):
    write_avss(tmp_path, CLIPS)
    index = built(tmp_path, tmp_path / "out", clip_s=3)
    assert {len(sample.frames_THWC) for sample in samples(index).values()} == {3}
    assert index.settings["clip_seconds"] == 3
    with pytest.raises(ValueError, match="--clip-s"):
        built(tmp_path, tmp_path / "other", clip_s=0)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 30 synthetic clips, seed 3, 32 x 32."""
    root, out = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("shards")
    asked = ["--setting", "avss", "--clips", "30", "--seed", "3", "--size", "32", "--workers", "1"]
    assert synth.main(["--out", str(root), *asked]) == 0
    built = ["build", "--source", "avss", "--root", str(root), "--out", str(out), "--size", "32", "--workers", "1"]
    assert command.main(built) == 0
    return out


def truth(name: str) -> np.ndarray:
    """Class of what sounds at each pixel of each second, read off the scene that the clip was drawn from."""
    scene = scene_of("avss", 3, int(name.removeprefix("avss_")))
    numbers = {"disc": 1, "square": 2, "triangle": 3, "star": 4, "cross": 5, "ring": 6}
    owner_THW = render_scene(scene, 32).owner_THW
    masks_THW = np.zeros(owner_THW.shape, dtype=np.uint8)
    for i, item in enumerate(scene.items):
        heard_T11 = np.array([item.kind in numbers and on for on in item.on_T])[:, None, None]
        masks_THW[(owner_THW == i) & heard_T11] = numbers.get(item.kind, 0)
    return masks_THW


def test_every_pixel_of_synthetic_masks_has_the_true_class(synthetic: Path):
    index = ShardIndex.load(synthetic)
    assert index.classes == ("background", "disc", "square", "triangle", "star", "cross", "ring")
    found = samples(index)
    assert len(found) == 30
    seen: set[int] = set()
    for name, sample in found.items():
        expected_THW = truth(name)
        assert sample.masks_THW.dtype == np.uint8
        assert len(sample.masks_THW) == SECONDS[sample.meta["subset"]] == len(expected_THW)
        expected_THW[~sample.labelled_T] = 0
        np.testing.assert_array_equal(sample.masks_THW, expected_THW, err_msg=name)
        seen |= set(np.unique(expected_THW).tolist())
    assert seen == set(range(7))
    for split in index.splits:
        own = [subset_of(int(clip.name[5:])) for shard in index.split(split) for clip in shard.clips]
        assert set(own) == {"v1s", "v1m", "v2"}


def loader_config(shards: Path, **train: int) -> Any:
    data = {"shards": str(shards), "workers": 0, "shuffle_window": 24}
    return from_dict({"data": data, "train": {"global_batch": 8, "max_steps": 3, **train}})


def test_batches_of_mixed_lengths_are_padded_and_marked(synthetic: Path):
    index = ShardIndex.load(synthetic)
    found = samples(index)
    mixed = 0
    for [clip] in TrainBatches(loader_config(synthetic), index):
        longest = max(len(found[name].frames_THWC) for name in clip.key)
        assert clip.masks_BTHW.shape == (8, longest, 32, 32)
        assert clip.masks_BTHW.dtype == torch.uint8
        mixed += len({len(found[name].frames_THWC) for name in clip.key}) > 1
        for b, name in enumerate(clip.key):
            sample, seconds = found[name], len(found[name].frames_THWC)
            assert clip.valid_BT[b].tolist() == [t < seconds for t in range(longest)]
            once = sample.meta["subset"] == "v1s"
            assert clip.labelled_BT[b].tolist() == [t < (1 if once else seconds) for t in range(longest)]
            np.testing.assert_array_equal(clip.masks_BTHW[b, :seconds].numpy(), sample.masks_THW)
            np.testing.assert_array_equal(clip.mel_BTFM[b, :seconds].numpy(), sample.mel_TFM)
            for padded in (clip.masks_BTHW, clip.frames_BTCHW, clip.mel_BTFM):
                assert not padded[b, seconds:].any()
    assert mixed


def test_evaluation_and_swapped_sound_with_both_lengths(synthetic: Path):
    index = ShardIndex.load(synthetic)
    found = samples(index)
    for audio in ("real", "swapped"):
        [(clip, positions)] = eval_loader(loader_config(synthetic), "val", batch_size=4, audio=audio)
        assert positions == [0, 1, 2, -1]
        for b, name in enumerate(clip.key):
            donor = found[clip.key[(positions[b] + 1) % 3] if audio == "swapped" and b < 3 else name]
            if audio == "swapped" and b == 3:
                continue
            seconds, heard = len(found[name].frames_THWC), len(donor.mel_TFM)
            both = min(seconds, heard)
            np.testing.assert_array_equal(clip.mel_BTFM[b, :both].numpy(), donor.mel_TFM[:both])
            np.testing.assert_allclose(clip.mel_BTFM[b, both:seconds], SILENT_LOG_MEL)
            assert clip.labelled_BT[b].sum() == seconds  # also of v1s: only training has one mask


def test_info_names_the_classes_and_verify_checks_their_number(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(synthetic, tmp_path / "copy"))
    assert command.main(["verify", str(copy)]) == 0
    assert command.main(["info", str(copy)]) == 0
    assert "7 classes, from 0: background, disc, square" in capsys.readouterr().out
    data = json.loads((copy / "index.json").read_text())
    data["settings"]["classes"] = data["settings"]["classes"][:6]
    (copy / "index.json").write_text(json.dumps(data))
    assert command.main(["verify", str(copy)]) == 1
    reports = capsys.readouterr().out.splitlines()
    rings = [name for name, sample in samples(ShardIndex.load(synthetic)).items() if (sample.masks_THW == 6).any()]
    assert len(rings) == len(reports) - 1
    for name in rings:
        assert any(f"clip {name}: a mask holds class 6, there are 6 from 0 on" in line for line in reports)
    for wrong in ("disc", ["background"], ["a", "b", "a"], [0, 1], [str(i) for i in range(256)]):
        data["settings"]["classes"] = wrong
        (copy / "index.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"index\.json: settings\.classes must list 2 to 255 different names"):
            ShardIndex.load(copy)

"""Folders of AVSBench as copies have them: where pictures lie, what they are called, which number comes first."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from media_files import disc_mask, ms3_frame, tone, write_ms3, write_png, write_wav
from PIL import Image

from avs_dist.shards.build import BuildConfig, build
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import Sample
from avs_dist.shards.sources import ClipJob, avsbench, avss

NAMES = ("a.b_0", "-x")


def jobs_of(
    root: Path, layout: avsbench.Layout = avsbench.MS3, clip_s: int = 5, **settings: bool
) -> dict[str, ClipJob]:
    listed = avsbench.list_clips(layout, root, clip_s, settings.pop("decode_video", False), **settings)
    return {job.name: job for job in listed}


def renumbered(folder: Path, form: str, shift: int = 0) -> None:
    """Rename the pictures of a clip; in the form, {n} is the number and {name} the clip's name."""
    for path in sorted(folder.iterdir(), reverse=shift > 0):
        number = int(path.stem.rpartition("_")[2]) + shift
        path.rename(folder / form.format(n=number, name=folder.name))


def built(root: Path, out: Path, source: str = "avsbench-ms3") -> dict[str, Sample]:
    index = build(BuildConfig(source, root, out, size=32, workers=1, deadline_s=20.0), progress=False)
    readers = [ClipReader(index, split) for split in index.splits]
    return {sample.name: sample for reader in readers for sample in reader.samples(range(len(reader)))}


@pytest.mark.parametrize(
    ("frame", "mask", "shift"),
    [
        ("{name}.mp4_{n}.png", "{name}_{n}.png", 0),
        ("{name}_{n}.png", "{name}.mp4_{n}.png", 0),
        ("{name}.mp4_{n}.png", "{name}_{n}.png", -1),
        ("{name}_{n}.PNG", "{name}_{n}.Png", -1),
        ("{name}.MP4_{n:02d}.png", "{name}_{n:05d}.png", 0),
    ],
)
def test_every_name_gives_the_same_clip(tmp_path: Path, frame: str, mask: str, shift: int):
    data = write_ms3(tmp_path, dict.fromkeys(NAMES, "train"))
    expected = {name: [ms3_frame(data, name, t) for t in range(5)] for name in NAMES}
    for name in NAMES:
        renumbered(data / "visual_frames" / name, frame, shift)
        renumbered(data / "gt_masks/train" / name, mask, shift)
    found = built(tmp_path, tmp_path / "out")
    for name in NAMES:
        assert found[name].labelled_T.all()
        for t in range(5):
            np.testing.assert_array_equal(found[name].frames_THWC[t], expected[name][t])
            np.testing.assert_array_equal(found[name].masks_THW[t], disc_mask(32, t))


@pytest.mark.parametrize("ending", [".jpg", ".JPEG"])
def test_frames_may_be_jpg_and_masks_may_not(tmp_path: Path, ending: str):
    data = write_ms3(tmp_path, {"a": "val", "b": "val"})
    for path in sorted((data / "visual_frames/a").iterdir()):
        Image.open(path).save(path.with_suffix(ending))
        path.unlink()
    renumbered(data / "gt_masks/val/b", "{name}_{n}.jpg")
    jobs = jobs_of(tmp_path)
    assert [path.name for path in jobs["a"].frames] == [f"a.mp4_{n}{ending}" for n in range(1, 6)]
    assert jobs["a"].problem is None
    assert not any(path.exists() for path in jobs["b"].masks)


def write_s4(root: Path, place: str) -> Path:
    """One train and one test clip whose files lie in `place`, as the pattern of a folder."""
    data = root / "s4_data"
    rows = [("tr_1", "dog_barking", "train"), ("te_1", "race_car", "test")]
    for name, category, split in rows:
        where = place.format(split=split, category=category, name=name)
        for k in range(1, 6):
            write_png(data / f"visual_frames/{where}/{name}_{k}.png", np.full((32, 32, 3), 10 * k, np.uint8))
            if split == "test" or k == 1:
                write_png(data / f"gt_masks/{where}/{name}_{k}.png", Image.fromarray(disc_mask(32, k)))
        write_wav(data / f"audio_wav/{where}.WAV", tone(5.0, 16_000))
    lines = ["name,start,category,split", *(f"{name},0,{category},{split}" for name, category, split in rows)]
    (root / "s4_meta_data.csv").write_text("\n".join(lines))
    return data


@pytest.mark.parametrize("place", ["{split}/{category}/{name}", "{split}/{name}", "{category}/{name}", "{name}"])
def test_s4_with_and_without_folders_of_split_and_category(tmp_path: Path, place: str):
    write_s4(tmp_path, place)
    jobs = jobs_of(tmp_path, avsbench.S4)
    assert [job.problem for job in jobs.values()] == [None, None]
    assert [len(jobs["tr_1"].masks), len(jobs["te_1"].masks)] == [1, 5]
    paths = [path for job in jobs.values() for path in (*job.frames, *job.masks, job.sound)]
    assert len(paths) == 18
    assert all(path and path.is_file() for path in paths)


def test_the_first_mask_of_s4_counts_as_its_frames_do(tmp_path: Path):
    data = write_s4(tmp_path, "{name}")
    renumbered(data / "visual_frames/tr_1", "{name}_{n}.png", -1)
    problem = jobs_of(tmp_path, avsbench.S4)["tr_1"].problem
    assert problem
    assert problem.startswith("one counts from 0 and the other from 1: ")
    assert "tr_1_0.png" in problem
    assert problem.endswith("gt_masks/tr_1/tr_1_1.png")
    renumbered(data / "gt_masks/tr_1", "{name}_{n}.png", -1)
    job = jobs_of(tmp_path, avsbench.S4)["tr_1"]
    assert job.problem is None
    assert [path.name for path in job.masks] == ["tr_1_0.png"]
    assert [path.name for path in job.frames] == [f"tr_1_{k}.png" for k in range(5)]


def test_what_is_mixed_is_refused_with_its_files(tmp_path: Path):
    data = write_ms3(tmp_path, dict.fromkeys(["both", "twice", "gap", "short", "late"], "train"))
    shutil.copy(data / "visual_frames/both/both.mp4_1.png", data / "visual_frames/both/both.mp4_0.png")
    shutil.copy(data / "visual_frames/twice/twice.mp4_3.png", data / "visual_frames/twice/twice_3.jpg")
    (data / "visual_frames/gap/gap.mp4_1.png").unlink()
    (data / "visual_frames/short/short.mp4_5.png").unlink()
    for folder in ("visual_frames/late", "gt_masks/train/late"):
        for path in (data / folder).glob("*_5.png"):
            path.unlink()
    jobs = jobs_of(tmp_path)
    problems = {name: job.problem or "" for name, job in jobs.items()}
    assert "visual_frames/both counts from 0 and from 1: both.mp4_0.png, both.mp4_5.png" in problems["both"]
    assert "visual_frames/twice: twice.mp4_3.png, twice_3.jpg" in problems["twice"]
    assert "visual_frames/gap: gap.mp4_1.png" in problems["gap"]
    assert "visual_frames/short: short.mp4_5.png" in problems["short"]  # a mask without its frame
    assert problems["late"] == ""
    assert len(jobs["late"].frames) == 4
    assert len(jobs["late"].masks) == 5  # the build ignores those behind the end


@pytest.mark.parametrize(("seconds", "clip_s"), [(5, 4), (10, 3), (10, 5), (6, 10), (10, 10)])
def test_longer_and_shorter_clips_count_from_0_too(tmp_path: Path, seconds: int, clip_s: int):
    data = write_ms3(tmp_path, {"a": "train"}, seconds=seconds)
    for folder in ("visual_frames/a", "gt_masks/train/a"):
        renumbered(data / folder, "{name}_{n}.png", -1)
    job = jobs_of(tmp_path, clip_s=clip_s)["a"]
    assert job.problem is None
    assert [path.name for path in job.frames] == [f"a_{k}.png" for k in range(min(seconds, clip_s))]


def test_masks_that_do_not_count_need_no_frame(tmp_path: Path):
    data = write_s4(tmp_path, "{name}")
    (data / "visual_frames/tr_1/tr_1_5.png").unlink()
    shutil.copy(data / "gt_masks/tr_1/tr_1_1.png", data / "gt_masks/tr_1/tr_1_5.png")
    job = jobs_of(tmp_path, avsbench.S4)["tr_1"]
    assert (job.problem, len(job.frames)) == (None, 4)


def test_a_clip_without_a_category_stays_in_the_data_folder():
    places = avsbench._places("{name}", avsbench.Row("a", "train", ""))
    assert places == ["a", "train/a"]


def test_masks_alone_tell_the_first_number_of_decoded_frames(tmp_path: Path):
    data = write_ms3(tmp_path, {"a": "train"})
    renumbered(data / "gt_masks/train/a", "{name}_{n}.png", -1)
    (data / "raw_videos").mkdir()
    (data / "raw_videos/a.MP4").write_bytes(b"film")
    job = jobs_of(tmp_path, decode_video=True)["a"]
    assert (job.frames, job.problem) == ((), None)
    assert job.video == data / "raw_videos/a.MP4"
    assert [path.name for path in job.masks] == [f"a_{k}.png" for k in range(5)]


@pytest.mark.parametrize(("ending", "first"), [(".jpg", 0), (".png", 0), (".jpg", 1), (".PNG", 1)])
def test_avss_in_every_form(tmp_path: Path, ending: str, first: int):
    base = tmp_path / "avs_released"
    folder = base / "v1m/clip"
    for k in range(first, first + 5):
        write_png(folder / f"frames/{k}{ending}", np.full((8, 8, 3), 10 * k, np.uint8))
        write_png(folder / f"labels_rgb/{k}.png", np.zeros((8, 8, 3), np.uint8))
    write_wav(folder / "audio.wav", tone(5.0, 16_000))
    (base / "metadata.csv").write_text("vid,uid,s_min,s_sec,a_obj,split,label\nclip,clip,0,0,dog,train,v1m\n")
    (base / "label2idx.json").write_text('{"background": 0, "dog": 1}')
    (job,) = avss.list_clips(tmp_path, 10)
    assert job.problem is None
    assert [path.name for path in job.frames] == [f"{k}{ending}" for k in range(first, first + 5)]
    assert [path.name for path in job.masks] == [f"{k}.png" for k in range(first, first + 5)]
    job.frames[0].unlink()
    (job,) = avss.list_clips(tmp_path, 10)
    assert job.problem

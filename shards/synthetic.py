"""A synthetic audio-visual segmentation benchmark as real media files in the AVSBench and AVSS folder layouts.

A clip depends on the setting, the seed, the picture size and its own number only: neither the number of clips nor the
number of workers changes it. Layouts (published S4, MS3 and AVSS data):

    Single-source/s4_meta_data.csv                            name,start,category,split
    Single-source/s4_data/{visual_frames,gt_masks}/SPLIT/CATEGORY/NAME/NAME_K.png
    Single-source/s4_data/{raw_videos,audio_wav}/SPLIT/CATEGORY/NAME.{mp4,wav}
    Multi-sources/ms3_meta_data.csv                           name,split,sounding_objects
    Multi-sources/ms3_data/visual_frames/NAME/NAME.mp4_K.png
    Multi-sources/ms3_data/gt_masks/SPLIT/NAME/NAME_K.png
    Multi-sources/ms3_data/{raw_videos,audio_wav}/SPLIT/NAME.{mp4,wav}
    avs_released/metadata.csv                                 vid,uid,s_min,s_sec,a_obj,split,label
    avs_released/label2idx.json                               class name -> index, 0 is the background
    avs_released/LABEL/UID/{frames/K.jpg,labels_rgb/K.png,audio.wav}

K counts from 1, in AVSS from 0; the first frame is the one at 0.9375 s. Masks of S4 and MS3 are 8-bit, 0 or 255, those
of AVSS RGB in the colours of the palette. Training clips of S4, and of v1s in AVSS, have the first mask only. The LABEL
of AVSS is v1s (one source, 5 s), v1m (switching, 5 s) or v2 (switching, 10 s).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import multiprocessing
import wave
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from avs_dist.shards.encode import write_clip
from avs_dist.shards.files import write_text
from avs_dist.shards.palette import colours
from avs_dist.shards.render import render_scene
from avs_dist.shards.scene import CLASSES, FPS, Scene, plan_scene
from avs_dist.shards.sources import avss
from avs_dist.shards.timbre import SAMPLE_RATE_HZ

Setting = Literal["s4", "ms3", "avss"]

ROOTS: dict[Setting, str] = {"s4": "Single-source", "ms3": "Multi-sources", "avss": avss.FOLDER}
MIN_SIZE = 32
CLASS_NAMES = ("background", *CLASSES)
# with this order the first two clips of each split have different lengths
_SUBSETS = ("v1s", "v2", "v1m")


@dataclass(frozen=True)
class ClipPaths:
    """Where the files of one clip go; frame and mask patterns take the number K, from `first` on."""

    frame: str
    mask: str
    wav: Path
    video: Path | None
    first: int = 1


def write_benchmark(
    out: Path, setting: Setting, clips: int, seed: int = 0, size: int = 224, workers: int = 1, progress: bool = True
) -> Path:
    """Write a benchmark below `out` and return its folder, see ROOTS.

    The csv is written last: a folder without it is an interrupted run.

    Args:
        clips: Number of clips; of every ten, one is for validation and one for test.
        size: Side of the square pictures in pixels, even.
        workers: Processes; 0 or 1 works in this one.

    Raises:
        ValueError: clips, size or workers out of range.
        FileExistsError: the folder exists and is not empty.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}: give at least 1 (3 or more fill all of train, val and test)")
    if size < MIN_SIZE or size % 2:
        raise ValueError(f"size is {size}: give an even number of pixels from {MIN_SIZE} up (H.264 needs even sides)")
    if workers < 0 or seed < 0:
        raise ValueError(f"workers is {workers} and seed {seed}: neither may be negative")
    root = out / ROOTS[setting]
    if root.exists() and any(root.iterdir()):
        state = "a data set" if _csv_path(root, setting).exists() else "an unfinished data set"
        raise FileExistsError(f"{root} already holds {state}: remove it or choose another --out")
    root.mkdir(parents=True, exist_ok=True)
    if setting == "avss":
        write_text(root / avss.CLASS_FILE, json.dumps({name: i for i, name in enumerate(CLASS_NAMES)}, indent=4) + "\n")
    write = functools.partial(write_one, root, setting, seed, size)
    bar = tqdm(_run(write, clips, workers), total=clips, desc=f"synth {setting}", unit="clip", disable=not progress)
    _write_csv(_csv_path(root, setting), setting, list(bar))
    return root


def scene_of(setting: Setting, seed: int, index: int) -> Scene:
    """The scene of clip number `index`."""
    seconds = avss.SUBSETS[subset_of(index)] if setting == "avss" else 5
    rng = np.random.default_rng([seed, list(ROOTS).index(setting), index])
    return plan_scene(seconds, switching=not _single_source(setting, index), rng=rng)


def subset_of(index: int) -> str:
    """AVSS subset of clip number `index`: all three are in every split from 30 clips on, both lengths from 20 on."""
    return _SUBSETS[(index + index // 10) % 3]


def _single_source(setting: Setting, index: int) -> bool:
    return setting == "s4" or (setting == "avss" and subset_of(index) == "v1s")


def split_of(index: int) -> str:
    """Split of clip number `index`: the second and third of every ten are validation and test."""
    return {1: "val", 2: "test"}.get(index % 10, "train")


def name_of(setting: Setting, index: int) -> str:
    return f"{setting}_{index:06d}"


def clip_paths(root: Path, setting: Setting, split: str, group_name: str, name: str) -> ClipPaths:
    """File names of the published layout; `group_name` is the category of an S4 clip, the subset of an AVSS clip."""
    if setting == "avss":
        folder = root / group_name / name
        return ClipPaths(
            f"{folder}/frames/{{}}.jpg", f"{folder}/labels_rgb/{{}}.png", folder / "audio.wav", None, first=0
        )
    data = root / f"{setting}_data"
    group = Path(split) / group_name if setting == "s4" else Path(split)
    if setting == "s4":
        frame = data / "visual_frames" / group / name / f"{name}_{{}}.png"
    else:
        frame = data / "visual_frames" / name / f"{name}.mp4_{{}}.png"
    return ClipPaths(
        frame=str(frame),
        mask=str(data / "gt_masks" / group / name / f"{name}_{{}}.png"),
        wav=data / "audio_wav" / group / f"{name}.wav",
        video=data / "raw_videos" / group / f"{name}.mp4",
    )


def write_one(root: Path, setting: Setting, seed: int, size: int, index: int) -> dict[str, str | int]:
    """Write the files of one clip; returns its row of the csv."""
    scene = scene_of(setting, seed, index)
    rendered = render_scene(scene, size)
    waveform_S = scene.waveform()
    sounding = [item.kind for item in scene.objects if item.on_T.any()]
    name, split = name_of(setting, index), split_of(index)
    paths = clip_paths(root, setting, split, subset_of(index) if setting == "avss" else sounding[0], name)
    for file in (Path(paths.frame), Path(paths.mask), paths.wav):
        file.parent.mkdir(parents=True, exist_ok=True)
    if paths.video:
        paths.video.parent.mkdir(parents=True, exist_ok=True)
        write_clip(paths.video, rendered.frames_FHWC, FPS, waveform_S, SAMPLE_RATE_HZ)
    _write_wav(paths.wav, waveform_S)
    for k, frame in enumerate(scene.labelled_frames, start=paths.first):
        # level 1 of png: grain does not compress, higher levels only take time
        Image.fromarray(rendered.frames_FHWC[frame]).save(paths.frame.format(k), compress_level=1, quality=95)
    num_masks = 1 if split == "train" and _single_source(setting, index) else scene.seconds
    for k, classes_HW in enumerate(rendered.classes_THW(scene)[:num_masks], start=paths.first):
        pixels = colours(len(CLASS_NAMES))[classes_HW] if setting == "avss" else (classes_HW > 0).astype(np.uint8) * 255
        Image.fromarray(pixels).save(paths.mask.format(k))
    return _row(setting, index, name, split, sounding)


def _row(setting: Setting, index: int, name: str, split: str, sounding: list[str]) -> dict[str, str | int]:
    """The clip's line of the csv; `sounding`: kinds of the objects that sound at some time."""
    if setting == "s4":
        return {"name": name, "start": 0, "category": sounding[0], "split": split}
    objects = "_".join(sorted(sounding))
    if setting == "ms3":
        return {"name": name, "split": split, "sounding_objects": objects}
    values = (name, name, 0, 0, objects, split, subset_of(index))
    return dict(zip(("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"), values, strict=True))


def _run(write: functools.partial, clips: int, workers: int) -> Iterator[dict[str, str | int]]:
    if workers <= 1:
        yield from map(write, range(clips))
        return
    # spawn: the caller may hold threads, which fork does not survive
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, range(clips), chunksize=4)


def _csv_path(root: Path, setting: Setting) -> Path:
    return root / (avss.METADATA if setting == "avss" else f"{setting}_meta_data.csv")


def _write_csv(path: Path, setting: Setting, rows: list[dict[str, str | int]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def _write_wav(path: Path, waveform_S: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(np.rint(waveform_S * 32767).astype("<i2").tobytes())

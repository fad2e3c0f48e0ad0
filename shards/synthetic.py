"""A synthetic audio-visual segmentation benchmark as real media files in the AVSBench folder layouts.

A clip depends on the setting, the seed, the picture size and its own number only: neither the number of clips nor the
number of workers changes it. Layouts (published S4 and MS3 data):

    Single-source/s4_meta_data.csv                            name,start,category,split
    Single-source/s4_data/{visual_frames,gt_masks}/SPLIT/CATEGORY/NAME/NAME_K.png
    Single-source/s4_data/{raw_videos,audio_wav}/SPLIT/CATEGORY/NAME.{mp4,wav}
    Multi-sources/ms3_meta_data.csv                           name,split,sounding_objects
    Multi-sources/ms3_data/visual_frames/NAME/NAME.mp4_K.png
    Multi-sources/ms3_data/gt_masks/SPLIT/NAME/NAME_K.png
    Multi-sources/ms3_data/{raw_videos,audio_wav}/SPLIT/NAME.{mp4,wav}

K counts from 1; frame K is the one at K - 1 + 0.9375 s. Masks are 8-bit, 0 or 255. S4 training clips have mask 1 only.
"""

from __future__ import annotations

import csv
import functools
import io
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
from avs_dist.shards.render import render_scene
from avs_dist.shards.scene import FPS, LABELLED_FRAMES, Scene, plan_scene
from avs_dist.shards.timbre import SAMPLE_RATE_HZ

Setting = Literal["s4", "ms3"]

ROOTS: dict[Setting, str] = {"s4": "Single-source", "ms3": "Multi-sources"}
MIN_SIZE = 32


@dataclass(frozen=True)
class ClipPaths:
    """Where the files of one clip go; frame and mask patterns take the number K."""

    frame: str
    mask: str
    video: Path
    wav: Path


def write_benchmark(
    out: Path, setting: Setting, clips: int, seed: int = 0, size: int = 224, workers: int = 1, progress: bool = True
) -> Path:
    """Write a benchmark below `out` and return its folder (Single-source or Multi-sources).

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
    write = functools.partial(write_one, root, setting, seed, size)
    bar = tqdm(_run(write, clips, workers), total=clips, desc=f"synth {setting}", unit="clip", disable=not progress)
    _write_csv(_csv_path(root, setting), setting, list(bar))
    return root


def scene_of(setting: Setting, seed: int, index: int) -> Scene:
    """The scene of clip number `index`."""
    return plan_scene(setting, np.random.default_rng([seed, list(ROOTS).index(setting), index]))


def split_of(index: int) -> str:
    """Split of clip number `index`: the second and third of every ten are validation and test."""
    return {1: "val", 2: "test"}.get(index % 10, "train")


def name_of(setting: Setting, index: int) -> str:
    return f"{setting}_{index:06d}"


def clip_paths(root: Path, setting: Setting, split: str, category: str, name: str) -> ClipPaths:
    """File names of the published layout."""
    data = root / f"{setting}_data"
    group = Path(split) / category if setting == "s4" else Path(split)
    if setting == "s4":
        frame = data / "visual_frames" / group / name / f"{name}_{{}}.png"
    else:
        frame = data / "visual_frames" / name / f"{name}.mp4_{{}}.png"
    return ClipPaths(
        frame=str(frame),
        mask=str(data / "gt_masks" / group / name / f"{name}_{{}}.png"),
        video=data / "raw_videos" / group / f"{name}.mp4",
        wav=data / "audio_wav" / group / f"{name}.wav",
    )


def write_one(root: Path, setting: Setting, seed: int, size: int, index: int) -> dict[str, str | int]:
    """Write the files of one clip; returns its row of the csv."""
    scene = scene_of(setting, seed, index)
    rendered = render_scene(scene, size)
    waveform_S = scene.waveform()
    sounding = [item.kind for item in scene.objects if item.on_T.any()]
    name, split = name_of(setting, index), split_of(index)
    paths = clip_paths(root, setting, split, sounding[0], name)
    for file in (Path(paths.frame), Path(paths.mask), paths.video, paths.wav):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_clip(paths.video, rendered.frames_FHWC, FPS, waveform_S, SAMPLE_RATE_HZ)
    _write_wav(paths.wav, waveform_S)
    masks_THW = rendered.masks_THW(scene)
    num_masks = 1 if setting == "s4" and split == "train" else len(masks_THW)
    for k, frame in enumerate(LABELLED_FRAMES, start=1):
        # level 1: grain does not compress, higher levels only take time
        Image.fromarray(rendered.frames_FHWC[frame]).save(paths.frame.format(k), compress_level=1)
    for k in range(1, num_masks + 1):
        Image.fromarray(masks_THW[k - 1].astype(np.uint8) * 255).save(paths.mask.format(k))
    if setting == "s4":
        return {"name": name, "start": 0, "category": sounding[0], "split": split}
    return {"name": name, "split": split, "sounding_objects": "_".join(sorted(sounding))}


def _run(write: functools.partial, clips: int, workers: int) -> Iterator[dict[str, str | int]]:
    if workers <= 1:
        yield from map(write, range(clips))
        return
    # spawn: the caller may hold threads, which fork does not survive
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, range(clips), chunksize=4)


def _csv_path(root: Path, setting: Setting) -> Path:
    return root / f"{setting}_meta_data.csv"


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

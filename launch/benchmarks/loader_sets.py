"""What `bench loader` reads: the same clips as shards of each frame format and as loose files, small clips, films."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from avs_dist.shards.encode import Mp4Writer
from avs_dist.shards.index import ShardEntry, ShardIndex
from avs_dist.shards.make import make_sample
from avs_dist.shards.members import encode_clip
from avs_dist.shards.schema import MEL_BANDS, MEL_FRAMES, Sample
from avs_dist.shards.sources import ClipJob
from avs_dist.shards.video_file import ticks_of
from avs_dist.shards.video_member import CONTAINERS, VIDEO, StoredVideo
from avs_dist.shards.workers import MediaWorker
from avs_dist.shards.write import ShardWriter

SPLIT = "train"
CLIP_S = 5
# folders of the loose files, as AVSBench MS3 has them
FRAMES, MASKS, LOG_MELS = "visual_frames", "gt_masks", "audio_log_mel"
MEMBERS = "members"
_SHARD_BYTES = 128e6
_GOLDEN = 0.618


class SetWriter:
    """Shards of one frame format, a new tar every 128 MB as in a build."""

    def __init__(self, folder: Path, frame_format: str, size: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._frame_format = folder, frame_format
        self._settings = {"image_size": size, "frame_format": frame_format, "clip_seconds": CLIP_S}
        self._shards: list[ShardEntry] = []
        self._writer = ShardWriter(folder, SPLIT, 0)

    def add(self, sample: Sample, video: StoredVideo | None = None) -> None:
        if self._writer.bytes >= _SHARD_BYTES:
            self._shards.append(self._writer.close())
            self._writer = ShardWriter(self._folder, SPLIT, len(self._shards))
        self._writer.add(sample, encode_clip(sample, self._frame_format, video))

    def close(self) -> None:
        shards = (*self._shards, self._writer.close())
        ShardIndex(self._folder, self._settings, shards, ()).save()


def write_sets(root: Path, samples: Iterable[Sample], formats: Sequence[str], size: int) -> None:
    """Each sample into `root/FORMAT` as shards, and into `root/literal` as loose files."""
    writers = [SetWriter(root / name, name, size) for name in formats]
    for sample in samples:
        for writer in writers:
            writer.add(sample)
        write_loose(root / "literal", sample)
    for writer in writers:
        writer.close()


def write_loose(root: Path, sample: Sample) -> None:
    """One clip as AVSBench has it: a PNG file for each frame and mask, a pickled tensor [T,1,96,64] of log-mel."""
    for folder, pictures in ((FRAMES, sample.frames_THWC), (MASKS, sample.masks_THW * 255)):
        place = root / folder / sample.name
        place.mkdir(parents=True)
        for t, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(place / f"{t}.png")
    (root / LOG_MELS).mkdir(exist_ok=True)
    with (root / LOG_MELS / f"{sample.name}.pkl").open("wb") as file:
        pickle.dump(torch.from_numpy(sample.mel_TFM[:, None]), file)


def write_small_set(folder: Path, count: int) -> None:
    """Many clips of one second and 8 x 8 pixels."""
    writer = SetWriter(folder, "raw", 8)
    sample = next(synthetic_samples(1, 8))
    cut = {name: getattr(sample, name)[:1] for name in ("frames_THWC", "masks_THW", "labelled_T", "mel_TFM")}
    for number in range(count):
        writer.add(replace(sample, name=f"clip{number:05d}", **cut))
    writer.close()


def write_film_set(folder: Path, film: Path, size: int, most: int) -> None:
    """Consecutive windows of a film, stored as video; the members also as files of their own, for other readers."""
    writer = SetWriter(folder, VIDEO, size)
    (folder / MEMBERS).mkdir()
    with MediaWorker() as worker:
        windows = int(_duration_s(film, worker)) // CLIP_S
        for number in range(min(windows, most)):
            job = _job(f"{film.stem}_{number:04d}", film, number * CLIP_S)
            sample, stored = make_sample(job, worker, size, store_video=True)
            assert stored is not None
            writer.add(_with_masks(sample, number), stored)
            _write_member(folder / MEMBERS, sample.name, stored)
    writer.close()


def film_samples(films: Sequence[Path], count: int, size: int) -> Iterator[Sample]:
    """Clips that begin at different places of real films, the films in turn; the masks are discs.

    Raises:
        ValueError: If a film is shorter than a clip.
    """
    with MediaWorker() as worker:
        rooms_s = [_duration_s(film, worker) - CLIP_S for film in films]
        for number in range(count):
            turn, which = divmod(number, len(films))
            job = _job(f"clip{number:05d}", films[which], turn * _GOLDEN % 1 * rooms_s[which])
            yield _with_masks(make_sample(job, worker, size)[0], number)


def synthetic_samples(count: int, size: int) -> Iterator[Sample]:
    """Clips that move over pictures whose amplitudes fall with frequency as those of photographs do."""
    for number in range(count):
        rng = np.random.default_rng(number)
        step = max(1, size // 16)
        picture_HWC = natural_picture(rng, size, size + CLIP_S * step)
        sample = Sample(
            name=f"clip{number:05d}",
            frames_THWC=np.stack([picture_HWC[:, t * step : t * step + size] for t in range(CLIP_S)]),
            mel_TFM=rng.normal(-2.0, 2.0, (CLIP_S, MEL_FRAMES, MEL_BANDS)).astype(np.float32),
            masks_THW=np.zeros((CLIP_S, size, size), dtype=np.uint8),
            labelled_T=np.zeros(CLIP_S, dtype=bool),
            meta={"sound": "ok"},
        )
        yield _with_masks(sample, number)


def natural_picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height,width,3] of noise with a 1/f spectrum, mostly the same in all colours."""
    across_H1, along_W = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency_HW = np.maximum(np.hypot(across_H1, along_W), 1 / max(height, width))
    layers_4HW = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(4, height, width))) / frequency_HW, (height, width))
    layers_4HW /= layers_4HW.std(axis=(1, 2), keepdims=True)
    colours_3HW = 128 + 50 * layers_4HW[:1] + 15 * layers_4HW[1:]
    return np.ascontiguousarray(colours_3HW.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_synthetic_film(path: Path, width: int, height: int, seconds: int, fps: int) -> None:
    """A film without sound that moves over one such picture."""
    num_frames = seconds * fps
    picture_HWC = natural_picture(np.random.default_rng(width), height, width + num_frames)
    with Mp4Writer(path, width=width, height=height, fps=Fraction(fps)) as writer:
        for left in range(num_frames):
            writer.write_frame(picture_HWC[:, left : left + width])


def write_smaller_film(film: Path, path: Path, width: int, height: int, seconds: int) -> None:
    """The first seconds of a film encoded anew as H.264 of that size, without its sound."""
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        fps = Fraction(round(stream.average_rate or 25))
        with Mp4Writer(path, width=width, height=height, fps=fps) as writer:
            for number, frame in enumerate(container.decode(stream)):
                if number == seconds * fps:
                    break
                writer.write_frame(frame.reformat(width=width, height=height).to_ndarray(format="rgb24"))


def describe_film(film: Path) -> str:
    """Name, codec and size."""
    with av.open(str(film)) as container:
        context = container.streams.video[0].codec_context
        return f"{film.name}, {context.name} {context.width} x {context.height}"


def film_size(film: Path) -> tuple[int, int]:
    """Width and height."""
    with av.open(str(film)) as container:
        context = container.streams.video[0].codec_context
        return context.width, context.height


def _job(name: str, film: Path, start_s: float) -> ClipJob:
    return ClipJob(name, SPLIT, film, video=film, sound=film, start_s=start_s, seconds=CLIP_S)


def _duration_s(film: Path, worker: MediaWorker) -> float:
    duration_s = worker.probe(film).duration_s
    if duration_s < CLIP_S:
        raise ValueError(f"--films {film}: {duration_s:.1f} s long, clips take {CLIP_S} s")
    return duration_s


def _with_masks(sample: Sample, number: int) -> Sample:
    """With a disc in each second, of another place and size in each clip."""
    seconds, height, width = sample.frames_THWC.shape[:3]
    rng = np.random.default_rng(number)
    radius, (top, left) = rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.6, 2)
    y_H1, x_W = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    discs = [np.hypot(y_H1 - top, x_W - left - 0.04 * t) < radius for t in range(seconds)]
    return replace(sample, masks_THW=np.stack(discs).astype(np.uint8), labelled_T=np.ones(seconds, dtype=bool))


def _write_member(folder: Path, name: str, stored: StoredVideo) -> None:
    """The film of a member, and beside it the numbers of the wanted frames."""
    path = folder / f"{name}.{stored.suffix}"
    path.write_bytes(stored.data)
    indices = list(stored.at)
    if stored.decoder == "pyav":
        container: Any = av.open(io.BytesIO(stored.data), format=CONTAINERS[stored.suffix])
        with container:
            ticks = ticks_of(container, container.streams.best("video"))
        indices = [ticks.index(tick) for tick in stored.at]
    (folder / f"{name}.json").write_text(json.dumps({"film": path.name, "frames": indices, "size": stored.size}))

"""Small media files and AVSBench folders for the tests of the shards."""

from __future__ import annotations

import csv
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

NUMBER_BITS = 10


def numbered_frame(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 RGB whose black and white columns spell `number` in binary, so that lossy codecs keep it readable."""
    bits = [(number >> b) & 1 for b in range(NUMBER_BITS)]
    columns = np.repeat(np.array(bits, dtype=np.uint8) * 255, width // NUMBER_BITS)
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def number_of(frame_HWC: np.ndarray) -> int:
    blocks = frame_HWC.mean(axis=(0, 2)).reshape(NUMBER_BITS, -1).mean(axis=1)
    return sum(1 << b for b, level in enumerate(blocks) if level > 128)


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """float32 [channels,S]."""
    wave_S = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave_S[None].astype(np.float32), channels, axis=0)


LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def write_video(
    path: Path,
    frames: int,
    fps: Fraction | float = 25,
    codec: str = "libx264",
    sound: np.ndarray | None = None,
    rate: int = 48_000,
    audio_codec: str = "aac",
    times_s: Sequence[float] | None = None,
) -> Path:
    """Numbered frames, and a sound track if `sound` [channels,S] is given; `times_s` makes the rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # with the index at the front a truncated mp4 still opens, and promises more than it holds
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        if times_s is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        audio = None
        if sound is not None:
            audio = container.add_stream(audio_codec, rate=rate, layout=LAYOUTS[len(sound)])
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(i), format="rgb24")
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[i] * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), "fltp", LAYOUTS[len(sound)])
            frame.sample_rate, frame.pts = rate, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def write_wav(path: Path, sound: np.ndarray, rate: int = 16_000) -> Path:
    """16-bit wav of `sound` [channels,S]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.T * 32767).astype("<i2").tobytes())
    return path


def write_png(path: Path, pixels: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)
    return path


def disc_mask(size: int, t: int) -> np.ndarray:
    """bool [size,size], another disc each second."""
    y, x = np.mgrid[:size, :size]
    return (y - size // 2) ** 2 + (x - size // 4 - 3 * t) ** 2 < (size // 6) ** 2


def write_ms3(root: Path, clips: dict[str, str], size: int = 32, seconds: int = 5) -> Path:
    """An MS3 folder of clips {name: split} with noise frames, disc masks and a tone; returns its ms3_data."""
    base = root / "Multi-sources"
    data = base / "ms3_data"
    for number, (name, split) in enumerate(clips.items()):
        noise = np.random.default_rng(number)
        for t in range(seconds):
            frame = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
            write_png(data / f"visual_frames/{name}/{name}.mp4_{t + 1}.png", frame)
            mask = disc_mask(size, t).astype(np.uint8) * 255
            write_png(data / f"gt_masks/{split}/{name}/{name}_{t + 1}.png", mask)
        write_wav(data / f"audio_wav/{split}/{name}.wav", tone(seconds, 16_000, hertz=200 + 50 * number))
    with (base / "ms3_meta_data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "split"), *clips.items()])
    return data


def ms3_frame(data: Path, name: str, t: int) -> np.ndarray:
    return np.asarray(Image.open(data / f"visual_frames/{name}/{name}.mp4_{t + 1}.png"))

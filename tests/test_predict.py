"""Prediction on video files: masks in the right place and second, an overlay that keeps pictures, times and sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from untrained import small_model, write_checkpoint

from avs_dist.clip import Clip
from avs_dist.config import TPAVIConfig
from avs_dist.launch.cli import run
from avs_dist.overlay import CONTOUR_RGB
from avs_dist.predict import predict_video
from avs_dist.shards.synthetic import write_benchmark
from avs_dist.systems.base import Prediction, System

VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "video"
FPS = 8
SOUND_HZ = 300.0


class BrightnessSystem(System):
    """Marks what is bright: its answer is known for every picture. Notes the length of the windows it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        self.lengths.append(int(clip.valid_BT.sum()))
        return Prediction(10 * clip.frames_BTCHW.mean(dim=2))


def half_bright(second: int, width: int, height: int) -> np.ndarray:
    """uint8 RGB: another of four quarters is bright in each second."""
    frame = np.full((height, width, 3), 40, dtype=np.uint8)
    top, left = divmod(second % 4, 2)
    frame[top * height // 2 : (top + 1) * height // 2, left * width // 2 : (left + 1) * width // 2] = 220
    return frame


def bursts(seconds: float, rate: int, channels: int) -> np.ndarray:
    """float32 [channels,S]: a burst of noise-free tone at an odd moment, for measuring delays."""
    time_S = np.arange(round(seconds * rate)) / rate
    envelope_S = np.exp(-(((time_S - 0.437 * seconds) / 0.05) ** 2))
    return np.tile((0.6 * envelope_S * np.sin(2 * np.pi * SOUND_HZ * time_S)).astype(np.float32), (channels, 1))


def write_film(
    path: Path,
    seconds: float,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    sound: np.ndarray | None = None,
    rate: int = 16_000,
    audio_codec: str = "aac",
) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=FPS)
        video.width, video.height, video.pix_fmt = *size, pixels
        video.bit_rate = 2_000_000
        layout = None if sound is None else {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
        audio = None if sound is None else container.add_stream(audio_codec, rate=rate, layout=layout)
        for index in range(round(seconds * FPS)):
            frame = av.VideoFrame.from_ndarray(half_bright(index // FPS, *size), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            chunk = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=str(layout))
            chunk.sample_rate, chunk.pts, chunk.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(chunk))
            container.mux(audio.encode(None))
    return path


def read_back(path: str | Path) -> tuple[np.ndarray, list[float], np.ndarray | None, int]:
    """Frames [F,H,W,3], their times, the mono sound placed by its time stamps, its rate."""
    with av.open(str(path)) as container:
        shown = list(container.decode(container.streams.best("video")))
    frames, times = np.stack([f.to_ndarray(format="rgb24") for f in shown]), [f.time for f in shown]
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        if stream is None:
            return frames, times, None, 0
        rate, resampler = stream.rate, av.AudioResampler(format="fltp")
        parts = [(f.time, p.to_ndarray().mean(axis=0)) for f in container.decode(stream) for p in resampler.resample(f)]
    mono = np.zeros(max(round(t * rate) + len(x) for t, x in parts), dtype=np.float32)
    for time_s, samples in parts:
        begin = round(time_s * rate)
        mono[begin : begin + len(samples)] = samples
    return frames, times, mono, rate


def read_masks(summary: dict) -> np.ndarray:
    return np.stack([np.asarray(Image.open(second["mask"])) for second in summary["seconds"]])


def predict(video: Path, out: Path, system: System | None = None) -> dict:
    return predict_video(system or BrightnessSystem(), video, out, image_size=32, progress=False)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_masks_and_overlay_in_the_right_place_and_second(tmp_path: Path) -> None:
    """12 s in windows of 5, an odd picture size: the last window reaches back to seconds 7..12."""
    video = write_film(tmp_path / "film.mkv", 12, (161, 97), pixels="yuv444p")
    system = BrightnessSystem()
    summary = predict(video, tmp_path / "out", system)
    assert system.lengths == [5, 5, 5]
    masks = read_masks(summary)
    assert masks.shape == (12, 97, 161)
    assert set(np.unique(masks)) == {0, 255}
    frames, times, sound, _ = read_back(summary["overlay"])
    assert frames.shape == (12 * FPS, 98, 162, 3)  # H.264 needs even sides
    assert np.allclose(times, np.arange(12 * FPS) / FPS, atol=1e-3)
    assert sound is None
    for second in range(12):
        bright = half_bright(second, 161, 97)[..., 0] > 128
        assert iou(masks[second] > 0, bright) > 0.9
        assert abs(summary["seconds"][second]["sounding_area"] - bright.mean()) < 0.03
        for frame in (frames[second * FPS], frames[second * FPS + FPS - 1]):
            pixels = frame[:97, :161].astype(int)
            tinted = pixels[..., 0] - pixels[..., 1] > 60
            inside, outside = _eroded(bright, 6), _eroded(~bright, 6)
            assert tinted[inside].mean() > 0.98
            outside[-12:, :60] = False  # the sound meter
            assert np.abs(pixels[outside] - 40).max() < 12


def _eroded(mask: np.ndarray, by: int) -> np.ndarray:
    padded = np.pad(mask, by, constant_values=False)
    height, width = mask.shape
    rows = np.all([padded[y : y + height] for y in range(2 * by + 1)], axis=0)
    return np.all([rows[:, x : x + width] for x in range(2 * by + 1)], axis=0)


def test_contour_is_drawn_around_the_mask(tmp_path: Path) -> None:
    summary = predict(write_film(tmp_path / "film.mp4", 1, (320, 240)), tmp_path)
    frame = read_back(summary["overlay"])[0][3].astype(int)
    yellow = np.abs(frame - CONTOUR_RGB).sum(axis=2) < 120
    yellow[-40:] = False
    rows, columns = np.nonzero(yellow)
    assert len(rows) > 150  # about the lower and the right edge of a 160 x 120 quarter, which meet no picture border
    near = (np.abs(rows - 120) < 14) | (np.abs(columns - 160) < 14)
    assert near.mean() > 0.98


def test_aac_is_copied_bit_by_bit(tmp_path: Path) -> None:
    video = write_film(tmp_path / "film.mp4", 5, sound=bursts(5, 48_000, 6), rate=48_000)
    summary = predict(video, tmp_path / "out")
    assert (summary["sound"], summary["audio_track"]) == ("ok", "copied")
    before, after = (_audio_packets(path) for path in (video, Path(summary["overlay"])))
    assert before == after
    assert len(before) > 200


def _audio_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.audio[0]) if p.size]
        return [(round(float(p.pts * p.time_base), 4), bytes(p)) for p in packets]


@pytest.mark.parametrize(("suffix", "codec", "audio_codec", "rate"), [
    (".webm", "libvpx", "libopus", 48_000),
    (".mkv", "libx264", "pcm_s16le", 11_025),
    (".mkv", "libx264", "flac", 12_345),
])  # fmt: skip
def test_other_codecs_are_encoded_again_in_time(
    tmp_path: Path, suffix: str, codec: str, audio_codec: str, rate: int
) -> None:
    video = write_film(
        tmp_path / f"film{suffix}", 4, codec=codec, sound=bursts(4, rate, 2), rate=rate, audio_codec=audio_codec
    )
    summary = predict(video, tmp_path / "out")
    assert (summary["sound"], summary["audio_track"]) == ("ok", "re-encoded")
    frames, _, sound, new_rate = read_back(summary["overlay"])
    assert len(frames) == 4 * FPS
    assert sound is not None
    assert abs(len(sound) / new_rate - 4) < 0.15
    assert abs(_burst_time(sound, new_rate) - 0.437 * 4) < 0.01
    assert 0.4 < np.abs(sound).max() < 0.8


def _burst_time(sound_S: np.ndarray, rate: int) -> float:
    energy = sound_S.astype(np.float64) ** 2
    return float((energy * np.arange(len(energy))).sum() / energy.sum() / rate)


def test_loudness_follows_the_sound(tmp_path: Path) -> None:
    video = write_film(tmp_path / "film.mp4", 5, sound=bursts(5, 16_000, 1))
    loudness = [second["loudness"] for second in predict(video, tmp_path)["seconds"]]
    assert np.argmax(loudness) == 2  # the burst is at 2.185 s
    assert loudness[0] < loudness[2] - 0.1


def test_silent_and_missing_sound(tmp_path: Path) -> None:
    silent = write_film(tmp_path / "silent.mp4", 2, sound=np.zeros((1, 32_000), dtype=np.float32))
    mute = write_film(tmp_path / "mute.mp4", 2)
    for video, sound, track in ((silent, "silent", "copied"), (mute, "none", "none")):
        summary = predict(video, tmp_path / "out")
        assert (summary["sound"], summary["audio_track"]) == (sound, track)
        assert len(read_masks(summary)) == 2
        assert all(abs(second["loudness"] - np.log(0.01)) < 1e-4 for second in summary["seconds"])
        assert (read_back(summary["overlay"])[2] is None) == (track == "none")


@pytest.mark.parametrize(("seconds", "expected"), [(0.25, 1), (1.0, 1), (2.375, 2), (5.5, 6)])
def test_number_of_masks_and_duration(tmp_path: Path, seconds: float, expected: int) -> None:
    summary = predict(write_film(tmp_path / "film.mp4", seconds), tmp_path)
    assert len(read_masks(summary)) == expected
    with av.open(summary["overlay"]) as container:
        stream = container.streams.video[0]
        assert abs(float(stream.duration * stream.time_base) - seconds) < 1e-3


def test_summary_file_and_second_run(tmp_path: Path) -> None:
    longer, shorter = write_film(tmp_path / "film.mp4", 4), write_film(tmp_path / "film.mkv", 2)
    first = predict(longer, tmp_path / "out")
    second = predict(shorter, tmp_path / "out")
    folder = tmp_path / "out" / "film"
    assert json.loads((folder / "summary.json").read_text()) == second != first
    assert sorted(p.name for p in (folder / "masks").iterdir()) == ["0001.png", "0002.png"]
    assert sorted(p.name for p in folder.iterdir()) == ["masks", "overlay.mp4", "summary.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), small_model(tpavi=TPAVIConfig(time_aligned=True)))


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_benchmark(tmp_path, "ms3", clips=2, size=64, progress=False)
    videos = [str(p) for p in sorted(tmp_path.rglob("*.mp4"))]
    assert run("predict", ["--checkpoint", str(checkpoint), *videos, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("5 masks") == 2
    for name in ("ms3_000000", "ms3_000001"):
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert summary["image_size"] == 64
        frames, _, sound, rate = read_back(summary["overlay"])
        assert len(frames) == 50
        assert sound is not None
        assert abs(len(sound) / rate - 5) < 0.1


def _text(folder: Path) -> list[str]:
    (folder / "text.mp4").write_text("this is not a film\n" * 200)
    return [str(folder / "text.mp4")]


def _sound_only(folder: Path) -> list[str]:
    with av.open(str(folder / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        chunk = av.AudioFrame.from_ndarray(bursts(2, 16_000, 1), format="fltp", layout="mono")
        chunk.sample_rate, chunk.pts, chunk.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(chunk))
        container.mux(stream.encode(None))
    return [str(folder / "song.mp4")]


def _same_name(folder: Path) -> list[str]:
    return [str(write_film(folder / name, 1)) for name in ("film.mp4", "film.mkv")]


@pytest.mark.parametrize(("make", "message"), [
    (_text, "cannot be read as a video"),
    (_sound_only, "no video stream"),
    (lambda folder: [str(folder / "missing.mp4")], "no such video file"),
    (_same_name, "several videos are named film"),
])  # fmt: skip
def test_errors_are_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], list[str]],
    message: str,
) -> None:
    arguments = ["--checkpoint", str(checkpoint), *make(tmp_path), "--out", str(tmp_path / "out")]
    assert run("predict", arguments) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "avs-dist predict: error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("name", "sound", "track"), [
    ("bigbuckbunny.mp4", "ok", "copied"),
    ("flower_silent_track.mp4", "silent", "copied"),
    ("nasa_13013.mp4", "ok", "copied"),
])  # fmt: skip
def test_real_videos(tmp_path: Path, name: str, sound: str, track: str) -> None:
    if not VIDEOS.is_dir():
        pytest.skip(f"{VIDEOS} is absent")
    summary = predict(VIDEOS / name, tmp_path)
    assert (summary["sound"], summary["audio_track"]) == (sound, track)
    with av.open(str(VIDEOS / name)) as before, av.open(summary["overlay"]) as after:
        old, new = before.streams.best("video"), after.streams.video[0]
        assert (new.width, new.height, new.average_rate) == (old.width, old.height, old.average_rate)
        assert new.frames == old.frames
        assert abs(before.duration - after.duration) / 1e6 < 1 / float(old.average_rate)
        assert len(summary["seconds"]) == round(float(old.duration * old.time_base))

"""Decoding of odd media files by real decoding processes, and what happens when a decoder hangs or dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_files import number_of, tone, write_video, write_wav
from PIL import Image

from avs_dist.shards.images import resize_bilinear
from avs_dist.shards.workers import ClipError, Media, MediaWorker

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def worker() -> Iterator[MediaWorker]:
    with MediaWorker(deadline_s=30) as worker:
        yield worker


def numbers(media: Media) -> list[int]:
    assert media.frames_THWC is not None
    return [number_of(frame) for frame in media.frames_THWC]


def decode(worker: MediaWorker, path: Path, start_s: float = 0.0, seconds: int = 5) -> Media:
    return worker.decode(path, path, start_s, seconds, size=160)


@pytest.mark.parametrize("fps", [10, 24, 25, 30, 60])
def test_published_frame_rule_at_whole_rates(worker: MediaWorker, tmp_path: Path, fps: int):
    media = decode(worker, write_video(tmp_path / "clip.mp4", 5 * fps, fps))
    assert numbers(media) == [int(s * fps + 15 / 16 * fps) for s in range(5)]
    assert media.decoder == "decord"


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001)])
def test_ntsc_rates_follow_the_published_rule(worker: MediaWorker, tmp_path: Path, rate: Fraction):
    media = decode(worker, write_video(tmp_path / "clip.mp4", round(5 * rate), rate))
    assert numbers(media) == [int(s * round(rate) + 15 / 16 * round(rate)) for s in range(5)]


@pytest.mark.parametrize("rate", [Fraction(25, 2), Fraction(15, 2)])
def test_fractional_rates_follow_the_clock(worker: MediaWorker, tmp_path: Path, rate: Fraction):
    """round(12.5) = 12 frames a second would drift; the frame on show at 15/16 of each second is taken."""
    media = decode(worker, write_video(tmp_path / "clip.mp4", int(20 * rate), rate), start_s=10.0)
    assert numbers(media) == [int((10 + s + 15 / 16) * rate) for s in range(5)]


def test_variable_rate_follows_the_timestamps(worker: MediaWorker, tmp_path: Path):
    times = [0.0, 0.1, 0.2, 0.9, 1.5, 1.9, 2.0, 2.05, 2.1, 2.15, 2.2, 3.0, 3.95, 4.0]
    media = decode(worker, write_video(tmp_path / "clip.mkv", len(times), 25, times_s=times), seconds=4)
    assert numbers(media) == [max(i for i, at in enumerate(times) if at <= s + 15 / 16) for s in range(4)]


def test_far_into_a_film_ntsc_does_not_drift(worker: MediaWorker, tmp_path: Path):
    rate = Fraction(30000, 1001)
    times = [float(i / rate) for i in range(900)]
    media = decode(worker, write_video(tmp_path / "film.mp4", 900, rate), start_s=25.0, seconds=4)
    for s, number in enumerate(numbers(media)):
        assert abs(times[number] - (25 + s + 15 / 16)) < 1 / rate


@pytest.mark.parametrize(("frames", "seconds"), [(3, 1), (20, 1), (37, 1), (38, 2), (70, 3)])
def test_a_started_second_counts_from_half_of_it_on(worker: MediaWorker, tmp_path: Path, frames: int, seconds: int):
    media = decode(worker, write_video(tmp_path / "short.mp4", frames))
    assert numbers(media) == [min(25 * s + 23, frames - 1) for s in range(seconds)]


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_channels_and_rates_of_the_sound(worker: MediaWorker, tmp_path: Path, channels: int, rate: int):
    path = write_video(tmp_path / "clip.mp4", 50, sound=tone(2.0, rate, channels), rate=rate)
    media = decode(worker, path, seconds=2)
    assert media.sample_rate_hz == rate
    assert media.waveform_S is not None
    assert media.waveform_S.dtype == np.float32
    middle = media.waveform_S[rate // 2 : rate // 2 * 3]
    assert len(middle) == rate
    # AAC low-passes the LFE channel of 5.1, so that a mean over six holds a little less
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.2)
    spectrum = np.abs(np.fft.rfft(middle))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_no_sound_track_and_short_sound(worker: MediaWorker, tmp_path: Path):
    assert decode(worker, write_video(tmp_path / "mute.mp4", 50), seconds=2).waveform_S is None
    path = write_video(tmp_path / "short.mp4", 125, sound=tone(2.0, 16_000), rate=16_000)
    media = decode(worker, path)
    assert media.frames_THWC is not None
    assert media.waveform_S is not None
    assert len(media.frames_THWC) == 5
    assert 2.0 <= len(media.waveform_S) / 16_000 < 2.2


def test_windows_of_picture_and_sound_stay_together(worker: MediaWorker, tmp_path: Path):
    sound = np.concatenate([tone(1.0, 16_000, hertz=300 + 200 * s) for s in range(12)], axis=1)
    path = write_video(tmp_path / "film.mp4", 300, sound=sound, rate=16_000)
    media = decode(worker, path, start_s=7.0, seconds=3)
    assert numbers(media) == [25 * s + 23 for s in (7, 8, 9)]
    assert media.waveform_S is not None
    for s in range(3):
        inner = media.waveform_S[16_000 * s + 4_000 : 16_000 * s + 12_000]
        assert int(np.abs(np.fft.rfft(inner)).argmax()) * 2 == pytest.approx(300 + 200 * (7 + s), abs=4)


@pytest.mark.parametrize(("codec", "suffix"), [("libvpx", "webm"), ("libvpx-vp9", "webm"), ("mpeg4", "avi")])
def test_other_containers_and_codecs(worker: MediaWorker, tmp_path: Path, codec: str, suffix: str):
    sound = tone(3.0, 48_000, 2) if suffix == "webm" else None
    path = write_video(tmp_path / f"clip.{suffix}", 75, codec=codec, sound=sound, audio_codec="libopus")
    media = decode(worker, path, seconds=3)
    assert numbers(media) == [23, 48, 73]
    assert (media.waveform_S is not None) == (suffix == "webm")


def test_truncated_file_falls_back_to_pyav(worker: MediaWorker, tmp_path: Path):
    """The container promises 5 s, the data end after about 60%; decord gives up, PyAV reads what is there."""
    whole = write_video(tmp_path / "whole.mp4", 125)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    media = decode(worker, cut)
    assert media.decoder == "pyav"
    seconds = len(numbers(media))
    assert 2 <= seconds <= 4
    assert numbers(media)[:-1] == [25 * s + 23 for s in range(seconds - 1)]


def test_pyav_gives_the_same_frames_as_decord(worker: MediaWorker, tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", 250)
    request = {"kind": "decode", "video": str(path), "sound": None, "start_s": 5.0, "seconds": 5, "size": 64}
    request["store"] = False
    by_decord = worker._request({**request, "decoder": "decord"})
    by_pyav = worker._request({**request, "decoder": "pyav"})
    assert (by_decord["facts"]["decoder"], by_pyav["facts"]["decoder"]) == ("decord", "pyav")
    np.testing.assert_array_equal(by_decord["frames"], by_pyav["frames"])


@pytest.mark.parametrize("content", [b"", b"not a video at all", os.urandom(5000)])
def test_rubbish_is_an_error_with_a_reason(worker: MediaWorker, tmp_path: Path, content: bytes):
    path = tmp_path / "rubbish.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError, match=r"\w"):
        decode(worker, path)


@pytest.mark.parametrize("as_sound", [False, True])
def test_a_list_of_files_opens_none_of_them(worker: MediaWorker, tmp_path: Path, as_sound: bool):
    """Decoders would follow it, whatever its name says."""
    film = write_video(tmp_path / "film.mp4", 30, sound=tone(1.0, 16_000))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile film.mp4\n")
    with pytest.raises(ClipError, match="Invalid"):
        worker.decode(film if as_sound else tmp_path / "list.mp4", tmp_path / "list.mp4", 0.0, 1, 32)


def test_sound_without_picture_is_an_error(worker: MediaWorker, tmp_path: Path):
    with pytest.raises(ClipError, match="no video stream"):
        decode(worker, write_wav(tmp_path / "sound.wav", tone(1.0, 16_000)))


def test_a_hang_costs_the_deadline_and_the_worker_recovers(tmp_path: Path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)  # opening it blocks in native code
    with MediaWorker(deadline_s=1.5) as worker:
        begin = time.monotonic()
        with pytest.raises(ClipError, match=r"hung \(opening .*pipe.mp4\): no answer within 1.5 s"):
            worker.probe(pipe)
        assert 1.5 <= time.monotonic() - begin < 10
        assert numbers(decode(worker, write_video(tmp_path / "clip.mp4", 50), seconds=2)) == [23, 48]


def test_a_hang_inside_decord_is_tried_again_with_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the decord package that loops for ever, as the real one does on some files."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/decord.py").write_text(
        "class DECORDError(Exception): pass\n"
        "class logging:\n    QUIET = 0\n    set_level = staticmethod(lambda level: None)\n"
        "class VideoReader:\n    def __init__(self, *a, **k):\n        while True: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    with MediaWorker(deadline_s=2.0) as worker:
        media = decode(worker, write_video(tmp_path / "clip.mp4", 50), seconds=2)
    assert media.decoder == "pyav"
    assert numbers(media) == [23, 48]


def test_a_crash_of_the_decoder_is_an_error_of_the_clip(tmp_path: Path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    with MediaWorker(deadline_s=20) as worker:
        worker.probe(write_video(tmp_path / "clip.mp4", 10))
        assert worker._process is not None
        crash = threading.Timer(0.5, os.kill, (worker._process.pid, signal.SIGSEGV))
        crash.start()
        with pytest.raises(ClipError, match=f"crashed.*{-signal.SIGSEGV}"):
            worker.probe(pipe)
        assert worker.probe(tmp_path / "clip.mp4").fps == 25


def test_resize_is_bilinear_between_pixel_centres():
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 8, axis=0)
    small = resize_bilinear(ramp, 32)[0, :, 0].astype(float)
    np.testing.assert_allclose(small, np.arange(32) * 8 + 2, atol=0.5)
    np.testing.assert_array_equal(resize_bilinear(np.full((7, 9, 3), 77, np.uint8), 16), 77)


@pytest.mark.parametrize("name", ["bigbuckbunny", "friday"])
def test_real_films_give_the_published_frames(worker: MediaWorker, name: str):
    """Frames that were extracted with cv2 by the published rule; one grey level is the rounding of fixed point."""
    folder = SHARED / "data/annotated" / name / "visual_frames"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    media = worker.decode(SHARED / f"data/video/{name}.mp4", None, 0.0, 5, size=224)
    assert media.frames_THWC is not None
    for t in range(5):
        expected = np.asarray(Image.open(folder / f"{name}_{t + 1}.png")).astype(int)
        assert np.abs(media.frames_THWC[t] - expected).max() <= 1

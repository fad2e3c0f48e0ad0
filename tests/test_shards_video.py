"""Frames stored as video: cut out of films, read again exactly, and what hostile films or a dying decoder cost."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from feature_files import members_of
from media_files import number_of, tone, write_ms3, write_video
from test_shards_build import write_s4

from avs_dist.shards import video_file
from avs_dist.shards.build import build
from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.faults import ClipFault
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import decode_clip, encode_clip
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import Sample
from avs_dist.shards.verify import verify
from avs_dist.shards.video_cut import frames_by_pyav
from avs_dist.shards.video_file import Video
from avs_dist.shards.video_member import CONTAINERS, DECODERS, StoredVideo
from avs_dist.shards.workers import ClipError, MediaWorker

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def worker() -> Iterator[MediaWorker]:
    with MediaWorker(deadline_s=30) as worker:
        yield worker


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 s at 25 fps with sound; with several key frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return write_video(path, 300, sound=tone(12.0, 16_000), rate=16_000)


@pytest.fixture(scope="module")
def stored(worker: MediaWorker, film: Path) -> StoredVideo:
    """Seconds 7, 8, 9 of `film`."""
    stored = worker.decode(film, None, 7.0, 3, 160, store=True).stored
    assert stored is not None
    return stored


def numbers(frames_THWC: Any) -> list[int]:
    return [number_of(frame) for frame in frames_THWC]


def sizes_and_keys(data: Any) -> list[tuple[int, bool]]:
    """Bytes of each packet, and whether it is a key frame; there is nothing but the picture."""
    with av.open(io.BytesIO(data)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        return [(packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


def test_a_cut_begins_with_a_key_frame_and_ends_with_the_last_wanted_frame(
    worker: MediaWorker, film: Path, stored: StoredVideo
):
    assert numbers(worker.decode_member(stored)) == [198, 223, 248]
    assert (stored.suffix, stored.decoder) == ("mkv", "pyav")
    with av.open(str(film)) as container:
        shown = [(packet.pts, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    times = sorted(tick for tick, _, _ in shown)
    first = max(i for i, (tick, _, key) in enumerate(shown) if key and tick <= times[198])
    last = next(i for i, (tick, _, _) in enumerate(shown) if tick == times[248])
    assert first > 0
    assert sizes_and_keys(stored.data) == [(size, key) for _, size, key in shown[first : last + 1]]
    again = worker.decode(film, None, 7.0, 3, 160, store=True).stored
    assert again == stored


CODECS = [("libx264", "mp4"), ("libx264", "mkv"), ("libx265", "mp4"), ("mpeg4", "avi"), ("libvpx-vp9", "webm")]
STREAMS = [("libx264", "ts"), ("mpeg2video", "ts"), ("mpeg1video", "mpg"), ("libx264", "flv")]


@pytest.mark.parametrize(("codec", "suffix"), [*CODECS, *STREAMS])
def test_codecs_and_containers(worker: MediaWorker, tmp_path: Path, codec: str, suffix: str):
    """Transport streams have no index: decord takes frames out of them that are others than asked for."""
    path = write_video(tmp_path / f"film.{suffix}", 250, codec=codec)
    for start_s, expected in ((0.0, [23, 48, 73]), (6.0, [173, 198, 223])):
        media = worker.decode(path, None, start_s, 3, 160, store=True)
        assert numbers(media.frames_THWC) == expected
        assert media.decoder == ("decord" if suffix in ("mp4", "mkv", "webm") else "pyav")
        assert media.stored is not None
        np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)
        assert media.stored.suffix == "mkv"
        if suffix == "ts":  # there the cut has to be looked for from five seconds before
            assert len(sizes_and_keys(media.stored.data)) < 120


def test_b_frames_in_avi_never_come_from_another_second(worker: MediaWorker, tmp_path: Path):
    """AVI has no times of frames that are coded out of order; decord answered frame 9 for frame 73."""
    media = worker.decode(write_video(tmp_path / "film.avi", 100), None, 0.0, 3, 160)
    assert numbers(media.frames_THWC) == pytest.approx([23, 48, 73], abs=3)


def test_variable_rate_and_repeated_frames(worker: MediaWorker, tmp_path: Path):
    times = [0.0, 0.1, 0.2, 0.9, 3.4, 3.95, 4.0]
    media = worker.decode(write_video(tmp_path / "a.mkv", 7, 25, times_s=times), None, 0.0, 4, 160, store=True)
    assert numbers(media.frames_THWC) == [3, 3, 3, 4]
    assert media.stored is not None
    assert numbers(worker.decode_member(media.stored)) == [3, 3, 3, 4]


def test_a_film_that_cannot_be_cut_is_stored_whole(worker: MediaWorker, tmp_path: Path):
    """The cuts are Matroska files, which do not take all codecs."""
    path = write_video(tmp_path / "film.avi", 100, codec="wmv2")
    media = worker.decode(path, None, 1.0, 2, 160, store=True)
    assert numbers(media.frames_THWC) == [48, 73]
    assert media.stored is not None
    assert (media.stored.data, media.stored.suffix, media.stored.decoder) == (path.read_bytes(), "avi", "pyav")
    np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)


def write_rolling(path: Path, frames: int, parameters: str) -> Path:
    """Noise that moves by a column in each frame, so that frames need those before them."""
    noise_HWC = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"x264-params": parameters})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise_HWC, i, axis=1), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_cut_that_gives_other_frames_is_not_taken(worker: MediaWorker, tmp_path: Path):
    """Where the picture is refreshed column by column, no frame that passes for a key frame is one."""
    path = write_rolling(tmp_path / "film.mkv", 125, "intra-refresh=1:keyint=50:scenecut=0")
    decoders = set()
    for start_s in (2.0, 2.2):
        media = worker.decode(path, None, start_s, 2, 160, store=True)
        assert media.stored is not None
        assert media.stored.data == path.read_bytes()
        np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)
        decoders.add(media.stored.decoder)
    assert decoders == {"pyav", "decord"}  # not even the two of them agree everywhere


@pytest.mark.parametrize("keyint", [250, 400])
def test_streams_with_rare_key_frames_are_read_from_their_beginning(worker: MediaWorker, tmp_path: Path, keyint: int):
    """Between five seconds before the wanted frame 248 and the frame itself there is no key frame to begin with."""
    parameters = f"keyint={keyint}:scenecut=0"
    indexed = worker.decode(write_rolling(tmp_path / "a.mp4", 275, parameters), None, 9.0, 1, 160)
    media = worker.decode(write_rolling(tmp_path / "a.ts", 275, parameters), None, 9.0, 1, 160, store=True)
    np.testing.assert_array_equal(media.frames_THWC, indexed.frames_THWC)
    assert media.stored is not None
    assert (media.stored.suffix, media.stored.decoder) == ("ts", "pyav")
    np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)


def test_av1(worker: MediaWorker, tmp_path: Path):
    """Its decoder works ahead, so nothing can be left out packet by packet; decord does not know it."""
    try:
        path = write_video(tmp_path / "film.mp4", 60, codec="libsvtav1")
    except av.codec.codec.UnknownCodecError:
        pytest.skip("this PyAV has no AV1 encoder")
    media = worker.decode(path, None, 0.0, 2, 160, store=True)
    assert numbers(media.frames_THWC) == [23, 48]
    assert media.stored is not None
    assert (media.decoder, media.stored.suffix, media.stored.decoder) == ("pyav", "mkv", "pyav")
    np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)


def test_what_cannot_be_stored_is_an_error_with_a_way_out(worker: MediaWorker, tmp_path: Path):
    path = write_video(tmp_path / "film.asf", 50, codec="wmv2")
    with pytest.raises(ClipError, match="no part of the film gives the same frames again, store it as pictures"):
        worker.decode(path, None, 0.0, 2, 160, store=True)


def test_decord_reads_members_too(worker: MediaWorker, stored: StoredVideo):
    with av.open(io.BytesIO(stored.data)) as container:
        ticks = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    by_number = replace(stored, decoder="decord", at=tuple(map(ticks.index, stored.at)))
    np.testing.assert_array_equal(worker.decode_member(by_number), worker.decode_member(stored))
    for bad, message in ((replace(by_number, suffix="ts"), "ts reliably"), (replace(by_number, at=(1, 2, 999)), "999")):
        with pytest.raises(ClipFault, match=message) as caught:
            worker.decode_member(bad)
        assert caught.value.kind == "video"


def test_shards_of_films(tmp_path: Path, film: Path):
    """The same frames, masks and sound as with frames that are stored as pixels."""
    root = film.parent
    built = {
        form: build(BuildConfig("videos", root, tmp_path / form, size=160, frames=form), progress=False)
        for form in ("raw", "video")
    }
    assert verify(built["video"], progress=False) == []
    readers = {form: ClipReader(ShardIndex.load(tmp_path / form), "test") for form in built}
    for clip in range(3):
        raw, video = (readers[form].sample(clip) for form in ("raw", "video"))
        np.testing.assert_array_equal(raw.frames_THWC, video.frames_THWC)
        np.testing.assert_array_equal(raw.mel_TFM, video.mel_TFM)
        assert raw.meta == video.meta
    assert set(readers["video"].members(0)) == {"json", "mel.npy", "video.mkv"}
    for reader in readers.values():
        reader.close()


def test_avsbench_with_masks(tmp_path: Path):
    write_s4(tmp_path)
    config = BuildConfig("avsbench-s4", tmp_path, tmp_path / "out", size=160, frames="video", decode_video=True)
    reader = ClipReader(build(config, progress=False), "test")
    assert set(reader.members(0)) == {"json", "mel.npy", "video.mkv", *(f"mask{t}.png" for t in range(5))}
    sample = reader.sample(0)
    reader.close()
    assert numbers(sample.frames_THWC) == [25 * s + 23 for s in range(5)]
    assert sample.masks_THW[3].any()


def test_pictures_cannot_become_video(tmp_path: Path):
    write_ms3(tmp_path, {"a": "train"})
    with pytest.raises(RuntimeError, match="a has extracted frames, no film to store: add --decode-video"):
        build(BuildConfig("avsbench-ms3", tmp_path, tmp_path / "out", size=32, frames="video"), progress=False)
    with pytest.raises(ValueError, match="--frames video stores parts of films; avss has pictures only"):
        BuildConfig("avss", tmp_path, tmp_path / "out", frames="video")


def members(stored: StoredVideo, **changes: Any) -> dict[str, Any]:
    """Members of a clip of three seconds; `changes` of its facts of the video."""
    zeros_THW = np.zeros((3, 160, 160), np.uint8)
    mel_TFM, frames_THWC = np.zeros((3, 96, 64), np.float32), np.zeros((3, 160, 160, 3), np.uint8)
    sample = Sample("a", frames_THWC, mel_TFM, zeros_THW, np.zeros(3, bool), {})
    found: dict[str, Any] = members_of(encode_clip(sample, "video", stored))
    facts = json.loads(found["json"])
    return {**found, "json": json.dumps({**facts, "video": {**facts["video"], **changes}}).encode()}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"suffix": "m3u8"}, "schema", "'video.suffix' must be one of .*, got 'm3u8'"),
        ({"suffix": ["mkv"]}, "schema", "'video.suffix' must be one of"),
        ({"decoder": "vlc"}, "schema", "'video.decoder' must be one of .*, got 'vlc'"),
        ({"size": 0}, "schema", "a side from 1 to 8192, got 0"),
        ({"size": 9000}, "schema", "a side from 1 to 8192, got 9000"),
        ({"size": 8192}, "oversize", r"frames of \(3, 8192, 8192, 3\) take more"),
        ({"at": [1, 2]}, "schema", r"'video.at' must be 3 ascending whole numbers, got \[1, 2\]"),
        ({"at": [3, 2, 1]}, "schema", "ascending"),
        ({"at": [1, 2, 3.0]}, "schema", "ascending"),
        ({"at": [1, 2, 2**70]}, "schema", "ascending"),
        ({"at": None}, "schema", "ascending"),
        ({"at": [1, 2, 3]}, "video", "3 of 3 frames cannot be decoded"),
        ({"suffix": "mp4"}, "member", "member video.mp4 is missing"),
    ],
)
def test_facts_of_a_video_are_checked(
    worker: MediaWorker, stored: StoredVideo, changes: dict[str, Any], kind: str, message: str
):
    assert numbers(decode_clip(members(stored), media=worker).frames_THWC) == [198, 223, 248]
    with pytest.raises(ClipFault, match=message) as caught:
        decode_clip(members(stored, **changes), media=worker)
    assert caught.value.kind == kind


def test_a_video_takes_a_decoder(stored: StoredVideo):
    with pytest.raises(ValueError, match="clip a holds a video: it takes a MediaWorker"):
        decode_clip(members(stored))


def test_playlists_open_nothing(tmp_path: Path, stored: StoredVideo, monkeypatch: pytest.MonkeyPatch):
    """FFmpeg would follow them by itself; a pipe would hold up whoever opens it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.chdir(tmp_path)  # lists of films may name neighbours only
    os.mkfifo("pipe.ts")
    texts = (
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\npipe.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile pipe.ts\n",
    )
    with MediaWorker(deadline_s=5) as worker:
        for text, suffix, decoder in product(texts, CONTAINERS, DECODERS):
            with pytest.raises(ClipFault) as caught:
                worker.decode_member(replace(stored, data=text.encode(), suffix=suffix, decoder=decoder))
            assert caught.value.kind == "video"
            assert "hung" not in str(caught.value)


def test_large_pictures_are_refused_also_behind_a_small_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a limit below 160 x 96, so that no large film has to be made."""
    data = write_video(tmp_path / "film.webm", 1, codec="libvpx").read_bytes()
    sides = b"\xb0\x81\xa0\xba\x81\x60"
    assert data.count(sides) == 1
    liar = data.replace(sides, b"\xb0\x81\x40\xba\x81\x40")
    assert frames_by_pyav(liar, "mkv", [0], 32).shape == (1, 32, 32, 3)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 10_000)
    monkeypatch.setitem(video_file.LIMITS, "max_pixels", "10000")
    with pytest.raises(ClipFault, match="frames of 160 x 96 pixels, the limit is 10000") as caught:
        frames_by_pyav(data, "mkv", [0], 32)
    assert caught.value.kind == "oversize"
    with pytest.raises(ValueError, match="1 of 1 frames cannot be decoded"):
        frames_by_pyav(liar, "mkv", [0], 32)


def test_long_films_are_refused_before_decoding(worker: MediaWorker, stored: StoredVideo):
    data = bytes(stored.data)
    at = data.index(b"\x44\x89\x88") + 3  # Duration, in milliseconds
    assert struct.unpack(">d", data[at : at + 8])[0] < 4000  # from its key frame on, not from the film's beginning
    longer = data[:at] + struct.pack(">d", 4e6) + data[at + 8 :]
    with pytest.raises(ClipFault, match="the video is 4000 s long") as caught:
        worker.decode_member(replace(stored, data=longer))
    assert caught.value.kind == "oversize"


def test_harmed_films_cost_their_clip_only(worker: MediaWorker, stored: StoredVideo):
    noise = np.random.default_rng(3)
    refused = 0
    for _ in range(40):
        harmed = bytearray(stored.data)
        harmed = harmed[: noise.integers(1, len(harmed))] if noise.random() < 0.3 else harmed
        for at in noise.integers(0, len(harmed), 20):
            harmed[at] = noise.integers(256)
        try:
            worker.decode_member(replace(stored, data=harmed))
        except ClipFault:
            refused += 1
    assert refused > 3
    assert numbers(worker.decode_member(stored)) == [198, 223, 248]


def test_the_memory_of_the_decoder_is_bounded(worker: MediaWorker, stored: StoredVideo):
    worker.decode_member(stored)
    assert os.fstat(worker._memory).st_size == 0  # what was passed is given back
    assert worker._process is not None
    assert resource.prlimit(worker._process.pid, resource.RLIMIT_AS) == (8 * 2**30, 8 * 2**30)


def open_descriptors() -> set[str]:
    return {f"{name}: {os.readlink(f'/proc/self/fd/{name}')}" for name in os.listdir("/proc/self/fd") if _is_open(name)}


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


@pytest.mark.parametrize("bytes_more", [0, 8 * 2**20])
def test_a_decoder_that_stands_still_costs_the_deadline(stored: StoredVideo, bytes_more: int):
    """SIGSTOP in mid-clip; what it was to read, however long, does not hold up its parent."""
    before = open_descriptors()
    with MediaWorker(deadline_s=1.5) as worker:
        worker.decode_member(stored)
        assert worker._process is not None
        first = worker._process.pid
        os.kill(first, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(ClipFault, match=r"hung \(opening video.mkv\): no answer within 1.5 s") as caught:
            worker.decode_member(replace(stored, data=bytes(stored.data) + bytes(bytes_more)))
        assert caught.value.kind == "video"
        assert time.monotonic() - begin < 15
        assert numbers(worker.decode_member(stored)) == [198, 223, 248]
        assert worker._process.pid != first
    assert open_descriptors() <= before  # sockets of earlier tests may close


def test_kill_9_of_the_decoder_costs_its_clip_only(stored: StoredVideo):
    with MediaWorker(deadline_s=60) as worker:
        worker.decode_member(stored)
        assert worker._process is not None
        first = worker._process.pid
        os.kill(first, signal.SIGSTOP)  # in mid-clip for certain when the signal comes
        killer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
        killer.start()
        with pytest.raises(ClipFault, match=rf"the decoder crashed .*exit code {-signal.SIGKILL}") as caught:
            worker.decode_member(stored)
        killer.join(timeout=10)
        assert caught.value.kind == "video"
        assert numbers(worker.decode_member(stored)) == [198, 223, 248]
        assert worker._process.pid != first


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "friday.mp4", "nasa_13013.mp4", "big_buck_bunny_0_30.webm"])
def test_real_films(worker: MediaWorker, name: str):
    path = SHARED / "data/video" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    start_s = 0.0 if Video(str(path)).duration_s < 10 else 5.0
    media = worker.decode(path, None, start_s, 5, 224, store=True)
    assert media.stored is not None
    assert (media.stored.suffix, media.stored.decoder) == ("mkv", "pyav")
    assert len(media.stored.data) < path.stat().st_size
    np.testing.assert_array_equal(worker.decode_member(media.stored), media.frames_THWC)

"""The decoding process: reads media files with decord and PyAV. The only file that imports decord.

It runs as a child of `workers.MediaWorker` (`python -m avs_dist.shards.decode FD FD`), because decord can loop for ever
in native code while holding the interpreter lock: only killing the process ends that. It imports neither torch nor
anything else that is slow to load. Requests and answers are JSON; bytes, pixels and samples go through shared memory.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, cast

import av
import decord
import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.images import resize_bilinear
from avs_dist.shards.video_cut import DECORD_SUFFIXES, frames_by_pyav, open_member, parts
from avs_dist.shards.video_file import DECORD_READS, LIMITS, Video
from avs_dist.shards.video_member import DECODERS

# Decoders that keep state between packets (AAC, Vorbis, Opus) need a run-up after a seek.
AUDIO_RUN_UP_S = 1.0
# Timestamps of some containers jitter by milliseconds; only a larger jump is a gap in the sound.
AUDIO_GAP_S = 0.1
# A film may come from a stranger: it must not take the memory of the training beside this process.
MAX_MEMORY_BYTES = 8 * 2**30


@lru_cache(maxsize=1)
def open_video(path: str) -> Video:
    """Consecutive windows of a film share one opened file."""
    return Video(path)


@lru_cache(maxsize=1)
def open_decord(path: str) -> Any:
    """The same for decord's reader."""
    return decord.VideoReader(path, num_threads=1)


def read_sound(path: str, start_s: float, seconds: int, zero_s: float) -> tuple[np.ndarray, int] | None:
    """Mono float32 samples of [start_s, start_s + seconds) at the native rate; None without a sound track.

    Args:
        zero_s: Container time of the clip's time zero (the first video frame), so that sound and picture stay together.
    """
    with av.open(path, options=LIMITS) as container:
        stream: Any = container.streams.best("audio")
        if stream is None:
            return None
        rate = int(stream.rate)
        if start_s > AUDIO_RUN_UP_S:
            target_s = start_s + zero_s - AUDIO_RUN_UP_S
            container.seek(int(target_s / stream.time_base), stream=stream, backward=True)
        mono_S = np.zeros(seconds * rate, dtype=np.float32)
        end = 0
        position: int | None = None
        resampler = av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            for part in resampler.resample(cast(av.AudioFrame, frame)):
                samples_S = part.to_ndarray().mean(axis=0, dtype=np.float64).astype(np.float32)
                stamp = None if part.time is None else round((part.time - zero_s - start_s) * rate)
                if position is None or (stamp is not None and abs(stamp - position) > AUDIO_GAP_S * rate):
                    position = stamp or 0
                end = max(end, _place(mono_S, samples_S, position))
                position += len(samples_S)
            if position is not None and position >= len(mono_S):
                break
        return mono_S[:end], rate


def _place(target_S: np.ndarray, samples_S: np.ndarray, position: int) -> int:
    """Copy the part of the samples that falls into the target; returns where it ends there."""
    begin, end = max(position, 0), min(position + len(samples_S), len(target_S))
    if begin < end:
        target_S[begin:end] = samples_S[begin - position : end - position]
    return max(end, 0)


def probe(path: str) -> dict[str, Any]:
    video = open_video(path)
    return {"fps": video.fps, "width": video.width, "height": video.height, "duration_s": video.duration_s}


def decode(request: dict[str, Any], notify: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Frames and sound of one clip, and the part of the film to be stored; see `workers.MediaWorker.decode`."""
    facts: dict[str, Any] = {"decoder": None, "rate": None}
    frames_THWC, mono_S = np.zeros((0, 0, 0, 3), dtype=np.uint8), np.zeros(0, dtype=np.float32)
    zero_s, seconds, data = 0.0, request["seconds"], b""
    if request["video"]:
        video = open_video(request["video"])
        # a started second counts when at least half of it exists
        seconds = max(1, min(seconds, int(video.duration_s - request["start_s"] + 0.5)))
        indices = [video.frame_index(request["start_s"] + t) for t in range(seconds)]
        facts |= probe(request["video"])
        facts["decoder"], indices, frames_THWC = _decode_frames(video, indices, request, notify)
        zero_s = video.start_s if request["sound"] == request["video"] else 0.0
        if request["store"]:
            notify("storing", video.path)
            facts["stored"], data = _stored(video, indices, frames_THWC, request)
    if request["sound"]:
        notify("sound", request["sound"])
        sound = read_sound(request["sound"], request["start_s"], seconds, zero_s)
        if sound is not None:
            mono_S, facts["rate"] = sound
    answer = {"facts": facts, "shape": frames_THWC.shape, "samples": len(mono_S), "bytes": len(data)}
    return answer, [frames_THWC, mono_S, np.frombuffer(data, np.uint8)]


def decode_member(data: bytes, suffix: str, decoder: str, at: list[int], size: int) -> np.ndarray:
    """uint8 RGB [T,size,size,3] of a stored video; see `video_member.StoredVideo`.

    Raises:
        ValueError, av.error.FFmpegError, decord.DECORDError: If it cannot be decoded.
    """
    if decoder == "pyav":
        return frames_by_pyav(data, suffix, at, size)
    if suffix not in DECORD_SUFFIXES:
        raise ValueError(f"decord does not read {suffix} reliably")
    open_member(data, suffix).close()  # it is the container that it is said to be, and not too large
    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return np.stack([resize_bilinear(frame, size) for frame in reader.get_batch(at).asnumpy()])


def _stored(
    video: Video, indices: list[int], frames_THWC: np.ndarray, request: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """Facts of a `StoredVideo` and its bytes, of the first part of the film that is seen to give these very frames.

    Raises:
        ValueError: If none does.
    """
    for part in parts(video, indices):
        places = {"pyav": [part.ticks[i] for i in part.indices], "decord": part.indices}
        for decoder in DECODERS if request["decoder"] != "pyav" else ("pyav",):
            facts = {"suffix": part.suffix, "decoder": decoder, "at": places[decoder], "size": request["size"]}
            try:
                if np.array_equal(decode_member(part.data, **facts), frames_THWC):
                    return facts, part.data
            except (ValueError, av.error.FFmpegError, decord.DECORDError):
                continue
    raise ValueError("no part of the film gives the same frames again, store it as pictures")


def _decode_frames(
    video: Video, indices: list[int], request: dict[str, Any], notify: Any
) -> tuple[str, list[int], np.ndarray]:
    """Name of the decoder that worked, which frames it gave, and these at the wanted size."""

    def resized(frames: Iterator[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
        shown = [(index, resize_bilinear(frame, request["size"])) for index, frame in frames]
        return [index for index, _ in shown], np.stack([frame for _, frame in shown])

    if request["decoder"] != "pyav":
        notify("decord", video.path)
        try:
            return "decord", *resized(_frames_decord(video, indices))
        except (decord.DECORDError, ValueError):
            notify("pyav", video.path)
    return "pyav", *resized(video.frames_pyav(indices))


def _frames_decord(video: Video, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Index and uint8 RGB [H,W,3] of each index.

    Raises:
        ValueError: If decord does not read such files reliably, or sees another stream or another number of frames.
    """
    if video.container not in DECORD_READS:
        raise ValueError(f"decord does not read {video.container} reliably")
    reader = open_decord(video.path)
    if len(reader) != len(video.ticks):
        raise ValueError(f"decord counts {len(reader)} frames, the container has {len(video.ticks)}")
    frames_THWC = reader.get_batch(indices).asnumpy()
    reader.seek(0)  # or it goes on decoding ahead and keeps the frames
    if frames_THWC.shape[1:3] != (video.height, video.width):
        raise ValueError(f"decord returns frames of {frames_THWC.shape[1:3]}, not {(video.height, video.width)}")
    return zip(indices, frames_THWC, strict=True)


def serve(connection: Connection, memory: int) -> None:
    """Answer requests until the parent goes away.

    Args:
        connection: For messages; they are short, so that neither side waits for the other to take them.
        memory: Descriptor of the memory that all bytes, pixels and samples go through, both ways.
    """
    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its children
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))

    def tell(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    tell(status="ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Default action of SIGALRM: the kernel ends a process that is stuck in native code after its parent died.
        signal.alarm(int(request["deadline_s"]) + 10)
        try:
            answer, arrays = _answer(request, memory, lambda stage, path: tell(status="stage", stage=stage, path=path))
            os.pwritev(memory, [np.ascontiguousarray(array).data.cast("B") for array in arrays if array.size], 0)
            tell(status="done", **answer)
        except Exception as error:  # any failure belongs to the clip, not to the worker
            kind = error.kind if isinstance(error, ClipFault) else "video"
            tell(status="failed", kind=kind, reason=f"{type(error).__name__}: {error}")
        signal.alarm(0)


def _answer(request: dict[str, Any], memory: int, notify: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Message to answer a request with, and what goes through the memory."""
    if request["kind"] == "probe":
        return {"facts": probe(request["video"])}, []
    if request["kind"] == "member":
        frames_THWC = decode_member(os.pread(memory, request["bytes"], 0), **request["stored"])
        return {"shape": frames_THWC.shape}, [frames_THWC]
    return decode(request, notify)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))

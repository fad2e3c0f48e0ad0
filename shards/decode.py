"""The decoding process: reads media files with decord and PyAV. The only file that imports decord.

It runs as a child of `workers.MediaWorker` (`python -m avs_dist.shards.decode FD`), because decord can loop for ever in
native code while holding the interpreter lock: only killing the process ends that. It imports neither torch nor
anything else that is slow to load. Requests and answers are JSON, pixels and samples follow as raw bytes.
"""

from __future__ import annotations

import json
import signal
import sys
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, cast

import av
import decord
import numpy as np

from avs_dist.shards.images import resize_bilinear
from avs_dist.shards.schema import MAX_PIXELS

# Frame rule of AVSBench: the last of 16 sub-samples of each second stands for it.
FRAME_OFFSET_S = 15 / 16
# Decoders that keep state between packets (AAC, Vorbis, Opus) need a run-up after a seek.
AUDIO_RUN_UP_S = 1.0
# Timestamps of some containers jitter by milliseconds; only a larger jump is a gap in the sound.
AUDIO_GAP_S = 0.1


class Video:
    """One opened video file: the time of every coded frame, and its pixels by decord or, where that fails, by PyAV."""

    def __init__(self, path: str) -> None:
        self.path = path
        with av.open(path) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise ValueError("no video stream")
            self.index, self.time_base = stream.index, stream.time_base or Fraction(1, 1000)
            self.width, self.height = stream.codec_context.width, stream.codec_context.height
            rate = stream.average_rate
            self.ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not 0 < self.width * self.height <= MAX_PIXELS:
            raise ValueError(f"frames of {self.width} x {self.height} pixels, the limit is {MAX_PIXELS} pixels")
        if not self.ticks:
            raise ValueError("the video stream holds no frame")
        self.start_s = float(self.ticks[0] * self.time_base)
        self.times_s = [float(tick * self.time_base) - self.start_s for tick in self.ticks]
        span_s = self.times_s[-1]
        self.fps = float(rate) if rate else (len(self.ticks) - 1) / span_s if span_s > 0 else 1.0
        self.duration_s = span_s + 1.0 / self.fps
        self._decord: Any = None

    def frame_index(self, second: float) -> int:
        """Coded frame that stands for the second that begins at `second`.

        The published index int(second * round(fps) + 15/16 * round(fps)), where that frame is less than one frame
        interval away from the moment it stands for: always at whole rates, and over AVSBench clips at NTSC rates.
        Elsewhere (12.5 fps, variable rate, far into a long film) that index drifts; then the frame on show at
        second + 15/16 by its timestamp.
        """
        moment, nominal = second + FRAME_OFFSET_S, round(self.fps)
        published = int(second * nominal + FRAME_OFFSET_S * nominal)
        last = len(self.times_s) - 1
        if published <= last and abs(self.times_s[published] - moment) < 1.0 / self.fps:
            return published
        # half a millisecond of slack for containers that round timestamps
        return min(max(0, bisect_right(self.times_s, moment + 5e-4) - 1), last)

    def frames_decord(self, indices: list[int]) -> Iterator[np.ndarray]:
        """uint8 RGB [H,W,3] of each index.

        Raises:
            ValueError: If decord sees another stream or another number of frames than the container has.
        """
        if self._decord is None:
            self._decord = decord.VideoReader(self.path, num_threads=1)
        if len(self._decord) != len(self.ticks):
            raise ValueError(f"decord counts {len(self._decord)} frames, the container has {len(self.ticks)}")
        frames_THWC = self._decord.get_batch(indices).asnumpy()
        self._decord.seek(0)  # or it goes on decoding ahead and keeps the frames
        if frames_THWC.shape[1:3] != (self.height, self.width):
            raise ValueError(f"decord returns frames of {frames_THWC.shape[1:3]}, not {(self.height, self.width)}")
        return iter(frames_THWC)

    def frames_pyav(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The same by PyAV; where a frame cannot be decoded, the nearest earlier one of the last second stands in.

        Raises:
            ValueError: If nothing can be decoded in the second before a frame.
        """
        wanted = [self.ticks[i] for i in indices]
        with av.open(self.path) as container:
            stream = container.streams[self.index]
            if self.times_s[indices[0]] > 1.0:
                container.seek(wanted[0], stream=stream, backward=True)
            shown: Any = None
            decoded = _tolerant_decode(container, stream)
            following = next(decoded, None)
            for tick in wanted:
                while following is not None and following.pts <= tick:
                    shown, following = following, next(decoded, None)
                if shown is None or (tick - shown.pts) * self.time_base > 1:
                    raise ValueError(f"no frame can be decoded near {float(tick * self.time_base):.2f} s")
                yield shown.to_ndarray(format="rgb24")


def _tolerant_decode(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; broken packets are passed over."""
    for packet in container.demux(stream):
        try:
            yield from (frame for frame in packet.decode() if frame.pts is not None)
        except av.error.FFmpegError:
            continue


@lru_cache(maxsize=1)
def open_video(path: str) -> Video:
    """Consecutive windows of a film share one opened file."""
    return Video(path)


def read_sound(path: str, start_s: float, seconds: int, zero_s: float) -> tuple[np.ndarray, int] | None:
    """Mono float32 samples of [start_s, start_s + seconds) at the native rate; None without a sound track.

    Args:
        zero_s: Container time of the clip's time zero (the first video frame), so that sound and picture stay together.
    """
    with av.open(path) as container:
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


def decode(request: dict[str, Any], notify: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Frames and sound of one clip; see `workers.MediaWorker.decode` for the request."""
    facts: dict[str, Any] = {"decoder": None, "rate": None}
    frames_THWC, mono_S = np.zeros((0, 0, 0, 3), dtype=np.uint8), np.zeros(0, dtype=np.float32)
    zero_s, seconds = 0.0, request["seconds"]
    if request["video"]:
        video = open_video(request["video"])
        # a started second counts when at least half of it exists
        seconds = max(1, min(seconds, int(video.duration_s - request["start_s"] + 0.5)))
        indices = [video.frame_index(request["start_s"] + t) for t in range(seconds)]
        facts |= probe(request["video"])
        facts["decoder"], frames_THWC = _decode_frames(video, indices, request, notify)
        zero_s = video.start_s if request["sound"] == request["video"] else 0.0
    if request["sound"]:
        notify("sound", request["sound"])
        sound = read_sound(request["sound"], request["start_s"], seconds, zero_s)
        if sound is not None:
            mono_S, facts["rate"] = sound
    return facts, frames_THWC, mono_S


def _decode_frames(video: Video, indices: list[int], request: dict[str, Any], notify: Any) -> tuple[str, np.ndarray]:
    """Name of the decoder that worked, and the frames at the wanted size."""

    def resized(frames: Iterator[np.ndarray]) -> np.ndarray:
        return np.stack([resize_bilinear(frame, request["size"]) for frame in frames])

    if request["decoder"] == "pyav":
        return "pyav", resized(video.frames_pyav(indices))
    notify("decord", video.path)
    try:
        return "decord", resized(video.frames_decord(indices))
    except (decord.DECORDError, ValueError):
        notify("pyav", video.path)
        return "pyav", resized(video.frames_pyav(indices))


def serve(connection: Connection) -> None:
    """Answer requests until the parent goes away."""
    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its children

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
            if request["kind"] == "probe":
                tell(status="done", facts=probe(request["video"]))
            else:
                facts, frames_THWC, mono_S = decode(
                    request, lambda stage, path: tell(status="stage", stage=stage, path=path)
                )
                tell(status="done", facts=facts, shape=frames_THWC.shape, samples=len(mono_S))
                if frames_THWC.size:
                    connection.send_bytes(np.ascontiguousarray(frames_THWC).data.cast("B"))
                if mono_S.size:
                    connection.send_bytes(mono_S.data.cast("B"))
        except Exception as error:  # any failure belongs to the clip, not to the worker
            tell(status="failed", reason=f"{type(error).__name__}: {error}")
        signal.alarm(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

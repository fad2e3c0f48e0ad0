"""Video files through PyAV, in the decoding process: when each coded frame is shown, which one stands for a second."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import closing
from fractions import Fraction
from typing import Any

import av
import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.schema import MAX_PIXELS

# Frame rule of AVSBench: the last of 16 sub-samples of each second stands for it.
FRAME_OFFSET_S = 15 / 16
# Containers whose frames decord finds. Of others (transport streams, AVI) it gives wrong ones without an error.
DECORD_READS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Containers that tell where their key frames lie; in others a seek may land behind the wanted frame.
_INDEXED = (*DECORD_READS, "avi")
_RUN_UP_S = 5
# Decoders refuse larger pictures, also behind a header that tells less; and a file is never read as a list of other
# files (concat, playlists), whatever its name says.
LIMITS = {
    "max_pixels": str(MAX_PIXELS),
    "format_whitelist": "mov,matroska,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,wav,w64,mp3,aac,flac",
}


class Video:
    """One opened video file: the time of every coded frame, and its pixels."""

    def __init__(self, path: str) -> None:
        self.path = path
        with av.open(path, options=LIMITS) as container:
            stream = video_stream(container)
            self.container = container.format.name
            self.index, self.time_base = stream.index, stream.time_base or Fraction(1, 1000)
            self.width, self.height = stream.codec_context.width, stream.codec_context.height
            rate = stream.average_rate
            self.ticks = ticks_of(container, stream)
        self.start_s = float(self.ticks[0] * self.time_base)
        self.times_s = [float(tick * self.time_base) - self.start_s for tick in self.ticks]
        span_s = self.times_s[-1]
        self.fps = float(rate) if rate else (len(self.ticks) - 1) / span_s if span_s > 0 else 1.0
        self.duration_s = span_s + 1.0 / self.fps

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

    def frames_pyav(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Index and uint8 RGB [H,W,3] of each of the frames, by PyAV.

        Where a frame cannot be decoded, the nearest earlier one of the last second stands in, with its own index.

        Raises:
            ValueError: If nothing can be decoded in the second before a frame.
        """
        wanted = [self.ticks[i] for i in indices]
        with closing(self._decoded(wanted[0])) as decoded:
            shown: Any = None
            following = next(decoded, None)
            for tick in wanted:
                while following is not None and following.pts <= tick:
                    shown, following = following, next(decoded, None)
                if shown is None or (tick - shown.pts) * self.time_base > 1:
                    raise ValueError(f"no frame can be decoded near {float(tick * self.time_base):.2f} s")
                yield bisect_right(self.ticks, shown.pts) - 1, shown.to_ndarray(format="rgb24")

    def seek(self, container: Any, tick: int) -> None:
        """Go on with a packet that lies before the one that is shown at `tick`, or near it where nothing tells."""
        if (tick - self.ticks[0]) * self.time_base > 1:
            run_up = 0 if self.container in _INDEXED else int(_RUN_UP_S / self.time_base)
            container.seek(tick - run_up, stream=container.streams[self.index], backward=True)

    def _decoded(self, tick: int) -> Generator[Any]:
        """Decoded frames from one on that is not behind `tick`, if need be from the beginning of the film."""
        for seek in (True, False):
            with av.open(self.path, options=LIMITS) as container:
                if seek:
                    self.seek(container, tick)
                frames = _frames(container, self.index)
                first = next(frames, None)
                if first is not None and (first.pts <= tick or not seek):
                    yield first
                    yield from frames
                    return


def video_stream(container: Any) -> Any:
    """The stream of the container's choice.

    Raises:
        ValueError: If there is none.
        ClipFault: If its pictures are larger than readers accept; none has been decoded for us yet.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("no video stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS:
        raise ClipFault("oversize", f"frames of {width} x {height} pixels, the limit is {MAX_PIXELS} pixels")
    stream.codec_context.options = LIMITS
    return stream


def ticks_of(container: Any, stream: Any) -> list[int]:
    """Time of each coded frame in units of the stream's time base, ascending.

    Raises:
        ValueError: If there is no frame.
    """
    ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    if not ticks:
        raise ValueError("the video stream holds no frame")
    return ticks


def _frames(container: Any, index: int) -> Iterator[Any]:
    return (frame for packet in container.demux(container.streams[index]) for frame in decode_packet(packet))


def decode_packet(packet: Any) -> list[Any]:
    """Frames that the packet completes; none where it is broken."""
    try:
        return [frame for frame in packet.decode() if frame.pts is not None]
    except av.error.FFmpegError:
        return []

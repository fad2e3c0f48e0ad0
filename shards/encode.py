"""The one place that writes video files: H.264 (yuv420p) and at most one AAC track in an mp4."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

# H.273 codes of the matrices that the writer can keep
_MATRICES = {1: Colorspace.ITU709, 5: Colorspace.ITU601, 6: Colorspace.ITU601}
AAC_FRAME_SAMPLES = 1024
AUDIO_BIT_RATE = 128_000
# with the macroblock tree x264 encodes equal input in different ways from run to run, even with one thread
X264_OPTIONS = {"preset": "veryfast", "x264-params": "mbtree=0"}
AAC_OPTIONS = {"aac_coder": "fast"}  # at this bit rate the slow search brings nothing one hears


class Mp4Writer:
    """Streaming mp4 writer; use as a context manager.

    The file is written beside `path` and gets its name only when the block ends without an error. With one encoder
    thread (the default) equal input gives equal bytes.

    Args:
        path: Final file.
        width, height: Picture size; an odd side is extended by one repeated row or column (yuv420p needs even sides).
        fps: Nominal frame rate.
        like: Video stream whose time base (the unit of explicit frame times), pixel aspect and colour matrix are kept;
            without it the unit is 1/fps and the matrix BT.601, which readers assume of untagged files.
        crf: x264 quality, 0 lossless to 51 worst.
        threads: x264 threads, 0 as many as there are cores.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: Fraction,
        like: av.VideoStream | None = None,
        crf: int = 18,
        threads: int = 1,
    ) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._pad_bottom, self._pad_right = height % 2, width % 2
        self._container = av.open(str(self._partial), "w", format="mp4", options={"fflags": "+bitexact"})
        self._video = self._container.add_stream("libx264", rate=fps, options={**X264_OPTIONS, "crf": str(crf)})
        self._video.width, self._video.height = width + self._pad_right, height + self._pad_bottom
        self._video.pix_fmt = "yuv420p"
        self._video.thread_count = threads
        self._time_base = 1 / fps
        self._matrix = Colorspace.ITU601
        if like is not None:
            self._keep_properties(like)
        self._video.codec_context.time_base = self._time_base
        self._audio: av.AudioStream | None = None
        self._next_pts = 0

    def _keep_properties(self, like: av.VideoStream) -> None:
        self._time_base = like.time_base or self._time_base
        ours, theirs = self._video.codec_context, like.codec_context
        if theirs.sample_aspect_ratio:
            ours.sample_aspect_ratio = theirs.sample_aspect_ratio
        if theirs.colorspace in _MATRICES:
            self._matrix = _MATRICES[theirs.colorspace]
            ours.colorspace, ours.color_primaries = theirs.colorspace, theirs.color_primaries
            ours.color_trc, ours.color_range = theirs.color_trc, ColorRange.MPEG

    def add_audio(self, sample_rate_hz: int, layout: str) -> None:
        """Add an AAC track that `write_audio` encodes; call before the first frame."""
        self._audio = self._container.add_stream("aac", rate=sample_rate_hz, layout=layout, options=AAC_OPTIONS)
        self._audio.bit_rate = AUDIO_BIT_RATE
        self._audio.codec_context.thread_count = 1

    def copy_audio(self, source: av.AudioStream) -> None:
        """Add a track that takes the packets of `source` unchanged by `write_audio_packet`."""
        self._audio = self._container.add_stream_from_template(source)

    def write_frame(self, frame_HWC: np.ndarray, pts: int | None = None) -> None:
        """Append a uint8 RGB frame, at time `pts` (in time_base; increasing), by default one frame after the last."""
        if self._pad_bottom or self._pad_right:
            frame_HWC = np.pad(frame_HWC, ((0, self._pad_bottom), (0, self._pad_right), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=self._matrix, dst_color_range=ColorRange.MPEG)
        frame.pts = self._next_pts if pts is None else pts
        frame.time_base = self._time_base
        self._next_pts = frame.pts + 1
        self._container.mux(self._video.encode(frame))

    def write_audio(self, frame: av.AudioFrame) -> None:
        """Encode an audio frame; it is converted to the format of `add_audio` where that differs."""
        assert self._audio is not None
        self._container.mux(self._audio.encode(frame))

    def write_audio_packet(self, packet: av.Packet) -> None:
        """Mux a packet of the stream given to `copy_audio`."""
        assert self._audio is not None
        packet.stream = self._audio
        self._container.mux(packet)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._container.close()
            self._partial.unlink(missing_ok=True)
            return
        self._container.mux(self._video.encode(None))
        if self._audio is not None and self._audio.codec_context.is_encoder:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        with open(self._partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self._path)


def write_clip(path: Path, frames_FHWC: np.ndarray, fps: Fraction, waveform_S: np.ndarray, sample_rate_hz: int) -> None:
    """Write a whole short clip: uint8 RGB frames and a mono waveform in [-1, 1]."""
    height, width = frames_FHWC.shape[1:3]
    with Mp4Writer(path, width=width, height=height, fps=fps) as writer:
        writer.add_audio(sample_rate_hz, "mono")
        chunks = _audio_frames(waveform_S, sample_rate_hz)
        for frame_HWC in frames_FHWC:
            writer.write_frame(frame_HWC)
        for chunk in chunks:
            writer.write_audio(chunk)


def _audio_frames(waveform_S: np.ndarray, sample_rate_hz: int) -> Iterator[av.AudioFrame]:
    for start in range(0, len(waveform_S), AAC_FRAME_SAMPLES):
        part = np.ascontiguousarray(waveform_S[None, start : start + AAC_FRAME_SAMPLES], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = sample_rate_hz
        frame.pts = start
        frame.time_base = Fraction(1, sample_rate_hz)
        yield frame

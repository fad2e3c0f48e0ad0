"""Paints masks on every frame of a video and keeps its sound: streaming, one frame in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from avs_dist.shards.encode import Mp4Writer
from avs_dist.shards.schema import LOG_OFFSET

FILL_RGB = (255, 40, 110)
CONTOUR_RGB = (255, 235, 120)
FILL_OPACITY = 0.45
CLASS_OPACITY = 0.6  # the colours of the VOC palette are dark
METER_RANGE = 8.0  # mean log-mel above digital silence that fills the meter; loud film music reaches 6.5

SoundTrack = Literal["copied", "re-encoded", "none"]


def write_overlay(
    video: Path, overlay: Path, masks: Sequence[Path], level_N: np.ndarray, levels_per_s: int, progress: bool = True
) -> SoundTrack:
    """Write `video` again as H.264 mp4, all frames at their size and time, with masks and a sound meter painted on.

    Args:
        masks: One picture a second at the size of the video; the last serves the rest of the video. Either {0,255}, or
            class indices with a palette: each class is then painted in its colour, and index 0 not at all.
        level_N: Loudness (mean log-mel), `levels_per_s` values a second, for the meter.

    Returns:
        What became of the sound track: AAC packets are copied, other codecs re-encoded.

    Raises:
        ValueError: The video stream cannot be decoded.
    """
    with av.open(str(video)) as source:
        picture, sound = source.streams.best("video"), source.streams.best("audio")
        if not isinstance(picture, av.VideoStream):
            raise ValueError(f"{video}: no video stream")
        assert sound is None or isinstance(sound, av.AudioStream)
        picture.thread_type = "AUTO"
        size = picture.codec_context.width, picture.codec_context.height
        fps = picture.average_rate or Fraction(25)
        painter = Painter(masks, level_N, levels_per_s)
        bar = tqdm(total=picture.frames or None, desc=f"overlay {video.name}", unit="frame", disable=not progress)
        with bar, Mp4Writer(overlay, width=size[0], height=size[1], fps=fps, like=picture, threads=0) as writer:
            track = _add_sound(writer, sound)
            clock = _Clock(picture, int(source.start_time or 0))
            for packet in source.demux([s for s in (picture, sound) if s is not None]):
                if packet.stream is not picture:
                    _pass_sound(writer, packet, track, clock)
                    continue
                for frame in tolerant_decode(packet):
                    pixels_HWC = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                    pts, time_s = clock.of(frame)
                    writer.write_frame(painter.paint(pixels_HWC, time_s), pts)
                    bar.update()
            if clock.frames == 0:
                raise ValueError(f"{video}: no frame can be decoded")
    return track


class Painter:
    """Paints the mask of a second, its outline and the sound meter; the masks are read one at a time."""

    def __init__(self, masks: Sequence[Path], level_N: np.ndarray, levels_per_s: int) -> None:
        self._masks, self._level_N, self._levels_per_s = masks, level_N, levels_per_s
        self._second = -1
        self._inner = self._outline = Image.new("L", (1, 1))
        self._class_colours: Image.Image | None = None
        kept = np.arange(256) * (1 - FILL_OPACITY)
        # 256 blended values for each of red, green and blue
        self._blend = [round(value + FILL_OPACITY * tint) for tint in FILL_RGB for value in kept]

    def paint(self, frame_HWC: np.ndarray, time_s: float) -> np.ndarray:
        """The uint8 RGB frame with everything painted, as a new array."""
        second = min(max(int(time_s), 0), len(self._masks) - 1)
        if second != self._second:
            self._load(second)
        image = Image.fromarray(frame_HWC)
        image.paste(self._tinted(image), mask=self._inner)
        image.paste(CONTOUR_RGB, mask=self._outline)
        out_HWC = np.array(image)
        self._draw_meter(out_HWC, time_s)
        return out_HWC

    def _tinted(self, image: Image.Image) -> Image.Image:
        if self._class_colours is None:
            return image.point(self._blend)
        return Image.blend(image, self._class_colours, CLASS_OPACITY)

    def _load(self, second: int) -> None:
        with Image.open(self._masks[second]) as image:
            index_HW = np.asarray(image)
            self._class_colours = image.convert("RGB") if image.mode == "P" else None
        width = 2 * max(1, round(len(index_HW) / 360)) + 1
        # padded, so that a mask has no outline along the border of the picture
        padded = Image.fromarray(np.pad(index_HW, width, mode="edge"))
        lowest_HW = np.asarray(padded.filter(ImageFilter.MinFilter(width)))
        inner_HW = lowest_HW > 0
        if self._class_colours is not None:  # away from other classes, too
            inner_HW &= lowest_HW == np.asarray(padded.filter(ImageFilter.MaxFilter(width)))
        inner_HW = inner_HW[width:-width, width:-width]
        self._second = second
        self._inner = Image.fromarray(inner_HW)
        self._outline = Image.fromarray((index_HW > 0) & ~inner_HW)

    def _draw_meter(self, out_HWC: np.ndarray, time_s: float) -> None:
        """A bar at the bottom left: how loud the model hears this moment."""
        height, width = out_HWC.shape[:2]
        margin, thickness, length = max(2, height // 40), max(2, height // 60), width // 4
        bar_HWC = out_HWC[height - margin - thickness : height - margin, margin : margin + length]
        bar_HWC[:] = bar_HWC // 3
        index = min(max(int(time_s * self._levels_per_s), 0), len(self._level_N) - 1)
        share = np.clip((self._level_N[index] - np.log(LOG_OFFSET)) / METER_RANGE, 0.0, 1.0)
        bar_HWC[:, : round(float(share) * length)] = CONTOUR_RGB


class _Clock:
    """Frame times of the new file: those of the old one from zero on, made strictly increasing."""

    def __init__(self, picture: av.VideoStream, start_us: int) -> None:
        self._unit = picture.time_base or Fraction(1, 1000)
        self._step = max(1, int(1 / (self._unit * (picture.average_rate or 25))))
        self._start_s = Fraction(start_us, 1_000_000)
        self._first_pts: int | None = None
        self._last_pts = -self._step
        self.frames = 0

    def shift(self, unit: Fraction) -> int:
        """Ticks to take off a stream with this time base."""
        return round(self._start_s / unit)

    def of(self, frame: av.VideoFrame) -> tuple[int, float]:
        """Its new time stamp, and seconds since the first frame."""
        pts = self._last_pts + self._step if frame.pts is None else frame.pts - self.shift(self._unit)
        pts = max(pts, self._last_pts + 1) if self.frames else pts
        if self._first_pts is None:
            self._first_pts = pts
        self._last_pts = pts
        self.frames += 1
        return pts, float((pts - self._first_pts) * self._unit)


def tolerant_decode(packet: Any) -> Iterator[Any]:
    """Frames of a packet; a broken one gives none."""
    try:
        yield from packet.decode()
    except av.error.FFmpegError:
        return


def _add_sound(writer: Mp4Writer, sound: av.AudioStream | None) -> SoundTrack:
    if sound is None:
        return "none"
    if sound.codec_context.name == "aac":
        writer.copy_audio(sound)
        return "copied"
    rates = av.Codec("aac", "w").audio_rates or []
    layout = sound.layout.name if sound.layout.name in ("mono", "stereo", "5.1") else "stereo"
    writer.add_audio(sound.rate if sound.rate in rates else 48_000, layout)
    return "re-encoded"


def _pass_sound(writer: Mp4Writer, packet: av.Packet, track: SoundTrack, clock: _Clock) -> None:
    shift = clock.shift(packet.time_base)
    if track == "copied":
        if packet.dts is not None and packet.pts is not None:
            packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
            writer.write_audio_packet(packet)
        return
    for frame in tolerant_decode(packet):
        if frame.pts is not None:
            frame.pts -= shift
        writer.write_audio(frame)

"""Parts of films as members, in the decoding process: cut out without encoding anew, and read again frame by frame."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.images import resize_bilinear
from avs_dist.shards.schema import MAX_CLIP_SECONDS, MAX_MEMBER_BYTES
from avs_dist.shards.video_file import DECORD_READS, LIMITS, Video, decode_packet, ticks_of, video_stream
from avs_dist.shards.video_member import CONTAINERS

# what takes any codec, and gives equal bytes for equal input
_CUT_SUFFIX = "mkv"
# decoders that can be told packet by packet what to leave out
_CAN_SKIP = ("h264", "hevc")
_SUFFIX_OF = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "mkv", "avi": "avi", "mpegts": "ts"}
DECORD_SUFFIXES = tuple(_SUFFIX_OF[container] for container in DECORD_READS)


@dataclass(frozen=True)
class Part:
    """A film that holds wanted frames.

    data:    its bytes.
    suffix:  its container, one of CONTAINERS.
    ticks:   times of all its frames, ascending, in units of its stream's time base.
    indices: places of the wanted frames in `ticks`.
    """

    data: bytes
    suffix: str
    ticks: list[int]
    indices: list[int]


def parts(video: Video, indices: Sequence[int]) -> Iterator[Part]:
    """Films that hold the frames `indices` of the video: the packets from the last key frame before them on, else all.

    Not every cut gives the same frames again (some key frames are none); the caller has to see.
    """
    for make in (_cut, _whole):
        try:
            part = make(video, indices)
        except (ValueError, av.error.FFmpegError):
            continue
        yield part


def open_member(data: bytes, suffix: str) -> Any:
    """The container of a stored video, which is not too large and has a video stream; close it.

    Raises:
        ValueError, av.error.FFmpegError: If it is not.
    """
    container: Any = av.open(io.BytesIO(data), format=CONTAINERS[suffix], options=LIMITS)
    try:
        video_stream(container)
        if container.duration is not None and container.duration > MAX_CLIP_SECONDS * av.time_base:
            raise ClipFault("oversize", f"the video is {container.duration // av.time_base} s long")
    except BaseException:
        container.close()
        raise
    return container


def frames_by_pyav(data: bytes, suffix: str, ticks: Sequence[int], size: int) -> np.ndarray:
    """uint8 RGB [T,size,size,3] of the frames that are shown at these ticks of the stream.

    Raises:
        ValueError, av.error.FFmpegError: If one of them cannot be decoded.
    """
    wanted, found = {*ticks}, {}
    with open_member(data, suffix) as container:
        stream = video_stream(container)
        context = stream.codec_context
        context.thread_count = 1
        for packet in container.demux(stream):
            if context.codec.name in _CAN_SKIP:
                # what is neither wanted nor needed by other frames is not decoded, which saves a third of the time
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in decode_packet(packet):
                if frame.pts in wanted:
                    found[frame.pts] = resize_bilinear(frame.to_ndarray(format="rgb24"), size)
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise ValueError(f"{len(wanted) - len(found)} of {len(wanted)} frames cannot be decoded")
    return np.stack([found[tick] for tick in ticks])


def _cut(video: Video, indices: Sequence[int]) -> Part:
    """A Matroska file of the packets from the key frame before the first wanted frame to the last wanted one.

    Raises:
        ValueError, av.error.FFmpegError: If there is no such key frame, or the packets cannot be stored.
    """
    first, last = video.ticks[indices[0]], video.ticks[indices[-1]]
    target = io.BytesIO()
    with av.open(video.path, options=LIMITS) as container:
        stream: Any = container.streams[video.index]
        packets = _packets(video, container, stream, first, last)
        times = sorted(packet.pts for packet in packets)
        with av.open(target, "w", format=CONTAINERS[_CUT_SUFFIX], options={"fflags": "+bitexact"}) as muxer:
            track = muxer.add_stream_from_template(stream, opaque=True)
            for packet in packets:
                packet.stream = track
                packet.pts -= times[0]  # the cut is as long as it is, wherever it lies in the film
                packet.dts = None if packet.dts is None else packet.dts - times[0]
                muxer.mux(packet)
    data = target.getvalue()
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"the cut has {len(data)} bytes, readers accept {MAX_MEMBER_BYTES}")
    with open_member(data, _CUT_SUFFIX) as container:
        ticks = ticks_of(container, video_stream(container))
    return Part(data, _CUT_SUFFIX, ticks, [times.index(video.ticks[i]) for i in indices])


def _whole(video: Video, indices: Sequence[int]) -> Part:
    """
    Raises:
        ValueError: If readers do not know such a container, or it is too large.
    """
    path, suffix = Path(video.path), _SUFFIX_OF.get(video.container)
    if suffix is None or path.stat().st_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{video.container} of {path.stat().st_size} bytes cannot be stored as it is")
    return Part(path.read_bytes(), suffix, video.ticks, list(indices))


def _packets(video: Video, container: Any, stream: Any, first: int, last: int) -> list[Any]:
    """The packets from the last key frame that is not behind `first` to the one that is shown at `last`."""
    video.seek(container, first)
    kept: list[Any] = []
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        if packet.is_keyframe and packet.pts <= first:
            kept = []
        elif not kept:
            continue
        kept.append(packet)
        if packet.pts == last:
            return kept
    raise ValueError("no key frame before the wanted frames")

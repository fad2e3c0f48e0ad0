"""Frames and masks of a clip as members, both ways: one array, or one picture for each second.

Formats: "raw" (arrays, read without a copy), and the pictures "png" and "webp" (lossless) and "jpeg". README.md has the
members key by key, and what each format costs.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.schema import MAX_CLIP_BYTES, MAX_PIXELS
from avs_dist.shards.segment import Members, decode_npy, encode_npy, member

RAW = "raw"
PICTURES = ("png", "webp", "jpeg")
_FRAMES, _MASKS = "frames.npy", "masks.npy"
_SUFFIXES = {"png": "png", "webp": "webp", "jpeg": "jpg"}
# more effort makes WebP 3 % smaller in three times the time
_OPTIONS = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "quality": 50, "method": 2},
    "jpeg": {"quality": 95, "subsampling": 0},
}
# RIFF header, one chunk of lossless pixels, its signature byte, width - 1 and height - 1 in 14 bits each
_WEBP_HEADER = struct.Struct("<4sI4s4sIBI")
_WEBP_SIGNATURE = 0x2F


def encode_frames(frames_THWC: np.ndarray, frame_format: str) -> dict[str, bytes]:
    """Members of uint8 RGB frames; `frame_format`: RAW or one of PICTURES."""
    if frame_format == RAW:
        return {_FRAMES: encode_npy(frames_THWC)}
    return {_frame_name(t, frame_format): _encode_picture(f, frame_format) for t, f in enumerate(frames_THWC)}


def decode_frames(members: Members, seconds: int, frame_format: str) -> np.ndarray:
    """uint8 [seconds,H,W,3]; raw frames are a view of the member where that is writable.

    Raises:
        ClipFault: If a member is missing, damaged, too large or of another shape than the rest.
    """
    if frame_format == RAW:
        frames_THWC = decode_npy(members, _FRAMES)
        shape = frames_THWC.shape
        if frames_THWC.dtype != np.uint8 or len(shape) != 4 or shape[::3] != (seconds, 3) or not frames_THWC.size:
            message = f"{_FRAMES} is {frames_THWC.dtype} {shape}, expected uint8 ({seconds}, height, width, 3)"
            raise ClipFault("array", message)
        return frames_THWC
    first = _open_picture(members, _frame_name(0, frame_format), frame_format, "RGB")
    shape = (seconds, first.height, first.width, 3)
    check_clip_bytes(shape)
    frames_THWC = np.empty(shape, dtype=np.uint8)
    for t in range(seconds):
        name = _frame_name(t, frame_format)
        image = _open_picture(members, name, frame_format, "RGB") if t else first
        if image.size != first.size:
            raise ClipFault("picture", f"{name} is {_shown(image)}, the first frame is {_shown(first)}")
        frames_THWC[t] = _pixels(image, name)
    return frames_THWC


def encode_masks(masks_THW: np.ndarray, labelled: Sequence[int], frame_format: str) -> dict[str, bytes]:
    """Members of the masks of the labelled seconds: an array beside raw frames, else pictures."""
    if frame_format == RAW:
        return {_MASKS: encode_npy(masks_THW[labelled])} if labelled else {}
    return {_mask_name(t): _encode_picture(masks_THW[t], "png") for t in labelled}


def decode_masks(
    members: Members, labelled: Sequence[int], shape_THW: tuple[int, int, int], frame_format: str
) -> np.ndarray:
    """uint8 of the given shape, zero where nothing is labelled.

    Raises:
        ClipFault: If a member is missing, damaged or of another size than the frames.
    """
    masks_THW = np.zeros(shape_THW, dtype=np.uint8)
    if frame_format == RAW:
        if labelled:
            masks_THW[labelled] = _raw_masks(members, (len(labelled), *shape_THW[1:]))
        return masks_THW
    for t in labelled:
        name = _mask_name(t)
        image = _open_picture(members, name, "png", "L")
        if (image.height, image.width) != shape_THW[1:]:
            raise ClipFault("mask", f"{name} is {_shown(image)}, the frames are {shape_THW[2]} x {shape_THW[1]}")
        masks_THW[t] = _pixels(image, name)
    return masks_THW


def check_clip_bytes(shape_THWC: tuple[int, ...]) -> None:
    """
    Raises:
        ClipFault: If frames of this shape would take more memory than readers give a clip.
    """
    if math.prod(shape_THWC) > MAX_CLIP_BYTES:
        raise ClipFault("oversize", f"frames of {shape_THWC} take more than {MAX_CLIP_BYTES} bytes")


def _raw_masks(members: Members, shape: tuple[int, ...]) -> np.ndarray:
    masks_LHW = decode_npy(members, _MASKS)
    if masks_LHW.dtype != np.uint8 or masks_LHW.ndim != 3 or len(masks_LHW) != shape[0]:
        message = f"{_MASKS} is {masks_LHW.dtype} {masks_LHW.shape}, expected uint8 {shape}"
        raise ClipFault("array", message)
    if masks_LHW.shape != shape:
        raise ClipFault("mask", f"{_MASKS} is {masks_LHW.shape}, expected {shape} as the frames")
    return masks_LHW


def _frame_name(t: int, frame_format: str) -> str:
    return f"frame{t}.{_SUFFIXES[frame_format]}"


def _mask_name(t: int) -> str:
    return f"mask{t}.png"


def _encode_picture(pixels: np.ndarray, picture_format: str) -> bytes:
    data = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    image.save(data, picture_format, **_OPTIONS[picture_format])
    return data.getvalue()


def _open_picture(members: Members, name: str, picture_format: str, mode: str) -> Image.Image:
    """The picture as its header tells it; no pixel is decoded yet, and no other format is even tried."""
    data = member(members, name)
    if picture_format == "webp":
        _check_size(name, *_webp_size(data, name))  # opening alone would take memory for all that it claims
    try:
        image = Image.open(io.BytesIO(data), formats=(picture_format,))
    except Image.DecompressionBombError as error:
        raise ClipFault("oversize", f"{name}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ClipFault("picture", f"{name}: not a {picture_format} picture ({error})") from error
    _check_size(name, *image.size)
    if image.mode != mode:
        raise ClipFault("picture", f"{name} has mode {image.mode}, expected {mode}")
    return image


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of a picture of lossless pixels and nothing else (no animation, no alpha, no profile)."""
    header = bytes(data[: _WEBP_HEADER.size])
    if len(header) == _WEBP_HEADER.size:
        riff, _, webp, chunk, _, signature, sides = _WEBP_HEADER.unpack(header)
        if (riff, webp, chunk, signature) == (b"RIFF", b"WEBP", b"VP8L", _WEBP_SIGNATURE):
            return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    raise ClipFault("picture", f"{name}: not a lossless webp picture")


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ClipFault("oversize", f"{name}: {width} x {height} pixels, the limit is {MAX_PIXELS}")


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    try:
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise ClipFault("picture", f"{name}: {error}") from error


def _shown(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"

"""Resizing and reading of pictures with numpy and PIL only (the decoding processes must start fast)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from avs_dist.shards.palette import class_indices
from avs_dist.shards.schema import MAX_PIXELS

# How a picture becomes square: squashed without a low-pass filter, as cv2 does ("sampled": AVSBench), or with one, as
# PIL does ("squashed": AVSS, val and test), or its short side resized, then its middle taken ("cropped": AVSS, train).
Fit = Literal["sampled", "squashed", "cropped"]


def resize_bilinear(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H,W,C] -> uint8 [size,size,C]; bilinear between pixel centres, aspect not kept, no low-pass filter.

    This is what cv2.resize does, which made the official AVSBench frames; PIL and torch smooth when they shrink.
    """
    height, width = image_HWC.shape[:2]
    if (height, width) == (size, size):
        return image_HWC
    top, bottom, weight_y = _taps(height, size)
    left, right, weight_x = _taps(width, size)
    weight_y, weight_x = weight_y[:, None, None], weight_x[None, :, None]

    def row(index: np.ndarray) -> np.ndarray:
        line = image_HWC.take(index, axis=0)  # take is faster than indexing, and its result lies in C order
        return line.take(left, axis=1) * (1 - weight_x) + line.take(right, axis=1) * weight_x

    return np.rint(row(top) * (1 - weight_y) + row(bottom) * weight_y).astype(np.uint8)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source pixels of each target pixel and the weight of the second."""
    position = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    first = np.floor(position).astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (position - first).astype(np.float32)


def open_image(source: Any, label: str) -> Image.Image:
    """PIL image, refused before any pixel is decoded when it is larger than MAX_PIXELS.

    Raises:
        ValueError: If it is too large, or no picture.
    """
    try:
        image = Image.open(source)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{label}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{label}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
    return image


def read_frame(path: Path, size: int, fit: Fit = "sampled") -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 RGB [size,size,3] and the original (width, height)."""
    image = _read_rgb(path)
    if fit == "sampled":
        return resize_bilinear(np.asarray(image), size), image.size
    whole_size = _whole_size(path, image.size, size, fit)
    return _fitted(image, whole_size, size, Image.Resampling.BILINEAR), image.size


def read_binary_mask(path: Path, size: int) -> np.ndarray:
    """uint8 {0,1} [size,size]: 1 where the picture is not black, however it is stored (1-bit, grey, palette, RGB)."""
    with open_image(path, str(path)) as image:
        try:
            if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr"):
                image = image.convert("RGB")  # the colour counts, not the palette index; alpha does not
            pixels = np.asarray(image)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: {error}") from error
    if image.mode == "LA":
        pixels = pixels[..., 0]
    mask_HW = (pixels > 0) if pixels.ndim == 2 else (pixels > 0).any(axis=2)
    if mask_HW.shape != (size, size):
        mask_HW = np.asarray(Image.fromarray(mask_HW.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST))
    return mask_HW.astype(np.uint8)


def read_class_mask(path: Path, size: int, fit: Fit, frame_size: tuple[int, int], num_classes: int) -> np.ndarray:
    """uint8 [size,size] class indices of a mask that tells classes by colour (`palette`), by nearest neighbour.

    Args:
        frame_size: Original (width, height) of the frame; the mask covers it, also with another number of pixels.

    Raises:
        ValueError: If a pixel has the colour of none of the classes, naming file and colour.
    """
    whole_size = _whole_size(path, frame_size, size, fit)
    colours_HWC = _fitted(_read_rgb(path), whole_size, size, Image.Resampling.NEAREST)
    try:
        return class_indices(colours_HWC, num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_rgb(path: Path) -> Image.Image:
    with open_image(path, str(path)) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: {error}") from error


def _whole_size(path: Path, frame_size: tuple[int, int], size: int, fit: Fit) -> tuple[int, int]:
    """Width and height to which a frame is resized before the middle is cut out; rounding as in the AVSS loader."""
    if fit != "cropped":
        return size, size
    width, height = (side * size // min(frame_size) for side in frame_size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path}: {frame_size[0]} x {frame_size[1]} pixels are too narrow to be cropped to a square")
    return width, height


def _fitted(image: Image.Image, whole_size: tuple[int, int], size: int, resample: Image.Resampling) -> np.ndarray:
    """[size,size,3]: the picture resized, then its middle."""
    left, top = (round((side - size) / 2) for side in whole_size)
    return np.asarray(image.resize(whole_size, resample).crop((left, top, left + size, top + size)))

"""Resizing and reading of pictures with numpy and PIL only (the decoding processes must start fast)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from avs_dist.shards.schema import MAX_PIXELS


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
        line = image_HWC[index]
        return line[:, left] * (1 - weight_x) + line[:, right] * weight_x

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


def read_frame(path: Path, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 RGB [size,size,3] and the original (width, height)."""
    with open_image(path, str(path)) as image:
        try:
            pixels_HWC = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: {error}") from error
        return resize_bilinear(pixels_HWC, size), image.size


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

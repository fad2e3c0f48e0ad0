"""Colours of semantic masks: the PASCAL-VOC palette, which AVSBench-semantic (AVSS) uses for its 71 classes."""

from __future__ import annotations

from functools import cache

import numpy as np

NUM_CLASSES = 71
MAX_CLASSES = 255


def colours(num_classes: int = NUM_CLASSES) -> np.ndarray:
    """uint8 [K,3] RGB colour of each class; class 0, the background, is black.

    Raises:
        ValueError: For fewer than 1 or more than MAX_CLASSES classes.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"the palette has colours for 1 to {MAX_CLASSES} classes, got {num_classes}")
    index_K = np.arange(num_classes, dtype=np.uint16)
    # the bits of an index go to red, green and blue in turn, each channel filling up from its highest bit
    channels = [sum(((index_K >> (3 * i + c)) & 1) << (7 - i) for i in range(3)) for c in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def class_indices(rgb_HWC: np.ndarray, num_classes: int = NUM_CLASSES) -> np.ndarray:
    """Class of each pixel by its colour: uint8 [H,W,3] -> uint8 [H,W].

    Raises:
        ValueError: If a pixel has none of the colours, naming the colour and how many pixels are so.
    """
    number_HW = _numbers(num_classes)[_codes(rgb_HWC)]
    if not number_HW.all():
        unknown_N3 = rgb_HWC[number_HW == 0]
        red, green, blue = unknown_N3[0].tolist()
        raise ValueError(
            f"{len(unknown_N3)} pixels have a colour of no class, the first is ({red}, {green}, {blue}); "
            f"expected the palette of {num_classes} classes"
        )
    return number_HW - np.uint8(1)


def _codes(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = (rgb[..., c].astype(np.intp) for c in range(3))
    return red << 16 | green << 8 | blue


@cache
def _numbers(num_classes: int) -> np.ndarray:
    """uint8 [2^24]: class + 1 at the 24-bit code of each colour, 0 elsewhere.

    Of the zeros only the pages that are written take memory and time.
    """
    numbers = np.zeros(2**24, dtype=np.uint8)
    numbers[_codes(colours(num_classes))] = np.arange(1, num_classes + 1)
    return numbers

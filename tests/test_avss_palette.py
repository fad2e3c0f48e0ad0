"""The palette of semantic masks, against its published definition and the literal comparison of every colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from media_files import write_png
from PIL import Image

from avs_dist.shards.images import read_class_mask
from avs_dist.shards.palette import class_indices, colours


def literal_classes(rgb_HWC: np.ndarray, palette_K3: np.ndarray) -> np.ndarray:
    """Every pixel compared with every colour."""
    matches_HWK = np.stack([(rgb_HWC == colour).all(axis=2) for colour in palette_K3], axis=2)
    assert (matches_HWK.sum(axis=2) == 1).all()
    return matches_HWK.argmax(axis=2)


def test_the_first_colours_are_those_of_pascal_voc():
    known = ["000000", "800000", "008000", "808000", "000080", "800080", "008080", "808080", "400000", "c00000"]
    known += ["408000", "c08000", "400080", "c00080", "408080", "c08080", "004000", "804000", "00c000", "80c000"]
    assert [bytes(colour).hex() for colour in colours(20)] == known
    assert bytes(colours(71)[70]).hex() == "208080"  # 70 = 0b1_000_110: blue and green at their highest bit, red at 2^5
    assert len({bytes(colour) for colour in colours(255)}) == 255


def test_classes_are_those_of_the_literal_comparison():
    rng = np.random.default_rng(0)
    classes_HW = np.concatenate([rng.permutation(71), rng.integers(0, 71, 71 * 8)]).reshape(9, 71)
    rgb_HWC = colours(71)[classes_HW]
    found_HW = class_indices(rgb_HWC)
    assert found_HW.dtype == np.uint8
    np.testing.assert_array_equal(found_HW, literal_classes(rgb_HWC, colours(71)))
    np.testing.assert_array_equal(found_HW, classes_HW)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_unknown_colours_are_named(channel: int):
    rgb_HWC = colours()[np.arange(70).reshape(7, 10)]
    rgb_HWC[3, 4, channel] ^= 1  # no colour of 71 classes uses the lowest bit
    red, green, blue = rgb_HWC[3, 4].tolist()
    with pytest.raises(ValueError, match=rf"^1 pixels .*\({red}, {green}, {blue}\).*71 classes"):
        class_indices(rgb_HWC)


def test_a_class_beyond_the_last_is_unknown():
    assert class_indices(colours(7)[None], 7).tolist() == [list(range(7))]
    with pytest.raises(ValueError, match=r"\(128, 128, 128\).*7 classes"):
        class_indices(colours(8)[None], 7)
    for wrong in (0, 256):
        with pytest.raises(ValueError, match=f"1 to 255 classes, got {wrong}"):
            colours(wrong)


def test_masks_of_every_storage_form_are_the_same(tmp_path: Path):
    classes_HW = np.random.default_rng(1).integers(0, 71, (16, 16), dtype=np.uint8)
    rgb = Image.fromarray(colours()[classes_HW])
    palette = Image.fromarray(classes_HW)
    palette.putpalette(colours().tobytes())
    shuffled = Image.fromarray(70 - classes_HW)
    shuffled.putpalette(colours()[70::-1].tobytes())
    forms = {"rgb": rgb, "palette": palette, "other palette": shuffled, "rgba": rgb.convert("RGBA")}
    for form, image in forms.items():
        path = write_png(tmp_path / f"{form}.png", image)
        found_HW = read_class_mask(path, 16, "squashed", (16, 16), 71)
        np.testing.assert_array_equal(found_HW, classes_HW, err_msg=form)

"""Prediction with several classes on video files: class maps, their colours in the overlay, and the summary."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from avs_dist.clip import IMAGENET_MEAN, IMAGENET_STD, Clip
from avs_dist.overlay import CLASS_OPACITY, CONTOUR_RGB
from avs_dist.predict import predict_video
from avs_dist.shards.encode import write_clip
from avs_dist.systems.base import Prediction, System

FPS = 4
WIDTH, HEIGHT = 96, 64
NAMES = ["background", *(f"thing {k}" for k in range(1, 12))]
RED, GREEN, BLUE = 1, 9, 11  # the classes of what is red, green or blue
VOC = {0: (0, 0, 0), RED: (128, 0, 0), GREEN: (192, 0, 0), BLUE: (192, 128, 0)}
FILM_RGB = {RED: (230, 30, 30), GREEN: (30, 230, 30), BLUE: (30, 30, 230)}


class ColourSystem(System):
    """Tells red, green and blue things from a dark background; all else that it says is wrong on purpose."""

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        channels = clip.frames_BTCHW * std + mean
        shape = (*channels.shape[:2], len(NAMES), *channels.shape[3:])
        class_logits = torch.full(shape, -10.0)
        class_logits[:, :, 0] = 0
        class_logits[:, :, [RED, GREEN, BLUE]] = 10 * (channels - 0.5)
        variance = torch.full_like(channels[:, :, 0], 0.04)
        return Prediction(torch.full_like(variance, -1.0), variance, class_logits)


class SilentSystem(ColourSystem):
    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        return Prediction(torch.full_like(clip.frames_BTCHW[:, :, 0], -1.0))


def truth(second: int) -> np.ndarray:
    """A red thing on the left, from the second second on a blue one that touches it, and in the last a green one."""
    classes = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    classes[16:48, 12:48] = RED
    if second >= 1:
        classes[16:48, 48:72] = BLUE
    if second == 2:
        classes[:12, 84:] = GREEN
    return classes


def write_film(path: Path) -> Path:
    frames = np.full((3 * FPS, HEIGHT, WIDTH, 3), 30, dtype=np.uint8)
    for index, frame in enumerate(frames):
        for number, colour in FILM_RGB.items():
            frame[truth(index // FPS) == number] = colour
    write_clip(path, frames, Fraction(FPS), np.zeros(3 * 16_000, dtype=np.float32), 16_000)
    return path


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("painted")
    return predict(write_film(folder / "film.mp4"), folder / "out", class_names=NAMES)


def predict(video: Path, out: Path, system: System | None = None, **options: object) -> dict:
    return predict_video(system or ColourSystem(), video, out, image_size=32, progress=False, **options)  # type: ignore[arg-type]


def class_map(summary: dict, second: int) -> Image.Image:
    return Image.open(Path(summary["classes"]) / f"{second + 1:04d}.png")


def test_class_maps_are_palette_pictures_of_the_indices(painted: dict) -> None:
    for second in range(3):
        with class_map(painted, second) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "P", (WIDTH, HEIGHT))
            shown_HWC, index_HW = np.asarray(image.convert("RGB")), np.asarray(image)
        expected = truth(second)
        assert set(np.unique(index_HW)) == set(np.unique(expected))
        for number in np.unique(expected):
            found, right = index_HW == number, expected == number
            assert (found & right).sum() / (found | right).sum() > 0.85
            assert {tuple(pixel) for pixel in shown_HWC[found].tolist()} == {VOC[number]}


def test_mask_is_where_the_class_map_is_not_background(painted: dict) -> None:
    """Not where the sounding probability, below 0.5 everywhere, is high."""
    for second, facts in enumerate(painted["seconds"]):
        mask = np.asarray(Image.open(facts["mask"]))
        assert np.array_equal(mask, 255 * (np.asarray(class_map(painted, second)) > 0))
        assert facts["sounding_area"] == pytest.approx((mask > 0).mean())
        assert facts["mean_probability"] == pytest.approx(1 / (1 + np.e), abs=1e-6)
        assert facts["mean_std"] == pytest.approx(0.2, abs=1e-6)
    assert Path(painted["uncertainty"]).is_dir()


def test_summary_says_how_much_of_the_picture_each_class_takes(painted: dict) -> None:
    folder = Path(painted["classes"]).parent
    assert json.loads((folder / "summary.json").read_text()) == painted
    assert painted["class_names"] == NAMES
    there = [list(facts["class_areas"]) for facts in painted["seconds"]]
    # the largest first, without the background
    assert there == [[NAMES[RED]], [NAMES[RED], NAMES[BLUE]], [NAMES[RED], NAMES[BLUE], NAMES[GREEN]]]
    for second, facts in enumerate(painted["seconds"]):
        index_HW = np.asarray(class_map(painted, second))
        for name, area in facts["class_areas"].items():
            assert area == pytest.approx((index_HW == NAMES.index(name)).mean())


def test_overlay_paints_each_class_in_its_colour(painted: dict) -> None:
    with av.open(painted["overlay"]) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 3 * FPS
    last = frames[-2]
    places = {RED: np.s_[24:40, 20:40], BLUE: np.s_[24:40, 56:64], GREEN: np.s_[2:5, 90:94]}
    for number, place in places.items():
        expected = (1 - CLASS_OPACITY) * np.array(FILM_RGB[number]) + CLASS_OPACITY * np.array(VOC[number])
        assert np.abs(last[place].mean(axis=(0, 1)) - expected).max() < 15
    assert np.abs(last[24:40, 80:] - 30).max() < 15  # background
    # there is a line between two classes that touch, and none inside one
    yellow = np.abs(last - CONTOUR_RGB).sum(axis=2) < 200
    assert yellow[22:42, 44:52].any(axis=1).all()
    assert not yellow[22:42, 20:40].any()


def test_classes_are_compared_at_the_size_of_the_video(tmp_path: Path) -> None:
    class NoiseSystem(ColourSystem):
        def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
            return Prediction(clip.frames_BTCHW[:, :, 0], None, noise)

    noise = torch.randn(1, 3, 70, 32, 32)
    summary = predict(write_film(tmp_path / "film.mp4"), tmp_path / "out", NoiseSystem())
    expected = F.interpolate(noise[0], (HEIGHT, WIDTH), mode="bilinear", align_corners=False).argmax(dim=1)
    for second in range(3):
        assert np.array_equal(np.asarray(class_map(summary, second)), expected[second].numpy())
    assert "class_names" not in summary
    assert all(0 < int(name) < 70 for name in summary["seconds"][0]["class_areas"])
    assert "uncertainty" not in summary


def test_another_system_leaves_no_class_maps_behind(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    predict(film, tmp_path / "out")
    summary = predict(film, tmp_path / "out", SilentSystem())
    assert sorted(p.name for p in (tmp_path / "out" / "film").iterdir()) == ["masks", "overlay.mp4", "summary.json"]
    assert not {"classes", "class_names"} & set(summary)
    assert "class_areas" not in summary["seconds"][0]


def test_names_must_fit_the_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 class names for a system of 12 classes"):
        predict(write_film(tmp_path / "film.mp4"), tmp_path / "out", class_names=["background", "man"])

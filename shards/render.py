"""Pictures of the synthetic benchmark: textured items, drawn from far to near, before a drifting background.

Shapes and textures are functions of item coordinates u, v (unit = the item's radius, rotated with the item).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avs_dist.shards.scene import CLASSES, FPS, Item, Scene

BACKGROUND = -1
SHAPE_REACH = 1.45  # no shape ends farther out than this many radii
# the background canvas is larger than the picture, which drifts over it, by this part of its side for 5 seconds
BACKGROUND_REACH = 0.7


@dataclass(frozen=True, eq=False)
class Rendered:
    """frames_FHWC: uint8 RGB of the whole clip; owner_THW: int8, index of the item seen at each pixel of the labelled
    frames (BACKGROUND where none)."""

    frames_FHWC: np.ndarray
    owner_THW: np.ndarray

    def masks_THW(self, scene: Scene) -> np.ndarray:
        """bool, the visible part of what sounds in each second."""
        return self.classes_THW(scene) > 0

    def classes_THW(self, scene: Scene) -> np.ndarray:
        """uint8, the class of what sounds at each pixel: its place in CLASSES, from 1; 0 where nothing sounds."""
        masks = np.zeros(self.owner_THW.shape, dtype=np.uint8)
        for number, item in enumerate(scene.items):
            for t in np.flatnonzero(item.on_T):
                masks[t][self.owner_THW[t] == number] = 1 + CLASSES.index(item.kind)
        return masks


def render_scene(scene: Scene, size: int) -> Rendered:
    """Draw all frames of a scene, size x size pixels."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene, size, rng)
    grain = rng.normal(0, scene.noise_levels, (size + 64, size + 64, 3)).astype(np.float32)
    frames = np.empty((scene.num_frames, size, size, 3), dtype=np.uint8)
    owners = []
    for index in range(scene.num_frames):
        time_s = index / float(FPS)
        # one field of grain, seen at another place in each frame: as good as fresh noise, and much faster
        y, x = rng.integers(0, 65, 2)
        frame_HWC = _crop(canvas, scene.background_velocity * time_s, size) + grain[y : y + size, x : x + size]
        owner_HW = np.full((size, size), BACKGROUND, dtype=np.int8)
        for number, item in enumerate(scene.items):
            _draw(item, number, time_s, frame_HWC, owner_HW)
        frames[index] = frame_HWC.clip(0, 255)
        if index in scene.labelled_frames:
            owners.append(owner_HW)
    return Rendered(frames, np.stack(owners))


def _background(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Soft random waves between two colours, float32 [canvas, canvas, 3]."""
    side = int(np.ceil(size * (1 + BACKGROUND_REACH * scene.seconds / 5)))
    along = np.arange(side, dtype=np.float32) / size
    wave_HW = np.zeros((side, side), dtype=np.float32)
    for frequency in rng.uniform(1.0, 9.0, 7):
        heading, phase = rng.uniform(0, 2 * np.pi, 2)
        k_x, k_y = 2 * np.pi * frequency * np.array([np.cos(heading), np.sin(heading)], dtype=np.float32)
        wave_HW += np.sin(k_y * along[:, None] + k_x * along[None, :] + np.float32(phase))
    weight_HW1 = (0.5 + wave_HW / 6).clip(0, 1)[..., None]
    first, second = scene.background_colours.astype(np.float32)
    return first + (second - first) * weight_HW1


def _crop(canvas: np.ndarray, drift_xy: np.ndarray, size: int) -> np.ndarray:
    middle = (canvas.shape[0] - size) / 2
    x, y = np.rint(middle + drift_xy * size).astype(int)
    return canvas[y : y + size, x : x + size]


def _draw(item: Item, number: int, time_s: float, frame_HWC: np.ndarray, owner_HW: np.ndarray) -> None:
    """Paint one item into the frame and enter it in the owner map where it covers at least half of a pixel."""
    size = len(frame_HWC)
    radius_px = item.radius * size
    centre_px = item.centre_xy(time_s) * size
    low = np.maximum(np.floor(centre_px - SHAPE_REACH * radius_px).astype(int), 0)
    high = np.minimum(np.ceil(centre_px + SHAPE_REACH * radius_px).astype(int) + 1, size)
    box = (slice(low[1], high[1]), slice(low[0], high[0]))
    x = ((np.arange(low[0], high[0]) + 0.5 - centre_px[0]) / radius_px).astype(np.float32)[None, :]
    y = ((np.arange(low[1], high[1]) + 0.5 - centre_px[1]) / radius_px).astype(np.float32)[:, None]
    angle = item.angle + item.spin * time_s
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    coverage = (0.5 - _outside(item, u, v) * np.float32(radius_px)).clip(0, 1)
    dark, bright = item.colours.astype(np.float32)
    paint = dark + (bright - dark) * _texture(item, u, v)[..., None]
    frame_HWC[box] += coverage[..., None] * (paint - frame_HWC[box])
    owner_HW[box][coverage >= 0.5] = number


def _outside(item: Item, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance to the outline, in radii, negative inside. Areas are alike over the classes."""
    match item.kind:
        case "disc":
            return np.hypot(u, v) - 0.95
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.86
        case "triangle":
            return np.maximum(-v, 0.5 * v + 0.866 * np.abs(u)) - 0.68
        case "star":
            return 0.75 * (np.hypot(u, v) - 0.88 - 0.32 * np.cos(5 * np.arctan2(v, u)))
        case "cross":
            long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
            return np.maximum(long - 1.1, short - 0.42)
        case "ring":
            return np.abs(np.hypot(u, v) - 0.78) - 0.33
        case _:  # blob: an irregular ellipse
            angle = np.arctan2(v, u)
            return np.hypot(u, v) - 0.8 - 0.2 * np.cos(2 * angle + item.phases[0]) - 0.1 * np.cos(3 * angle)


def _texture(item: Item, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """0 = dark colour, 1 = bright colour."""
    a, b = item.phases[0], item.phases[1]
    match item.kind:
        case "disc":  # circles
            wave = np.sin(14 * np.hypot(u, v) + a)
        case "square":  # checkerboard
            wave = 3 * np.sin(6.5 * u + a) * np.sin(6.5 * v + b)
        case "triangle":  # stripes
            wave = np.sin(13 * v + a)
        case "star":  # dots
            wave = 2 * (np.cos(9 * u + a) + np.cos(9 * v + b) - 0.6)
        case "cross":  # blotches
            wave = np.sin(4 * u + 2.5 * np.sin(3 * v + a)) + np.sin(4 * v + 2.5 * np.sin(3 * u + b))
        case "ring":  # rays
            wave = np.sin(8 * np.arctan2(v, u) + a)
        case _:  # blob: fine mottle
            wave = np.sin(5 * u + 2 * np.sin(4 * v + a)) + np.sin(6 * v + b)
    return (0.5 + 1.5 * wave).clip(0, 1)

"""What happens in a clip of the synthetic benchmark: which objects, where they move, when they sound.

A class is a shape with a texture and a timbre; colours are random, so they tell nothing. `plan_scene` draws all
numbers of a clip; its pictures (`render.render_scene`) and its sound (`Scene.waveform`) are pure functions of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from avs_dist.shards import timbre

FPS = Fraction(10)  # motion is slow; decoding and rendering 25 fps would only cost time

TIMBRES: dict[str, timbre.Timbre] = {
    "disc": timbre.flute,
    "square": timbre.bell,
    "triangle": timbre.hiss,
    "star": timbre.chirp,
    "cross": timbre.clicks,
    "ring": timbre.buzz,
}
CLASSES = tuple(TIMBRES)


@dataclass(frozen=True, eq=False)
class Item:
    """Something that moves through the picture: an object of a class, or a distractor (`kind` "blob").

    Lengths are parts of the picture side, times seconds, angles radians, colours RGB 0..255 (two rows: dark, bright).
    """

    kind: str
    radius: float
    start_xy: np.ndarray
    velocity_xy: np.ndarray
    angle: float
    spin: float
    phases: np.ndarray
    colours: np.ndarray
    on_T: np.ndarray
    level_rms: float = 0.0
    sound_seed: int = 0

    def centre_xy(self, time_s: float) -> np.ndarray:
        """Position: straight motion, reflected at a margin inside the picture."""
        margin = 0.8 * self.radius
        span = 1 - 2 * margin
        folded = (self.start_xy + self.velocity_xy * time_s) % (2 * span)
        return margin + np.where(folded > span, 2 * span - folded, folded)


@dataclass(frozen=True, eq=False)
class Scene:
    """All numbers of one clip; items from the farthest to the nearest."""

    items: tuple[Item, ...]
    background_colours: np.ndarray
    background_velocity: np.ndarray
    seed: int
    noise_levels: float
    noise_rms: float

    @property
    def seconds(self) -> int:
        return len(self.items[0].on_T)

    @property
    def num_frames(self) -> int:
        return self.seconds * int(FPS)

    @property
    def labelled_frames(self) -> tuple[int, ...]:
        """Frame that stands for each second, by the AVSBench rule."""
        return tuple(int(second * FPS + Fraction(15, 16) * FPS) for second in range(self.seconds))

    @property
    def objects(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.kind in TIMBRES)

    def waveform(self) -> np.ndarray:
        """Mono float32 sound at timbre.SAMPLE_RATE_HZ."""
        sources = [(TIMBRES[o.kind], o.on_T, o.level_rms, o.sound_seed) for o in self.objects]
        return timbre.mix(sources, self.noise_rms, self.seed)


def plan_scene(seconds: int, switching: bool, rng: np.random.Generator) -> Scene:
    """Draw a clip: 2-3 objects of different classes and 2-4 small distractors that never sound.

    Args:
        switching: Sounds switch on and off each second; false: one object sounds all the time.
    """
    num_objects = int(rng.integers(2, 4))
    kinds = rng.permutation(len(CLASSES))[:num_objects]
    on_OT = _switching_sources(num_objects, seconds, rng) if switching else _single_source(num_objects, seconds)
    objects = [_draw_object(CLASSES[kind], on_T, num_objects, rng) for kind, on_T in zip(kinds, on_OT, strict=True)]
    objects = _spread(objects, seconds, rng)
    blobs = [_draw_blob(seconds, rng) for _ in range(int(rng.integers(2, 5)))]
    items = objects + blobs
    return Scene(
        items=tuple(items[i] for i in rng.permutation(len(items))),
        background_colours=rng.uniform(70, 185, 3) + rng.uniform(-35, 35, (2, 3)),
        background_velocity=rng.uniform(-0.06, 0.06, 2),
        seed=int(rng.integers(2**31)),
        noise_levels=rng.uniform(2.0, 6.0),
        noise_rms=10 ** rng.uniform(-2.8, -2.3),
    )


def _single_source(num_objects: int, seconds: int) -> np.ndarray:
    on_OT = np.zeros((num_objects, seconds), dtype=bool)
    on_OT[0] = True
    return on_OT


def _switching_sources(num_objects: int, seconds: int, rng: np.random.Generator) -> np.ndarray:
    """Each second anew: silence, one, two or (rarely) three of the objects; never a silent clip."""
    chances = (0.2, 0.65, 0.15) if num_objects == 2 else (0.2, 0.55, 0.2, 0.05)
    on_OT = np.zeros((num_objects, seconds), dtype=bool)
    while not on_OT.any():
        for second in range(seconds):
            count = rng.choice(num_objects + 1, p=chances)
            on_OT[:, second] = rng.permutation(num_objects) < count
    return on_OT


def _draw_object(kind: str, on_T: np.ndarray, num_objects: int, rng: np.random.Generator) -> Item:
    speed, heading = rng.uniform(0.03, 0.15), rng.uniform(0, 2 * np.pi)
    dark, bright = rng.uniform(0, 90, 3), rng.uniform(150, 255, 3)
    return Item(
        kind=kind,
        radius=rng.uniform(0.15, 0.25 if num_objects == 2 else 0.2),
        start_xy=rng.uniform(0, 2, 2),
        velocity_xy=speed * np.array([np.cos(heading), np.sin(heading)]),
        angle=rng.uniform(0, 2 * np.pi),
        spin=rng.uniform(-0.5, 0.5),
        phases=rng.uniform(0, 2 * np.pi, 6),
        colours=np.stack([dark, bright]),
        on_T=on_T,
        level_rms=10 ** rng.uniform(-1.15, -0.85),
        sound_seed=int(rng.integers(2**31)),
    )


def _draw_blob(seconds: int, rng: np.random.Generator) -> Item:
    grey = rng.uniform(40, 215)
    tint = 25.0 if rng.uniform() < 0.5 else 90.0  # half of them grey, half coloured
    return Item(
        kind="blob",
        radius=rng.uniform(0.04, 0.08),
        start_xy=rng.uniform(0, 2, 2),
        velocity_xy=rng.uniform(-0.2, 0.2, 2),
        angle=rng.uniform(0, 2 * np.pi),
        spin=rng.uniform(-1, 1),
        phases=rng.uniform(0, 2 * np.pi, 6),
        colours=(grey + rng.uniform(-tint, tint, (2, 3))).clip(0, 255),
        on_T=np.zeros(seconds, dtype=bool),
    )


def _spread(objects: list[Item], seconds: int, rng: np.random.Generator) -> list[Item]:
    """Of 24 draws of start positions the one with the least crowding, so that objects may touch but rarely hide."""
    times_s = [0.25 * step for step in range(4 * seconds)]
    best, best_gap = objects, -np.inf
    for _ in range(24):
        trial = [replace(o, start_xy=rng.uniform(0, 2, 2)) for o in objects]
        centres = np.array([[o.centre_xy(t) for t in times_s] for o in trial])
        gaps = [
            np.linalg.norm(centres[i] - centres[j], axis=1).min() / (trial[i].radius + trial[j].radius)
            for i in range(len(trial))
            for j in range(i)
        ]
        if min(gaps) > best_gap:
            best, best_gap = trial, min(gaps)
    return best

"""The world of the synthetic cross-modal sequences: events that are seen and heard together amid nuisance.

An event has one prototype for the eye, one for the ear and a name, which have nothing in common but that they come
together. In each clip one event lasts for some seconds, at one place of the picture. Besides, every modality of a clip
has a look of its own, which is stronger than the event, says nothing about it, and stays the same for the whole clip
(light and background; room and timbre), and noise in each second. A codebook that only reconstructs spends its codes on
these; the event is all that the modalities share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUISANCE_RANK = 6  # directions in which the looks of a modality differ
SPREAD = 0.8  # of an event in the picture, in positions of the map
LOUDNESS = (0.7, 1.3)  # of the event of a clip


@dataclass(frozen=True)
class World:
    """What all clips of a benchmark share: K events, their prototypes, R directions of nuisance, sizes, strengths.

    visual_KC, audio_KC:                   prototypes of the events, with a mean square of 1.
    visual_nuisance_RC, audio_nuisance_RC: directions of what differs from clip to clip, with a mean square of 1.
    nuisance:                              standard deviation of their weights.
    noise:                                 standard deviation of every value in every second.
    shortest_s:                            of the intervals that an event lasts, up to the whole clip.
    """

    events: tuple[str, ...]
    visual_KC: np.ndarray
    audio_KC: np.ndarray
    visual_nuisance_RC: np.ndarray
    audio_nuisance_RC: np.ndarray
    seconds: int = 10
    side: int = 3
    shortest_s: int = 4
    nuisance: float = 0.7
    noise: float = 0.4


def make_world(seed: int, num_events: int = 8, visual_channels: int = 24, audio_channels: int = 16) -> World:
    """The world of a seed."""
    rng = np.random.default_rng([seed, 0])
    events = tuple(f"event_{k}" for k in range(num_events))
    return World(
        events,
        visual_KC=_directions(rng, num_events, visual_channels),
        audio_KC=_directions(rng, num_events, audio_channels),
        visual_nuisance_RC=_directions(rng, NUISANCE_RANK, visual_channels),
        audio_nuisance_RC=_directions(rng, NUISANCE_RANK, audio_channels),
    )


def make_sequence(rng: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """One clip.

    Returns:
        visual_THWC float32, audio_TC float32, labels_TK uint8 (which events happen in each second), the name of its
        event.
    """
    seconds, side = world.seconds, world.side
    k = int(rng.integers(len(world.events)))
    length = int(rng.integers(world.shortest_s, seconds + 1))
    start = int(rng.integers(seconds - length + 1))
    loudness, place = rng.uniform(*LOUDNESS), rng.integers(side, size=2)
    distance_HW = sum((axis - at) ** 2 for axis, at in zip(np.indices((side, side)), place, strict=True))
    strength_HW1 = np.exp(-0.5 * distance_HW / SPREAD**2)[..., None]
    visual_THWC = _background(rng, world, world.visual_nuisance_RC, (seconds, side, side))
    audio_TC = _background(rng, world, world.audio_nuisance_RC, (seconds,))
    labels_TK = np.zeros((seconds, len(world.events)), dtype=np.uint8)
    on = slice(start, start + length)
    visual_THWC[on] += loudness * strength_HW1 * world.visual_KC[k]
    audio_TC[on] += loudness * world.audio_KC[k]
    labels_TK[on, k] = 1
    return visual_THWC.astype(np.float32), audio_TC.astype(np.float32), labels_TK, world.events[k]


def _background(rng: np.random.Generator, world: World, nuisance_RC: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The look of one clip in one modality, the same in all seconds and places, and noise: [*shape,C]."""
    look_C = world.nuisance * rng.standard_normal(len(nuisance_RC)) @ nuisance_RC
    return look_C + world.noise * rng.standard_normal((*shape, nuisance_RC.shape[1]))


def _directions(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Random directions [count,channels] of mean square 1."""
    vectors_NC = rng.standard_normal((count, channels))
    return vectors_NC * np.sqrt(channels / np.square(vectors_NC).sum(1, keepdims=True))

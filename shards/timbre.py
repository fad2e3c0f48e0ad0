"""Sounds of the synthetic benchmark: one timbre for each object class, switched on and off by the second.

All sounds are mono float32 at SAMPLE_RATE_HZ. Every timbre keeps its character within a tenth of a second, so that each
second of it can be told from the others in a log-mel of 0.96 s; pitch and rate vary from clip to clip.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SAMPLE_RATE_HZ = 16_000
RAMP_S = 0.015  # switching is faded over this time: a step would click in every band

Timbre = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def flute(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Harmonic stack with vibrato: lines at multiples of 220-300 Hz."""
    f0_hz = rng.uniform(220, 300)
    phase_S = 2 * np.pi * f0_hz * time_S + 0.9 * np.sin(2 * np.pi * rng.uniform(4.5, 6.0) * time_S)
    return np.sum([np.sin(k * phase_S + rng.uniform(0, 6.28)) / k for k in range(1, 7)], axis=0)


def bell(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Struck FM bell: inharmonic lines around 1.3-1.6 kHz, decaying after each of 4-5 strikes a second."""
    carrier_hz, since_S = rng.uniform(1300, 1600), _since_last(time_S, rng.uniform(4.0, 5.0), rng.uniform())
    index_S = 3.0 * np.exp(-8.0 * since_S)
    tone_S = np.sin(2 * np.pi * carrier_hz * time_S + index_S * np.sin(2 * np.pi * 1.41 * carrier_hz * time_S))
    return tone_S * np.exp(-7.0 * since_S)


def hiss(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Bursts of high noise (3.2-6.5 kHz), 5-7 a second."""
    noise_S = _band_noise(rng, len(time_S), 3200, 6500)
    return noise_S * (0.08 + (np.sin(2 * np.pi * rng.uniform(5, 7) * time_S + rng.uniform(0, 6.28)) > 0))


def chirp(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Upward sweeps from 600-800 to about 3000 Hz, 3-4 a second."""
    rate_hz, low_hz = rng.uniform(3.0, 4.0), rng.uniform(600, 800)
    since_S = _since_last(time_S, rate_hz, rng.uniform())
    sweep_hz_per_s = (3000 - low_hz) * rate_hz
    return np.sin(2 * np.pi * (low_hz + 0.5 * sweep_hz_per_s * since_S) * since_S)


def clicks(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Click train: 12-16 short broad-band ticks a second."""
    since_S = _since_last(time_S, rng.uniform(12, 16), rng.uniform())
    return rng.standard_normal(len(time_S)) * np.exp(-since_S / 0.003)


def buzz(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Low motor: odd and even harmonics of 70-95 Hz up to 600 Hz, with a slow tremolo."""
    f0_hz = rng.uniform(70, 95)
    partials = [np.sin(2 * np.pi * k * f0_hz * time_S + rng.uniform(0, 6.28)) for k in range(1, 7)]
    tone_S = np.sum(partials, axis=0)
    return tone_S * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(7, 9) * time_S))


def mix(sources: list[tuple[Timbre, np.ndarray, float, int]], noise_rms: float, noise_seed: int) -> np.ndarray:
    """Sum of the sources over background noise, float32 within [-0.98, 0.98].

    Args:
        sources: (timbre, bool per second when it sounds, rms level while it sounds, seed).
        noise_rms: Level of the background noise (white with a low rumble).
    """
    seconds = len(sources[0][1])
    time_S = np.arange(seconds * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    rng = np.random.default_rng(noise_seed)
    noise_S = rng.standard_normal(len(time_S)) + 2 * _band_noise(rng, len(time_S), 30, 250)
    out_S = noise_rms * _unit_rms(noise_S)
    for timbre, on_T, level_rms, seed in sources:
        out_S += level_rms * _unit_rms(timbre(np.random.default_rng(seed), time_S)) * _gate(on_T)
    return (out_S * min(1.0, 0.98 / np.abs(out_S).max())).astype(np.float32)


def _since_last(time_S: np.ndarray, rate_hz: float, offset: float) -> np.ndarray:
    """Seconds since the last event of a regular train."""
    return ((time_S * rate_hz + offset) % 1.0) / rate_hz


def _band_noise(rng: np.random.Generator, num_samples: int, low_hz: float, high_hz: float) -> np.ndarray:
    """White noise of unit rms cut to a band."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    freqs_hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE_HZ)
    spectrum[(freqs_hz < low_hz) | (freqs_hz > high_hz)] = 0
    return _unit_rms(np.fft.irfft(spectrum, num_samples))


def _unit_rms(signal_S: np.ndarray) -> np.ndarray:
    return signal_S / np.sqrt(np.mean(signal_S**2))


def _gate(on_T: np.ndarray) -> np.ndarray:
    """0 or 1 for each sample, with fades that lie inside the sounding seconds."""
    on_S = np.repeat(on_T.astype(np.float64), SAMPLE_RATE_HZ)
    ramp = int(RAMP_S * SAMPLE_RATE_HZ)
    closed_S = np.concatenate([[0.0], on_S, [0.0]])
    distance_S = np.full(len(closed_S), ramp, dtype=np.float64)
    for edge in np.flatnonzero(np.diff(closed_S)):
        low, high = max(edge - ramp, 0), min(edge + ramp + 2, len(closed_S))
        distance_S[low:high] = np.minimum(distance_S[low:high], np.abs(np.arange(low, high) - (edge + 0.5)))
    return on_S * np.minimum(distance_S[1:-1] / ramp, 1.0)

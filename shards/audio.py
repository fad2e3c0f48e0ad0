"""Sound to VGGish log-mel examples. The only file that imports torchaudio.

Parameters of the published VGGish front end: 25 ms periodic Hann window (400 samples at 16 kHz), 10 ms hop, 512-point
FFT, magnitude spectrum, 64 HTK-mel bands over 125-7500 Hz, ln(mel + 0.01), examples of 96 frames without overlap.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from avs_dist.shards.schema import LOG_OFFSET, MEL_BANDS, MEL_FRAMES

SAMPLE_RATE_HZ = 16_000
WINDOW = 400
HOP = 160
FFT = 512
LOWEST_HZ, HIGHEST_HZ = 125.0, 7500.0

# one step of 16-bit sound: what never leaves it is digital silence, also after a lossy codec
SILENCE_PEAK = 1.0 / 32768.0


def log_mel_examples(waveform_S: np.ndarray | Tensor, sample_rate_hz: int) -> Tensor:
    """VGGish log-mel examples of a sound.

    Args:
        waveform_S: Samples in [-1, 1], mono [S] or [channels,S] (channels are averaged, as VGGish does).
        sample_rate_hz: Its rate; anything but 16 kHz is resampled first.

    Returns:
        float32 [n,96,64] (time, mel); n = 0 for less than 0.975 s. 5 s give 5 examples of 0.96 s.

    Raises:
        ValueError: If the waveform has another number of dimensions or the rate is not positive.
    """
    waveform = torch.as_tensor(waveform_S)
    if waveform.ndim not in (1, 2):
        raise ValueError(f"waveform must be [S] or [channels,S], got shape {tuple(waveform.shape)}")
    mono_S = waveform.to(torch.float32)
    if mono_S.ndim == 2:
        mono_S = mono_S.mean(dim=0)
    # float64 from here on: the result then hardly depends on the order in which a machine adds up
    mono_S = _resample(mono_S, sample_rate_hz).to(torch.float64)
    if mono_S.shape[0] < WINDOW:
        return torch.zeros(0, MEL_FRAMES, MEL_BANDS)
    # not centred, incomplete windows dropped; a 400-sample window in a 512-point FFT is zero-padded at its end
    frames_NW = mono_S.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW, periodic=True, dtype=torch.float64)
    magnitude_NF = torch.fft.rfft(frames_NW, n=FFT).abs()
    log_mel_NM = torch.log(magnitude_NF @ mel_matrix() + LOG_OFFSET)
    count = log_mel_NM.shape[0] // MEL_FRAMES
    return log_mel_NM[: count * MEL_FRAMES].reshape(count, MEL_FRAMES, MEL_BANDS).to(torch.float32)


def clip_log_mel(waveform_S: np.ndarray | Tensor, sample_rate_hz: int, seconds: int) -> Tensor:
    """Exactly one example for each second of a clip: float32 [seconds,96,64].

    Example k covers 0.96 k to 0.96 (k + 1) s, as published; the drift stays below half a second up to 12 s.
    """
    waveform = torch.as_tensor(waveform_S)
    missing = seconds * sample_rate_hz - waveform.shape[-1]
    if missing > 0:
        # Silence is added to the sound, not to the spectrogram: the published code repeats the last example, which
        # lets a sound go on that has ended, and zeros in the log domain are a sound (ln 1), not silence (ln 0.01).
        waveform = torch.nn.functional.pad(waveform, (0, missing))
    return log_mel_examples(waveform, sample_rate_hz)[:seconds]


def sound_flag(waveform_S: np.ndarray | None) -> str:
    """ "none" without a sound track, "silent" for digital silence, else "ok"."""
    if waveform_S is None:
        return "none"
    return "ok" if waveform_S.size and float(np.abs(waveform_S).max()) >= SILENCE_PEAK else "silent"


@cache
def mel_matrix() -> Tensor:
    """float64 [257,64] weights: triangles whose slopes are linear in mel (not in Hz), no area normalisation."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hertz / 700.0)

    bins_F = mel(np.linspace(0.0, SAMPLE_RATE_HZ / 2, FFT // 2 + 1))
    lowest, highest = mel(np.array([LOWEST_HZ, HIGHEST_HZ]))
    edges = np.linspace(lowest, highest, MEL_BANDS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins_F[:, None] - lower) / (centre - lower)
    falling = (upper - bins_F[:, None]) / (upper - centre)
    weights_FM = np.maximum(0.0, np.minimum(rising, falling))
    weights_FM[0] = 0.0  # the DC bin never counts
    return torch.from_numpy(weights_FM)


def _resample(waveform_S: Tensor, rate_hz: int) -> Tensor:
    if rate_hz <= 0:
        raise ValueError(f"the sample rate must be positive, got {rate_hz}")
    if rate_hz == SAMPLE_RATE_HZ or waveform_S.shape[0] == 0:
        return waveform_S
    if math.gcd(rate_hz, SAMPLE_RATE_HZ) < 8:
        # the polyphase kernel would need gigabytes; a multiple of 8 Hz is at most 4 Hz away
        rate_hz = max(8, round(rate_hz / 8) * 8)
    return _resampler(rate_hz)(waveform_S)


@lru_cache(maxsize=16)
def _resampler(rate_hz: int) -> Resample:
    """Kernel computed in float64 and kept; the window of resampy's kaiser_best, which the published code uses."""
    return Resample(
        rate_hz,
        SAMPLE_RATE_HZ,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    )

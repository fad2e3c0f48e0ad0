"""The VGGish log-mel against golden values of the published front end, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avs_dist.shards.audio import clip_log_mel, log_mel_examples, mel_matrix, sound_flag
from avs_dist.shards.schema import SILENT_LOG_MEL


def sine(rate: int, seconds: float = 5.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)


def test_golden_values_of_a_sine():
    examples = log_mel_examples(sine(16_000), 16_000)
    assert examples.shape == (5, 96, 64)
    assert examples.dtype == torch.float32
    assert examples.mean().item() == pytest.approx(-3.501795, rel=1e-3)
    assert examples.std().item() == pytest.approx(2.109456, rel=1e-3)
    assert examples.double().sum().item() == pytest.approx(-107575.155, rel=1e-5)
    first = torch.tensor([-3.736307, -2.743742, -2.204709, -2.052619])
    torch.testing.assert_close(examples[0, 0, :4], first, rtol=1e-4, atol=1e-5)


def test_silence_is_ln_of_the_offset():
    assert log_mel_examples(np.zeros(80_000), 16_000).unique().tolist() == [pytest.approx(np.log(0.01))]
    assert pytest.approx(np.log(0.01)) == SILENT_LOG_MEL


def test_no_centring():
    """The first frame sees samples 0..399 only: an impulse at 400 does not reach it, one at 399 - 160 does twice."""
    impulse = np.zeros(16_000)
    impulse[400] = 1.0
    frames = log_mel_examples(impulse, 16_000)[0]
    assert torch.allclose(frames[0], torch.full((64,), SILENT_LOG_MEL))
    assert (frames[1] > SILENT_LOG_MEL + 0.1).any()


def test_mel_matrix_has_no_dc_and_slopes_linear_in_mel():
    weights_FM = mel_matrix().numpy()
    assert weights_FM.shape == (257, 64)
    assert not weights_FM[0].any()

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(125.0), mel(7500.0), 66)
    at = 40 * 8000 / 256  # bin 40
    band = int(weights_FM[40].argmax())
    expected = min((mel(at) - edges[band]) / (edges[1] - edges[0]), (edges[band + 2] - mel(at)) / (edges[1] - edges[0]))
    assert weights_FM[40, band] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int):
    reference = log_mel_examples(sine(16_000), 16_000)
    resampled = log_mel_examples(sine(rate), rate)
    assert resampled.shape == (5, 96, 64)
    assert (resampled - reference)[1:4].abs().max() < 0.02  # the ends ring


def test_a_rate_without_common_factor_costs_no_gigabytes():
    assert log_mel_examples(sine(44_101, 1.0), 44_101).shape == (1, 96, 64)


def test_channels_are_averaged_and_torch_is_accepted():
    mono = sine(16_000)
    stereo = torch.from_numpy(np.stack([mono, np.zeros_like(mono)]))
    torch.testing.assert_close(log_mel_examples(stereo, 16_000), log_mel_examples(mono / 2, 16_000))


@pytest.mark.parametrize("seconds", [1, 2, 5, 10, 24, 25, 30])
@pytest.mark.parametrize("existing", [0.0, 0.5, 40.0])
def test_clip_has_one_example_a_second(seconds: int, existing: float):
    assert clip_log_mel(sine(16_000, existing), 16_000, seconds).shape == (seconds, 96, 64)


def test_missing_sound_becomes_silence():
    examples = clip_log_mel(sine(44_100, 2.0), 44_100, 5)
    torch.testing.assert_close(examples[3:], torch.full((2, 96, 64), SILENT_LOG_MEL))
    assert (examples[0] > SILENT_LOG_MEL + 1).any()


def test_errors():
    with pytest.raises(ValueError, match=r"\[S\] or \[channels,S\]"):
        log_mel_examples(np.zeros((1, 2, 3)), 16_000)
    with pytest.raises(ValueError, match="rate"):
        log_mel_examples(np.zeros(1000), 0)
    assert log_mel_examples(np.zeros(300), 16_000).shape == (0, 96, 64)


def test_sound_flag():
    assert sound_flag(None) == "none"
    assert sound_flag(np.zeros(10, np.float32)) == "silent"
    assert sound_flag(np.zeros(0, np.float32)) == "silent"
    assert sound_flag(np.array([0, 1 / 32768], np.float32)) == "ok"

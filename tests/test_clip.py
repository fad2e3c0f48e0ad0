"""Batches of clips: bytes as stored until they are on the device, normalised there, and never seen raw by a network."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from query_runs import query_config, unicode_run
from test_system_tpavi import make_config

from avs_dist.clip import IMAGENET_MEAN, IMAGENET_STD, collate
from avs_dist.sequences import Sequences, collate_features, collate_media
from avs_dist.shards.schema import FeatureSample, Sample
from avs_dist.systems import build_system

SECONDS = (3, 2)
SIZE = 64


def sample(seconds: int, name: str, **more: np.ndarray) -> Sample:
    """A clip of noise in read-only arrays, as a decoder may give them."""
    rng = np.random.default_rng(seconds)
    arrays = (
        rng.integers(0, 256, (seconds, SIZE, SIZE, 3), dtype=np.uint8),
        rng.standard_normal((seconds, 96, 64), dtype=np.float32),
        rng.integers(0, 2, (seconds, SIZE, SIZE), dtype=np.uint8),
        np.arange(seconds) < 2,
    )
    for array in arrays:
        array.flags.writeable = False
    return Sample(name, *arrays, **more)


@pytest.fixture
def samples() -> list[Sample]:
    return [sample(seconds, f"clip{seconds}") for seconds in SECONDS]


def by_hand(frames_THWC: np.ndarray) -> torch.Tensor:
    """ImageNet-normalised float64 [T,3,H,W]."""
    normalised = (frames_THWC / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2)


def assert_normalised(frames_BTCHW: torch.Tensor, samples: list[Sample], tolerance: float = 1e-6) -> None:
    for b, each in enumerate(samples):
        seconds = len(each.frames_THWC)
        found, expected = frames_BTCHW[b, :seconds].double(), by_hand(each.frames_THWC)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        assert not frames_BTCHW[b, seconds:].any()


def test_a_batch_holds_the_bytes_of_the_clips_and_zeros(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = collate(samples)
    assert clip.frames_BTCHW.dtype == clip.masks_BTHW.dtype == torch.uint8
    assert clip.frames_BTCHW.shape == (2, 3, 3, SIZE, SIZE)
    assert clip.frames_BTCHW.permute(0, 1, 3, 4, 2).is_contiguous()  # the stored order: one copy, no transposition
    assert clip.valid_BT.tolist() == [[True, True, True], [True, True, False]]
    for b, each in enumerate(samples):
        n = len(each.frames_THWC)
        np.testing.assert_array_equal(clip.frames_BTCHW[b, :n].permute(0, 2, 3, 1), each.frames_THWC)
        for field, stored in (
            ("mel_BTFM", each.mel_TFM),
            ("masks_BTHW", each.masks_THW),
            ("labelled_BT", each.labelled_T),
        ):
            np.testing.assert_array_equal(getattr(clip, field)[b, :n], stored)
            assert not getattr(clip, field)[b, n:].any()
        assert not clip.frames_BTCHW[b, n:].any()


@pytest.mark.parametrize("how_many", [1, 2], ids=["whole", "padded"])
def test_frames_are_normalised_on_the_way_to_the_device(samples, how_many):
    chosen = samples[:how_many]
    clip = collate(chosen)
    assert_normalised(clip.to("cpu").normalised_BTCHW, chosen)
    # in whatever order they lie in memory
    planar = replace(clip, frames_BTCHW=clip.frames_BTCHW.contiguous())
    assert_normalised(planar.to("cpu").normalised_BTCHW, chosen)
    low = clip.to("cpu", torch.bfloat16)
    assert low.frames_BTCHW.dtype == low.mel_BTFM.dtype == torch.bfloat16
    assert_normalised(low.frames_BTCHW, chosen, tolerance=0.02)
    # and once only
    again = clip.to("cpu").to("cpu")
    assert torch.equal(again.frames_BTCHW, clip.to("cpu").frames_BTCHW)


def test_the_host_does_not_wait_for_the_device(samples):
    """A tensor of the meta device has no values that could be read."""
    moved = collate(samples).to("meta")
    assert moved.normalised_BTCHW.device.type == moved.valid_BT.device.type == "meta"
    assert collate_media(samples, num_steps=4).to("meta").inputs["visual"].dtype == torch.float32


def test_stored_sound_is_there_where_all_clips_have_it(samples):
    heard = [replace(each, audio_TD=np.full((len(each.mel_TFM), 128), 2, np.float32)) for each in samples]
    clip = collate(heard)
    assert clip.audio_BTD is not None
    assert torch.equal(clip.audio_BTD, 2.0 * clip.valid_BT[..., None].expand(2, 3, 128))
    assert clip.to("cpu", torch.bfloat16).audio_BTD.dtype == torch.bfloat16
    assert collate([heard[0], samples[1]]).audio_BTD is None
    cut = collate_media(heard, num_steps=2)
    assert torch.equal(cut.audio_BTD, torch.full((2, 2, 128), 2.0))
    assert collate_media(samples, num_steps=2).to("cpu").audio_BTD is None


def test_sequences_of_media_are_normalised_and_features_are_not(samples):
    batch = collate_media(samples, num_steps=4)
    assert batch.inputs["visual"].dtype == torch.uint8
    moved = batch.to("cpu")
    assert_normalised(moved.inputs["visual"], samples)
    assert torch.equal(moved.inputs["audio"], batch.inputs["audio"])
    features = {"audio": np.full((2, 8), 200, np.float16)}
    stored = collate_features([FeatureSample("a", features, {})], shapes={"audio": (8,)}, num_steps=3, num_events=1)
    assert stored.inputs["audio"].dtype == torch.float16
    assert torch.equal(stored.to("cpu").inputs["audio"][0, :2], torch.full((2, 8), 200.0))


@pytest.mark.parametrize("system", ["tpavi", "ecmvae", "diffusion"])
def test_systems_refuse_frames_as_stored(system, samples):
    clip = collate(samples)
    built = build_system(make_config(system=system))
    for method in (lambda: built.loss_terms(clip, 0), lambda: built.predict(clip)):
        with pytest.raises(ValueError, match="frames are uint8, as stored"):
            method()
    if system == "ecmvae":
        with pytest.raises(ValueError, match="frames are uint8, as stored"):
            built.latents(clip)
    assert built.predict(clip.to("cpu")).logits_BTHW.shape == (2, 3, SIZE, SIZE)


def test_queries_and_codebooks_refuse_frames_as_stored(samples, tmp_path):
    clip = collate(samples)
    unicode = unicode_run(tmp_path / "run")
    query = build_system(query_config(tmp_path / "run"))
    with pytest.raises(ValueError, match="frames are uint8, as stored"):
        query.predict(clip)
    query.predict(clip.to("cpu"))
    media: Sequences = collate_media(samples, num_steps=3)
    with pytest.raises(ValueError, match="frames are uint8, as stored"):
        unicode.encode(media)
    assert unicode.encode(media.to("cpu"))["visual"].valid_BT.sum() == sum(SECONDS)


def test_clips_of_two_sizes_are_no_batch(samples):
    small = replace(samples[1], frames_THWC=samples[1].frames_THWC[:, :32])
    with pytest.raises(ValueError, match=r"clip clip2: frames are \(32, 64\), others of the batch \(64, 64\)"):
        collate([samples[0], small])

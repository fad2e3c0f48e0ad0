"""Random numbers of each clip, and what augmentation makes of training clips with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_system_tpavi import make_clip, pad

from avs_dist.augment import crop, mirror, shift
from avs_dist.clip import Clip, collate
from avs_dist.config import DataConfig
from avs_dist.draws import ClipDraws
from avs_dist.shards.schema import Sample


def test_numbers_belong_to_the_clip_not_to_its_batch_or_padding():
    together, alone = ClipDraws(1, 2, ["a", "b"]), ClipDraws(1, 2, ["b"])
    for draw in ("normal", "uniform"):
        assert torch.equal(getattr(together, draw)("z", 5, 3)[1:], getattr(alone, draw)("z", 5, 3))
        assert torch.equal(getattr(alone, draw)("z", 9, 3)[:, :5], getattr(alone, draw)("z", 5, 3))


def test_seed_step_clip_and_purpose_each_give_other_numbers():
    first = ClipDraws(1, 2, ["a"]).normal("z", 100)
    others = [
        ClipDraws(3, 2, ["a"]).normal("z", 100),
        ClipDraws(1, 3, ["a"]).normal("z", 100),
        ClipDraws(1, 2, ["b"]).normal("z", 100),
        ClipDraws(1, 2, ["a"]).normal("y", 100),
    ]
    assert all(abs(torch.corrcoef(torch.cat([first, other]))[0, 1]) < 0.4 for other in others)


def test_distributions():
    draws = ClipDraws(0, 0, [f"clip{i}" for i in range(50)])
    assert stats.kstest(draws.normal("z", 200).flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(draws.uniform("z", 200).flatten().numpy(), "uniform").pvalue > 0.01
    assert draws.normal("z", 1, 1).flatten().unique().numel() == 50


def many(num_clips: int) -> Clip:
    clip = make_clip(batch=num_clips, frames=3, size=4)
    clip.labelled_BT[:, 2] = False
    return clip


def mirrored_BT(before: Clip, after: Clip) -> torch.Tensor:
    """Which frames were mirrored; all others must be as they were, and masks must go with their frames."""
    kept_BT = (after.frames_BTCHW == before.frames_BTCHW).flatten(2).all(2)
    turned_BT = (after.frames_BTCHW == before.frames_BTCHW.flip(-1)).flatten(2).all(2)
    assert bool((kept_BT ^ turned_BT).all())
    masks_BTHW = torch.where(turned_BT[..., None, None], before.masks_BTHW.flip(-1), before.masks_BTHW)
    assert torch.equal(after.masks_BTHW, masks_BTHW)
    return turned_BT


def test_clips_are_mirrored_as_a_whole_with_their_masks():
    clip = many(200)
    turned_BT = mirrored_BT(clip, mirror(clip, 0.3, ClipDraws(0, 0, clip.key)))
    assert torch.equal(turned_BT, turned_BT[:, :1].expand_as(turned_BT))
    assert 0.2 < turned_BT.float().mean() < 0.4
    other_step_BT = mirrored_BT(clip, mirror(clip, 0.3, ClipDraws(0, 1, clip.key)))
    assert not torch.equal(turned_BT, other_step_BT)


def test_the_public_code_mirrors_each_labelled_frame_by_itself():
    clip = many(200)
    turned_BT = mirrored_BT(clip, mirror(clip, 0.3, ClipDraws(0, 0, clip.key), each_frame=True))
    assert not turned_BT[:, 2].any()
    assert bool((turned_BT[:, 0] != turned_BT[:, 1]).any())
    assert 0.2 < turned_BT[:, :2].float().mean() < 0.4


def test_mirroring_depends_on_neither_batch_nor_padding():
    clip = many(20)
    whole = mirror(clip, 0.5, ClipDraws(0, 0, clip.key))
    padded = mirror(pad(clip, 2), 0.5, ClipDraws(0, 0, clip.key))
    assert torch.equal(padded.frames_BTCHW[:, :3], whole.frames_BTCHW)
    last = replace(clip, **{f: getattr(clip, f)[-1:] for f in ("frames_BTCHW", "masks_BTHW", "valid_BT", "key")})
    assert torch.equal(mirror(last, 0.5, ClipDraws(0, 0, last.key)).frames_BTCHW, whole.frames_BTCHW[-1:])
    assert mirror(clip, 0.0, ClipDraws(0, 0, clip.key)) is clip


SECONDS = (5, 3, 4, 5)
SIDE = 32


def painted(seconds: int, name: str) -> Sample:
    """A clip in which the mask is painted in red, and its second into blue, log-mel, stored sound and the labels."""
    rng = np.random.default_rng(seconds)
    second_T = np.arange(seconds)
    masks_THW = (rng.random((seconds, SIDE // 8, SIDE // 8)) < 0.5).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    frames_THWC = np.zeros((seconds, SIDE, SIDE, 3), np.uint8)
    frames_THWC[..., 0] = 200 * masks_THW
    frames_THWC[..., 2] = 10 + second_T[:, None, None]
    heard_T = 10 + second_T.astype(np.float32)
    mel_TFM, audio_TD = np.tile(heard_T[:, None, None], (1, 96, 64)), np.tile(heard_T[:, None], (1, 128))
    return Sample(name, frames_THWC, mel_TFM, masks_THW, second_T < seconds - 1, audio_TD=audio_TD)


@pytest.fixture
def clips() -> Clip:
    """Clips of several lengths; the last second of each has no label."""
    return collate([painted(seconds, f"clip{i}") for i, seconds in enumerate(SECONDS)])


def assert_aligned(clip: Clip) -> None:
    """Masks are where the frames are red (but at edges, which bilinear resizing blurs), and all is of one second."""
    red_BTHW = clip.frames_BTCHW[:, :, 0].int()
    clear_BTHW = (red_BTHW < 50) | (red_BTHW > 150)
    assert torch.equal((red_BTHW > 100)[clear_BTHW], (clip.masks_BTHW > 0)[clear_BTHW])
    assert clear_BTHW.float().mean() > 0.85
    assert clip.audio_BTD is not None
    second_BT = clip.frames_BTCHW[:, :, 2].int().amax((2, 3))
    assert torch.equal(clip.frames_BTCHW[:, :, 2].int().amin((2, 3)), second_BT)
    for heard in (clip.mel_BTFM.flatten(2), clip.audio_BTD):
        assert bool((heard == second_BT[..., None]).all())
    last_B1 = 10 + torch.tensor(SECONDS)[:, None] - 1
    assert torch.equal(clip.labelled_BT, clip.valid_BT & (second_BT != last_B1))
    assert torch.equal(second_BT > 0, clip.valid_BT)


@pytest.mark.parametrize("step", range(4))
def test_a_window_is_cut_out_of_frames_and_masks_alike(clips, step):
    cut = crop(clips, 0.5, ClipDraws(0, step, clips.key))
    assert_aligned(cut)
    assert cut.frames_BTCHW.dtype == cut.masks_BTHW.dtype == torch.uint8
    assert cut.frames_BTCHW.shape == clips.frames_BTCHW.shape
    assert bool((cut.masks_BTHW != clips.masks_BTHW).flatten(1).any(1).all())


def test_windows_have_all_sizes_and_places():
    """The window is read off a ramp of columns and rows."""
    ramp_HW = np.arange(100, dtype=np.uint8)[:, None].repeat(100, 1)
    frames_THWC = np.stack([ramp_HW, ramp_HW.T, ramp_HW], -1)[None]
    empty = Sample(
        "", frames_THWC, np.zeros((1, 96, 64), np.float32), np.zeros((1, 100, 100), np.uint8), np.ones(1, bool)
    )
    whole = collate([replace(empty, name=f"clip{i}") for i in range(200)])
    cut = crop(whole, 0.6, ClipDraws(0, 0, whole.key)).frames_BTCHW[:, 0].int()
    top_B, bottom_B = cut[:, 0, 0, 0], cut[:, 0, -1, 0]
    left_B, right_B = cut[:, 1, 0, 0], cut[:, 1, 0, -1]
    side_B = bottom_B - top_B + 1
    assert torch.equal(side_B, right_B - left_B + 1)
    assert 60 <= side_B.min() < 64
    assert 96 < side_B.max() <= 100
    assert top_B.min() == left_B.min() == 0
    assert bottom_B[side_B < 96].max() == right_B[side_B < 96].max() == 99
    assert top_B.max() > 30
    assert abs(torch.corrcoef(torch.stack([top_B, left_B]).float())[0, 1]) < 0.6


@pytest.mark.parametrize("longest", [1, 2, 9])
def test_seconds_are_rolled_within_what_exists(clips, longest):
    moved = set()
    for step in range(20):
        rolled = shift(clips, longest, ClipDraws(0, step, clips.key))
        assert_aligned(rolled)
        assert torch.equal(rolled.valid_BT, clips.valid_BT)
        second_T = rolled.mel_BTFM[0, :, 0, 0].long() - 10
        assert torch.equal(second_T.roll(-int(second_T[0])), (torch.arange(5) + 2 * int(second_T[0])) % 5)
        moved.add(int(second_T[0]))
    assert moved == ({0, 1, 4} if longest == 1 else set(range(5)))


def test_all_of_it_together_stays_aligned_and_is_the_clip_alone(clips):
    def augmented(clip: Clip) -> Clip:
        draws = ClipDraws(3, 7, clip.key)
        return shift(crop(mirror(clip, 0.5, draws), 0.7, draws), 2, draws)

    together = augmented(clips)
    assert_aligned(together)
    for b, seconds in enumerate(SECONDS):
        alone = augmented(collate([painted(seconds, f"clip{b}")]))
        for field in ("frames_BTCHW", "mel_BTFM", "masks_BTHW", "labelled_BT", "valid_BT", "audio_BTD"):
            assert torch.equal(getattr(together, field)[b, :seconds], getattr(alone, field)[0])
            assert not getattr(together, field)[b, seconds:].any()


def test_augmentation_that_is_off_leaves_the_batch_alone(clips):
    draws, off = ClipDraws(0, 0, clips.key), DataConfig()
    assert shift(crop(mirror(clips, off.mirror, draws), off.crop, draws), off.shift, draws) is clips


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"crop": 0.0}, "data.crop=0.0: must be more than 0 and at most 1"),
        ({"crop": 1.5}, "data.crop=1.5: must be more than 0 and at most 1"),
        ({"shift": -1}, "data.shift=-1: must be at least 0"),
    ],
)
def test_settings_out_of_range(wrong, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**wrong)

"""Random numbers of each clip, and the mirrored training clips that are made with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy import stats
from test_system_tpavi import make_clip, pad

from avs_dist.augment import mirror
from avs_dist.clip import Clip
from avs_dist.draws import ClipDraws


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

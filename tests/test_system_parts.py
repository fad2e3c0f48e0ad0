"""What several systems share: rows of codes, the mean of several masks, masks as pictures."""

from __future__ import annotations

import pytest
import torch

from avs_dist.draws import ClipDraws
from avs_dist.semantic import mask_pictures, sounding_logits
from avs_dist.systems.averaging import average
from avs_dist.systems.code_rows import CodeRows
from avs_dist.systems.generator import Masks
from avs_dist.systems.trunk import Existing

VALID = torch.tensor([[True, True, True], [True, False, False]])
COUNTED = torch.tensor([[True, True, True], [False, False, False]])
DRAWS = ClipDraws(0, 5, ("a", "b"))


def rows(per: str, valid_BT: torch.Tensor = VALID) -> CodeRows:
    return CodeRows(per, Existing(valid_BT), COUNTED)  # type: ignore[arg-type]


def test_rows_of_frames_are_the_frames_that_exist():
    of_frames, value_ND = rows("frame"), torch.randn(4, 2)
    assert of_frames.reduce(value_ND) is value_ND
    assert of_frames.spread(value_ND) is value_ND
    assert of_frames.clip_R.tolist() == [0, 0, 0, 1]
    assert of_frames.counted_R.tolist() == [True, True, True, False]


def test_rows_of_clips_are_means_over_their_frames():
    of_clips, value_ND = rows("clip"), torch.randn(4, 2)
    reduced = of_clips.reduce(value_ND)
    torch.testing.assert_close(reduced, torch.stack([value_ND[:3].mean(0), value_ND[3]]))
    assert torch.equal(of_clips.spread(reduced), reduced[[0, 0, 0, 1]])
    assert of_clips.clip_R.tolist() == [0, 1]
    assert of_clips.counted_R.tolist() == [True, False]


def test_draws_of_rows_do_not_depend_on_padding():
    full = DRAWS.normal("noise", 3, 2)
    assert torch.equal(rows("frame").draw(DRAWS.normal, "noise", 2), full[VALID])
    assert torch.equal(rows("clip").draw(DRAWS.normal, "noise", 2), DRAWS.normal("noise", 2))
    longer = torch.cat([VALID, torch.zeros(2, 2, dtype=torch.bool)], 1)
    counted = torch.cat([COUNTED, torch.zeros(2, 2, dtype=torch.bool)], 1)
    padded = CodeRows("frame", Existing(longer), counted)
    assert torch.equal(padded.draw(DRAWS.uniform, "level"), rows("frame").draw(DRAWS.uniform, "level"))
    of_clip = DRAWS.uniform("share")
    assert of_clip.dtype == torch.float32
    assert torch.equal(rows("frame").draw_of_clip(DRAWS.uniform, "share"), of_clip[[0, 0, 0, 1]])


def binary(logits: torch.Tensor) -> Masks:
    return Masks(logits, None, None, [])


def several(class_logits_BTKHW: torch.Tensor) -> Masks:
    logits = sounding_logits(class_logits_BTKHW.flatten(0, 1)).unflatten(0, class_logits_BTKHW.shape[:2])
    return Masks(logits, class_logits_BTKHW, None, [])


def test_mean_and_variance_of_binary_masks():
    drawn = torch.randn(5, 1, 2, 3, 3, dtype=torch.float64)
    got = average(lambda number: binary(drawn[number - 1]), 5, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(got.probabilities_BTHW, drawn.sigmoid().mean(0))
    torch.testing.assert_close(got.variance_BTHW, drawn.sigmoid().var(0, correction=0))
    assert got.class_logits_BTKHW is None
    alone = average(lambda number: binary(drawn[number - 1]), 1, torch.ones(1, 2, dtype=torch.bool))
    assert alone.variance_BTHW is None


def test_mean_of_class_probabilities_and_variance_of_sounding():
    drawn = torch.randn(4, 1, 2, 3, 5, 5, dtype=torch.float64)
    valid = torch.tensor([[True, False]])
    got = average(lambda number: several(drawn[number - 1]), 4, valid)
    probability = drawn.softmax(3)
    torch.testing.assert_close(got.class_logits_BTKHW.softmax(2)[:, :1], probability.mean(0)[:, :1])
    torch.testing.assert_close(got.probabilities_BTHW[:, :1], 1 - probability[:, :, :1, 0].mean(0))
    torch.testing.assert_close(got.variance_BTHW, (1 - probability[:, :, :, 0]).var(0, correction=0))
    assert got.logits_BTHW[:, 1].abs().max() == 0  # no such frame
    assert got.class_logits_BTKHW[:, 1].abs().max() == 0


def test_sounding_is_not_background():
    logits_NKHW = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(sounding_logits(logits_NKHW).sigmoid(), 1 - logits_NKHW.softmax(1)[:, 0])
    assert torch.equal(sounding_logits(logits_NKHW[:, :1]), logits_NKHW[:, 0])


def test_masks_as_pictures():
    masks = torch.tensor([[[0, 1], [2, 70]]], dtype=torch.uint8)
    assert mask_pictures(masks, 1, torch.float32).tolist() == [[[[0.0, 1.0], [1.0, 1.0]]]]
    colours = mask_pictures(masks, 71, torch.float64)[0].permute(1, 2, 0) * 255
    assert colours[0].tolist() == [[0, 0, 0], [128, 0, 0]]  # the VOC palette
    assert colours[1, 0].tolist() == [0, 128, 0]
    assert (
        len({tuple(c) for c in mask_pictures(torch.arange(71).view(1, 1, 71), 71, torch.float64)[0, :, 0].T.tolist()})
        == 71
    )


@pytest.mark.parametrize("count", [2, 7])
def test_running_mean_needs_no_more_memory_than_one_mask(count):
    """Each mask is asked for once, in order."""
    asked: list[int] = []

    def paint(number: int) -> Masks:
        asked.append(number)
        return binary(torch.zeros(1, 1, 2, 2))

    average(paint, count, torch.ones(1, 1, dtype=torch.bool))
    assert asked == list(range(1, count + 1))

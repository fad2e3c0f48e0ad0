"""Metrics over classes against literal loops in the published form, under any split into updates and ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from avs_dist.semantic_metrics import DEFINITIONS, ClassScores, SemanticMetrics, class_areas

K = 6
# one row of pixels a frame: true classes, predicted classes
FRAMES = (
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),  # background alone, and right
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0, 0, 0]),  # 3 never occurs, but is predicted
    ([1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0, 0]),
    ([1, 1, 2, 2, 2, 2, 2, 2], [2, 2, 1, 1, 2, 2, 2, 2]),  # no background, 1 is nowhere right
    ([5, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),  # 5 is missed; 4 is never met at all
    ([2, 2, 2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 2]),
)


def make_frames(num_random: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class logits [F,K,2,4] whose argmax is the second list of FRAMES, and masks; random frames with all classes."""
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, K, (num_random, 2, 8))
    extra[:, 1] = np.where(rng.random((num_random, 8)) < 0.5, extra[:, 0], extra[:, 1])
    pairs = np.concatenate([np.array(FRAMES), extra])
    logits_FPK = rng.normal(size=(len(pairs), 8, K))
    np.put_along_axis(logits_FPK, pairs[:, 1, :, None], 5.0, axis=2)
    logits_FKHW = torch.from_numpy(logits_FPK.transpose(0, 2, 1).reshape(-1, K, 2, 4)).float()
    return logits_FKHW, torch.from_numpy(pairs[:, 0].reshape(-1, 2, 4)).to(torch.uint8)


def published(logits_FKHW: Tensor, masks_FHW: Tensor) -> dict[str, float]:
    """Literal loops over frames, classes and pixels, with precision, recall and NaN as the public code has them."""
    classes = range(logits_FKHW.shape[1])
    iou, f_score, count = (np.zeros(len(classes)) for _ in range(3))
    inside_all, union_all, true_all = (np.zeros(len(classes)) for _ in range(3))
    for logits_KHW, mask_HW in zip(logits_FKHW.double().numpy(), masks_FHW.numpy(), strict=True):
        predicted_HW = logits_KHW.argmax(0)
        for k in classes:
            inside = sum(int(p == k and m == k) for p, m in zip(predicted_HW.flat, mask_HW.flat, strict=True))
            predicted, true = int((predicted_HW == k).sum()), int((mask_HW == k).sum())
            union = predicted + true - inside
            with np.errstate(invalid="ignore"):
                precision, recall = np.float64(inside) / predicted, np.float64(inside) / true
                f = 1.3 * precision * recall / (0.3 * precision + recall)
            f_score[k] += 0.0 if np.isnan(f) else f
            iou[k] += inside / union if union else 0.0
            count[k] += union > 0
            inside_all[k], union_all[k], true_all[k] = inside_all[k] + inside, union_all[k] + union, true_all[k] + true
    with np.errstate(invalid="ignore"):
        mean_iou, mean_f, dataset = iou / count, f_score / count, inside_all / union_all
    occurs = true_all > 0
    results = {}
    for suffix, first in (("", 0), ("_no_background", 1)):
        results[f"miou{suffix}"] = np.nan_to_num(mean_iou[first:]).mean()
        results[f"miou_present{suffix}"] = mean_iou[first:][occurs[first:]].mean()
        results[f"miou_dataset{suffix}"] = dataset[first:][occurs[first:]].mean()
        results[f"f_score{suffix}"] = np.nan_to_num(mean_f[first:]).mean()
        results[f"f_score_present{suffix}"] = mean_f[first:][occurs[first:]].mean()
    return results


def measured(logits_FKHW: Tensor, masks_FHW: Tensor, at_once: int = 100) -> tuple[dict[str, float], ClassScores]:
    metrics = SemanticMetrics(logits_FKHW.shape[1])
    for logits, masks in zip(logits_FKHW.split(at_once), masks_FHW.split(at_once), strict=True):
        metrics.update(logits, masks)
    return metrics.results()


def test_numbers_that_a_hand_can_check():
    """Two frames of four pixels and three classes, the last of which is never met."""
    classes = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
    masks = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 1]]])
    logits = torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()
    got = measured(logits, masks)[0]
    background, object_ = (1 / 2 + 3 / 4) / 2, (2 / 3 + 0) / 2
    assert got["miou"] == pytest.approx((background + object_ + 0) / 3)
    assert got["miou_no_background"] == pytest.approx((object_ + 0) / 2)
    assert got["miou_present"] == pytest.approx((background + object_) / 2)
    assert got["miou_present_no_background"] == pytest.approx(object_)
    assert got["miou_dataset"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert got["miou_dataset_no_background"] == pytest.approx(2 / 4)
    # background: precision 1, recall 1/2, and precision 3/4, recall 1; object: precision 2/3, recall 1, and missed
    f_background = (1.3 * 0.5 / (0.3 + 0.5) + 1.3 * 0.75 / (0.3 * 0.75 + 1)) / 2
    f_object = 1.3 * (2 / 3) / (0.3 * 2 / 3 + 1) / 2
    assert got["f_score"] == pytest.approx((f_background + f_object) / 3)
    assert got["f_score_present_no_background"] == pytest.approx(f_object)
    assert (got["frames"], got["frames_with_sound"]) == (2, 2)


@pytest.mark.parametrize("num_random", [0, 25])
def test_equals_literal_loops(num_random):
    logits, masks = make_frames(num_random)
    got, expected = measured(logits, masks)[0], published(logits, masks)
    assert set(expected) == set(DEFINITIONS)
    assert {key: got[key] for key in expected} == pytest.approx(expected, abs=1e-11)
    assert len(set(expected.values())) == len(expected) or num_random  # no two of them can be confused
    assert got["frames"] == len(masks)
    assert got["frames_with_sound"] == int((masks > 0).flatten(1).any(1).sum())


def test_scores_of_each_class():
    logits, masks = make_frames()
    scores = measured(logits, masks)[1]
    assert scores.frames_K.tolist() == [4, 2, 2, 0, 0, 1]
    assert scores.iou_K.tolist() == pytest.approx(
        [(1 + 6 / 8 + 3 / 6 + 7 / 8) / 4, (2 / 5 + 0) / 2, (4 / 8 + 1) / 2, 0, math.nan, 0], nan_ok=True
    )
    assert scores.iou_dataset_K[2] == pytest.approx(12 / 16)
    rows = scores.rows(["background", "man", "dog", "gun", "cat", "piano"])
    assert rows[2] == {"class": 2, "name": "dog", "iou": 0.75, "f_score": rows[2]["f_score"], "iou_dataset": 0.75,
                       "frames": 2}  # fmt: skip
    assert rows[4] == {"class": 4, "name": "cat", "iou": None, "f_score": None, "iou_dataset": None, "frames": 0}
    assert rows[3]["f_score"] == 0
    assert "name" not in scores.rows()[0]
    with pytest.raises(ValueError, match="2 class names for 6 classes"):
        scores.rows(["background", "man"])


def test_background_alone():
    """Right in every pixel: 1 for the background, and nothing to say about the others."""
    logits, masks = make_frames()
    got = measured(logits[:1], masks[:1])[0]
    assert got == {
        "miou": 1 / K,
        "miou_no_background": 0,
        "miou_present": 1,
        "miou_dataset": 1,
        "f_score": 1 / K,
        "f_score_no_background": 0,
        "f_score_present": 1,
        "frames": 1,
        "frames_with_sound": 0,
    }


def test_areas_count_pixels():
    rng = np.random.default_rng(2)
    classes, masks = rng.integers(0, 71, (2, 3, 40, 30))
    areas = class_areas(torch.from_numpy(classes), torch.from_numpy(masks), 71)
    for f in range(3):
        for k in (0, 1, 35, 70):
            counted = [((classes[f] == k) & (masks[f] == k)).sum(), (classes[f] == k).sum(), (masks[f] == k).sum()]
            assert areas[:, f, k].tolist() == counted


@pytest.mark.parametrize("at_once", [1, 2, 7, 31])
def test_split_into_updates_does_not_change_a_bit(at_once):
    logits, masks = make_frames(25)
    assert measured(logits, masks, at_once)[0] == measured(logits, masks)[0]
    shuffled = torch.randperm(31)
    assert measured(logits[shuffled], masks[shuffled], at_once)[0] == measured(logits, masks)[0]


def test_dtypes_and_an_empty_update():
    logits, masks = make_frames(25)
    expected = measured(logits.bfloat16().float(), masks)[0]
    for dtype in (torch.int16, torch.int64):
        assert measured(logits.bfloat16(), masks.to(dtype))[0] == expected
    metrics = SemanticMetrics(K)
    metrics.update(logits[:0], masks[:0])
    with pytest.raises(ValueError, match="no frames were counted"):
        metrics.compute()
    metrics.update(logits.bfloat16(), masks)
    assert metrics.compute() == expected


def _rank_main(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    logits, masks = make_frames(25)
    metrics = SemanticMetrics(K)
    for part in torch.arange(rank, 31, size).split(4):  # strided and uneven
        metrics.update(logits[part], masks[part])
    torch.save(metrics.compute(), f"{out}.{rank}")
    dist.destroy_process_group()


def test_world_size_does_not_change_a_bit(tmp_path: Path):
    expected = measured(*make_frames(25))[0]
    mp.spawn(_rank_main, (2, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"out.{rank}", weights_only=True) == expected


def test_errors_say_what_is_wrong():
    logits, masks = make_frames()
    metrics = SemanticMetrics(K)
    with pytest.raises(ValueError, match="num_classes 1: must be at least 2"):
        SemanticMetrics(1)
    with pytest.raises(ValueError, match=r"must be \[F,6,H,W\], got \(6, 5, 2, 4\)"):
        metrics.update(logits[:, :5], masks)
    with pytest.raises(ValueError, match=r"\[F,H,W\], got \(6, 2, 4\) and \(5, 2, 4\)"):
        metrics.update(logits, masks[:5])
    with pytest.raises(ValueError, match="true classes must be from 0 to 5, got 0 to 255"):
        metrics.update(logits, masks.masked_fill(masks == 5, 255))
    broken = logits.clone()
    broken[2, 4, 1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN in 1 of 6 frames"):
        metrics.update(broken, masks)
    with pytest.raises(ValueError, match="no frames were counted"):  # nothing of these was
        metrics.compute()

"""Metrics against literal loops in the published form, under any split into updates and ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avs_dist.metrics import SegmentationMetrics, f_curves, frame_iou

THRESHOLDS = torch.linspace(0, 1 - 1e-10, 255)


def literal_iou(logits_HW: Tensor, mask_HW: Tensor) -> float:
    """The published rule, pixel counts of one frame."""
    predicted, truth = torch.sigmoid(logits_HW) > 0.5, mask_HW > 0
    if not truth.any():
        return int((~predicted).sum()) / (truth.numel() + 1e-7)
    return int((predicted & truth).sum()) / (int((predicted | truth).sum()) + 1e-7)


def literal_f_curve(logits_HW: Tensor, mask_HW: Tensor) -> Tensor:
    """The published rule, one pass over the pixels for each threshold, in float64."""
    probabilities, truth = torch.sigmoid(logits_HW), mask_HW > 0
    curve = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
    for k, threshold in enumerate(THRESHOLDS):
        predicted = probabilities >= threshold
        hits = float((predicted & truth).sum())
        precision, recall = hits / (float(predicted.sum()) + 1e-20), hits / (float(truth.sum()) + 1e-20)
        denominator = 0.3 * precision + recall
        curve[k] = 1.3 * precision * recall / denominator if denominator > 0 else 0.0
    return curve


def literal_metrics(logits_FHW: Tensor, masks_FHW: Tensor, frames_per_batch: int) -> dict[str, float]:
    curves = [literal_f_curve(x, m) if m.any() else None for x, m in zip(logits_FHW, masks_FHW, strict=True)]

    def best(part: list[Tensor | None]) -> float:
        sounding = [c for c in part if c is not None]
        return float(torch.stack(sounding).mean(0).max()) if sounding else 0.0

    batches = [best(curves[i : i + frames_per_batch]) for i in range(0, len(curves), frames_per_batch)]
    ious = [literal_iou(x, m) for x, m in zip(logits_FHW, masks_FHW, strict=True)]
    return {
        "miou": sum(ious) / len(ious),
        "f_score": best(curves),
        "f_score_batched": sum(batches) / len(batches),
    }


def make_frames(num_frames: int, seed: int = 0, size: tuple[int, int] = (24, 20)) -> tuple[Tensor, Tensor]:
    """Predictions of varied quality; every third frame is silent, and so are all of frames 8 to 11."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(num_frames, *size, dtype=torch.uint8)
    for f in range(num_frames):
        if f % 3 != 2 and f not in range(8, 12):
            top, left = (int(torch.randint(0, s - 6, (1,), generator=generator)) for s in size)
            masks[f, top : top + 6, left : left + 5 + f % 4] = 1
    noise = torch.randn(num_frames, *size, generator=generator)
    quality = torch.rand(num_frames, 1, 1, generator=generator) * 4
    offset = torch.randn(num_frames, 1, 1, generator=generator)
    return quality * (masks.float() * 2 - 1) + noise + offset, masks


@pytest.mark.parametrize(("batch_size", "frames_per_item"), [(1, 1), (4, 1), (4, 5), (2, 3), (100, 1)])
def test_equals_literal_loop(batch_size, frames_per_item):
    logits, masks = make_frames(43)
    metrics = SegmentationMetrics(batch_size_compat=batch_size, frames_per_item=frames_per_item)
    metrics.update(logits, masks)
    results = metrics.compute()
    for name, value in literal_metrics(logits, masks, batch_size * frames_per_item).items():
        assert results[name] == pytest.approx(value, abs=1e-12), name
    assert results["frames"] == 43
    assert results["frames_with_sound"] == int(masks.flatten(1).any(1).sum())
    assert results["batch_size"] == batch_size


def test_curves_equal_literal_loop_at_every_threshold():
    logits, masks = make_frames(7)
    # probabilities that lie exactly on thresholds, and the saturated ends
    logits[0, 0, :4] = torch.logit(THRESHOLDS[[50, 100, 127, 200]])
    logits[0, 1, :4] = torch.tensor([200.0, -200.0, float("inf"), float("-inf")])
    curves = f_curves(logits, masks)
    for f in range(7):
        expected = literal_f_curve(logits[f], masks[f]) if masks[f].any() else torch.zeros(255, dtype=torch.float64)
        torch.testing.assert_close(curves[f], expected, rtol=0, atol=1e-14)


def test_frame_iou_values_and_empty_truth():
    masks = torch.zeros(4, 2, 5)
    masks[0, 0, :4] = 1
    logits = torch.full((4, 2, 5), -1.0)
    logits[0, 0, 2:] = 1.0  # 2 of 4 hit, 1 false: 2/5
    logits[2, 0, :3] = 1.0  # silent, 3 of 10 false: 0.7
    masks[3] = 1  # all missed
    iou = frame_iou(logits, masks)
    assert iou.dtype == torch.float32
    torch.testing.assert_close(iou, torch.tensor([0.4, 1.0, 0.7, 0.0]), atol=1e-6, rtol=0)
    # a logit of exactly 0 is probability 0.5: not foreground
    assert frame_iou(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)).item() == pytest.approx(1.0)


def test_sounding_and_silent_frames_are_also_reported_apart():
    logits, masks = make_frames(12)
    metrics = SegmentationMetrics()
    metrics.update(logits, masks)
    results, iou, sounding = metrics.compute(), frame_iou(logits, masks), masks.bool().flatten(1).any(1)
    assert results["miou_sounding"] == pytest.approx(float(iou[sounding].mean()), abs=1e-6)
    assert results["miou_silent"] == pytest.approx(float(iou[~sounding].mean()), abs=1e-6)


def test_batch_of_silent_frames_counts_as_zero_in_the_published_form_only():
    logits, masks = make_frames(4)
    metrics = SegmentationMetrics(batch_size_compat=2)
    metrics.update(logits[:2], masks[:2])
    before = metrics.compute()
    metrics.update(torch.full((2, 24, 20), -9.0), torch.zeros(2, 24, 20, dtype=torch.uint8))
    after = metrics.compute()
    assert after["f_score_batched"] == pytest.approx(before["f_score_batched"] / 2, abs=1e-12)
    assert after["f_score"] == before["f_score"] > 0
    assert "miou_silent" in after
    assert "miou_silent" not in before


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 29), max_size=8), order_seed=st.integers(0, 10**6))
def test_any_split_and_any_order_give_the_same_bits(cuts, order_seed):
    logits, masks = make_frames(29)
    positions = torch.arange(29) // 2  # clips of two frames
    whole = SegmentationMetrics()
    whole.update(logits, masks, positions)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(order_seed))
    parts = SegmentationMetrics()
    for part in torch.tensor_split(order, sorted(cuts)):
        parts.update(logits[part], masks[part], positions[part])
    assert parts.compute() == whole.compute()


def test_arrival_order_numbers_the_items_like_positions():
    logits, masks = make_frames(30)
    by_arrival = SegmentationMetrics(frames_per_item=5)
    for start in range(0, 30, 7):  # updates that cut through items
        by_arrival.update(logits[start : start + 7], masks[start : start + 7])
    by_position = SegmentationMetrics()
    by_position.update(logits, masks, torch.arange(30) // 5)
    assert by_arrival.compute() == by_position.compute()


def test_padding_positions_are_ignored():
    logits, masks = make_frames(10)
    plain = SegmentationMetrics()
    plain.update(logits[:8], masks[:8], list(range(8)))
    padded = SegmentationMetrics()
    padded.update(logits, masks, [*range(8), -1, -1])
    padded.update(logits, masks, [-1] * 10)
    assert padded.compute() == plain.compute()


def test_half_precision_logits_and_mask_dtypes():
    logits, masks = make_frames(9)
    results = []
    for mask in (masks, masks.bool(), masks.long(), masks.float()):
        metrics = SegmentationMetrics()
        metrics.update(logits.bfloat16(), mask)
        results.append(metrics.compute())
    exact = SegmentationMetrics()
    exact.update(logits.bfloat16().float(), masks)
    assert all(r == exact.compute() for r in results)


def _rank_main(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    logits, masks = make_frames(31)
    mine = torch.arange(rank, 31, size)  # strided: batches are spread over the ranks, and the last are uneven
    metrics = SegmentationMetrics()
    for part in mine.split(4):
        metrics.update(logits[part], masks[part], part // 3)
    if rank == size - 1:
        metrics.update(logits[:1], masks[:1], [-1])
    torch.save(metrics.compute(), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_world_size_does_not_change_a_bit(size, tmp_path: Path):
    logits, masks = make_frames(31)
    single = SegmentationMetrics()
    single.update(logits, masks, torch.arange(31) // 3)
    expected = single.compute()
    mp.spawn(_rank_main, (size, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=size)
    for rank in range(size):
        assert torch.load(tmp_path / f"out.{rank}", weights_only=True) == expected


def test_memory_does_not_grow_with_the_frames_of_a_batch():
    metrics = SegmentationMetrics(batch_size_compat=4, frames_per_item=25)
    for seed in range(5):
        metrics.update(*make_frames(20, seed))
    assert [tuple(v.shape) for v in metrics._batches.values()] == [(256,)]


def test_errors_say_what_is_wrong():
    logits, masks = make_frames(4)
    metrics = SegmentationMetrics()
    with pytest.raises(ValueError, match="no frames were counted"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"\[F,H,W\], got \(4, 24, 20\) and \(3, 24, 20\)"):
        metrics.update(logits, masks[:3])
    with pytest.raises(ValueError, match=r"\[F,H,W\]"):
        frame_iou(logits[0], masks[0])
    broken = logits.clone()
    broken[2, 3, 3] = float("nan")
    for call in (frame_iou, f_curves, metrics.update):
        with pytest.raises(ValueError, match=r"NaN in 1 of 4 frames \(first: frame 2\)"):
            call(broken, masks)
    with pytest.raises(ValueError, match="only 0 and 1"):
        frame_iou(logits, masks * 255)
    with pytest.raises(ValueError, match="floating point"):
        frame_iou(masks, masks)
    with pytest.raises(ValueError, match="one for each of the 4 frames"):
        SegmentationMetrics().update(logits, masks, [0, 1])
    metrics = SegmentationMetrics()
    metrics.update(logits, masks)
    with pytest.raises(ValueError, match="cannot be mixed"):
        metrics.update(logits, masks, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="at least 1"):
        SegmentationMetrics(batch_size_compat=0)

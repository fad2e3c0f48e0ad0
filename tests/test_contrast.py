"""The contrastive loss of latent diffusion: by hand, which frames are negatives, and on two ranks as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from avs_dist.config import DiffusionLossConfig
from avs_dist.systems.contrast import Contrast, contrast

CLIPS = torch.tensor([0, 0, 1, 2, 2, 2])
D = 4


def draw() -> tuple[Tensor, Tensor]:
    """Codes and conditions [6,D]."""
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(len(CLIPS), D, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def literal(codes: Tensor, conditions: Tensor, temperature: float = 1.0) -> Contrast:
    """Eq. 11, frame by frame: the code of the own frame against those of other clips."""
    losses, positives, negatives = [], [], []
    for i in range(len(codes)):
        score = [torch.cosine_similarity(conditions[i], code, dim=0) for code in codes]
        others = [score[j] for j in range(len(codes)) if CLIPS[j] != CLIPS[i]]
        ratio = (score[i] / temperature).exp() / sum((s / temperature).exp() for s in [score[i], *others])
        losses.append(-ratio.log())
        positives.append(score[i])
        negatives += others
    return Contrast(*(torch.stack(values).mean() for values in (losses, positives, negatives)))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_the_formula(temperature):
    codes, conditions = draw()
    got = contrast(DiffusionLossConfig(temperature=temperature), codes, conditions, CLIPS)
    for value, want in zip(got, literal(codes, conditions, temperature), strict=True):
        torch.testing.assert_close(value, want)


def test_both_directions_are_their_mean():
    codes, conditions = draw()
    got = contrast(DiffusionLossConfig(symmetric=True), codes, conditions, CLIPS).loss
    want = (literal(codes, conditions).loss + literal(conditions, codes).loss) / 2
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("trains", "trained"), [("condition", False), ("both", True)])
def test_what_each_version_of_the_paper_trains(trains, trained):
    codes, conditions = (value.requires_grad_() for value in draw())
    contrast(DiffusionLossConfig(trains=trains), codes, conditions, CLIPS).loss.backward()
    assert conditions.grad.abs().sum() > 0
    assert (codes.grad is not None) == trained


def test_one_clip_alone_has_nothing_to_contrast():
    codes, conditions = draw()
    found = contrast(DiffusionLossConfig(), codes, conditions, torch.zeros(len(codes), dtype=torch.long))
    assert found.loss.item() == 0.0
    assert found.negative.item() == 0.0


def _gradients(rows: slice, clips: Tensor) -> dict[str, Tensor]:
    codes, conditions = (value[rows].requires_grad_() for value in draw())
    found = contrast(DiffusionLossConfig(temperature=0.3, symmetric=True), codes, conditions, clips)
    found.loss.backward()
    return {"values": torch.stack(found).detach(), "codes": codes.grad, "conditions": conditions.grad}


def _rank_main(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    # ranks number their clips from 0, and have different numbers of frames
    rows, clips = ((slice(0, 2), CLIPS[:2]), (slice(2, 6), CLIPS[2:] - 1))[rank]
    torch.save(_gradients(rows, clips), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path):
    """Values and gradients, which flow to the codes of the other rank as well."""
    mp.spawn(_rank_main, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = _gradients(slice(0, 6), CLIPS)
    torch.testing.assert_close(torch.stack([r["values"] for r in ranks]).mean(0), one["values"])
    for name in ("codes", "conditions"):  # the engine takes the mean over ranks
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]) / 2, one[name])

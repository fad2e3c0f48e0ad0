"""Heads, losses and metrics of the downstream tasks against literal loops and enumerations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from avs_dist.downstream.heads import ALPHA, ClipHead, SecondHead
from avs_dist.downstream.localisation import exp_log_loss, with_background
from avs_dist.downstream.metrics import (
    accuracy,
    constant_f1,
    constant_precision,
    harmonic_mean,
    published_precision_recall,
    recall_at,
    segment_f1,
)


def seconds(count: int, events: int = 4, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """What is said, what is true, and which of 5 seconds exist."""
    valid_NT = torch.arange(5) < torch.randint(1, 6, (count, 1))
    return torch.rand(count, 5, events) < share, torch.rand(count, 5, events) < share, valid_NT


def test_clip_head_by_hand():
    head = ClipHead(3, 4).double()
    with torch.no_grad():
        head.hidden.bias -= 5.0  # all hidden values are negative
    code_BTD = torch.randn(2, 5, 3, dtype=torch.float64)
    valid_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    w1, b1, w2, b2 = (p.detach().numpy() for p in head.parameters())
    for row, length in ((0, 5), (1, 2)):
        hidden_TD = np.array([w1 @ code_BTD[row, t].numpy() + b1 for t in range(length)])
        expected = w2 @ hidden_TD.max(axis=0) + b2
        np.testing.assert_allclose(head(code_BTD, valid_BT)[row].detach().numpy(), expected, rtol=1e-12)


def test_seconds_that_do_not_exist_get_no_gradient_in_the_clip_head():
    head = ClipHead(3, 4)
    code_BTD = torch.randn(2, 5, 3, requires_grad=True)
    valid_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    head(code_BTD, valid_BT).square().sum().backward()
    assert code_BTD.grad[1, :2].abs().sum() > 0
    assert (code_BTD.grad[1, 2:] == 0).all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_second_head_by_hand():
    head = SecondHead(3, 4).double()
    code_BTD = torch.randn(2, 5, 3, dtype=torch.float64)
    w1, b1, w2, b2 = (dict(head.named_parameters())[name].detach().numpy() for name in (
        "hidden.weight", "hidden.bias", "classify.weight", "classify.bias"
    ))  # fmt: skip
    found = head(code_BTD).detach().numpy()
    assert found.shape == (2, 5, 5)
    for b, t in itertools.product(range(2), range(5)):
        np.testing.assert_allclose(found[b, t], w2 @ (w1 @ code_BTD[b, t].numpy() + b1) + b2, rtol=1e-12)
    assert head.alpha_K.tolist() == pytest.approx([ALPHA] * 5)


def test_exp_log_loss_by_hand():
    logits_MC = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target_MC = (torch.rand(7, 4) < 0.4).double()
    alpha_C = torch.rand(4, dtype=torch.float64, requires_grad=True)
    expected, slope_C = 0.0, np.zeros(4)
    for z, t in zip(logits_MC.detach().numpy(), target_MC.numpy(), strict=True):
        for c in range(4):
            term = -t[c] * (z[c] - math.log(sum(math.exp(v) for v in z))) * math.exp(-alpha_C[c].item()) / 7
            expected += term
            slope_C[c] -= term
    loss = exp_log_loss(logits_MC, target_MC, alpha_C)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(alpha_C.grad.numpy(), slope_C, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: exp_log_loss(z, target_MC, alpha_C.detach()), logits_MC)


def test_background_is_where_nothing_happens():
    labels_NTK = torch.tensor([[[0, 0], [1, 0], [1, 1]]], dtype=torch.uint8)
    assert with_background(labels_NTK).tolist() == [[[0, 0, 1], [1, 0, 0], [1, 1, 0]]]
    assert with_background(labels_NTK).dtype == torch.float32


def test_accuracy():
    logits_NK = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, -2.0], [0.0, 1.0, 2.0]])
    assert accuracy(logits_NK, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)


def test_segment_f1_is_the_micro_f1_of_the_seconds_that_exist():
    said, true, valid = seconds(9)
    expected = f1_score(true[valid].numpy(), said[valid].numpy(), average="micro")
    assert segment_f1(said, true, valid) == pytest.approx(expected)
    assert segment_f1(said, true, torch.ones_like(valid)) != pytest.approx(expected)
    nothing = torch.zeros_like(said)
    assert segment_f1(nothing, nothing, valid) == 0.0


def test_published_precision_and_recall_average_over_batches():
    said, true, valid = seconds(200)
    said[80:160] = False  # a batch where nothing is said has precision and recall 0
    precision = recall = 0.0
    for first in (0, 80, 160):
        clips = range(first, min(first + 80, 200))
        hits = said_total = true_total = 0
        for n, t, k in itertools.product(clips, range(5), range(4)):
            if valid[n, t]:
                hits += int(said[n, t, k] and true[n, t, k])
                said_total += int(said[n, t, k])
                true_total += int(true[n, t, k])
        if said_total:
            precision += len(clips) / 200 * hits / said_total
            recall += len(clips) / 200 * hits / true_total
    assert published_precision_recall(said, true, valid) == pytest.approx((precision, recall))


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(2 / (1 / 0.5 + 1 / 0.25))
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_constant_answers_are_the_best_of_all_sets_of_events():
    for seed in range(5):
        torch.manual_seed(seed)
        _, true, valid = seconds(6)
        true &= torch.rand(4) < torch.tensor([1.0, 0.6, 0.3, 0.1])
        f1, precision = [], []
        for chosen in itertools.product([False, True], repeat=4):
            said = torch.tensor(chosen).expand_as(true)
            f1.append(segment_f1(said, true, valid))
            hits, total = (said & true)[valid].sum().item(), said[valid].sum().item()
            precision.append(hits / total if total else 0.0)
        assert constant_f1(true, valid) == pytest.approx(max(f1))
        assert constant_precision(true, valid) == pytest.approx(max(precision))


def test_recall_is_the_mean_over_all_orders_of_equal_scores():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 3, size=6).astype(np.float32)
        relevant = rng.random(6) < 0.4
        relevant[rng.integers(6)] = True
        for k in (1, 2, 4, 6, 9):
            hits = []
            for order in itertools.permutations(range(6)):
                ranked = sorted(order, key=lambda i: -scores[i])  # stable: equal scores stay in the drawn order
                hits.append(relevant[ranked[:k]].any())
            found = recall_at(torch.from_numpy(scores)[None], torch.from_numpy(relevant)[None], k)
            assert found.item() == pytest.approx(np.mean(hits), abs=1e-9)
            assert found.dtype == torch.float64


def test_recall_of_a_constant_is_chance():
    relevant = torch.eye(50, dtype=torch.bool)
    assert recall_at(torch.zeros(50, 50), relevant, 5).tolist() == pytest.approx([0.1] * 50)

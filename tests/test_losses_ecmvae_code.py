"""What the public ECMVAE code computes, against literal loops over its description."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from avs_dist.gaussian import Gaussian
from avs_dist.losses import ecmvae_code, information, latent, segmentation

B, T, L = 2, 3, 4


def gaussian(*shape: int) -> Gaussian:
    return Gaussian(torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64))


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def normal_density(x: float, mean: float, deviation: float) -> float:
    return math.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))


def alone(value: Tensor) -> Tensor:
    """The sum over all ranks, where there is one."""
    return value


# ---- divergences


def test_kl_takes_the_exponential_of_the_log_variance_for_the_deviation():
    q, p = gaussian(B, T, L), gaussian(B, T, L)
    normals = [torch.distributions.Normal(g.mean, g.log_var.exp()) for g in (q, p)]
    want = torch.distributions.kl_divergence(*normals).sum(-1)
    torch.testing.assert_close(ecmvae_code.gaussian_kl(q, p), want)
    assert (want - latent.gaussian_kl(q, p)).abs().max() > 0.1
    values = leaves(*q, *p)
    assert torch.autograd.gradcheck(lambda *t: ecmvae_code.gaussian_kl(Gaussian(*t[:2]), Gaussian(*t[2:])), values)


def test_js_compares_elementwise_densities_at_different_points():
    q, p = gaussian(B * T, L), gaussian(B * T, L)
    noise_q, noise_p = torch.randn(2, B * T, L, dtype=torch.float64)
    got = ecmvae_code.js_divergence(q, p, noise_q, noise_p)
    assert got.shape == (B * T,)
    total = 0.0
    for n in range(B * T):
        for d in range(L):
            densities = []
            for g, noise in ((q, noise_q), (p, noise_p)):
                mean, deviation = g.mean[n, d].item(), math.exp(g.log_var[n, d].item() / 2)
                densities.append(normal_density(mean + deviation * noise[n, d].item(), mean, deviation))
            middle = sum(densities) / 2
            total += sum(f * math.log(f / middle) for f in densities) / 2
    # "batchmean": the sum over everything, divided by the frames
    assert got.mean().item() == pytest.approx(total / (B * T), rel=1e-10)


def test_js_is_neither_zero_for_equal_distributions_nor_bounded():
    q, noise = gaussian(50, L), torch.randn(2, 50, L, dtype=torch.float64)
    assert ecmvae_code.js_divergence(q, q, *noise).mean() > 0.01
    sharp = Gaussian(torch.zeros(1, L), torch.full((1, L), -8.0))
    wide = Gaussian(torch.zeros(1, L), torch.zeros(1, L))
    zero = torch.zeros(1, L)
    assert ecmvae_code.js_divergence(sharp, wide, zero, zero).item() > 10 * math.log(2)


def test_js_passes_no_gradient_through_its_samples():
    values = leaves(*gaussian(3, L), *gaussian(3, L))
    noise = torch.randn(2, 3, L, dtype=torch.float64)
    q, p = Gaussian(*values[:2]), Gaussian(*values[2:])
    points = [g.sample(n).detach() for g, n in zip((q, p), noise, strict=True)]
    normals = [torch.distributions.Normal(g.mean, (g.log_var / 2).exp()) for g in (q, p)]
    at = [normal.log_prob(point).exp() for normal, point in zip(normals, points, strict=True)]
    middle = (at[0] + at[1]) / 2
    want = sum((f * (f / middle).log()).sum() / 2 for f in at)
    got = ecmvae_code.js_divergence(q, p, *noise).sum()
    torch.testing.assert_close(got, want)
    for one, two in zip(torch.autograd.grad(got, values), torch.autograd.grad(want, values), strict=True):
        torch.testing.assert_close(one, two)
    assert torch.autograd.grad(ecmvae_code.js_divergence(q, p, *noise).sum(), values)[0].abs().max() > 1e-3


def test_js_stays_finite_where_densities_vanish():
    values = leaves(*(torch.zeros(1, L) for _ in range(4)))
    far = torch.full((1, L), 60.0)  # its density is not a float32
    loss = ecmvae_code.js_divergence(Gaussian(*values[:2]), Gaussian(*values[2:]), far, far / 60)
    for value in (loss, *torch.autograd.grad(loss.sum(), values)):
        assert torch.isfinite(value).all()


# ---- difference loss


def literal_difference(shared: Tensor, specific: list[Tensor]) -> float:
    """Rows [N,L] of all ranks."""

    def prepared(rows: Tensor) -> list[list[float]]:
        count, length = rows.shape
        mean = [sum(rows[i, d].item() for i in range(count)) / count for d in range(length)]
        centred = [[rows[i, d].item() - mean[d] for d in range(length)] for i in range(count)]
        return [[v / (math.hypot(*row) + 1e-6) for v in row] for row in centred]

    total, a, length = 0.0, prepared(shared), shared.shape[1]
    for other in specific:
        b = prepared(other)
        entries = [sum(x[i] * y[j] for x, y in zip(a, b, strict=True)) for i in range(length) for j in range(length)]
        total += sum(e * e for e in entries) / length**2
    return total


def test_difference_equals_a_literal_loop_over_the_rows_that_exist():
    shared, *specific = (torch.randn(B, T, L, dtype=torch.float64) for _ in range(3))
    valid = torch.tensor([[True, True, False], [True, True, True]])
    specific[1][0, 2] = math.nan  # a frame that does not exist
    got = ecmvae_code.difference(shared, specific, valid, alone)
    want = literal_difference(shared[valid], [code[valid] for code in specific])
    assert got.shape == ()
    assert got.item() == pytest.approx(want, rel=1e-10)
    # the pair of specific codes has no part
    one_by_one = [ecmvae_code.difference(shared, [code], valid, alone) for code in specific]
    torch.testing.assert_close(got, sum(one_by_one))


def test_difference_passes_no_gradient_through_the_norm_but_through_the_mean():
    shared, other = leaves(*(torch.randn(1, 5, L, dtype=torch.float64) for _ in range(2)))
    valid = torch.ones(1, 5, dtype=torch.bool)
    got = torch.autograd.grad(ecmvae_code.difference(shared, [other], valid, alone), [shared, other])
    fixed = [(c - c.mean(1, keepdim=True)).norm(dim=2, keepdim=True).detach() + 1e-6 for c in (shared, other)]
    a, b = ((c - c.mean(1, keepdim=True)) / norm for c, norm in zip((shared, other), fixed, strict=True))
    want = torch.autograd.grad((a[0].T @ b[0]).square().mean(), [shared, other])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one.sum(1), torch.zeros(1, L).double(), atol=1e-12, rtol=0)


def test_equal_rows_and_no_rows_have_no_difference():
    same = torch.ones(1, 3, L).requires_grad_()
    for valid in (torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        loss = ecmvae_code.difference(same, [same], valid, alone)
        assert loss.item() == 0
        assert torch.isfinite(torch.autograd.grad(loss, same)[0]).all()


class _ThreadSum:
    """Sums over ranks that are threads of this process; autograd's graph then spans all of them."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def __call__(self, rank: int, value: Tensor) -> Tensor:
        self.given[rank] = value
        self.barrier.wait(timeout=20)
        total = torch.stack(self.given).sum(0)
        self.barrier.wait(timeout=20)
        return total


def test_difference_is_that_of_the_global_batch_on_every_rank():
    codes = leaves(*(torch.randn(4, T, L, dtype=torch.float64) for _ in range(3)))
    valid = torch.rand(4, T) > 0.3
    valid[0] = False  # the first rank has no frame at all
    whole = ecmvae_code.difference(codes[0], codes[1:], valid, alone)
    parts, ranks = (slice(0, 1), slice(1, 2), slice(2, 4)), 3
    reduce = _ThreadSum(ranks)

    def of(rank: int) -> Tensor:
        mine = [code[parts[rank]] for code in codes]
        return ecmvae_code.difference(mine[0], mine[1:], valid[parts[rank]], lambda value: reduce(rank, value))

    with ThreadPoolExecutor(ranks) as pool:
        losses = list(pool.map(of, range(ranks)))
    want = torch.autograd.grad(whole, codes)
    for loss in losses:
        torch.testing.assert_close(loss, whole)
        for got, true in zip(torch.autograd.grad(loss, codes, retain_graph=True), want, strict=True):
            torch.testing.assert_close(got, true)


# ---- mutual information and segmentation


def test_log_likelihood_is_the_squared_error_without_the_log_variance():
    predicted, target = gaussian(B * T, L), torch.randn(B * T, L, dtype=torch.float64)
    got = ecmvae_code.log_likelihood(target, predicted)
    for n in range(B * T):
        rows = zip(target[n].tolist(), predicted.mean[n].tolist(), predicted.log_var[n].tolist(), strict=True)
        assert got[n].item() == pytest.approx(sum(-0.5 * (m - y) ** 2 / math.exp(v) for y, m, v in rows), rel=1e-10)
    # what is left out
    missing = -0.5 * (predicted.log_var + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(information.barber_agakov(target, predicted), got + missing)
    # more variance is always better
    log_var = predicted.log_var.clone().requires_grad_()
    assert (
        torch.autograd.grad(ecmvae_code.log_likelihood(target, Gaussian(predicted.mean, log_var)).sum(), log_var)[0] > 0
    ).all()
    values = leaves(target, *predicted)
    assert torch.autograd.gradcheck(lambda t, *g: ecmvae_code.log_likelihood(t, Gaussian(*g)), values)


def test_structure_loss_has_an_unweighted_smoothed_cross_entropy_and_a_weighted_iou():
    height, width = 6, 5
    logits = torch.randn(B, T, height, width, dtype=torch.float64) * 3
    masks = torch.randint(0, 3, (B, T, height, width))
    counted = torch.tensor([[True, False, True], [False, True, True]])
    total, count = ecmvae_code.structure_loss(logits, masks, counted)
    bce, iou, pixels = 0.0, 0.0, 0
    for b, t in counted.nonzero().tolist():
        on = (masks[b, t] > 0).double()
        inter = both = 0.0
        for y in range(height):
            for x in range(width):
                m, p = on[y, x].item(), 1 / (1 + math.exp(-logits[b, t, y, x].item()))
                smooth = (1 - 0.001) * m + 0.001 / 2
                bce -= smooth * math.log(p) + (1 - smooth) * math.log(1 - p)
                pixels += 1
                weight = 1 + 5 * abs(on.sum().item() / 31**2 - m)  # every window holds the whole frame
                inter += weight * p * m
                both += weight * (p + m)
        iou += 1 - (inter + 1) / (both - inter + 1)
    assert count.item() == 4
    assert total.item() / 4 == pytest.approx(bce / pixels + iou / 4, rel=1e-10)
    proper, _ = segmentation.structure_loss(logits, masks, counted)
    assert abs(proper.item() - total.item()) > 1e-3
    assert torch.autograd.gradcheck(lambda z: ecmvae_code.structure_loss(z, masks, counted)[0], leaves(logits))

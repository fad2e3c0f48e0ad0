"""The posterior-collapse monitor against plain numpy, and its independence of batches and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from untrained import small_model

from avs_dist.clip import Clip
from avs_dist.collapse import CollapseMonitor, CollapseReport
from avs_dist.config import Config, LatentConfig
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.systems import build_system
from avs_dist.systems.base import LatentCodes

CLIPS, T, L = 7, 5, 4


def gaussian(seed: int, spread: float = 1.0, offset: float = 0.0) -> Gaussian:
    """[CLIPS,T,L] in float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CLIPS, T, L)
    mean = offset + spread * torch.randn(shape, generator=generator)
    return Gaussian(mean, torch.randn(shape, generator=generator).clamp(-2, 2))


def make_codes() -> tuple[LatentCodes, Tensor]:
    """Codes "c" (Gaussian) and "s_v" (mixture) of clips of 2 to 5 seconds; what is not a frame holds nonsense."""
    q, p = gaussian(0), gaussian(1)
    mixture_q, mixture_p = Mixture((gaussian(2), gaussian(3))), Mixture((gaussian(4), gaussian(5)))
    lengths_B1 = torch.tensor([[2 + i % 4] for i in range(CLIPS)])
    valid_BT = torch.arange(T) < lengths_B1
    for each in (q, p, *mixture_q.experts, *mixture_p.experts):
        each.mean[~valid_BT] = torch.nan
    return LatentCodes({"c": p, "s_v": mixture_p}, {"c": q, "s_v": mixture_q}), valid_BT


def rows(codes: LatentCodes, index: slice) -> LatentCodes:
    """Codes of some of the clips."""

    def cut(each: Gaussian | Mixture) -> Gaussian | Mixture:
        if isinstance(each, Mixture):
            return Mixture(tuple(Gaussian(e.mean[index], e.log_var[index]) for e in each.experts))
        return Gaussian(each.mean[index], each.log_var[index])

    prior = {name: cut(each) for name, each in codes.prior.items()}
    return LatentCodes(prior, {name: cut(each) for name, each in codes.posterior.items()})


def monitored(batch: int, first: int = 0, step: int = 1) -> CollapseReport:
    """Batches of `batch` clips, of which this rank takes every `step`-th."""
    codes, valid_BT = make_codes()
    monitor = CollapseMonitor()
    for start in list(range(0, CLIPS, batch))[first::step]:
        index = slice(start, start + batch)
        monitor.update(rows(codes, index), valid_BT[index])
    return monitor.compute()


def frames(value_BTL: Tensor, valid_BT: Tensor) -> np.ndarray:
    return value_BTL[valid_BT].double().numpy()


def kl_NL(q: Gaussian, p: Gaussian, valid_BT: Tensor) -> np.ndarray:
    m_q, m_p = frames(q.mean, valid_BT), frames(p.mean, valid_BT)
    v_q, v_p = np.exp(frames(q.log_var, valid_BT)), np.exp(frames(p.log_var, valid_BT))
    return 0.5 * (np.log(v_p / v_q) + (v_q + (m_q - m_p) ** 2) / v_p - 1)


def test_equals_plain_means_and_variances():
    codes, valid_BT = make_codes()
    report = monitored(3)
    assert report.frames == int(valid_BT.sum()) < CLIPS * T
    q, p = codes.posterior["c"], codes.prior["c"]
    np.testing.assert_allclose(report.kl["c"], kl_NL(q, p, valid_BT).mean(0), rtol=1e-9)
    np.testing.assert_allclose(report.variance["c"], frames(q.mean, valid_BT).var(0), rtol=1e-9)

    pairs = zip(codes.posterior["s_v"].experts, codes.prior["s_v"].experts, strict=True)
    expected = np.mean([kl_NL(a, b, valid_BT) for a, b in pairs], axis=(0, 1))
    np.testing.assert_allclose(report.kl["s_v"], expected, rtol=1e-9)
    means = [frames(e.mean, valid_BT) for e in codes.posterior["s_v"].experts]
    np.testing.assert_allclose(report.variance["s_v"], np.mean(means, axis=0).var(0), rtol=1e-6)


def test_a_mixture_against_one_gaussian_compares_each_expert_with_it():
    a, b, p, valid_BT = gaussian(0), gaussian(1), gaussian(2), torch.ones(CLIPS, T, dtype=torch.bool)
    expected = (kl_NL(a, p, valid_BT) + kl_NL(b, p, valid_BT)).mean(0) / 2
    monitor = CollapseMonitor()
    monitor.update(LatentCodes({"c": p}, {"c": Mixture((a, b))}), valid_BT)
    np.testing.assert_allclose(monitor.compute().kl["c"], expected, rtol=1e-9)


def test_variance_survives_a_large_mean():
    """Naive float32 sums of squares would lose all of it, float64 ones half of the digits."""
    generator = torch.Generator().manual_seed(0)
    mean = 1e6 + 1e-2 * torch.randn(CLIPS, T, L, dtype=torch.float64, generator=generator)
    q = Gaussian(mean, torch.zeros_like(mean))
    monitor = CollapseMonitor()
    monitor.update(LatentCodes({"c": q}, {"c": q}), torch.ones(CLIPS, T, dtype=torch.bool))
    np.testing.assert_allclose(monitor.compute().variance["c"], mean.flatten(0, 1).numpy().var(0), rtol=1e-6)
    assert monitor.compute().kl["c"] == (0,) * L


@pytest.mark.parametrize("batch", [1, 2, CLIPS])
def test_batches_do_not_change_a_bit(batch):
    assert monitored(batch) == monitored(3)


def _rank_main(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for batch in (2, CLIPS):  # one batch of all clips leaves nothing to the second rank
        report = monitored(batch, rank, size)
        torch.save((report.frames, report.scalars(), dict(report.variance)), f"{out}.{rank}.{batch}")
    dist.destroy_process_group()


def test_ranks_do_not_change_a_bit(tmp_path: Path):
    expected = monitored(1)
    mp.spawn(_rank_main, (2, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for file in sorted(tmp_path.glob("out.*")):
        frames, scalars, variance = torch.load(file, weights_only=True)
        assert frames == expected.frames, file
        assert scalars == expected.scalars(), file
        assert variance == expected.variance, file
    assert len(list(tmp_path.glob("out.*"))) == 4


def test_a_collapsed_dimension_says_nothing():
    """Dimensions 0 and 2 follow the input, 1 and 3 do not: their posterior is the prior but for a trace."""
    active_L = torch.tensor([True, False, True, False])
    q = gaussian(0, spread=0.15)
    q = Gaussian(
        torch.where(active_L, q.mean, 0.01 * q.mean + 3), torch.where(active_L, -2.0, 0.0).expand(q.mean.shape)
    )
    p = Gaussian(torch.zeros_like(q.mean) + 3 * ~active_L, torch.zeros_like(q.mean))
    monitor = CollapseMonitor()
    monitor.update(LatentCodes({"c": p}, {"c": q}), torch.ones(CLIPS, T, dtype=torch.bool))
    report = monitor.compute()
    assert report.active_units == {"c": 2}
    scalars = report.scalars()
    assert list(scalars) == ["kl/c", "active_units/c", *(f"kl_per_dimension/c_0{i}" for i in range(L))]
    assert scalars["active_units/c"] == 2
    kl_L = [scalars[f"kl_per_dimension/c_0{i}"] for i in range(L)]
    assert min(kl_L[0], kl_L[2]) > 0.5 > 1e-3 > max(kl_L[1], kl_L[3])
    assert scalars["kl/c"] == pytest.approx(sum(kl_L))


def test_active_means_a_variance_above_one_hundredth():
    for variance, active in ((0.0099, 0), (0.0101, 1)):
        mean = variance**0.5 * torch.tensor([1.0, -1.0]).view(1, 2, 1)  # population variance, not n - 1
        q = Gaussian(mean, torch.zeros_like(mean))
        monitor = CollapseMonitor()
        monitor.update(LatentCodes({"c": q}, {"c": q}), torch.ones(1, 2, dtype=torch.bool))
        assert monitor.compute().active_units == {"c": active}


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no frames were counted"):
        CollapseMonitor().compute()
    codes, valid_BT = make_codes()
    autoencoder = CollapseMonitor()
    autoencoder.update(LatentCodes(codes.prior, {}), valid_BT)
    assert autoencoder.compute().scalars() == {}
    with pytest.raises(ValueError, match="code c: its posterior mean or KL is NaN"):
        CollapseMonitor().update(codes, torch.ones_like(valid_BT))


@pytest.mark.parametrize("joint", ["fused", "moe"])
def test_codes_of_ecmvae(joint):
    system = build_system(Config(model=small_model(system="ecmvae", latent=LatentConfig(dim=3, joint=joint))))
    valid_BT = torch.tensor([[True, True, True], [True, False, False]])
    shape = (2, 3)
    clip = Clip(
        torch.randn(*shape, 3, 64, 64) * valid_BT[..., None, None, None],
        torch.randn(*shape, 96, 64) * valid_BT[..., None, None],
        (torch.rand(*shape, 64, 64) < 0.5).byte(),
        valid_BT,
        valid_BT,
        ("a", "b"),
    )
    monitor = CollapseMonitor()
    monitor.update(system.latents(clip), clip.valid_BT)
    report = monitor.compute()
    assert report.frames == 4
    assert set(report.kl) == {"s_v", "s_a", "c"}
    assert all(len(kl_L) == 3 and min(kl_L) > 0 for kl_L in report.kl.values())

"""bf16 under every ZeRO stage: float32 masters and moments, float32 sums of gradients, and every step counted once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avs_dist import world
from avs_dist.clip import Clip
from avs_dist.config import Config, EngineConfig, OptimConfig, TrainConfig
from avs_dist.engine import Engine, stop
from avs_dist.optimizer_state import partitions
from avs_dist.systems.base import Prediction, System

MICRO, PARTS = 4, 4


class Layers(System):
    """Two layers on the sound."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        raise NotImplementedError

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        return {"mse": (self.layers(clip.mel_BTFM).float() - clip.masks_BTHW[..., :1, :1]).square().mean()}


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    yield world.start()
    stop()


def _clips() -> list[Clip]:
    draws, found = torch.Generator().manual_seed(1), []
    for _ in range(PARTS):
        mel = torch.randn(MICRO, 2, 96, 64, generator=draws)
        yes = torch.ones(MICRO, 2, dtype=torch.bool)
        masks = torch.randint(2, (MICRO, 2, 2, 2), generator=draws, dtype=torch.uint8)
        found.append(Clip(torch.zeros(MICRO, 2, 3, 2, 2), mel, masks, yes, yes, ("k",) * MICRO))
    return found


def _engine(stage: int, precision: str, device: torch.device, **optim: Any) -> Engine:
    config = Config(
        engine=EngineConfig(zero_stage=stage, precision=precision, grad_accumulation=PARTS),  # type: ignore[arg-type]
        train=TrainConfig(global_batch=MICRO * PARTS, max_steps=10),
        optim=OptimConfig(**{"lr": 1e-3, **optim}),
    )
    torch.manual_seed(0)
    return Engine(Layers(), config, device)


def _state(engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
    """The masters of the only rank, and what Adam remembers of them, each as one vector."""
    optimizer = engine._engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [p.master for p in partitions(engine.system, optimizer, 0)]
    states = [inner.state[master] for master in masters]
    kinds = {k: torch.cat([state[k].flatten().clone() for state in states]) for k in ("step", "exp_avg", "exp_avg_sq")}
    return torch.cat([master.detach().flatten().clone() for master in masters]), kinds


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_masters_and_moments_are_float32_and_count_every_step_once(stage: int, name: str, device: torch.device) -> None:
    engine = _engine(stage, "bf16", device, name=name, weight_decay=0.1)
    assert next(engine.system.parameters()).dtype == torch.bfloat16
    losses = [engine.train_step(_clips(), step)["mse"] for step in range(3)]
    masters, moments = _state(engine)
    assert {masters.dtype, *(value.dtype for value in moments.values())} == {torch.float32}
    assert set(moments["step"].tolist()) == {3.0}
    assert (masters.bfloat16().float() != masters).double().mean().item() > 0.9  # they hold more than bf16 can
    again = _engine(1, "bf16", device, name=name, weight_decay=0.1)
    # ZeRO 0 sums micro-batches in bf16
    near = 1e-3 if stage == 0 else 1e-6
    assert losses == pytest.approx([again.train_step(_clips(), step)["mse"] for step in range(3)], rel=near)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_are_summed_in_float32(stage: int, device: torch.device) -> None:
    engine = _engine(stage, "bf16", device)
    torch.manual_seed(0)
    twin, gradients = Layers().bfloat16(), []
    for clip in _clips():
        loss = twin.loss_terms(clip.to(device, torch.bfloat16), 0)["mse"] / PARTS
        gradients.append(torch.autograd.grad(loss, list(twin.parameters())))
    mean = torch.cat([torch.stack([g.float() for g in each]).sum(0).flatten() for each in zip(*gradients, strict=True)])
    engine.train_step(_clips(), 0)
    momentum = _state(engine)[1]["exp_avg"]
    torch.testing.assert_close(momentum[momentum != 0], 0.1 * mean[mean != 0], rtol=1e-5, atol=0.0)

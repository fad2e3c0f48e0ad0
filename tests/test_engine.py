"""The engine on a tiny system: derived settings, accumulation, schedule, NaN guard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from avs_dist import world
from avs_dist.clip import Clip
from avs_dist.config import Config, EngineConfig, OptimConfig, TrainConfig
from avs_dist.engine import Engine, deepspeed_config, stop
from avs_dist.optim import lr_factor
from avs_dist.systems.base import Prediction, System


class TinySystem(System):
    """One convolution; mean squared error to the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        return Prediction(self.conv(clip.frames_BTCHW.flatten(0, 1))[:, 0].unflatten(0, clip.valid_BT.shape).float())

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        return {"mse": (self.predict(clip).logits_BTHW - clip.masks_BTHW).square().mean()}


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    yield world.start()
    stop()


def _config(stage: int = 1, accumulation: int = 1, **optim: object) -> Config:
    return Config(
        engine=EngineConfig(zero_stage=stage, grad_accumulation=accumulation),  # type: ignore[arg-type]  # 0..3
        train=TrainConfig(global_batch=4, max_steps=10),
        optim=OptimConfig(**{"lr": 0.1, **optim}),  # type: ignore[arg-type]  # test values
    )


def _engine(config: Config, device: torch.device) -> Engine:
    torch.manual_seed(0)
    return Engine(TinySystem(), config, device)


def _clips(size: int, bad: bool = False) -> list[Clip]:
    frames = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    if bad:
        frames[0, 0, 0, 0, 0] = float("nan")
    yes = torch.ones(4, 2, dtype=torch.bool)
    masks = (frames.mean(2) > 0).to(torch.uint8)
    cuts = [slice(i, i + size) for i in range(0, 4, size)]
    return [Clip(frames[c], torch.zeros(size, 2, 96, 64), masks[c], yes[c], yes[c], ("k",) * size) for c in cuts]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulated_micro_batches_equal_one_batch(stage: int, device: torch.device) -> None:
    one = _engine(_config(stage), device)
    two = _engine(_config(stage, accumulation=2), device)
    for step in range(3):
        assert two.train_step(_clips(2), step) == pytest.approx(one.train_step(_clips(4), step), rel=1e-5)


def test_first_step_is_the_adam_step_computed_by_hand(device: torch.device) -> None:
    engine = _engine(_config(), device)
    torch.manual_seed(0)
    twin = TinySystem()
    twin.loss_terms(_clips(4)[0], 0)["mse"].backward()
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    engine.train_step(_clips(4), 0)
    for name, weight in engine.full_weights():
        grad = dict(twin.named_parameters())[name].grad
        assert grad is not None
        torch.testing.assert_close(weight, before[name] - 0.1 * grad / (grad.abs() + 1e-8))


@pytest.mark.parametrize("stage", [0, 1])  # ZeRO skips a step with NaN gradients by itself, stage 0 does not
@pytest.mark.parametrize("bad_micro_batch", [0, 1])
def test_nan_stops_the_run_before_the_weights_change(bad_micro_batch: int, stage: int, device: torch.device) -> None:
    engine = _engine(_config(stage, accumulation=2), device)
    before = dict(engine.full_weights())
    clips = _clips(2)
    clips[bad_micro_batch] = _clips(2, bad=True)[0]
    with pytest.raises(RuntimeError, match=r"step 5: loss is not finite.*optim\.lr"):
        engine.train_step(clips, 5)
    for name, weight in engine.full_weights():
        assert torch.equal(weight, before[name])


def test_schedule() -> None:
    config = OptimConfig(warmup_steps=4, schedule="cosine")
    factors = [lr_factor(s, 12, config) for s in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert lr_factor(100, 12, OptimConfig()) == 1.0


def test_deepspeed_settings_are_derived_and_batches_must_divide() -> None:
    settings = deepspeed_config(_config(3, accumulation=2, clip_norm=0.5))
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match=r"train\.global_batch.*4 cannot be divided by 3"):
        deepspeed_config(_config(accumulation=3))

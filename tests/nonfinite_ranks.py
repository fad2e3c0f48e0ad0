"""One of several ranks that train with steps that are not finite, and without those steps; run by test_nonfinite.

Prints one line of JSON for each case: what differs between the two, and what was told.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from unicode_batches import make_batch, small_config

from avs_dist import engine, world
from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.launch.train import parse_config
from avs_dist.nonfinite import NonFiniteError
from avs_dist.systems import build_system

# the gradient is spoilt behind this module, whose output is finite
SPOILT = {"unicode": "encoders.audio", "tpavi": "trunk.audio_encoder"}


def tpavi_config(*overrides: str) -> Config:
    return parse_config(["--config", "configs/demo.yaml", "--engine.grad_accumulation", "2", *overrides])


def unicode_batches(step: int, loud: bool) -> list[Any]:
    batch = make_batch(4)
    shift = 0.1 * step + world.rank()
    inputs = {name: x + shift for name, x in batch.inputs.items()}
    if loud:
        inputs["audio"] = inputs["audio"] * 1e30
    return [replace(batch, inputs=inputs, key=tuple(f"{key}-{world.rank()}-{step}" for key in batch.key))]


def tpavi_batches(step: int, loud: bool) -> list[Any]:
    """Two micro-batches, of which the first is the loud one."""
    draw = torch.Generator().manual_seed(10 * step + world.rank())
    yes, clips = torch.ones(2, 2, dtype=torch.bool), []
    for number in range(2):
        keys = tuple(f"clip{i}-{world.rank()}-{step}-{number}" for i in range(2))
        mel = torch.randn(2, 2, 96, 64, generator=draw) * (1e38 if loud and number == 0 else 1.0)
        frames = torch.randn(2, 2, 3, 32, 32, generator=draw)
        masks = (torch.rand(2, 2, 32, 32, generator=draw) > 0.5).to(torch.uint8)
        clips.append(Clip(frames, mel, masks, yes, yes, keys))
    return clips


def run(config: Config, batches: Any, steps: list[int], errors: list[NonFiniteError]) -> dict[str, Tensor]:
    """All that is left after these steps: 1 is loud on rank 1, in 2 a gradient of rank 1 is NaN."""
    torch.manual_seed(0)
    running = engine.Engine(build_system(config), config, torch.device("cpu"))
    spoils = False
    module = running.system.get_submodule(SPOILT[config.model.system])

    def spoil(_: Any, __: Any, output: Any) -> None:
        if spoils and world.rank() == 1:
            first = output if isinstance(output, Tensor) else next(iter(output))
            first.register_hook(lambda gradient: gradient * float("nan"))

    module.register_forward_hook(spoil)
    for step in steps:
        spoils = step == 2
        try:
            running.train_step(batches(step, loud=step == 1 and world.rank() == 1), step)
        except NonFiniteError as error:
            errors.append(error)
    weights = {name: tensor.clone() for name, tensor in running.full_weights()}
    return {**weights, **{f"optimizer {name}": tensor for name, tensor in running.optimizer_state().items()}}


def main() -> None:
    world.start(60.0)
    for name, precision, stage in (case.split("-") for case in sys.argv[1:]):
        make, batches = {"unicode": (small_config, unicode_batches), "tpavi": (tpavi_config, tpavi_batches)}[name]
        settings = (
            "--engine.precision",
            precision,
            "--engine.zero_stage",
            stage,
            "--engine.timeout_s",
            "60",
            "--train.global_batch",
            "8",
        )
        config = make(*settings)
        errors: list[NonFiniteError] = []
        with_faults = run(config, batches, [0, 1, 2, 3], errors)
        without = run(config, batches, [0, 3], unexpected := [])
        differ = [name for name, value in without.items() if not torch.equal(value, with_faults[name])]
        told = [{"step": e.step, "text": str(e), "faults": [f._asdict() for f in e.faults]} for e in errors]
        finite = all(bool(value.isfinite().all()) for value in without.values())
        found = {"compared": len(without), "differ": differ, "told": told, "finite": finite and not unexpected}
        print(json.dumps({"case": f"{name}-{precision}-{stage}", "rank": world.rank(), **found}), flush=True)
    world.barrier()
    engine.stop()


if __name__ == "__main__":
    main()

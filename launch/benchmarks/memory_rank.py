"""One rank of `bench memory`: python or a launcher runs this file, with a plan of cases.

The plan is JSON: {"out": folder, "cases": [{...}, ...]}. All cases run one after the other in one process group. Of
each, rank 0 leaves the figures in the folder and prints a line.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from avs_dist import world
from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.engine import Engine, stop
from avs_dist.launch.benchmarks.memory_state import Held, Watch, storages
from avs_dist.launch.benchmarks.ranks import planned
from avs_dist.launch.benchmarks.timing import PeakMemory
from avs_dist.launch.benchmarks.traffic import TrafficCounter
from avs_dist.launch.train import parse_config
from avs_dist.sequences import Sequences
from avs_dist.shards.files import write_text
from avs_dist.systems import build_system

DONE = "memory case done: "
TIMEOUT_S = 300.0  # a rank that waits longer for the others ends the launch
SECONDS = 5  # of a clip


@dataclass(frozen=True)
class Case:
    """A run of a few steps, of one clip a rank; its name has all of it.

    files: of settings, from left to right.
    size:  side of a frame in pixels.
    timed: steps whose time and peak memory are taken; of 0 the state is looked at, and what is sent is counted.
    """

    files: tuple[str, ...]
    ranks: int
    stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]
    offload: Literal["none", "optimizer"] = "none"
    activation_checkpointing: bool = False
    size: int = 64
    timed: int = 0

    @property
    def name(self) -> str:
        parts = [*(Path(file).stem for file in self.files), f"{self.ranks}ranks", f"zero{self.stage}", self.precision]
        parts += ["offload"] if self.offload != "none" else []
        parts += ["recompute"] if self.activation_checkpointing else []
        return "-".join([*parts, f"{self.size}px", *([f"{self.timed}timed"] if self.timed else [])])

    def config(self) -> Config:
        values = {
            "engine.zero_stage": self.stage,
            "engine.precision": self.precision,
            "engine.offload": self.offload,
            "engine.activation_checkpointing": str(self.activation_checkpointing).lower(),
            "train.global_batch": self.ranks,
            "model.backbone.weights": "none",
        }
        files = [word for file in self.files for word in ("--config", file)]
        return parse_config([*files, *(word for key, value in values.items() for word in (f"--{key}", str(value)))])


def main(plan: dict[str, Any]) -> None:
    device = world.start(TIMEOUT_S)
    try:
        for values in plan["cases"]:
            case = Case(**{**values, "files": tuple(values["files"])})
            found = _timed(case, device) if case.timed else _looked_at(case, device)
            if world.is_main():
                write_text(Path(plan["out"]) / f"{case.name}.json", json.dumps(found))
                print(f"{DONE}{case.name}", flush=True)
            world.barrier()
    finally:
        stop()


def _looked_at(case: Case, device: torch.device) -> dict[str, Any]:
    """The state before the second step, of the rank that holds most; what is sent in the third."""
    gc.collect()
    batches, before = random_batches(case), storages()
    engine = _engine(case, device)
    watch = Watch(_deepspeed(engine), before)
    engine.train_step(batches, 0)
    held: list[Held] = []
    _before_step(engine, lambda: held.append(watch.held()))
    engine.train_step(batches, 1)
    watch.stop()
    counter = TrafficCounter()
    with counter:
        engine.train_step(batches, 2)
    everywhere = [Held(*each) for each in world.gather_objects(tuple(held[0]))]
    fullest = max(everywhere, key=lambda each: each.state(case.stage))
    return {
        **_parameters(engine),
        "optimizer": type(_deepspeed(engine).optimizer).__name__,
        "held": fullest._asdict(),
        "sent": [row._asdict() for row in counter.sent()],
    }


def _before_step(engine: Engine, look: Callable[[], None]) -> None:
    """Once, between the backward pass and the step."""
    inner = _deepspeed(engine)
    step = inner.step

    def looking(*args: Any, **kwargs: Any) -> Any:
        look()
        inner.step = step
        return step(*args, **kwargs)

    inner.step = looking


def _timed(case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, and the most memory that the process takes in it beside what it holds between steps."""
    batches, engine = random_batches(case), _engine(case, device)
    engine.train_step(batches, 0)
    gc.collect()
    peak, seconds = PeakMemory(device.type), []
    for step in range(1, case.timed + 1):
        begin = time.perf_counter()
        engine.train_step(batches, step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    everywhere = world.gather_objects((peak.baseline_mib, peak.mib()))
    between, most = (max(figures) for figures in zip(*everywhere, strict=True))
    return {**_parameters(engine), "seconds": statistics.median(seconds), "between_mib": between, "peak_mib": most}


def _engine(case: Case, device: torch.device) -> Engine:
    config = case.config()
    torch.manual_seed(config.seed)
    return Engine(build_system(config, load_pretrained=False), config, device)


def _deepspeed(engine: Engine) -> Any:
    """The product itself has no reason to show it."""
    return engine._engine


def _parameters(engine: Engine) -> dict[str, int]:
    numbers = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in engine.system.parameters()]
    learning = sum(number for learns, number in numbers if learns)
    return {"parameters": learning, "frozen_parameters": sum(number for _, number in numbers) - learning}


def random_batches(case: Case) -> list[Clip] | list[Sequences]:
    """One random clip; another on each rank."""
    config = case.config()
    generator = torch.Generator().manual_seed(world.rank())
    exist_BT, key = torch.ones(1, SECONDS, dtype=torch.bool), (f"clip {world.rank()}",)
    if config.model.system == "unicode" and config.model.unicode.inputs == "features":
        shapes = config.model.unicode.shapes
        inputs = {m: torch.randn(1, SECONDS, *shape, generator=generator) for m, shape in shapes.items()}
        return [Sequences(inputs, dict.fromkeys(inputs, exist_BT), {}, key)]
    clip = Clip(
        frames_BTCHW=torch.randn(1, SECONDS, 3, case.size, case.size, generator=generator),
        mel_BTFM=torch.randn(1, SECONDS, 96, 64, generator=generator),
        masks_BTHW=(torch.rand(1, SECONDS, case.size, case.size, generator=generator) > 0.5).to(torch.uint8),
        labelled_BT=exist_BT,
        valid_BT=exist_BT,
        key=key,
    )
    return [clip]


if __name__ == "__main__":
    main(planned())

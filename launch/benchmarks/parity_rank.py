"""One rank of the short trainings of `bench parity`: python or a launcher runs this file, with a plan of cases.

The plan is JSON: {"out": folder, "steps": n, "shards": {"clips": ..., "sequences": ...}, "cases": [{...}, ...]}. All
cases run one after the other in one process group. Each leaves its records and weights in the folder, which says that
it has come to its end, and a line on stdout.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from avs_dist import world
from avs_dist.config import Config
from avs_dist.engine import Engine, stop
from avs_dist.launch.benchmarks.parity_cases import TIMEOUT_S, Case
from avs_dist.launch.benchmarks.ranks import planned
from avs_dist.loader import TrainBatches
from avs_dist.shards.files import write_text
from avs_dist.shards.index import ShardIndex
from avs_dist.systems import build_system
from avs_dist.tasks import build_task

DONE = "parity case done: "


def main(plan: dict[str, Any]) -> None:
    device = world.start(TIMEOUT_S)
    try:
        for values in plan["cases"]:
            case = Case(**values)
            _run(case, case.config(plan["steps"], plan["shards"]), Path(plan["out"]), device)
    finally:
        stop()


def _run(case: Case, config: Config, out: Path, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    task, index = build_task(config), ShardIndex.load(config.data.shards)
    system = build_system(config)
    if case.nudged:
        _nudge(system, torch.bfloat16 if case.precision == "bf16" else torch.float32)
    engine = Engine(system, config, device)
    _save_weights(engine, out / f"{case.name}.start.safetensors")
    losses = []
    for step, batches in enumerate(TrainBatches(config, index)):
        losses.append(engine.train_step([task.augment(batch, step) for batch in batches], step))
    _check_buffers(engine)
    metrics, codes = task.evaluate(engine)
    _save_weights(engine, out / f"{case.name}.safetensors")
    if world.is_main():
        found = {
            "engine": engine.describe(),
            "parameters": [name for name, _ in engine.system.named_parameters()],
            "losses": losses,
            "metrics": {**metrics, **{f"codes/{name}": value for name, value in codes.items()}},
        }
        write_text(out / f"{case.name}.json", json.dumps(found))
        print(f"{DONE}{case.name}", flush=True)
    world.barrier()


def _check_buffers(engine: Engine) -> None:
    """Codebook and running statistics are kept by every rank for itself, and must not drift.

    Raises:
        RuntimeError: they are not the same on all ranks, bit for bit.
    """
    buffers = dict(engine.system.named_buffers())
    hashes = {name: hashlib.sha256(buffer.cpu().numpy().tobytes()).hexdigest() for name, buffer in buffers.items()}
    if drifted := {name for each in world.gather_objects(hashes) for name in each if each[name] != hashes[name]}:
        raise RuntimeError(f"not the same on all ranks: {', '.join(sorted(drifted))}")


@torch.no_grad()
def _nudge(system: torch.nn.Module, dtype: torch.dtype) -> None:
    """Every weight one rounding up or down."""
    generator = torch.Generator().manual_seed(0)
    for parameter in system.parameters():
        sign = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1.0 + sign * torch.finfo(dtype).eps)


def _save_weights(engine: Engine, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in engine.full_weights()}
    if world.is_main():
        save_file(weights, path)


if __name__ == "__main__":
    main(planned())

"""One rank of the test of the memory switches: a few steps of each case, and what came out of them on stdout.

python or the deepspeed launcher runs this file with words like "resnet18:1:off:none", one for each case.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import torch
from deepspeed.runtime.zero import parameter_offload

from avs_dist import world
from avs_dist.engine import Engine, stop
from avs_dist.launch.benchmarks.memory_rank import Case, random_batches
from avs_dist.launch.train import parse_config
from avs_dist.systems import build_system

STEPS = 3
FOUND = "found: "


def run(word: str, device: torch.device) -> dict[str, object]:
    """Losses of each step, and the weights and running statistics after the last as sums of absolute values."""
    backbone, stage, checkpointing, offload = word.split(":")
    config = parse_config(
        ["--config", "configs/demo.yaml", "--model.backbone.name", backbone, "--engine.zero_stage", stage,
         "--engine.activation_checkpointing", checkpointing, "--engine.offload", offload,
         "--train.global_batch", str(world.world_size()), "--optim.warmup_steps", "0"]
    )  # fmt: skip
    torch.manual_seed(0)
    engine = Engine(build_system(config, load_pretrained=False), config, device)
    clips = random_batches(Case(("configs/demo.yaml",), world.world_size(), 0, "fp32"))
    within = len(parameter_offload.FWD_MODULE_STACK)
    losses = [engine.train_step(clips, step)["loss"] for step in range(STEPS)]
    left = len(parameter_offload.FWD_MODULE_STACK) - within  # modules that ZeRO 3 believes to be still running
    return {
        "losses": losses,
        "left": left,
        "weights": {name: float(w.double().abs().sum()) for name, w in engine.full_weights()},
    }


def main() -> None:
    device = world.start(120.0)
    try:
        for word in (word for word in sys.argv[1:] if not word.startswith("--local_rank")):
            found = run(word, device)
            if world.is_main():
                print(f"{FOUND}{json.dumps([word, found])}", flush=True)
    finally:
        stop()


if __name__ == "__main__":
    main()

"""One rank of a short Uni-Code training, for a launcher; what it found goes to the folder of its first argument.

Every rank trains, and tells the hashes of its buffers; then rank 0 alone encodes, which would hang if that needed the
others.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from avs_dist import engine, world
from avs_dist.launch.train import parse_config
from avs_dist.loader import TrainBatches
from avs_dist.shards.index import ShardIndex
from avs_dist.systems import build_system


def main(out: Path, arguments: list[str]) -> None:
    device = world.start()
    config = parse_config(arguments)
    torch.manual_seed(config.seed)
    running = engine.Engine(build_system(config), config, device)
    index = ShardIndex.load(config.data.shards)
    losses, batches = [], []
    for step, batches in enumerate(TrainBatches(config, index)):
        losses.append(running.train_step(batches, step))
    hashes = world.gather_objects({name: _hash(buffer) for name, buffer in running.system.named_buffers()})
    if world.is_main():
        if config.engine.zero_stage < 3:  # which gathers the weights of what is called
            running.encode(batches[0])
        assert running.describe().startswith("engine=DeepSpeedEngine")
        found = {"losses": losses, "hashes": hashes, "engine": running.describe()}
        (out / "found.json").write_text(json.dumps(found))
    world.barrier()
    engine.stop()


def _hash(buffer: torch.Tensor) -> str:
    return hashlib.sha256(buffer.detach().cpu().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(Path(words[0]), words[1:])

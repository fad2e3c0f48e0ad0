"""The command under torchrun trains as in one process; tests/test_parity.py compares systems, ZeRO stages and ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10


def _train(launcher: list[str], shards: Path, out_dir: Path, *overrides: str) -> tuple[str, list[float]]:
    """What the run printed, and its losses: the sums, and all their terms in the order of the steps."""
    command = [
        *launcher, "launch/train.py", "--config", "configs/demo.yaml", "--data.shards", str(shards),
        "--data.workers", "0", "--train.max_steps", str(STEPS), "--train.log_every", "1", "--train.eval_every", "0",
        "--train.out_dir", str(out_dir), *overrides,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    other = ("phase", "step", "lr", "seconds_per_step")
    return done.stdout, [v for r in records if r["phase"] == "train" for k, v in r.items() if k not in other]


@pytest.mark.slow
def test_torchrun_with_accumulation_trains_as_one_process_with_accumulation(ms3_shards: Path, tmp_path: Path) -> None:
    overrides = ("--engine.grad_accumulation", "2", "--engine.zero_stage", "2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    stdout, two = _train(torchrun, ms3_shards, tmp_path / "two", *overrides)
    assert "engine=DeepSpeedEngine zero_stage=2 world_size=2 device=cpu precision=fp32" in stdout
    stdout, one = _train([sys.executable], ms3_shards, tmp_path / "one", *overrides)
    assert "engine=DeepSpeedEngine zero_stage=2 world_size=1 device=cpu precision=fp32 kernels=rank_t" in stdout
    assert len(one) == 2 * STEPS  # the sum and its only term
    assert two == pytest.approx(one, rel=1e-4)

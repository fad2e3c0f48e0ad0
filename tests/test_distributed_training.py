"""The real launcher, the real engine, two ranks: every ZeRO stage trains exactly as one process does."""

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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(launcher: list[str], shards: Path, out_dir: Path, *overrides: str) -> tuple[str, list[float]]:
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
    return done.stdout, [r["loss"] for r in records if r["phase"] == "train"]


@pytest.fixture(scope="module")
def one_process(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    stdout, losses = _train([sys.executable], ms3_shards, tmp_path_factory.mktemp("run") / "one")
    assert "engine=DeepSpeedEngine zero_stage=1 world_size=1 device=cpu precision=fp32 kernels=rank_t" in stdout
    assert len(losses) == STEPS
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process(stage: int, ms3_shards: Path, one_process: list[float], tmp_path: Path) -> None:
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(_free_port())]
    stdout, losses = _train(launcher, ms3_shards, tmp_path / "two", "--engine.zero_stage", str(stage))
    assert f"engine=DeepSpeedEngine zero_stage={stage} world_size=2 device=cpu precision=fp32" in stdout
    assert losses == pytest.approx(one_process, rel=1e-4)


@pytest.mark.slow
def test_torchrun_with_accumulation_trains_as_one_process_with_accumulation(ms3_shards: Path, tmp_path: Path) -> None:
    overrides = ("--engine.grad_accumulation", "2", "--engine.zero_stage", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    _, two = _train([*torchrun, str(_free_port())], ms3_shards, tmp_path / "two", *overrides)
    _, one = _train([sys.executable], ms3_shards, tmp_path / "one", *overrides)
    assert two == pytest.approx(one, rel=1e-4)

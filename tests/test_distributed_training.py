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
ECMVAE = "configs/demo_ecmvae.yaml"
DIFFUSION = "configs/demo_diffusion.yaml"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(
    launcher: list[str], shards: Path, out_dir: Path, *overrides: str, config: str = "configs/demo.yaml"
) -> tuple[str, list[float]]:
    """What the run printed, and its losses: the sums, and all their terms in the order of the steps."""
    command = [
        *launcher, "launch/train.py", "--config", "configs/demo.yaml", "--config", config, "--data.shards", str(shards),
        "--data.workers", "0", "--train.max_steps", str(STEPS), "--train.log_every", "1", "--train.eval_every", "0",
        "--train.out_dir", str(out_dir), *overrides,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    other = ("lr", "seconds_per_step")
    return done.stdout, [v for r in _records(out_dir, "train") for k, v in r.items() if k not in other]


def _records(out_dir: Path, phase: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("phase", "step")} for r in records if r["phase"] == phase]


@pytest.fixture(scope="module")
def one_process(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    stdout, losses = _train([sys.executable], ms3_shards, tmp_path_factory.mktemp("run") / "one")
    assert "engine=DeepSpeedEngine zero_stage=1 world_size=1 device=cpu precision=fp32 kernels=rank_t" in stdout
    assert len(losses) == 2 * STEPS  # the sum and its only term
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


@pytest.mark.slow
def test_ecmvae_trains_on_two_ranks_as_on_one(ms3_shards: Path, tmp_path: Path) -> None:
    """All draws (codes, noise, mirrored clips) and all batch statistics are those of the global batch."""
    overrides = ("--engine.zero_stage", "2", "--data.mirror", "0.5", "--loss.avm", "ms3_kl", "--train.eval_every", "5")
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(_free_port())]
    stdout, two = _train(launcher, ms3_shards, tmp_path / "two", *overrides, config=ECMVAE)
    assert "zero_stage=2 world_size=2" in stdout
    _, one = _train([sys.executable], ms3_shards, tmp_path / "one", *overrides, config=ECMVAE)
    assert len(one) == 8 * STEPS
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    codes = [_records(tmp_path / run, "codes") for run in ("one", "two")]
    assert len(codes[0]) == 2
    for of_one, of_two in zip(*codes, strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3, abs=1e-5)  # nats; a collapsed dimension is all rounding


@pytest.mark.slow
def test_latent_diffusion_trains_on_two_ranks_as_on_one(ms3_shards: Path, tmp_path: Path) -> None:
    """Also under ZeRO-3, where the sampling kernel gets gathered weights; negatives are those of the global batch."""
    overrides = ("--engine.zero_stage", "3", "--model.diffusion.eta", "0.5", "--train.eval_every", "5")
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(_free_port())]
    stdout, two = _train(launcher, ms3_shards, tmp_path / "two", *overrides, config=DIFFUSION)
    assert "zero_stage=3 world_size=2" in stdout
    _, one = _train([sys.executable], ms3_shards, tmp_path / "one", *overrides, config=DIFFUSION)
    assert len(one) == 7 * STEPS  # the sum, three terms, and the scale of the codes and both scores
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    scores = [_records(tmp_path / run, "eval") for run in ("one", "two")]
    assert len(scores[0]) == 2
    for of_one, of_two in zip(*scores, strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3)

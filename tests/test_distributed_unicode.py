"""Uni-Code on 1, 2 and 4 ranks under the real launcher: one codebook, and the same as that of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
SETTINGS = (
    *("--config", "configs/demo_unicode.yaml", "--data.workers", "0", "--model.unicode.dropout", "0"),
    *("--model.unicode.codebook.num_codes", "32", "--model.unicode.codebook.reset_after", "6"),
    *("--train.max_steps", str(STEPS), "--train.global_batch", "16", "--optim.lr", "4e-4"),
)


class Run(NamedTuple):
    losses: list[dict[str, float]]
    hashes: list[dict[str, str]]  # of the buffers of each rank
    engine: str
    weights: dict[str, Tensor]


def _run(ranks: int, shards: Path, out: Path, *overrides: str) -> Run:
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port] if ranks > 1 else [sys.executable]
    command = [*launcher, "tests/unicode_ranks.py", str(out), *SETTINGS, "--data.shards", str(shards), *overrides]
    env: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((out / "found.json").read_text())
    return Run(**found, weights=load_file(out / "weights.safetensors"))


@pytest.fixture(scope="module")
def one_process(cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = _run(1, cmg_shards, tmp_path_factory.mktemp("one") / "run")
    assert "world_size=1" in run.engine
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (4, 1)])
def test_ranks_share_one_codebook_and_train_as_one_process(ranks, stage, cmg_shards, one_process, tmp_path):
    several = _run(ranks, cmg_shards, tmp_path / "run", "--engine.zero_stage", str(stage))
    assert f"zero_stage={stage} world_size={ranks}" in several.engine
    assert len(several.hashes) == ranks
    assert all(hashes == several.hashes[0] for hashes in several.hashes)  # bit for bit
    assert {"codebook.codes", "codebook.count", "codebook.sum", "codebook.idle"} <= set(several.hashes[0])
    for theirs, ours in zip(several.losses, one_process.losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    assert one_process.weights["codebook.updates"] == STEPS
    for name, value in one_process.weights.items():
        if name.startswith("codebook."):
            difference = (several.weights[name].double() - value.double()).abs().max().item()
            assert difference <= 1e-5 * max(1.0, value.abs().max().item()), (name, difference)


@pytest.mark.slow
def test_ranks_with_the_sampled_estimate_and_the_public_update(cmg_shards, tmp_path):
    overrides = (
        *("--loss.unicode.club_estimate", "sampled", "--model.unicode.codebook.update", "sequential"),
        *("--model.unicode.codebook.teacher", "time_aligned", "--loss.unicode.align", "transport"),
    )
    one = _run(1, cmg_shards, tmp_path / "one", *overrides)
    two = _run(2, cmg_shards, tmp_path / "two", *overrides)
    assert two.hashes[0] == two.hashes[1]
    for theirs, ours in zip(two.losses, one.losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-4)

"""Variants of Uni-Code on two ranks as in one process, and a rank that encodes alone; the rest is in test_parity.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
SETTINGS = (
    *("--config", "configs/demo_unicode.yaml", "--data.workers", "0"),
    *("--model.unicode.codebook.num_codes", "32", "--model.unicode.codebook.reset_after", "6"),
    *("--train.max_steps", str(STEPS), "--train.global_batch", "16", "--optim.lr", "4e-4"),
)


class Run(NamedTuple):
    losses: list[dict[str, float]]
    hashes: list[dict[str, str]]  # of the buffers of each rank
    engine: str


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
    return Run(**json.loads((out / "found.json").read_text()))


@pytest.mark.slow
def test_ranks_with_the_sampled_estimate_and_the_public_update(cmg_shards, tmp_path):
    overrides = (
        *("--loss.unicode.club_estimate", "sampled", "--model.unicode.codebook.update", "sequential"),
        *("--model.unicode.codebook.teacher", "time_aligned", "--loss.unicode.align", "transport"),
    )
    one = _run(1, cmg_shards, tmp_path / "one", *overrides)
    two = _run(2, cmg_shards, tmp_path / "two", *overrides)
    assert two.hashes[0] == two.hashes[1]  # bit for bit
    assert {"codebook.codes", "codebook.count", "codebook.sum", "codebook.idle"} <= set(two.hashes[0])
    for theirs, ours in zip(two.losses, one.losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-4)

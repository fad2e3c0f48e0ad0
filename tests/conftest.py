"""Fixtures shared by the tests: one thread per process, a seed, and small shards made by the real commands."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two ranks run side by side in some tests

import pytest
import torch

from avs_dist.launch import shards, synth

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ms3_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic MS3 clips of 64 x 64 as media files."""
    out = tmp_path_factory.mktemp("clips")
    assert synth.main(["--out", str(out), "--setting", "ms3", "--clips", "20", "--seed", "3", "--size", "64"]) == 0
    return out


@pytest.fixture(scope="session")
def ms3_shards(ms3_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards built from `ms3_clips`."""
    out = tmp_path_factory.mktemp("shards")
    source = ["build", "--source", "avsbench-ms3", "--root", str(ms3_clips), "--out", str(out), "--size", "64"]
    assert shards.main(source) == 0
    return out

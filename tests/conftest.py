"""Fixtures shared by the tests: one thread per process, a seed, and small shards made by the real commands.

On a bare GPU host (torch, triton, numpy and pytest only) nothing but the kernel tests, test_kernel_*, is collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two ranks run side by side in some tests

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: without a GPU the kernels are interpreted

ROOT = Path(__file__).resolve().parents[1]
ABSENT = [name for name in ("jsonargparse", "webdataset", "deepspeed") if importlib.util.find_spec(name) is None]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    other = collection_path.suffix == ".py" and not collection_path.name.startswith("test_kernel_")
    return True if ABSENT and other else None


def pytest_report_header() -> str | None:
    return f"not installed: {', '.join(ABSENT)}; only the kernel tests are collected" if ABSENT else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers), so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def ordered_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted matrix products sum in one order everywhere, as a GPU's tensor cores do.

    The interpreter takes BLAS, which on some CPUs rounds equal rows or columns differently by their place.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = np.zeros_like(d.data)
        for left, right in zip(a.data.T.astype(total.dtype), b.data.astype(total.dtype), strict=True):
            total += left[:, None] * right
        return TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ms3_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic MS3 clips of 64 x 64 as media files."""
    from avs_dist.launch import synth

    out = tmp_path_factory.mktemp("clips")
    assert synth.main(["--out", str(out), "--setting", "ms3", "--clips", "20", "--seed", "3", "--size", "64"]) == 0
    return out


@pytest.fixture(scope="session")
def ms3_shards(ms3_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards built from `ms3_clips`."""
    from avs_dist.launch import shards

    out = tmp_path_factory.mktemp("shards")
    source = ["build", "--source", "avsbench-ms3", "--root", str(ms3_clips), "--out", str(out), "--size", "64"]
    assert shards.main(source) == 0
    return out


@pytest.fixture(scope="session")
def cmg_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of features of 80 synthetic cross-modal sequences."""
    from avs_dist.launch import shards, synth

    clips, out = tmp_path_factory.mktemp("cmg"), tmp_path_factory.mktemp("cmg_shards")
    assert synth.main(["--out", str(clips), "--setting", "cmg", "--clips", "80", "--seed", "3"]) == 0
    source = ["build", "--source", "vggsound-avel", "--root", str(clips / "VGGSound-AVEL"), "--out", str(out)]
    assert shards.main(source) == 0
    return out

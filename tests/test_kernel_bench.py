"""The benchmark compares before it times, survives what it measures, and its very script runs on a bare host."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from avs_dist.kernels import codebook, runtime, tpavi
from avs_dist.launch import bench
from avs_dist.launch.benchmarks import ceilings, ddim, fscore, report, timing
from avs_dist.launch.benchmarks.measure import measure, relative_error
from avs_dist.launch.benchmarks.problem import Case
from avs_dist.launch.benchmarks.registry import OPS
from avs_dist.launch.benchmarks.workers import Worker
from avs_dist.launch.cli import run

ROOT = Path(__file__).resolve().parents[1]

# what a bare GPU host does not have: everything of setup.py but torch, triton and numpy
ABSENT = "jsonargparse docstring_parser yaml tqdm webdataset deepspeed accelerate transformers decord av PIL timm"
ABSENT += " torchvision torchaudio safetensors tensorboard matplotlib"
BARE = f"""
import sys
from importlib.machinery import PathFinder

class BareFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT.split()!r} else PathFinder.find_spec(name, path, target)

finders = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.meta_path[:] = [BareFinder if finder is PathFinder else finder for finder in finders]
"""


def tiny(op: str, implementation: str = "ours") -> Case:
    return Case(op, OPS[op].sizes("cpu", True)[0], "float32", implementation, "cpu", repeats=2, tiny=True)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Environment of a host without our dependencies, and without avs_dist installed."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "AVS_KERNELS")}
    return environment | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.slow
def test_the_script_runs_from_a_plain_checkout_on_a_bare_host(bare, tmp_path):
    """All ops and implementations, tiny, through the kernels (interpreted without a GPU)."""
    for name in ("jsonargparse", "avs_dist"):
        without = subprocess.run([sys.executable, "-c", f"import {name}"], env=bare, cwd=tmp_path, capture_output=True)
        assert b"ModuleNotFoundError" in without.stderr, f"{name} is there: this is no bare host"
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), "kernels", "--tiny", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--json", "all.json", "--markdown", "all.md"], env=bare, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    assert {(row["op"], row["implementation"]) for row in found["rows"]} == {
        (op.name, name) for op in OPS.values() for name in op.implementations
    }
    for row in found["rows"]:
        assert row["error"] < 0.02, row
        for figures in row["modes"].values():
            assert 0 < figures["wall_us"]["p20"] <= figures["wall_us"]["p50"] <= figures["wall_us"]["p80"]
    assert set(next(row for row in found["rows"] if row["op"] == "tpavi")["modes"]) == {"forward", "forward+backward"}
    table = (tmp_path / "all.md").read_text()
    assert table in done.stdout
    for fact in (torch.__version__, "commit", "date", "command: python launch/bench.py kernels --tiny"):
        assert fact in table
    if not torch.cuda.is_available():
        assert found["rows"][0]["device"] == "cpu"
        assert "graph_us" not in json.dumps(found)


def other_decay(update):
    return lambda state, observed, **settings: update(state, observed, **{**settings, "decay": 0.9})


@pytest.mark.parametrize(
    ("op", "module", "name", "broken"),
    [
        ("tpavi", tpavi, "tpavi", lambda right: lambda *args: (right(*args)[0] * 1.1, None)),
        ("ddim", ddim, "ddim_sample", lambda right: lambda *args: right(*args) * float("nan")),
        ("codebook", codebook, "codebook_update", other_decay),
        ("fscore", fscore, "f_curves", lambda right: lambda *args: right(*args) + 1e-4),
    ],
)
def test_a_wrong_op_is_refused_not_timed(op, module, name, broken, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)  # the torch forms do for this
    assert "modes" in measure(tiny(op))
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    found = measure(tiny(op))
    assert "modes" not in found
    assert re.fullmatch(rf"{op} ours .*float32 is wrong: relative error .*, allowed .*", found["failed"])


def always_wrong(case: Case) -> dict:
    return {"failed": "is wrong"} if case.implementation == "ours" else {"skipped": "not today"}


def test_a_wrong_op_is_an_error_of_the_command_after_the_others_were_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", always_wrong)
    path = tmp_path / "rows.json"
    assert run("bench", ["fscore", "--tiny", "--device", "cpu", "--json", str(path)]) == 1
    assert "fscore ours frames=2 hw=6 float32: is wrong" in capsys.readouterr().err
    assert [row.get("skipped") for row in json.loads(path.read_text())["rows"]] == ["not today", None]


def test_relative_error_is_the_worst_of_all_tensors_and_sees_nan():
    exact = [torch.full((100,), 10.0), torch.full((4,), 1e-3)]
    assert relative_error(exact, exact) == 0
    assert relative_error([exact[0] * 1.01, exact[1]], exact) == pytest.approx(0.01, rel=1e-4)
    assert relative_error([exact[0], exact[1] + 0.5], exact) == pytest.approx(0.5, rel=1e-4)  # small values: absolute
    assert math.isnan(relative_error([exact[0], exact[1] * math.nan], exact))
    with pytest.raises(ValueError, match="longer"):
        relative_error(exact[:1], exact)


def test_a_worker_survives_what_it_measures():
    worker = Worker(fresh=False)
    try:
        first = worker.call(os.getpid, limit_s=60)
        assert first != os.getpid()
        assert worker.call(os.getpid, limit_s=60) == first
        started = time.monotonic()
        assert worker.call(time.sleep, 60, limit_s=0.2) == {"skipped": "took more than 0.2 s"}
        assert time.monotonic() - started < 20
        assert worker.call(os.abort, limit_s=60) == {"failed": "crashed (exit code -6)"}
        assert worker.call(int, "x", limit_s=60)["failed"].startswith("ValueError: invalid literal")
        assert worker.call(os.getpid, limit_s=60) != first
    finally:
        worker.stop()


def test_each_case_on_a_cpu_has_a_process_of_its_own():
    worker = Worker(fresh=True)
    try:
        assert worker.call(os.getpid, limit_s=60) != worker.call(os.getpid, limit_s=60)
    finally:
        worker.stop()


def test_quantiles_are_in_microseconds():
    assert timing.quantiles([0.001 * n for n in range(11)]) == pytest.approx((2000, 5000, 8000))
    assert timing.quantiles([0.002]) == (2000, 2000, 2000)


def test_short_calls_are_repeated_and_long_ones_are_not(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "PATIENCE", 0.05)
    timing.wall(lambda: calls.append(0) or calls, "cpu", least_repeats=5, least_seconds=0.02)
    assert len(calls) == timing.MOST_REPEATS
    calls.clear()
    timing.wall(lambda: calls.append(time.sleep(0.03)) or calls, "cpu", least_repeats=5)
    assert len(calls) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_a_temporary_and_not_what_was_there_before():
    there_before = torch.ones(32 << 20)
    meter = timing.PeakMemory("cpu")
    torch.ones(16 << 20).add_(1)
    assert 60 < meter.mib() < 90
    assert timing.PeakMemory("cpu").mib() < 10
    assert len(there_before)


def result(graph: float | None, wall: float) -> dict:
    def spread(value: float) -> dict:
        return {"p20": value, "p50": value, "p80": value}

    figures = {"wall_us": spread(wall), "peak_mib": 3.0, "work": {"amount": 8e6, "ceiling": "copy"}}
    return {"error": 1e-3, "modes": {"forward": figures | ({"graph_us": spread(graph)} if graph else {})}}


def test_the_table_compares_like_with_like_and_shows_losses():
    sizes = OPS["tpavi"].sizes("cuda", False)
    rows = [
        (Case("tpavi", sizes[0], "float32", "literal", "cuda"), result(None, 200.0)),
        (Case("tpavi", sizes[0], "float32", "torch", "cuda"), result(5.0, 80.0)),
        (Case("tpavi", sizes[0], "float32", "ours", "cuda"), {**result(10.0, 50.0), "auto": {"tpavi": "torch"}}),
        (Case("tpavi", sizes[1], "float32", "literal", "cuda"), {"skipped": "needs about 900 GiB"}),
        (Case("tpavi", sizes[1], "float32", "ours", "cuda"), result(10.0, 50.0)),
    ]
    table = report.markdown({"device": "some", "cuda": "13"}, {"copy": 4000.0}, rows)
    first, second = (line for line in table.splitlines() if line.startswith("| hw=7"))
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    # literal 200 against wall 50; torch 5 against graph 10; 8e6 bytes in 10 us = 800 GB/s
    assert cells[1:9] == ["200", "5 / 80", "10 / 50", "10-10", "800 GB/s", "20% of copy", "4x", "**0.50x**"]
    assert "| - | 10 / 50 |" in second
    assert "needs about 900 GiB" in table
    assert "auto takes torch for tpavi at hw=7 B=4 T=5 C=256 float32" in table


def test_ceilings_are_rates_of_this_device():
    rates = ceilings.measure("cpu", tiny=True)
    assert set(rates) == {"copy", "float32"}
    assert all(rate > 0 for rate in rates.values())
    assert ceilings.rate(1e9, 1e6, "copy") == 1.0  # a gigabyte in a second
    assert ceilings.rate(1e12, 1e6, "float32") == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tpavi --size hw=3 K=2", r"--size K=\.\.\.: tpavi has hw, B, T, C"),
        ("tpavi --size hw=0", "expected NAME=N with N at least 1"),
        ("kernels --size hw=3", "--size needs one op"),
        ("ddim --implementations fast", "--implementations fast: ddim has .*scheduler"),
        ("tpavi --device cuda", "torch sees no GPU"),
        ("tpavi --repeat 3", "nearest known key: repeats"),
        ("tpavy", "invalid choice: 'tpavy'"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    try:
        code = run("bench", words.split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(message, said)
    assert said.count("\n") == 1


def test_sizes_of_the_command_line_complete_those_of_the_op(tmp_path):
    words = ["tpavi", "--tiny", "--device", "cpu", "--implementations", "torch", "--repeats", "1"]
    path = tmp_path / "rows.json"
    assert run("bench", [*words, "--size", "hw=2", "--size", "hw=4", "B=1", "--json", str(path)]) == 0
    sizes = [row["size"] for row in json.loads(path.read_text())["rows"]]
    assert sizes == [{"hw": 2, "B": 2, "T": 3, "C": 20}, {"hw": 4, "B": 1, "T": 3, "C": 20}]


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["tpavi", "ddim", "codebook"])
def test_every_implementation_that_can_be_captured_is(op):
    for name in OPS[op].implementations:
        case = Case(op, OPS[op].sizes("cuda", True)[0], "float32", name, "cuda", repeats=3, tiny=True)
        problem = OPS[op].prepare(case)
        for mode, figures in measure(case)["modes"].items():
            assert "graph_failed" not in figures, f"{case} {mode}"
            assert ("graph_us" in figures) == problem.capturable

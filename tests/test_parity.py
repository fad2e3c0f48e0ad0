"""Several ranks train as one process, to the same weights, codebook and metrics, under the real launcher.

The cases are those of `avs-dist bench parity`, which has the whole table.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from avs_dist.launch import bench
from avs_dist.launch.benchmarks.parity import Trainings, exit_code
from avs_dist.launch.benchmarks.parity_cases import SYSTEMS, Case, table
from avs_dist.launch.benchmarks.parity_compare import Difference, Found, compare, markdown
from avs_dist.launch.cli import run

TOLERANCE = 1e-4
CASES = [
    *(Case("tpavi", stage, 2) for stage in (0, 1, 2, 3)),
    Case("ecmvae", 2, 2),
    Case("diffusion", 3, 2),
    Case("unicode", 3, 2),
    Case("separable", 3, 2, accumulation=2),
    Case("separable", 1, 1, accumulation=4),
]


@pytest.fixture(scope="module")
def outcomes(
    ms3_shards: Path, cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[Case, Difference | str]:
    """One launch for each number of ranks."""
    shards = {"clips": str(ms3_shards), "sequences": str(cmg_shards)}
    trainings = Trainings(tmp_path_factory.mktemp("parity"), steps=8, shards=shards, limit_s=500.0)  # type: ignore[arg-type]
    trainings.run(list(dict.fromkeys([*(case.reference for case in CASES), *CASES])))
    return {case: trainings.outcome(case) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_weights_codebook_and_metrics_are_those_of_one_process(
    case: Case, outcomes: Mapping[Case, Difference | str]
) -> None:
    found = outcomes[case]
    assert not isinstance(found, str), found
    assert found.largest < TOLERANCE, found
    assert found.of_update < 0.01, found  # of weights that have hardly moved the difference says little
    assert found.worst["losses"], "nothing was compared"


@pytest.mark.slow
def test_command_prints_the_table_and_tells_what_is_apart(
    cmg_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parity", "--systems", "unicode", "--stages", "1", "--ranks", "1", "--accumulations", "--steps", "2"]
    words += ["--sequences", str(cmg_shards), "--clips", "nowhere", "--json", str(tmp_path / "parity.json")]
    assert run("bench", [*words, "--tolerance", "1e-30"]) in (0, 1)  # one rank may well agree bit for bit
    told = capsys.readouterr().out
    assert "| unicode | 0 | 1 | 1 |" in told
    assert "control |" in told
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row["nudged"] for row in rows] == [True, False]
    assert rows[0]["parameters"] > 0  # the control is another training
    assert rows[1]["losses"] < 1e-6


def test_table_has_every_cell_and_no_reference() -> None:
    cases = table(list(SYSTEMS), [0, 1, 2, 3], [1, 2, 4], [], "fp32")
    plain = [case for case in cases if not case.nudged]
    assert len(plain) == len(SYSTEMS) * (4 * 3 - 1)
    assert len({case.name for case in cases}) == len(cases) == len(plain) + len(SYSTEMS)
    assert all(case.reference not in cases for case in cases)
    summed = table([], [1], [1, 2, 4], [1, 2, 4], "bf16")
    assert {(case.ranks, case.accumulation) for case in summed} >= {(1, 4), (2, 2), (4, 2)}
    assert (4, 4) not in {(case.ranks, case.accumulation) for case in summed}  # a batch of 8


def _doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _found(**changes: object) -> Found:
    start = {"w": _doubles(0.0, 0.0, 0.0, 0.0), "b": _doubles(0.0)}
    weights = {"w": _doubles(3.0, 3.0, 3.0, 3.0), "b": _doubles(1e-3)}
    buffers = {"n.running_mean": _doubles(0.0, 0.0), "n.running_var": _doubles(8.0, 8.0)}
    found = Found("", {"loss": [2.0, 1.0]}, {"miou": 0.5}, start, weights, buffers)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "column", "expected"),
    [
        ({"losses": {"loss": [2.0, 1.15]}}, "losses", 0.1),
        ({"metrics": {"miou": 0.55}}, "metrics", 0.1),
        ({"parameters": {"w": _doubles(3.3, 3.3, 3.3, 3.3), "b": _doubles(1e-3)}}, "parameters", 0.1),
        ({"buffers": {"n.running_mean": _doubles(0.4, 0.0), "n.running_var": _doubles(8.0, 8.0)}}, "buffers", 0.1),
        ({"losses": {"loss": [2.0, math.nan]}}, "losses", math.inf),
    ],
)
def test_difference_is_relative_and_the_largest_decides(changes: dict, column: str, expected: float) -> None:
    found = compare(_found(**changes), _found())
    assert getattr(found, column) == pytest.approx(expected, rel=1e-5)
    assert found.largest == pytest.approx(expected, rel=1e-5)
    case = Case("tpavi", 1, 2)
    assert "**no**" in markdown({}, TOLERANCE, [(case, found)])
    with pytest.raises(RuntimeError, match="tpavi-zero1-2ranks"):
        exit_code([(case, found)], TOLERANCE)
    assert exit_code([(dataclasses.replace(case, nudged=True), found)], TOLERANCE) == 0


@pytest.mark.parametrize(
    ("changes", "column", "worst"),
    [
        ({"losses": {"loss": [2.0, 1.0], "second": [1.0, math.nan]}}, "losses", "second"),
        ({"metrics": {"miou": 0.5, "second": math.nan}}, "metrics", "second"),
        ({"buffers": {"first": _doubles(1.0), "second": _doubles(math.nan)}}, "buffers", "second"),
        ({"parameters": {"w": _doubles(3.0, 3.0, 3.0, 3.0), "b": _doubles(math.nan)}}, "worst_tensor", "b"),
    ],
)
def test_what_is_no_number_is_the_worst_wherever_it_stands(changes: dict, column: str, worst: str) -> None:
    reference = _found(
        losses={"loss": [2.0, 1.0], "second": [1.0, 1.0]},
        metrics={"miou": 0.5, "second": 0.5},
        buffers={"first": _doubles(1.0), "second": _doubles(1.0)},
    )
    found = compare(dataclasses.replace(reference, **changes), reference)
    assert getattr(found, column) == found.largest == math.inf
    assert found.worst[column] == worst
    assert "**no**" in markdown({}, TOLERANCE, [(Case("tpavi", 1, 2), found)])


def test_a_case_that_failed_or_has_other_terms_is_no_success() -> None:
    with pytest.raises(ValueError, match="not in both: avm"):
        compare(_found(losses={"loss": [2.0, 1.0], "avm": [0.0, 0.0]}), _found())
    with pytest.raises(RuntimeError, match="zero1-2ranks: it crashed"):
        exit_code([(Case("tpavi", 1, 2), "it crashed")], TOLERANCE)


def test_no_steps_are_no_training() -> None:
    with pytest.raises(ValueError, match="--steps 0: at least 1"):
        bench.main(["parity", "--steps", "0"])


@pytest.mark.slow
def test_a_training_that_ends_its_launch_costs_no_other(cmg_shards: Path, tmp_path: Path) -> None:
    trainings = Trainings(tmp_path, 1, {"clips": str(tmp_path / "nowhere"), "sequences": str(cmg_shards)}, 200.0)
    broken, fine = Case("tpavi", 0, 1), Case("unicode", 0, 1)
    trainings.run([broken, fine])
    assert "nowhere" in str(trainings.outcome(broken))
    assert not isinstance(trainings.outcome(fine), str)

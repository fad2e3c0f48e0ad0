"""The ahead-of-time gate: it passes for the kernels as they are, and it can fail.

Triton compiles only in a process without TRITON_INTERPRET, so the gate runs in processes of its own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from avs_dist.kernels import aot, runtime
from avs_dist.kernels.aot_cases import Case
from avs_dist.kernels.resources import TARGETS, Resources

ROOT = Path(__file__).resolve().parents[1]


@triton.jit
def good_kernel(x_ptr, out_ptr, N: tl.constexpr):
    index_N = tl.arange(0, N)
    tl.store(out_ptr + index_N, 2 * tl.load(x_ptr + index_N))


@triton.jit
def gather_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """Takes 4 N bytes of shared memory, and with many elements a thread more registers than there are."""
    index_N = tl.arange(0, N)
    row_N = tl.load(x_ptr + index_N)
    for _ in range(10):
        row_N = row_N + tl.gather(row_N * 1.1, (index_N * 7 + 3) % N, 0)
    tl.store(out_ptr + index_N, row_N)


@triton.jit
def mismatch_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, 2 * N)))


@triton.jit
def product_kernel(x_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    offsets_NN = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x_NN = tl.load(x_ptr + offsets_NN)
    tl.store(out_ptr + offsets_NN, tl.dot(x_NN, x_NN, input_precision=PRECISION))


class Fatal(ASTSource):
    """A program that takes the compiler down."""

    def make_ir(self, *arguments):
        os.abort()


def launch(kernel, warps: int = 4, stages: int = 1, **constants) -> None:
    x = torch.zeros(1)
    runtime.launch(kernel, (1,), x, torch.empty_like(x), num_warps=warps, num_stages=stages, **constants)


CASES = [
    Case("good", partial(launch, good_kernel, N=128), main=True),
    Case("spilling", partial(launch, gather_kernel, N=2048, warps=1), main=True),
    Case("spilling, not main", partial(launch, gather_kernel, N=2048, warps=1, stages=2)),
    Case("hoarding", partial(launch, gather_kernel, N=65536, warps=32)),
    Case("mismatch", partial(launch, mismatch_kernel, N=128)),
    Case("fatal", partial(launch, good_kernel, N=64)),
    Case("product", partial(launch, product_kernel, N=32, PRECISION="tf32")),
    Case("scalar product", partial(launch, product_kernel, N=32, PRECISION="ieee")),
]


def report() -> None:
    """Print results, faults and differences from several tables; runs in a process that can compile."""
    jobs = [fatal(job) if job.row.startswith("fatal") else job for job in aot.plan(CASES, ["sm_90"])]
    results = aot.compile_all(jobs, processes=1)
    rows = {j.row: {"sm_90": list(r)} for j, r in zip(jobs, results, strict=True) if isinstance(r, Resources)}

    def changed(row: str, **fields) -> dict:
        return {**rows, row: {"sm_90": list(Resources(*rows[row]["sm_90"])._replace(**fields))}}

    tables = {
        "same": rows,
        "fewer spills": changed("spilling, not main / gather_kernel", spilled=0),
        "other memory": changed("good / good_kernel", shared=64),
        "other product": changed("product / product_kernel", dot="-"),
        "other registers": changed("good / good_kernel", registers=99),
        "missing": {row: columns for row, columns in rows.items() if not row.startswith("good")},
        "left over": {**rows, "gone / good_kernel": {"sm_90": [16, 0, 0, "-"]}},
    }
    compared = {
        name: list(aot.differences(jobs, results, {"versions": aot.versions(), "rows": table}, whole=True))
        for name, table in tables.items()
    }
    old = {"versions": {"triton": "0"}, "rows": {}}
    compared["other version"] = list(aot.differences(jobs, results, old, whole=True))
    twice = [job.row for job in aot.plan([CASES[0], CASES[0]._replace(name="again")], ["sm_90"])]
    numbered = aot.plan([Case("both", lambda: [launch(good_kernel, N=n) for n in (16, 32)])], ["sm_90", "gfx942"])
    print(
        json.dumps(
            {
                "rows": rows,
                "faults": list(aot.faults(jobs, results)),
                "compared": compared,
                "twice": twice,
                "numbered": [(job.row, job.build.target) for job in numbered],
            }
        )
    )


def fatal(job: aot.Job) -> aot.Job:
    source = job.build.source
    return job._replace(build=job.build._replace(source=Fatal(source.fn, source.signature, source.constants)))


def compile_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def reported() -> dict:
    done = compile_process("-c", "import test_kernel_aot; test_kernel_aot.report()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_kernels_build_for_all_targets_and_take_what_the_table_says():
    done = compile_process("-m", "avs_dist.kernels.aot", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("spilling / gather_kernel", r"spills \d+ bytes a thread in a main case"),
        ("hoarding / gather_kernel", "262144 bytes of shared memory, a block may have 232448"),
        ("mismatch / mismatch_kernel", "does not compile: .*Cannot make_shape_compatible.*N=128 warps=4"),
        ("fatal / good_kernel", r"the compiler crashed \(exit code -6\)"),
        ("scalar product / product_kernel", "a product without tensor cores"),
    ],
)
def test_what_is_wrong_by_itself_is_found(reported, case, message):
    found = [fault for fault in reported["faults"] if fault.startswith(f"sm_90: {case}")]
    assert len(found) == 1
    assert re.search(message, found[0])


def test_what_is_right_is_no_fault(reported):
    assert len(reported["faults"]) == 5
    assert reported["compared"]["same"] == []
    assert reported["rows"]["product / product_kernel"]["sm_90"][3] == "tensor"
    assert reported["rows"]["good / good_kernel"]["sm_90"][1:] == [0, 0, "-"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("fewer spills", "not main / gather_kernel: spills [1-9]"),
        ("other memory", "good_kernel: 0 bytes of shared memory, product -; the table says 64, -"),
        ("other product", "product tensor; the table says"),
        ("missing", "good_kernel: not in the table; .*python -m avs_dist.kernels.aot --update"),
        ("left over", "gone / good_kernel: in the table, but nothing launches it"),
    ],
)
def test_differences_from_the_table_are_found(reported, table, message):
    (found,) = reported["compared"][table]
    assert re.search(message, found)


def test_registers_and_tables_of_another_triton_are_not_compared(reported):
    assert reported["compared"]["other registers"] == []
    assert reported["compared"]["other version"] == []


def test_equal_launches_are_built_once_and_different_ones_of_a_case_are_numbered(reported):
    assert reported["twice"] == ["good / good_kernel"]
    names = ["both / good_kernel", "both / good_kernel #2"]
    assert sorted(reported["numbered"]) == sorted([name, target] for name in names for target in ("sm_90", "gfx942"))


def test_the_gate_does_not_run_in_the_interpreter(capsys):
    if not runtime.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    with pytest.raises(SystemExit):
        aot.main(["--quick"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def kernels() -> set[str]:
    """Names of all kernels in the sources."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.endswith("_kernel")}


def test_the_table_holds_every_kernel_on_every_target():
    rows = aot.read_table()["rows"]
    for target in TARGETS:
        built = {row.split(" / ")[1].split(" #")[0] for row, columns in rows.items() if target in columns}
        assert built == kernels(), target

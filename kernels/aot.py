"""The gate before any GPU: every kernel is built for every target, and what it takes is compared with aot.json.

    python -m avs_dist.kernels.aot            build all cases for all targets
    python -m avs_dist.kernels.aot --quick    all cases for sm_90, the main ones for the others; products by the PTX
    python -m avs_dist.kernels.aot --update   build all, then write the table

It fails when a kernel does not compile, takes more shared memory than a block may have, computes a product without
tensor cores, spills registers in a main case (on NVIDIA), or differs from the table in spills or shared memory.
Register counts are noted, not compared: they move with the version of ptxas.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from avs_dist.kernels import runtime
from avs_dist.kernels.aot_cases import Case, all_cases
from avs_dist.kernels.resources import TARGETS, Build, Resources, measure, specialise

TABLE = Path(__file__).with_name("aot.json")
UPDATE = "python -m avs_dist.kernels.aot --update"
FULL_TARGET = "sm_90"  # that of --quick

# row of the table -> {"launch": constants and options, target: [registers, spilled, shared, dot]}
Table = dict[str, dict[str, Any]]


class Job(NamedTuple):
    """One compilation and the row of the table that it fills."""

    row: str
    main: bool
    launch: str
    build: Build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m avs_dist.kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"all cases for {FULL_TARGET} only")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="compilers side by side")
    args = parser.parse_args(argv)
    if runtime.INTERPRETED:
        parser.error("with TRITON_INTERPRET=1 triton does not compile: unset it")
    if args.quick and args.update:
        parser.error("--update needs all cases for all targets: leave --quick out")
    started = time.monotonic()
    jobs = [job for job in plan(all_cases()) if not args.quick or job.main or job.build.target == FULL_TARGET]
    results = compile_all(jobs, args.processes, disassemble=not args.quick)
    if args.update:
        write_table(jobs, results)
    problems = [*faults(jobs, results), *differences(jobs, results, read_table(), whole=not args.quick)]
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    verdict = f"{len(problems)} problems" if problems else "all well"
    print(f"{len(jobs)} kernels built in {time.monotonic() - started:.0f} s: {verdict}")
    return 1 if problems else 0


def plan(cases: Iterable[Case], targets: Sequence[str] = tuple(TARGETS)) -> list[Job]:
    """Record the launches of all cases; equal ones are built once, under the name of the first case."""
    jobs: dict[str, Job] = {}
    rows: set[tuple[str, str]] = set()
    for case in cases:
        for backend in dict.fromkeys(TARGETS[target].gpu.backend for target in targets):
            with runtime.recording(backend) as launches:
                case.call()
            for launch in launches:
                for target in targets:
                    if TARGETS[target].gpu.backend != backend:
                        continue
                    build = specialise(launch, target)
                    if build.key in jobs:
                        continue
                    row = _free_name(f"{case.name} / {launch.kernel.__name__}", target, rows)
                    jobs[build.key] = Job(row, case.main, _describe(launch), build)
    return list(jobs.values())


def _free_name(name: str, target: str, taken: set[tuple[str, str]]) -> str:
    """A case that launches a kernel in several ways numbers them."""
    number = 1
    while (numbered := name if number == 1 else f"{name} #{number}", target) in taken:
        number += 1
    taken.add((numbered, target))
    return numbered


def _describe(launch: runtime.Launch) -> str:
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items())
    return f"{constants} warps={launch.num_warps} stages={launch.num_stages}"


def compile_all(jobs: Sequence[Job], processes: int, disassemble: bool = True) -> list[Resources | str]:
    """What each job takes, or what is wrong with it; from an empty cache, several processes side by side."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        builds = [job.build for job in jobs]
        shares = [_Share(builds[start::processes], disassemble) for start in range(processes)]
        while waiting := {share.receiver: share for share in shares if not share.finished}:
            for receiver in connection.wait(list(waiting)):
                waiting[receiver].receive()  # type: ignore[index]
    results: list[Resources | str] = [""] * len(jobs)
    for start, share in enumerate(shares):
        results[start::processes] = share.results
    return results


class _Share:
    """Builds done by one child process; if the compiler takes the child down, a new one goes on after that build."""

    def __init__(self, builds: list[Build], disassemble: bool) -> None:
        self.builds = builds
        self.disassemble = disassemble
        self.results: list[Resources | str] = []
        self._start()

    @property
    def finished(self) -> bool:
        return len(self.results) == len(self.builds)

    def _start(self) -> None:
        # a fork keeps the recorded launches, which cannot be pickled; no other thread runs in the parent
        context = get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        rest = self.builds[len(self.results) :]
        self.child = context.Process(target=_measure_each, args=(rest, self.disassemble, sender), daemon=True)
        self.child.start()
        sender.close()

    def receive(self) -> None:
        try:
            self.results.append(self.receiver.recv())
        except EOFError:
            self.child.join()
            self.results.append(f"the compiler crashed (exit code {self.child.exitcode})")
            if not self.finished:
                self._start()


def _measure_each(builds: list[Build], disassemble: bool, sender: connection.Connection) -> None:
    for build in builds:
        try:
            sender.send(measure(build, disassemble))
        except RuntimeError as error:
            sender.send(str(error))


def faults(jobs: Sequence[Job], results: Sequence[Resources | str]) -> Iterator[str]:
    """What is wrong by itself, whatever the table says."""
    for job, result in zip(jobs, results, strict=True):
        place = f"{job.build.target}: {job.row}"
        if isinstance(result, str):
            yield f"{place}: {result} ({job.launch})"
            continue
        target = TARGETS[job.build.target]
        if result.shared > target.shared_limit:
            yield f"{place}: {result.shared} bytes of shared memory, a block may have {target.shared_limit}"
        if result.dot == "scalar":
            yield f"{place}: a product without tensor cores"
        if job.main and result.spilled and target.gpu.backend == "cuda":
            yield f"{place}: spills {result.spilled} bytes a thread in a main case"


def differences(
    jobs: Sequence[Job], results: Sequence[Resources | str], table: dict[str, Any], whole: bool
) -> Iterator[str]:
    """What differs from the table in launches, spills and shared memory.

    Args:
        whole: every row was built, so that a row which was not is left over.
    """
    if table["versions"] != versions():
        sys.stderr.write(f"built with {versions()}, the table with {table['versions']}: not compared\n")
        return
    rows: Table = table["rows"]
    hint = f"if that is meant, run {UPDATE}"
    for job, result in zip(jobs, results, strict=True):
        if not isinstance(result, Resources):  # a fault already
            continue
        place, known = f"{job.build.target}: {job.row}", rows.get(job.row, {})
        if job.build.target not in known:
            yield f"{place}: not in the table; {hint}"
            continue
        old = Resources(*known[job.build.target])
        if result.spilled != old.spilled:
            yield f"{place}: spills {result.spilled} bytes a thread, the table says {old.spilled}; {hint}"
        if (result.shared, result.dot) != (old.shared, old.dot):
            is_now = f"{result.shared} bytes of shared memory, product {result.dot}"
            yield f"{place}: {is_now}; the table says {old.shared}, {old.dot}; {hint}"
    if whole:
        built = {(job.row, job.build.target) for job in jobs}
        for row, columns in rows.items():
            for target in TARGETS:
                if target in columns and (row, target) not in built:
                    yield f"{target}: {row}: in the table, but nothing launches it; {hint}"


def versions() -> dict[str, str]:
    return {"triton": triton.__version__}


def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def write_table(jobs: Sequence[Job], results: Sequence[Resources | str]) -> None:
    rows: Table = {}
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Resources):
            rows.setdefault(job.row, {"launch": job.launch})[job.build.target] = list(result)
    lines = ",\n".join(f"{json.dumps(row)}: {json.dumps(columns)}" for row, columns in rows.items())
    head = f'"versions": {json.dumps(versions())},\n"columns": {json.dumps(Resources._fields)}'
    TABLE.write_text(f'{{{head},\n"rows": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())

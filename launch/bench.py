"""Time the kernels against their literal formulas and the best that torch alone can do, on this very device.

    avs-dist bench kernels                                     all ops; about 5 minutes on a GPU, 3 on a CPU
    avs-dist bench tpavi --size hw=56 B=4 --json tpavi.json    one op, own sizes
    python launch/bench.py kernels --markdown measured.md      from a plain checkout with torch, triton and numpy
    avs-dist bench models                                      whole networks: parameters and time of a prediction
    avs-dist bench loader --help                               how fast clips are read; its own options
    avs-dist bench parity --help                               several ranks against one process; its own options
    avs-dist bench kills --help                                a training killed at random moments; its own options
    avs-dist bench memory --help                               bytes held and sent by each ZeRO stage; its own options
    avs-dist bench scaling --help                              a model of the step time on 1 to 1,024 GPUs; likewise

Before a hot spot is timed its outputs and gradients are compared with the truth in float64; a wrong result is not
timed, and the exit code is 1. On a CPU each case runs in a fresh process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a plain checkout, and not this folder

import torch

from avs_dist.launch.benchmarks import ceilings, models, report
from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.measure import measure
from avs_dist.launch.benchmarks.problem import Case, Op, Size
from avs_dist.launch.benchmarks.registry import OPS
from avs_dist.launch.benchmarks.workers import Worker
from avs_dist.launch.cli import run

OWN_OPTIONS = ("loader", "parity", "kills", "memory", "scaling")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OWN_OPTIONS:  # imported here, as a bare GPU host has nothing that they need
        return importlib.import_module(f"avs_dist.launch.benchmarks.{argv[0]}").main(argv[1:])
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    facts = report.facts(device, f"python launch/bench.py {shlex.join(argv)}")
    if args.op == "models":
        return _bench_models(args, device, facts)
    cases = list(_cases(args, device))
    rows: report.Rows = []
    worker = Worker(fresh=device == "cpu" and not args.tiny)
    try:
        rates = worker.call(ceilings.measure, device, args.tiny, limit_s=args.limit_s)
        if failure := rates.get("failed") or rates.get("skipped"):
            raise RuntimeError(f"the ceilings of this device cannot be measured: {failure}")
        for number, case in enumerate(cases, start=1):
            sys.stderr.write(f"[{number}/{len(cases)}] {case}\n")
            result = worker.call(measure, case, limit_s=args.limit_s)
            rows.append((case, result))
            # after each case: a run that is cut off keeps what it has
            save(args, report.as_json(facts, rates, rows), report.markdown(facts, rates, rows))
            if any("graph_failed" in figures for figures in result.get("modes", {}).values()):
                worker.stop()  # what broke the capture may spoil the next case in this process
    finally:
        worker.stop()
    print(report.markdown(facts, rates, rows))
    failed = [f"{case}: {result['failed']}" for case, result in rows if "failed" in result]
    if failed:
        raise RuntimeError("; ".join(failed))
    return 0


def _bench_models(args: argparse.Namespace, device: str, facts: dict[str, Any]) -> int:
    for name in ("dtypes", "size", "implementations"):
        if getattr(args, name):
            raise ValueError(f"--{name}: the networks of `models` are those of their papers")
    rows: list[tuple[models.Model, dict[str, Any]]] = []
    worker = Worker(fresh=not args.tiny)
    try:
        for number, model in enumerate(models.MODELS, start=1):
            sys.stderr.write(f"[{number}/{len(models.MODELS)}] {model.label}\n")
            result = worker.call(models.measure, model, device, args.repeats, args.tiny, limit_s=args.limit_s)
            rows.append((model, result))
            save(args, models.as_json(facts, rows), models.markdown(facts, rows))
    finally:
        worker.stop()
    print(models.markdown(facts, rows))
    failed = [f"{model.label}: {result['failed']}" for model, result in rows if "failed" in result]
    if failed:
        raise RuntimeError("; ".join(failed))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "bench",
        "OP [options]",
        description=__doc__,
    )
    parser.add_argument("op", choices=["kernels", *OPS, "models"], help="one hot spot, all of them, or the networks")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="types of the inputs (default: those of each op)")
    parser.add_argument(
        "--size", type=_item, nargs="+", action="append", metavar="NAME=N", help="a size; may be given several times"
    )
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="only these; `ours` is the library's own")
    parser.add_argument("--repeats", type=int, default=20, help="least number of timed runs of a short case")
    parser.add_argument("--limit-s", type=float, default=90.0, help="longest time for one case")
    parser.add_argument("--tiny", action="store_true", help="dry run: tiny sizes, no code generation by torch.compile")
    parser.add_results()
    return parser


def _item(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=N with N at least 1, got '{text}'")
    return name, int(number)


def _cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    """All cases in order.

    Raises:
        ValueError: a name that the op does not have.
    """
    ops = list(OPS.values()) if args.op == "kernels" else [OPS[args.op]]
    names = {name for op in ops for name in op.implementations}
    unknown = set(args.implementations or ()) - names
    if unknown:
        raise ValueError(f"--implementations {' '.join(sorted(unknown))}: {args.op} has {', '.join(sorted(names))}")
    if args.size and args.op == "kernels":
        raise ValueError("--size needs one op: each has its own sizes")
    for op in ops:
        for size in _sizes(op, args, device):
            for dtype in args.dtypes or op.dtypes(device):
                for name in op.implementations:
                    case = Case(op.name, size, dtype, name, device, args.repeats, args.tiny)
                    wanted = name in args.implementations if args.implementations else op.included(case)
                    if wanted:
                        yield case


def _sizes(op: Op, args: argparse.Namespace, device: str) -> list[Size]:
    """Those of the command line, completed by the last size of the op, or its own."""
    own = op.sizes(device, args.tiny)
    for given in args.size or ():
        for name, _ in given:
            if name not in own[-1]:
                raise ValueError(f"--size {name}=...: {op.name} has {', '.join(own[-1])}")
    return [{**own[-1], **dict(given)} for given in args.size] if args.size else own


if __name__ == "__main__":
    raise SystemExit(run("bench"))

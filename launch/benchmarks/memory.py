"""Measure the memory and the traffic of trainings: what each ZeRO stage holds and sends, against ZeRO's arithmetic.

    avs-dist bench memory                                              about 15 minutes on 2 CPU cores
    avs-dist bench memory --parts state --config configs/unicode.yaml --ranks 2
    avs-dist bench memory --parts switches --size 112

Parts: `state`, model state and bytes of a step, of every ZeRO stage and precision; `own`, our own collectives, of each
system; `switches`, the effect of engine.activation_checkpointing and engine.offload. The deepspeed launcher starts the
ranks on this host. A case that fails is told, the others go on, and the exit code is 1; it is 1 as well where the model
state is further than --tolerance from what ZeRO says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from avs_dist.launch.benchmarks import memory_rank, report
from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.memory_rank import Case
from avs_dist.launch.benchmarks.memory_report import Row, excess, markdown
from avs_dist.launch.benchmarks.ranks import device, launch_plan

CONFIGS = report.ROOT / "configs"
PVT = (str(CONFIGS / "tpavi_ms3.yaml"),)
R50 = (*PVT, str(CONFIGS / "resnet50.yaml"))
SYSTEMS = tuple((str(CONFIGS / f"{name}.yaml"),) for name in ("tpavi_ms3", "ecmvae_ms3", "diffusion_ms3", "unicode"))
PARTS = ("state", "own", "switches")
TIMED = 3  # steps


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    parts = {part: _cases(part, args) for part in args.parts}
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as root:
        found = measure([case for cases in parts.values() for case in cases], Path(root), args.limit_s)
    rows = {part: [(case, found[case]) for case in cases] for part, cases in parts.items()}
    facts = _facts(f"avs-dist bench memory {shlex.join(argv)}".strip())
    tables = markdown(facts, rows)
    save(args, _as_json(facts, rows), tables)
    print(tables)
    return exit_code(rows, args.tolerance)


def exit_code(rows: Mapping[str, Sequence[Row]], tolerance: float) -> int:
    """0.

    Raises:
        RuntimeError: a case failed, or its model state is further from ZeRO's arithmetic than the tolerance.
    """
    bad = [f"{case.name}: {found['failed']}" for each in rows.values() for case, found in each if "failed" in found]
    for case, found in rows.get("state", ()):
        if "failed" not in found and abs(excess(case, found)) > tolerance:
            bad.append(f"{case.name}: model state {excess(case, found):+.1%} from ZeRO's arithmetic")
    if bad:
        raise RuntimeError("; ".join(bad))
    return 0


def measure(cases: Sequence[Case], root: Path, limit_s: float) -> dict[Case, dict[str, Any]]:
    """Figures of each case, or {"failed": why}. Those of one number of ranks share a launch, but for timed ones.

    Args:
        cases: in any order.
        root: folder for plans and figures.
        limit_s: longest time for one launch.
    """
    found: dict[Case, dict[str, Any]] = {}
    launches = [[case] for case in cases if case.timed]
    for ranks in dict.fromkeys(case.ranks for case in cases if not case.timed):
        launches.append([case for case in cases if case.ranks == ranks and not case.timed])
    with tqdm(total=len(cases), desc="memory", unit="case") as bar:
        while launches:
            group = launches.pop(0)
            failed = _launch(group, root, limit_s, bar)
            done = [case for case in group if (root / f"{case.name}.json").is_file()]
            found |= {case: json.loads((root / f"{case.name}.json").read_text()) for case in done}
            left = [case for case in group if case not in done]
            if left:  # one that ends its launch costs no other
                found[left[0]] = {"failed": failed or "it left no figures"}
                launches += [left[1:]] if left[1:] else []
    return found


def _launch(cases: Sequence[Case], root: Path, limit_s: float, bar: tqdm) -> str:
    plan = {"out": str(root), "cases": [dataclasses.asdict(case) for case in cases]}
    return launch_plan(memory_rank, plan, root / "plan.json", cases[0].ranks, limit_s, bar)


def _cases(part: str, args: argparse.Namespace) -> list[Case]:
    if part == "state":
        files = tuple(args.config or R50)
        return [
            Case(files, ranks, stage, precision)
            for ranks in args.ranks
            for precision in args.precisions
            for stage in args.stages
        ]
    if part == "own":
        return [Case(files, 2, 1, "bf16") for files in ([tuple(args.config)] if args.config else SYSTEMS)]
    cases = []
    common: dict[str, Any] = {"size": args.size, "timed": TIMED}
    networks = [tuple(args.config)] if args.config else [PVT, R50]
    for files in networks:
        cases += [Case(files, 1, 1, "fp32", activation_checkpointing=on, **common) for on in (False, True)]
    cases += [
        Case(networks[-1], 1, stage, "fp32", offload=to, **common) for stage in (2, 3) for to in ("none", "optimizer")
    ]
    return cases


def _as_json(facts: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    plain = {part: [{**dataclasses.asdict(case), **found} for case, found in each] for part, each in rows.items()}
    return {"facts": facts, **plain}


def _facts(command: str) -> dict[str, Any]:
    return {**report.rank_facts(device(), command), "threads": "1 a rank", "load before": f"{os.getloadavg()[0]:.1f}"}


def _parser() -> Parser:
    parser = Parser(
        "bench memory",
        description=__doc__,
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--config", action="append", metavar="FILE", help="settings of the network; several compose")
    parser.add_argument("--stages", type=int, choices=range(4), nargs="+", default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--ranks", type=int, choices=[1, 2, 4, 8], nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--precisions", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=224, help="pixels of a side, of the switches (default 224)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest difference of the state (default 0.1)")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="longest time for one launch (default 3600)")
    parser.add_results()
    return parser

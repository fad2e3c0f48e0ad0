"""Compare trainings on several ranks, under every ZeRO stage, with the same training in one process.

    avs-dist bench parity                                       the whole table; 15 to 20 minutes on 2 CPU cores
    avs-dist bench parity --systems unicode --stages 3 --ranks 2
    avs-dist bench parity --precision bf16 --tolerance 0.05 --markdown bf16.md

Every system trains for some steps with the same global batches, and is evaluated; the deepspeed launcher starts the
ranks. `--accumulations` adds a network without batch normalisation that sums micro-batches. The exit code is 1 when a
case is further from one process than the tolerance.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from avs_dist.launch.benchmarks import parity_rank, report
from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.parity_cases import SYSTEMS, Case, Data, table
from avs_dist.launch.benchmarks.parity_compare import Difference, Found, Row, as_json, compare, markdown
from avs_dist.launch.benchmarks.ranks import device, launch_plan
from avs_dist.launch.benchmarks.small_shards import make_shards


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: at least 1")
    cases = table(args.systems, args.stages, args.ranks, args.accumulations, args.precision)
    if not cases:
        raise ValueError("--systems, --stages, --ranks: one process with ZeRO 0 is what the others are compared with")
    with tempfile.TemporaryDirectory(prefix="bench-parity-") as root:
        shards: dict[Data, str] = {
            "clips": args.clips or make_shards(Path(root), "clips"),
            "sequences": args.sequences or make_shards(Path(root), "sequences"),
        }
        trainings = Trainings(Path(root), args.steps, shards, args.limit_s)
        trainings.run(list(dict.fromkeys([*(case.reference for case in cases), *cases])))
        rows = [(case, trainings.outcome(case)) for case in cases]
    facts = _facts(f"avs-dist bench parity {shlex.join(argv)}".strip(), args.precision, args.steps)
    tables = markdown(facts, args.tolerance, rows)
    save(args, as_json(facts, args.tolerance, rows), tables)
    print(tables)
    return exit_code(rows, args.tolerance)


def exit_code(rows: Sequence[Row], tolerance: float) -> int:
    """0.

    Raises:
        RuntimeError: a case failed, or is further from its reference than the tolerance.
    """
    bad = [f"{case.name}: {found}" for case, found in rows if isinstance(found, str)]
    for case, found in rows:
        if not isinstance(found, str) and not case.nudged and found.largest > tolerance:
            bad.append(f"{case.name}: {found.largest:.1e} apart, at most {tolerance:g} expected")
    if bad:
        raise RuntimeError("; ".join(bad))
    return 0


class Trainings:
    """Runs cases, all those of one number of ranks in one launch, and keeps what they leave.

    Args:
        root: for plans, logs and weights.
        steps: of each training.
        shards: by what they hold.
        limit_s: longest time for one launch.
    """

    def __init__(self, root: Path, steps: int, shards: dict[Data, str], limit_s: float) -> None:
        self.root, self.steps, self.shards, self.limit_s = root, steps, shards, limit_s
        self._failed: dict[Case, str] = {}

    def run(self, cases: Sequence[Case]) -> None:
        """A case that ends its launch costs no other: what is left is launched again."""
        with tqdm(total=len(cases), desc="parity", unit="training") as bar:
            for ranks in sorted({case.ranks for case in cases}):
                left = [case for case in cases if case.ranks == ranks]
                while left:
                    message = self._launch(left, ranks, bar)
                    left = [case for case in left if not self._file(case).is_file()]
                    if left:
                        self._failed[left[0]] = message or "it left no figures"
                        left = left[1:]

    def outcome(self, case: Case) -> Difference | str:
        """How far the case is from its reference, or why that cannot be said."""
        for each in (case, case.reference):
            if each in self._failed:
                return f"{each.name} failed: {self._failed[each]}"
        try:
            return compare(Found.load(self.root, case), Found.load(self.root, case.reference))
        except ValueError as error:
            return str(error)

    def _file(self, case: Case) -> Path:
        return self.root / f"{case.name}.json"

    def _launch(self, cases: Sequence[Case], ranks: int, bar: tqdm) -> str:
        """Why it failed, as `launch` says it."""
        plan: dict[str, Any] = {"out": str(self.root), "steps": self.steps, "shards": self.shards}
        plan["cases"] = [dataclasses.asdict(case) for case in cases]
        return launch_plan(parity_rank, plan, self.root / "plan.json", ranks, self.limit_s, bar)


def _facts(command: str, precision: str, steps: int) -> dict[str, object]:
    return {**report.rank_facts(device(), command), "threads a rank": 1, "precision": precision, "steps": steps}


def _parser() -> Parser:
    parser = Parser(
        "bench parity",
        description=__doc__,
    )
    parser.add_argument("--systems", choices=list(SYSTEMS), nargs="*", default=list(SYSTEMS), help="default: all")
    parser.add_argument("--stages", type=int, choices=range(4), nargs="+", default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--ranks", type=int, choices=[1, 2, 4, 8], nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument(
        "--accumulations",
        type=int,
        choices=[1, 2, 4],
        nargs="*",
        default=[1, 2, 4],
        help="micro-batches of a step, for a network without batch normalisation; no number leaves it out",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=20, help="of each training (default 20)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference (default 1e-4)")
    parser.add_argument("--clips", metavar="SHARDS", help="train masks on these (default: makes small synthetic ones)")
    parser.add_argument(
        "--sequences", metavar="SHARDS", help="train the codebook on these features (default: likewise)"
    )
    parser.add_argument("--limit-s", type=float, default=3600.0, help="longest time for one launch (default 3600)")
    parser.add_results()
    return parser

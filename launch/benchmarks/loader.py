"""Measure how fast clips are read: ours, a literal AVSBench loader and plain webdataset, on the same clips of 5 s.

    avs-dist bench loader                                          synthetic pictures and films; about 6 minutes
    avs-dist bench loader --films a.mp4 b.webm --json loader.json  clips out of real films
    avs-dist bench loader --tiny                                   dry run of all parts

Parts: clips a second of one core for each frame format; video members against raw decord; loading processes; memory
over many clips; time to the first batch of a new and of a restored run. Each loader runs in a process of its own with
one thread. The clips are written below the folder for temporary files first (1.2 GB; TMPDIR names another place).
A part that fails or takes too long is told, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from avs_dist.launch.benchmarks import loader_report, report
from avs_dist.launch.benchmarks.command import Parser, save
from avs_dist.launch.benchmarks.loader_measure import BATCH
from avs_dist.launch.benchmarks.loader_parts import TINY, Bench, Row, Scale


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.clips < BATCH or args.clips % BATCH or args.repeats < 1 or args.seconds < 0:
        raise ValueError(f"--clips must be a multiple of {BATCH}, --repeats at least 1, --seconds not negative")
    for film in args.films:
        if not film.is_file():
            raise FileNotFoundError(f"--films {film} is not a file")
    scale = TINY if args.tiny else Scale(args.clips, args.seconds, args.repeats, workers=_numbers_of_workers())
    facts = _facts(f"avs-dist bench loader {shlex.join(argv)}".strip())
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as root:
        bench = Bench(Path(root), args.films, scale, args.limit_s, one_process=args.tiny)
        found: dict[str, list[Row]] = {}
        try:
            bench.write()
            for part in loader_report.PARTS:
                found[part] = bench.rows_of(part)
                # after each part: a run that is cut off keeps what it has
                tables = loader_report.markdown(facts, bench.about, found)
                save(args, {"facts": facts, "clips": bench.about, **found}, tables)
        finally:
            bench.close()
    print(tables)
    return exit_code(found)


def exit_code(found: Mapping[str, Sequence[Row]]) -> int:
    """0.

    Raises:
        RuntimeError: If anything could not be measured.
    """
    failed = [f"{row['label']}: {row['failed']}" for rows in found.values() for row in rows if "failed" in row]
    if failed:
        raise RuntimeError("; ".join(failed))
    return 0


def _numbers_of_workers() -> tuple[int, ...]:
    """None, one, two, and so on in powers of two up to the number of cores."""
    return (0, 1, 2, *(1 << power for power in range(2, (os.cpu_count() or 1).bit_length())))


def _facts(command: str) -> Row:
    versions = {name: importlib.metadata.version(name) for name in ("webdataset", "decord", "av", "pillow", "numpy")}
    return {
        **report.facts("cpu", command),
        "threads": 1,
        "cores": os.cpu_count(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        **versions,
    }


def _parser() -> Parser:
    parser = Parser(
        "bench loader",
        description=__doc__,
    )
    parser.add_argument("--films", type=Path, nargs="+", default=[], metavar="FILE", help="take the clips out of these")
    parser.add_argument("--clips", type=int, default=256, help="clips of each set (default 256)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of one measurement (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each rate (default 5)")
    parser.add_argument("--limit-s", type=float, default=900.0, help="longest time for one measurement (default 900)")
    parser.add_argument("--tiny", action="store_true", help="dry run: few small clips, each measured once")
    parser.add_results()
    return parser

"""Look at a machine, or at all hosts of a cluster, before a training does.

    avs-dist doctor                                               this machine; less than 15 s
    avs-dist doctor --out-dir runs --shards shards/ms3 --ranks 2  also these shards, and two processes that must talk
    avs-dist doctor --hosts hostfile --out-dir runs               every host over ssh, and what must agree between them

One line for each finding: ok; warn, training runs, but look at it; fail, it does not run, or not well. What to do
about it stands behind the arrow. The exit code is 1 if anything fails.

--hosts takes the hostfile of the deepspeed launcher and goes the launcher's way: the same folder and Python on each
host, ssh without a password, .deepspeed_env and PDSH_SSH_ARGS_APPEND heeded. Beside the checks of each host it compares
Python, packages, the commit of the code, clocks and the shards' index, and tries whether all hosts see what the first
one writes in --out-dir, reach its port, and add up numbers together. A host that does not answer is a line, no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from typing import Any

from avs_dist.launch.checks import cluster, hosts, local, network
from avs_dist.launch.checks.rows import FAIL, OK, Options, Row, counted, failed, table
from avs_dist.launch.cli import OneLineErrors, run

MOST_S = 86400.0


class Parser(OneLineErrors, argparse.ArgumentParser):
    """argparse only: the doctor also runs where packages are missing."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    options = Options(args.out_dir, args.shards, args.cache_dir, args.ranks, args.master_port)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if args.hosts is None:
        rows = local.examine(options)
        _tell({"rows": rows}, rows, args.json, table(rows, colour))
        return 1 if failed(rows) else 0
    # a collective that hangs leaves the other half of the time to the other checks, and costs no more than its row
    options = dataclasses.replace(options, many_hosts=True, within_s=args.timeout_s / 2)
    here = network.launcher(options)
    report = _cluster(args, options)
    rows = here + report.rows()
    _tell({"rows": here + report.together, "hosts": report.hosts}, rows, args.json, _text(here, report, colour))
    return 1 if failed(rows) else 0


def _parser() -> Parser:
    parser = Parser(
        prog="avs-dist doctor",
        usage="avs-dist doctor [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out-dir", default="runs", help="where checkpoints will go: train.out_dir, or a folder above it (runs)")
    add("--shards", help="folder or URL of shards to look at")
    add("--cache-dir", help="where shards from a URL will be kept (default: that of training)")
    add("--ranks", type=_positive, default=1, metavar="N", help="processes on this machine that add up numbers (1)")
    add("--hosts", metavar="HOSTFILE", help="also all hosts of this file; a line is 'NAME slots=RANKS'")
    add("--master-addr", help="address of the first host (default: its first one that is not loopback)")
    add("--master-port", type=_positive, default=29500, metavar="PORT", help="port of rank 0 (29500)")
    add("--ssh-port", type=_positive, metavar="PORT", help="port of sshd on the hosts")
    add("--timeout-s", type=_seconds, default=60.0, metavar="S", help="longest wait for one answer of a host (60)")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_S:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0 and at most {MOST_S:g}, got '{text}'")
    return value


def _cluster(args: argparse.Namespace, options: Options) -> cluster.Report:
    named = hosts.read_hostfile(args.hosts)
    if shutil.which("ssh") is None:  # which is a row of this machine
        return cluster.Report({}, [])
    connections = hosts.connect(named, args.ssh_port, min(10.0, args.timeout_s))
    try:
        return cluster.examine(connections, options, args.master_addr, args.timeout_s)
    finally:
        hosts.close(connections)


def _text(here: list[Row], report: cluster.Report, colour: bool) -> str:
    """The tables; of a host only what is not well, because twenty hosts are alike."""
    parts = [f"this machine\n{table(here, colour)}"]
    for name, rows in report.hosts.items():
        bad = [row for row in rows if row.state != OK]
        parts.append(f"{name}: {counted(rows)}" + (f"\n{table(bad, colour)}" if bad else ""))
    if report.together:
        parts.append(f"between the hosts\n{table(report.together, colour)}")
    return "\n\n".join(parts)


def _tell(values: dict[str, Any], rows: list[Row], as_json: bool, text: str) -> None:
    if as_json:
        plain = {"healthy": not failed(rows), **values}
        print(json.dumps(plain, indent=1, default=dataclasses.asdict))
        return
    print(text)
    verdict = "see the lines with `fail`" if any(row.state == FAIL for row in rows) else "fit to train"
    print(f"\n{counted(rows)}: {verdict}")


if __name__ == "__main__":
    raise SystemExit(run("doctor"))

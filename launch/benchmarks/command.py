"""What the command lines of all benchmarks have in common; argparse only: a bare GPU host has nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from avs_dist.launch.cli import OneLineErrors
from avs_dist.shards.files import write_text


class Parser(OneLineErrors, argparse.ArgumentParser):
    """Parser of `avs-dist COMMAND`, with its options for the results that `save` writes.

    Args:
        command: as it is typed, such as "bench loader".
        operands: what follows it in its usage.
    """

    def __init__(self, command: str, operands: str = "[options]", **options: Any) -> None:
        prog = f"avs-dist {command}"
        super().__init__(
            prog=prog,
            usage=f"{prog} {operands}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def add_results(self) -> None:
        """--json and --markdown; call it last, so that they stand last in the help."""
        self.add_argument("--json", type=Path, help="also write all figures to this file")
        self.add_argument("--markdown", type=Path, help="also write the tables to this file")


def save(args: argparse.Namespace, figures: Any, tables: str) -> None:
    """Write what was found to the files that were asked for."""
    if args.json:
        write_text(args.json, json.dumps(figures, indent=1) + "\n")
    if args.markdown:
        write_text(args.markdown, tables)

"""The parser of the commands that read typed configs; `bench` does with argparse, see cli.OneLineErrors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonargparse

from avs_dist.launch.cli import OneLineErrors


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of the descriptions kept."""


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """jsonargparse parser whose errors are one clear line and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # a mistyped setting must not be taken for another
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("usage", f"{kwargs.get('prog')} [options]")
        super().__init__(*args, **kwargs)

    def add_commands(
        self, dest: str, commands: Iterable[tuple[str, Parser, str]], operands: Mapping[str, str] | None = None
    ) -> None:
        """Subcommands of which one must be given: name, parser and one line of help of each.

        Args:
            dest: where the name of the one that was given will stand.
            operands: what follows a command's name in its usage, where that is not "[options]".
        """
        subcommands = self.add_subcommands(required=True, dest=dest)
        for name, command, text in commands:
            subcommands.add_subcommand(name, command, help=text)
            command.prog = f"{self.prog} {name}"  # errors and help then name the command as it is typed
            command.usage = f"{command.prog} {(operands or {}).get(name, '[options]')}"

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        # the deepspeed launcher adds --local_rank=N to every script; we read LOCAL_RANK
        return super().parse_args([a for a in args if not a.startswith("--local_rank=")], *rest, **kwargs)


def add_max_damaged(parser: Parser) -> None:
    """For commands that read the clips of a checkpoint's shards."""
    told = "share of the clips that may be damaged; they are left out and told (default: that of the training)"
    parser.add_argument("--max-damaged", type=float | None, default=None, help=told)

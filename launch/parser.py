"""The parser of the commands that read typed configs; `bench` does with argparse, see cli.OneLineErrors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jsonargparse

from avs_dist.launch.cli import OneLineErrors


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of the descriptions kept."""


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """jsonargparse parser whose errors are one clear line and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("usage", f"{kwargs.get('prog')} [options]")
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        # the deepspeed launcher adds --local_rank=N to every script; we read LOCAL_RANK
        return super().parse_args([a for a in args if not a.startswith("--local_rank=")], *rest, **kwargs)

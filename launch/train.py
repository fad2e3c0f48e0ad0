"""Train a system from tar shards, on one process or many.

    avs-dist train --config configs/demo.yaml --optim.lr 2e-4
    torchrun --nproc_per_node 8 launch/train.py --config configs/tpavi_ms3.yaml
    deepspeed --num_accelerators 8 launch/train.py --config configs/tpavi_ms3.yaml --engine.zero_stage 2

Several --config files compose from left to right; any value can be overridden by its dotted name.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from avs_dist import interruption
from avs_dist.config import Config
from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist train", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(Config)
    return parser


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from YAML files and dotted overrides; errors are one line and exit code 2."""
    parser = build_parser()
    return config_of(parser, parser.parse_args(argv))


def config_of(parser: Parser, namespace: Any) -> Config:
    """The config in what a parser that has `add_class_arguments(Config)` has read, beside whatever else."""
    values = parser.instantiate_classes(namespace)
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})


def main(argv: list[str] | None = None) -> int:
    with interruption.noted():  # before anything slow is imported
        config = parse_config(argv)
        from avs_dist.trainer import train  # after parsing, so that --help and errors come at once

        try:
            train(config)
        except interruption.Preempted:  # rank 0 has said so
            return interruption.EXIT_CODE
        return 0


if __name__ == "__main__":
    code = run("train")
    # all is written and closed; at the interpreter's own exit threads of gloo were seen to abort a rank that was done
    with suppress(OSError):  # nobody may be left to read
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

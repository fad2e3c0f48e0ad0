"""For the tests of the ablation tables: their rows, configs, and what runs of them leave."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avs_dist.config import Config, to_dict
from avs_dist.launch.ablation_tables.paper import Paper, Row
from avs_dist.launch.sweeps.command import build_parser
from avs_dist.launch.sweeps.files import write_results
from avs_dist.launch.sweeps.outcome import Outcome, State
from avs_dist.launch.sweeps.plan import Plan, make_plan
from avs_dist.launch.sweeps.summary import Summary
from avs_dist.launch.train import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SPEEDS = [{"phase": "train", "step": step, "seconds_per_step": s} for step, s in ((10, 9.0), (20, 0.5), (30, 0.4))]


@functools.cache
def composed(*names: str) -> Config:
    return parse_config([word for name in names for word in ("--config", str(CONFIGS / name))])


def rows_of(paper: Paper) -> list[Row]:
    """Of all its tables."""
    return [row for key in paper.keys for row in paper.table(key).rows]


def planned(file: Path, *base: str) -> Plan:
    """The sweep as `avs-dist sweep` checks it before its first trial.

    Args:
        base: other words of the command line.
    """
    words = ["--sweep", str(file), *base]
    parser = build_parser()
    return make_plan(parser, parser.parse_args(words), words)


def without_place(config: Config) -> dict[str, Any]:
    """What a training does, wherever it writes and whether it is resumed."""
    values = to_dict(config)
    return {**values, "train": {**values["train"], "out_dir": "", "resume": False}}


def swept(
    folder: Path, runs: Mapping[str, tuple[dict[str, Any], Sequence[dict[str, Any]]]], state: State = "complete"
) -> None:
    """What a sweep leaves whose rows were trained and measured.

    Args:
        runs: of each row, what measured it wrote and the evaluations of its training.
        state: of all its trials.
    """
    outcomes = []
    for number, (row, (measured, evaluations)) in enumerate(runs.items()):
        run = folder / "trials" / f"{number:04d}"
        run.mkdir(parents=True)
        (run / "test.json").write_text(json.dumps(measured))
        (run / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in [*SPEEDS, *evaluations]))
        outcomes.append(Outcome(number, state, {}, "max", run, label=row))
    summary = Summary("", "miou", "max", "avs-dist sweep", "random", "none", "finished", started=0.0, ended=1.0)
    write_results(folder, summary, outcomes)

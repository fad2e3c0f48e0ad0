"""ablations.json and ablations.md."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avs_dist.launch.ablation_tables.experiment import Column, Experiment, Plan
from avs_dist.launch.ablation_tables.paper import Key, Paper, Row, Table
from avs_dist.shards.files import write_text

SPEED = Column("steps_per_s", "steps/s", ".2f")
RESULT_FILE = "test.json"  # what measures a run writes it there, at once and last: where it is, the row is done


def write_tables(
    out: Path,
    plan: Plan,
    paper: Paper,
    tables: Mapping[Key, Table],
    runs: Mapping[str, Path],
    command: Callable[[Row], str],
) -> None:
    """Write both files, with the scores of all rows that are measured so far.

    Args:
        runs: folder of the training of each variant that has one.
        command: that trains a row alone.
    """
    written: dict[str, dict[str, Any]] = {}
    for key, table in tables.items():
        rows = []
        for row in table.rows:
            named = {"label": row.label, "variant": row.variant, "published": row.config.published}
            rows.append({**named, **_scores(paper.experiment, runs.get(row.variant)), "command": command(row)})
        written[str(key)] = {"title": table.title, "published": table.published, "rows": rows}
    write_text(out / "ablations.json", json.dumps({**dataclasses.asdict(plan), "tables": written}, indent=1) + "\n")
    write_text(out / "ablations.md", _markdown(plan, paper, written))


def _scores(experiment: Experiment, run: Path | None) -> dict[str, float | None]:
    if run is None or not (run / RESULT_FILE).is_file():
        return dict.fromkeys((*(column.key for column in experiment.columns), SPEED.key))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds_per_step"] for record in records if record["phase"] == "train"]
    speed = 1.0 / statistics.median(seconds) if seconds else None  # a run of few steps logs none
    return {**experiment.scores(run / RESULT_FILE, records), SPEED.key: speed}


def _markdown(plan: Plan, paper: Paper, tables: Mapping[str, Any]) -> str:
    experiment = paper.experiment
    columns = (*experiment.columns, SPEED)
    parts = [
        f"Toy scale: {experiment.described(plan)}, a tenth of them the test split, "
        f"and {plan.steps} steps from random weights with one seed. These scores are reported, not claimed: they show "
        "that every row trains; at this scale their order says nothing about that of the paper.",
        f"Paper: {paper.title}. Base of all rows: {' '.join(plan.config)}. {experiment.legend}; steps/s is a median, "
        "of rows that train side by side.",
    ]
    for table in tables.values():
        quoted = [f"paper's {heading}" for heading in table["published"]]
        head = ("row", *(column.heading for column in columns), *quoted, "command")
        lines = [f"## {table['title']}", "", _line(head), _line(["---"] * len(head))]
        for row in table["rows"]:
            measured = [_cell(row[column.key], column.form) for column in columns]
            scores = [*row["published"], *[None] * (len(quoted) - len(row["published"]))]
            of_paper = [_cell(score, experiment.published_form) for score in scores]
            lines.append(_line([row["label"], *measured, *of_paper, f"`{row['command']}`"]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

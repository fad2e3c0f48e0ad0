"""The ablation tables of a paper at toy scale: synthetic clips, a tiny network, few steps.

    avs-dist ablations                                     Tables 2-6 of ECMVAE; about 15 minutes on 2 free CPU cores
    avs-dist ablations --paper diffusion                   Tables III-VIII of contrastive latent diffusion
    avs-dist ablations --paper unicode --tables 1 2 fig3   Tables 1-3 and Fig. 3 of Uni-Code
    avs-dist ablations --paper unicode --tables transfer   its four rows that tell most, in minutes
    avs-dist ablations --tables 5 --steps 1000 --out runs/table5

Every row is the base configs plus small files of configs/ecmvae, configs/diffusion or configs/unicode; rows that stand
in several tables are run once. The tables and their commands are written to ablations.md and ablations.json in --out,
again after every row. A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from avs_dist.launch.ablation_tables import PAPERS
from avs_dist.launch.ablation_tables.experiment import Column, Experiment, Plan
from avs_dist.launch.ablation_tables.paper import FROM_S4, S4, Paper
from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser
from avs_dist.launch.stages import shown, stage
from avs_dist.launch.train import parse_config
from avs_dist.shards.files import write_text
from avs_dist.shards.schema import INDEX_FILE

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Key = int | str  # of a table or figure
SPEED = Column("steps_per_s", "steps/s", ".2f")


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist ablations", description=__doc__)
    parser.add_argument(
        "--paper", type=Literal["ecmvae", "diffusion", "unicode"], default="ecmvae", help="whose tables"
    )
    parser.add_argument(
        "--tables",
        type=int | str,
        nargs="+",
        default=None,
        help="of the paper: 2 to 6 of ECMVAE, 3 to 8 (Table III to VIII) of diffusion, 1 to 3, transfer and fig3 of "
        "unicode (default: all)",
    )
    parser.add_argument(
        "--config",
        action="append",
        type=str,
        help="base of every row; may be given several times (default: configs/demo_ecmvae.yaml; of diffusion: "
        "configs/demo_diffusion.yaml and configs/diffusion/toy.yaml; of unicode: configs/demo_unicode.yaml)",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="everything is written here (default: runs/ablations; of diffusion and unicode: runs/ablations_PAPER)",
    )
    add = parser.add_argument
    add("--clips", type=int | None, default=None, help="clips of each setting (default: 160; of unicode: 2000)")
    add("--size", type=int | None, default=None, help="side of the frames in pixels (default: 64; of unicode: none)")
    add("--steps", type=int | None, default=None, help="steps of each training (default: 150; of unicode: 600)")
    add("--seed", type=int, default=1, help="seed of the clips and of the trainings")
    add("--quick", action="store_true", help="24 clips and 6 steps: shows that all rows run")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    started, paper = time.monotonic(), PAPERS[args.paper]
    plan = _plan(args, paper)
    out, keys = Path(args.out or paper.out), _keys(paper, args.tables or ())
    warmup = _warmup_steps(plan)
    _claim(out, plan)
    todo = [variant for variant in _variants(paper, keys) if not _result_file(out, variant).is_file()]
    _write(out, plan, keys, warmup)
    for done, variant in enumerate(todo, start=1):
        print(f"\n[{done}/{len(todo)}] {variant}, {time.monotonic() - started:.0f} s so far", flush=True)
        shards = _shards(out, _setting(paper, variant), plan)
        stage(*_train_command(out, plan, variant, warmup))
        stage(*map(str, paper.experiment.measure(out / variant, shards, _result_file(out, variant))))
        _write(out, plan, keys, warmup)
    print(f"\n{(out / 'ablations.md').read_text()}")
    print(f"took {time.monotonic() - started:.0f} s; written to {out / 'ablations.md'} and {out / 'ablations.json'}")
    return 0


def _plan(args: Any, paper: Paper) -> Plan:
    clips, steps = (24, 6) if args.quick else (paper.clips, paper.steps)
    size = paper.experiment.size
    if args.size is not None and size is None:
        raise ValueError(f"--size {args.size}: {paper.title} trains on features, which have no size in pixels")
    plan = Plan(
        paper=args.paper,
        config=tuple(args.config or map(_typed, (CONFIGS / name for name in paper.base))),
        clips=clips if args.clips is None else args.clips,
        size=size if args.size is None else args.size,
        steps=steps if args.steps is None else args.steps,
        seed=args.seed,
    )
    if plan.steps < 1:
        raise ValueError(f"--steps {plan.steps}: must be at least 1")
    return plan


def _keys(paper: Paper, asked: Sequence[Key]) -> list[Key]:
    """The tables that are asked for, in the order of the paper; all where none is."""
    unknown = [key for key in asked if key not in paper.tables]
    if unknown:
        raise ValueError(f"--tables {unknown[0]}: of {paper.title} there are {paper.known}")
    return [key for key in paper.tables if key in (asked or paper.tables)]


def _variants(paper: Paper, keys: Sequence[Key]) -> list[str]:
    """Every variant of the tables once, the S4 training before what starts from it."""
    variants = dict.fromkeys(row.variant for key in keys for row in paper.tables[key].rows)
    return [name for variant in variants for name in ((S4, FROM_S4) if variant == FROM_S4 else (variant,))]


def _setting(paper: Paper, variant: str) -> str:
    return "s4" if variant == S4 else paper.experiment.setting


def _result_file(out: Path, variant: str) -> Path:
    """What measures a row writes this, at once and last: where it is, the row is done."""
    return out / variant / "test.json"


def _warmup_steps(plan: Plan) -> int:
    """The warm-up keeps its share of the steps of the base."""
    base = parse_config([word for path in plan.config for word in ("--config", path)])
    return round(base.optim.warmup_steps * plan.steps / base.train.max_steps)


def _claim(out: Path, plan: Plan) -> None:
    """Rows of one folder are comparable: it belongs to one plan."""
    path, mine = out / "plan.json", json.loads(json.dumps(dataclasses.asdict(plan)))
    if not path.is_file():
        write_text(path, json.dumps(mine, indent=1) + "\n")
        return
    other = json.loads(path.read_text())
    if other != mine:
        differ = "; ".join(
            f"{key} {other.get(key)} there, {mine[key]} here" for key in mine if mine[key] != other.get(key)
        )
        raise ValueError(f"--out {out} holds rows of other settings ({differ}): choose another folder")


def _shards(out: Path, setting: str, plan: Plan) -> Path:
    """Folder of the shards of one setting, made if it is not there."""
    clips, shards = out / f"clips_{setting}", out / f"shards_{setting}"
    if not (shards / INDEX_FILE).is_file():
        shutil.rmtree(clips, ignore_errors=True)  # of a run that was stopped
        for command in PAPERS[plan.paper].experiment.data(setting, clips, shards, plan):
            stage(*map(str, command))
    return shards


def _train_command(out: Path, plan: Plan, variant: str, warmup: int) -> list[str]:
    paper = PAPERS[plan.paper]
    configs = [*plan.config, *(_typed(CONFIGS / name) for name in paper.files(variant))]
    values = {
        "data.shards": out / f"shards_{_setting(paper, variant)}",
        "seed": plan.seed,
        "optim.warmup_steps": warmup,
        "train.max_steps": plan.steps,
        "train.eval_every": 0,
        "train.out_dir": out / variant,
        "train.resume": "true",
        **({"train.init_from": out / S4} if variant == FROM_S4 else {}),
    }
    words = [word for path in configs for word in ("--config", path)]
    return ["train", *words, *(str(word) for key, value in values.items() for word in (f"--{key}", value))]


def _typed(path: Path) -> str:
    """The path as one would type it here."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def _write(out: Path, plan: Plan, keys: Sequence[Key], warmup: int) -> None:
    """ablations.json and ablations.md with all rows that are done so far."""
    tables, paper = {}, PAPERS[plan.paper]
    for key in keys:
        rows = []
        for row in paper.tables[key].rows:
            command = shown(_train_command(out, plan, row.variant, warmup))
            rows.append({**row._asdict(), **_result(out, paper.experiment, row.variant), "command": command})
        tables[str(key)] = {"title": f"{paper.name(key)}: {paper.tables[key].title}", "rows": rows}
    write_text(out / "ablations.json", json.dumps({**dataclasses.asdict(plan), "tables": tables}, indent=1) + "\n")
    write_text(out / "ablations.md", _markdown(plan, paper, tables))


def _result(out: Path, experiment: Experiment, variant: str) -> dict[str, float | None]:
    path = _result_file(out, variant)
    if not path.is_file():
        return dict.fromkeys((*(column.key for column in experiment.columns), SPEED.key))
    records = [json.loads(line) for line in (out / variant / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds_per_step"] for record in records if record["phase"] == "train"]
    speed = 1.0 / statistics.median(seconds) if seconds else None  # a run of few steps logs none
    return {**experiment.scores(path, records), SPEED.key: speed}


def _markdown(plan: Plan, paper: Paper, tables: dict[str, Any]) -> str:
    experiment = paper.experiment
    columns, published = (*experiment.columns, SPEED), experiment.published
    parts = [
        f"Toy scale: {experiment.described(plan)}, a tenth of them the test split, "
        f"and {plan.steps} steps from random weights with one seed. These scores are reported, not claimed: they show "
        "that every row trains; at this scale their order says nothing about that of the paper.",
        f"Paper: {paper.title}. Base of all rows: {' '.join(plan.config)}. {experiment.legend}; steps/s is a median.",
    ]
    head = ("row", *(column.heading for column in columns), *published, "command")
    for table in tables.values():
        lines = [f"## {table['title']}", "", _line(head), _line(["---"] * len(head))]
        for row in table["rows"]:
            measured = [_cell(row[column.key], column.form) for column in columns]
            quoted = row["published"] if isinstance(row["published"], tuple) else [row["published"]] * len(published)
            of_paper = [_cell(value, experiment.published_form) for value in quoted]
            lines.append(_line([row["label"], *measured, *of_paper, f"`{row['command']}`"]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    raise SystemExit(run("ablations"))

"""The ablation tables of a paper at toy scale: synthetic clips, a tiny network, few steps.

    avs-dist ablations                                     Tables 2-6 of ECMVAE
    avs-dist ablations --paper diffusion                   Tables III-VIII of contrastive latent diffusion
    avs-dist ablations --paper unicode --tables 1 2 fig3   Tables 1-3 and Fig. 3 of Uni-Code
    avs-dist ablations --paper unicode --tables transfer   its four rows that tell most, in minutes
    avs-dist ablations --tables 5 --steps 1000 --out runs/table5

The tables are the sweeps configs/sweeps/ecmvae_table4.yaml and so on, which run on real data by themselves (`avs-dist
sweep`). This command makes clips, and of all the rows of the tables one sweep, in which several train at a time and
those that stand in several tables once; then it measures each run on the test split. The tables and their commands are
written to ablations.md and ablations.json in --out. A run that was stopped goes on where it was when the same command
is given again.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from avs_dist.launch.ablation_tables import PAPERS
from avs_dist.launch.ablation_tables.experiment import Plan
from avs_dist.launch.ablation_tables.paper import CONFIGS, FROM_S4, START, Key, Paper, Row, Table
from avs_dist.launch.ablation_tables.writing import RESULT_FILE, write_tables
from avs_dist.launch.cli import run
from avs_dist.launch.parser import Parser
from avs_dist.launch.stages import shown, stage
from avs_dist.launch.train import parse_config
from avs_dist.shards.files import write_text
from avs_dist.shards.schema import INDEX_FILE

S4 = "s4"  # the training that rows start from, and its setting


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
    out = Path(args.out or paper.out)
    tables = {key: paper.table(key) for key in _keys(paper, args.tables or ())}
    rows = _distinct(tables)
    values = _values(plan)
    _claim(out, plan)

    def write() -> None:
        write_tables(out, plan, paper, tables, _runs(out), lambda row: shown(_train_command(out, plan, row, values)))

    write()
    if any(variant not in _runs(out) for variant in rows):
        _train(out, plan, tables, values)
    runs = _runs(out)
    todo = [variant for variant in rows if variant in runs and not (runs[variant] / RESULT_FILE).is_file()]
    for done, variant in enumerate(todo, start=1):
        print(f"\n[{done}/{len(todo)}] {variant}, {time.monotonic() - started:.0f} s so far", flush=True)
        shards = _shards(out, paper.experiment.setting, plan)
        stage(*map(str, paper.experiment.measure(runs[variant], shards, runs[variant] / RESULT_FILE)))
        write()
    print(f"\n{(out / 'ablations.md').read_text()}")
    print(f"took {time.monotonic() - started:.0f} s; written to {out / 'ablations.md'} and {out / 'ablations.json'}")
    if lacking := [variant for variant in rows if variant not in runs]:
        why = f"{_sweep_folder(out, tables) / 'trials.csv'} says why; the same command tries again what failed"
        raise RuntimeError(f"{', '.join(lacking)}: not trained: {why}")
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
    unknown = [key for key in asked if key not in paper.keys]
    if unknown:
        raise ValueError(f"--tables {unknown[0]}: of {paper.title} there are {paper.known}")
    return [key for key in paper.keys if key in (asked or paper.keys)]


def _distinct(tables: Mapping[Key, Table]) -> dict[str, Row]:
    """Each variant once, by its name."""
    rows: dict[str, Row] = {}
    for table in tables.values():
        for row in table.rows:
            rows.setdefault(row.variant, row)
    return rows


def _values(plan: Plan) -> dict[str, object]:
    """What all trainings have, by config key; the warm-up keeps its share of the steps of the base."""
    base = parse_config(_config_words(plan))
    return {
        "seed": plan.seed,
        "optim.warmup_steps": round(base.optim.warmup_steps * plan.steps / base.train.max_steps),
        "train.max_steps": plan.steps,
        "train.eval_every": 0,
    }


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


def _train(out: Path, plan: Plan, tables: Mapping[Key, Table], values: Mapping[str, object]) -> None:
    """All rows that have no run yet, as one sweep; before it the training on S4, where a row starts from it."""
    paper = PAPERS[plan.paper]
    shards = _shards(out, paper.experiment.setting, plan)
    folder = _sweep_folder(out, tables)
    file = folder.with_suffix(".yaml")
    if not file.is_file():
        write_text(file, yaml.safe_dump(_sweep(out, paper, tables), sort_keys=False))
    if FROM_S4 in yaml.safe_load(file.read_text())["rows"]:
        first = {"data.shards": _shards(out, S4, plan), **values, "train.out_dir": out / S4, "train.resume": "true"}
        stage("train", *_config_words(plan), *_words(first))
    own = ("--sweep", file, "--out", folder, "--resume")
    stage("sweep", *_config_words(plan), *own, *_words({"data.shards": shards, **values}))


def _sweep_folder(out: Path, tables: Mapping[Key, Table]) -> Path:
    return out / f"tables_{'_'.join(map(str, tables))}"


def _sweep(out: Path, paper: Paper, tables: Mapping[Key, Table]) -> dict[str, Any]:
    """The file of the sweep; rows that another sweep of this folder has trained are not in it."""
    rows, there = {}, _runs(out)
    for variant, row in _distinct(tables).items():
        if variant not in there:
            rows[variant] = {**dataclasses.asdict(row.config), "settings": _settings(out, row)}
    plain = json.loads(json.dumps({"rows": rows}))
    return {
        "title": f"{paper.title}, tables at toy scale: {', '.join(map(str, tables))}",
        "scheduler": {"name": "none"},
        "resources": {"cpus": 1},
        "published": next((list(table.published) for table in tables.values() if table.published), []),
        **plain,
    }


def _settings(out: Path, row: Row) -> dict[str, Any]:
    """Those of the row, with our training on S4 in the place of the real one."""
    return {key: str(out / S4) if key == START else value for key, value in row.config.settings.items()}


def _runs(out: Path) -> dict[str, Path]:
    """The folder of the training of each variant that is done."""
    runs: dict[str, Path] = {}
    for path in sorted(out.glob("tables_*/trials.csv")):
        with path.open(newline="") as file:
            for trial in csv.DictReader(file):
                if trial["state"] == "complete":
                    runs.setdefault(trial["label"], path.parent / trial["folder"])
    return runs


def _train_command(out: Path, plan: Plan, row: Row, values: Mapping[str, object]) -> list[str]:
    """What trains a row alone, as the sweep does."""
    shards = out / f"shards_{PAPERS[plan.paper].experiment.setting}"
    overlays = [word for path in row.config.configs for word in ("--config", _typed(Path(path)))]
    own = {"data.shards": shards, **values, "train.out_dir": out / row.variant, **_settings(out, row)}
    return ["train", *_config_words(plan), *overlays, *_words(own)]


def _config_words(plan: Plan) -> list[str]:
    return [word for path in plan.config for word in ("--config", path)]


def _words(values: Mapping[str, object]) -> list[str]:
    """Of the command line."""
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


def _typed(path: Path) -> str:
    """The path as one would type it here."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


if __name__ == "__main__":
    raise SystemExit(run("ablations"))

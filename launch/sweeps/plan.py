"""A sweep that was checked: its trainings, its space, its folder."""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from avs_dist.config import Config, flat, from_dict, to_dict
from avs_dist.launch.parser import Parser
from avs_dist.launch.sweeps.settings import RowConfig, SweepConfig
from avs_dist.launch.sweeps.space import Choice, Space, cells, examples, parse_space
from avs_dist.launch.sweeps.trial import merged
from avs_dist.launch.train import config_of
from avs_dist.shards.files import write_text
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.locks import EXCLUSIVE, lock_file, try_lock
from avs_dist.tasks import build_task

_FILE = "sweep.yaml"
_OWN = ("train.out_dir", "train.resume", "train.fork_from")  # given by the sweep
_FREE = (
    "title",
    "objective",
    "samples",
    "hours",
    "retries",
    "resources",
    "published",
)  # may be others when it is resumed
_KEEP_FOR_PBT = 4  # checkpoints: another trial may ask for one that is not the newest


@dataclass(frozen=True)
class Plan:
    """What is run, and where.

    Args:
        out: folder of the sweep.
        command: as a person would type it, without --resume.
        space: what is drawn.
        bases: config of each row without drawn settings; of a sweep without rows that of the row "".
        objective: key of the score among the metrics of an evaluation.
    """

    sweep: SweepConfig
    out: Path
    command: str
    space: Space
    bases: dict[str, Config]
    objective: str

    def fits(self, row: str, settings: dict[str, Any]) -> None:
        """Raises ValueError for settings that do not fit together."""
        from_dict(merged(to_dict(self.bases[row]), settings))

    def max_steps(self, row: str, settings: Mapping[str, Any]) -> int:
        """Of a trial."""
        return int(merged(to_dict(self.bases[row]), settings)["train"]["max_steps"])


def make_plan(parser: Parser, args: Any, words: list[str]) -> Plan:
    """From the parsed command line.

    Args:
        words: of the command line.

    Raises:
        ValueError: something does not fit; nothing has begun.
    """
    sweep: SweepConfig = parser.instantiate_classes(args)["sweep"]
    space = parse_space(sweep.space)
    base = config_of(parser, args)
    file = getattr(args["sweep"], "__path__", None)
    place = Path(str(file.absolute)).parent if file else Path.cwd()
    rows = sweep.rows or {"": RowConfig()}
    known = flat(to_dict(Config()))
    for key in (*(each.key for each in space), *(key for row in rows.values() for key in row.settings)):
        _check_key(key, known)
    parsed = {name: _overlaid(parser, args, row, place) for name, row in rows.items()}
    for namespace in parsed.values():
        for settings in examples(space):
            parser.parse_object(settings, namespace)  # ends with an error that names key and value
    bases = {name: _kept_for_others(config_of(parser, namespace), sweep) for name, namespace in parsed.items()}
    for config in bases.values():
        _check_scheduler(sweep, space, config)
        for settings in cells(space):
            from_dict(merged(to_dict(config), settings))  # raises where they do not fit together
        _check_data(config, space)
    return Plan(
        sweep=sweep,
        out=Path(args["out"] or Path("runs/sweeps") / (Path(str(file)).stem if file else "sweep")),
        command=f"avs-dist sweep {shlex.join(word for word in words if word != '--resume')}",
        space=space,
        bases=bases,
        objective=sweep.objective or build_task(base).best_by,
    )


@contextmanager
def claimed(plan: Plan, resume: bool) -> Iterator[None]:
    """Have the folder of a sweep alone within the block.

    Raises:
        RuntimeError: another sweep has it.
        ValueError: it holds a sweep and is not to be resumed, or another sweep.
    """
    with lock_file(plan.out / ".lock") as lock:
        if not try_lock(lock, EXCLUSIVE):
            raise RuntimeError(f"--out {plan.out}: a sweep is running there; its sweep.html shows it")
        _claim(plan, resume)
        yield


def _claim(plan: Plan, resume: bool) -> None:
    """Its trials are comparable, so the folder belongs to one plan."""
    path, mine = plan.out / _FILE, _described(plan)
    if not path.is_file():
        write_text(path, yaml.safe_dump(mine, sort_keys=False))
        return
    if not resume:
        raise ValueError(f"--out {plan.out} holds a sweep: go on with it by --resume, or choose another folder")
    there = yaml.safe_load(path.read_text())
    one, other = flat(_lasting(there)), flat(_lasting(mine))
    differ = [
        f"{key} {one.get(key)} there, {other.get(key)} here" for key in one | other if one.get(key) != other.get(key)
    ]
    if differ:
        raise ValueError(
            f"--out {plan.out} holds a sweep of other settings ({'; '.join(differ)}): choose another folder"
        )
    if there["sweep"]["samples"] > mine["sweep"]["samples"]:
        raise ValueError(
            f"--sweep.samples {mine['sweep']['samples']}: the sweep has {there['sweep']['samples']} already"
        )
    write_text(path, yaml.safe_dump(mine, sort_keys=False))


def _described(plan: Plan) -> dict[str, Any]:
    sweep = json.loads(json.dumps(dataclasses.asdict(plan.sweep)))
    return {"command": plan.command, "sweep": sweep, "bases": {row: to_dict(base) for row, base in plan.bases.items()}}


def _lasting(described: dict[str, Any]) -> dict[str, Any]:
    sweep = {key: value for key, value in described["sweep"].items() if key not in _FREE}
    return {"sweep": sweep, "config": described["bases"]}


def _check_key(key: str, known: dict[str, Any]) -> None:
    if key in _OWN:
        raise ValueError(f"space: {key} is given by the sweep itself")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"space: unknown config key '{key}'" + (f" (did you mean {near[0]}?)" if near else ""))


def _overlaid(parser: Parser, args: Any, row: RowConfig, place: Path) -> Any:
    for name in row.configs:
        path = place / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a config of a row, is not there")
        args = parser.parse_object(yaml.safe_load(path.read_text()), args)
    return parser.parse_object(row.settings, args) if row.settings else args


def _check_data(config: Config, space: Space) -> None:
    """Raises what a training would after minutes: shards that are not there, or not those of the system."""
    tried = [settings for settings in examples(space) if any(key.startswith(("data.", "model.")) for key in settings)]
    for settings in ({}, *tried):
        chosen = from_dict(merged(to_dict(config), settings))
        build_task(chosen).check_data(ShardIndex.load(chosen.data.shards))


def _kept_for_others(config: Config, sweep: SweepConfig) -> Config:
    if sweep.scheduler.name != "pbt" or config.train.keep_last >= _KEEP_FOR_PBT:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, keep_last=_KEEP_FOR_PBT))


def _check_scheduler(sweep: SweepConfig, space: Space, base: Config) -> None:
    name = sweep.scheduler.name
    if name != "none" and not 0 < base.train.eval_every < base.train.max_steps:
        raise ValueError(
            f"{name} compares trials while they train: set train.eval_every, now {base.train.eval_every}, below "
            f"train.max_steps={base.train.max_steps}, or --sweep.scheduler.name none"
        )
    if name in ("asha", "median") and sweep.scheduler.grace_steps > base.train.max_steps:
        steps = f"sweep.scheduler.grace_steps={sweep.scheduler.grace_steps}"
        raise ValueError(f"{steps}: more than train.max_steps={base.train.max_steps}, so no trial could be stopped")
    if name in ("asha", "pbt") and any(each.key == "train.max_steps" for each in space):
        raise ValueError(f"space: train.max_steps: {name} compares trials of the same length")
    if name == "pbt":
        for each in space:
            if each.when or (isinstance(each.domain, Choice) and each.domain.grid):
                raise ValueError(f"space: {each.key}: pbt takes no conditions and no grid")
            if each.key.startswith(("model.", "data.")) or each.key == "seed":
                raise ValueError(f"space: {each.key} cannot change within a training, as pbt does")

"""A sweep is checked before its first trial: keys, values, rows, schedulers, its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from avs_dist.launch.sweeps.command import build_parser
from avs_dist.launch.sweeps.plan import Plan, claimed, make_plan
from avs_dist.launch.sweeps.setup import Setup

ROOT = Path(__file__).resolve().parents[1]
LR = {"optim.lr": "loguniform(1e-5, 1e-3)"}
EVERY = ("--train.eval_every", "5", "--train.max_steps", "10")


@pytest.fixture
def plan(ms3_shards: Path, tmp_path: Path) -> Any:
    """Makes a plan from the contents of a sweep file and further words."""

    def make(sweep: dict[str, Any], *more: str) -> Plan:
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(sweep))
        words = ["--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(ms3_shards), "--sweep", str(file),
                 *EVERY, *more]  # fmt: skip
        parser = build_parser()
        return make_plan(parser, parser.parse_args(words), words)

    return make


def test_plan_of_a_space(plan: Any) -> None:
    made = plan({"space": LR}, "--sweep.samples", "4", "--optim.name", "adam")
    assert (made.sweep.samples, made.objective, made.out) == (4, "miou", Path("runs/sweeps/small"))
    assert made.bases[""].optim.name == "adam"
    assert made.max_steps("", {"train.max_steps": 7}) == 7
    assert made.command.startswith("avs-dist sweep --config ")
    with pytest.raises(ValueError, match="engine.offload=optimizer needs"):
        made.fits("", {"engine.offload": "optimizer", "engine.zero_stage": 0})


def test_rows_are_laid_over_the_config(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text("optim: {lr: 0.5}\ntrain: {global_batch: 2}\n")
    rows = {"as it is": {}, "other": {"configs": ["row.yaml"], "settings": {"optim.name": "adam"}, "published": [1.5]}}
    made = plan({"rows": rows, "scheduler": {"name": "none"}}, "--optim.lr", "0.25")
    assert [made.bases[row].optim.lr for row in rows] == [0.25, 0.5]
    assert [made.bases[row].optim.name for row in rows] == ["adamw", "adam"]
    assert made.bases["other"].train.global_batch == 2
    assert made.bases["other"].optim.clip_norm == 1.0
    with pytest.raises(FileNotFoundError, match="gone.yaml, a config of a row, is not there"):
        plan({"rows": {"a": {"configs": ["gone.yaml"]}}})


@pytest.mark.parametrize(
    ("sweep", "more", "message"),
    [
        ({"space": {"optim.lrr": "uniform(0, 1)"}}, (), r"unknown config key 'optim.lrr' \(did you mean optim.lr\?\)"),
        ({"space": {"optim": "choice(1, 2)"}}, (), "unknown config key 'optim'"),
        ({"rows": {"a": {"settings": {"optim.lrr": 1}}}}, (), "unknown config key 'optim.lrr'"),
        ({"space": {"train.out_dir": "choice(a, b)"}}, (), "given by the sweep itself"),
        ({"space": LR}, ("--train.eval_every", "0"), "asha compares trials while they train: set train.eval_every"),
        ({"space": {"model.tpavi.stages": "choice([[0], [1]])"}, "samples": 4, "scheduler": {"name": "pbt"}}, (),
         "cannot change within a training"),
        ({"space": {"optim.lr": "grid(1, 2)"}, "samples": 4, "scheduler": {"name": "pbt"}}, (), "no grid"),
        ({"space": LR}, ("--data.shards", "gone"), "gone"),
        ({"space": {"data.shards": "choice(gone)"}}, (), "gone"),
        ({"space": {"engine.zero_stage": "grid(0, 1)", "engine.offload": "grid(none, optimizer)"}}, (),
         "engine.offload=optimizer needs"),
        ({"space": {"train.max_steps": "grid(10, 20)"}}, (), "asha compares trials of the same length"),
        ({"space": LR, "scheduler": {"grace_steps": 11}}, (), "grace_steps=11: more than train.max_steps=10"),
        ({"rows": {"a": {"settings": {"train.eval_every": 0}}}}, (), "asha compares trials while they train"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_trial(
    plan: Any, sweep: dict[str, Any], more: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(sweep, *more)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"space": {"optim.name": "choice(adam, sgd)"}}, "optim.name"),
        ({"space": {"train.global_batch": "uniform(1, 4)"}}, "train.global_batch"),
        ({"space": {"optim.lr": {"value": "choice(fast)"}}}, "optim.lr"),
        ({"rows": {"a": {"settings": {"optim.lr": "fast"}}}}, "optim.lr"),
        ({"space": LR, "schedular": {"name": "pbt"}}, "schedular"),
        ({"space": LR, "sampels": 3}, "sampels"),
        ({"space": LR, "scheduler": {"name": "hyperband"}}, "scheduler"),
    ],
)
def test_values_of_the_wrong_type_are_named(
    plan: Any, sweep: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan(sweep)
    error = capsys.readouterr().err
    assert error.startswith("avs-dist sweep: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_folder_belongs_to_one_sweep(plan: Any, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))

    def take(sweep: dict[str, Any], *more: str, resume: bool = True) -> None:
        with claimed(plan(sweep, *out, *more), resume):
            pass

    take({"space": LR, "samples": 4}, resume=False)
    take({"space": LR, "samples": 6, "retries": 5, "objective": "f_score"})  # more of it
    for resume, other, message in (
        (False, {"space": LR, "samples": 6}, "go on with it by --resume"),
        (True, {"space": {"optim.lr": "uniform(0, 1)"}, "samples": 6}, "a sweep of other settings .sweep.space"),
        (True, {"space": LR, "samples": 5}, "the sweep has 6 already"),
    ):
        with pytest.raises(ValueError, match=message):
            take(other, resume=resume)
    with pytest.raises(ValueError, match=r"optim\.clip_norm 1\.0 there, 2\.0 here"):
        take({"space": LR, "samples": 6}, "--optim.clip_norm", "2")
    mine = plan({"space": LR, "samples": 6}, *out)
    with claimed(mine, resume=True), pytest.raises(RuntimeError, match="a sweep is running there"):
        take({"space": LR, "samples": 6})


def test_trials_take_turns_where_they_do_not_fit_together(plan: Any) -> None:
    def room(there: dict[str, float], **sweep: Any) -> int:
        made = plan({"space": LR, "samples": 4, **sweep})
        return Setup.of(made, there).room(made, there)

    two = {"workers": 2, "cpus": 2}
    assert room({"CPU": 4.0}, resources={"cpus": 2}) == 3  # one more waits, which lets a cluster grow
    assert room({"CPU": 9.0}, resources=two) == 2
    assert room({"CPU": 9.0}, resources={**two, "concurrent": 1}) == 1
    assert room({"CPU": 8.0, "GPU": 2.0}) == 3  # a GPU each, where there are any
    assert room({"CPU": 8.0, "GPU": 2.0}, resources={"gpus": 0.5}) == 5
    assert room({"CPU": 2.0}, scheduler={"name": "pbt"}) == 4
    with pytest.raises(ValueError, match="pbt trains all its 4 trials side by side, but 2 of 2 workers"):
        room({"CPU": 9.0}, resources=two, scheduler={"name": "pbt"})
    with pytest.raises(ValueError, match="a trial of 2 workers with 2 CPU each does not fit: there are 3 CPU"):
        room({"CPU": 3.0}, resources=two)

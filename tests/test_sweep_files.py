"""The results of a sweep in its folder: trials.csv, best.yaml, and its trials on TensorBoard."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from avs_dist.config import Config, OptimConfig, TrainConfig, from_dict, to_dict
from avs_dist.launch.sweeps.files import write_hparams, write_results
from avs_dist.launch.sweeps.outcome import Fork, Outcome
from avs_dist.launch.sweeps.summary import Summary
from avs_dist.launch.train import parse_config

SWEEP = Summary("a sweep", "miou", "max", "avs-dist sweep", "random", "asha", "finished", 0.0, 60.0)


def outcome(folder: Path, number: int, scores: tuple[tuple[int, float], ...], **values: Any) -> Outcome:
    """A trial with the folder of a run that could have made it."""
    place = folder / "trials" / f"{number:04d}"
    settings = values.pop("settings", {"optim.lr": 1e-4 * (number + 1)})
    train = TrainConfig(out_dir=str(place), resume=True, fork_from="elsewhere" if values.get("forks") else None)
    config = replace(Config(), optim=OptimConfig(lr=settings.get("optim.lr", 3e-4)), train=train, seed=number)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    state, mode = values.pop("state", "complete"), values.pop("mode", "max")
    return Outcome(number, state, settings, mode, place, scores=scores, **values)


def test_csv_has_every_trial_with_all_digits(tmp_path: Path) -> None:
    third = 1 / 3
    settings = {"optim.lr": third, "optim.name": "adamw", "data.x": None, "data.mirror": False, "model.sizes": [1, 2]}
    trials = [
        outcome(tmp_path, 0, ((10, third), (20, 0.1)), settings=settings, starts=2, seconds=1.5, published=(48.2,)),
        outcome(tmp_path, 1, ((10, math.nan),), label='a, "quoted"\nlabel', state="failed", reason="x; y"),
        outcome(tmp_path, 2, (), settings={"seed": 7}, state="waiting"),
    ]
    write_results(tmp_path, replace(SWEEP, published=("mIoU", "F")), trials)
    with open(tmp_path / "trials.csv", newline="") as file:
        first, second, third_row = csv.DictReader(file)
    assert (float(first["best"]), first["best_step"], float(first["last"]), first["last_step"]) == (
        third,
        "10",
        0.1,
        "20",
    )
    assert float(first["optim.lr"]) == third
    assert (first["optim.name"], first["data.x"], first["data.mirror"]) == ("adamw", "null", "false")
    assert json.loads(first["model.sizes"]) == [1, 2]
    assert (first["starts"], first["seconds"], first["seed"]) == ("2", "1.5", "")
    assert (first["published mIoU"], first["published F"], first["folder"]) == ("48.2", "", "trials/0000")
    assert (second["label"], second["state"], second["reason"]) == ('a, "quoted"\nlabel', "failed", "x; y")
    assert (second["best"], second["best_step"], second["last"]) == ("", "", "nan")
    assert (third_row["seed"], third_row["optim.lr"], third_row["last"], third_row["last_step"]) == ("7", "", "", "")


@pytest.mark.parametrize(("mode", "number", "score"), [("max", 1, "0.75 at step 20"), ("min", 0, "0.25 at step 10")])
def test_best_yaml_trains_the_best_trial_anew(tmp_path: Path, mode: Any, number: int, score: str) -> None:
    trials = [
        outcome(tmp_path, 0, ((10, 0.25), (20, 0.5)), mode=mode),
        outcome(tmp_path, 1, ((10, 0.5), (20, 0.75)), mode=mode),
        outcome(tmp_path, 2, ((10, math.nan),), mode=mode),
    ]
    write_results(tmp_path, replace(SWEEP, mode=mode, title="tit\nseed: 13\n#le"), trials)
    text = (tmp_path / "best.yaml").read_text()
    assert f"tit seed: 13 #le: the best is trial {number}, miou {score}." in text
    assert str(tmp_path / "trials" / f"{number:04d}") in text

    config = parse_config(["--config", str(tmp_path / "best.yaml")])
    assert config.train.out_dir == str(tmp_path / "best")
    assert not Path(config.train.out_dir).exists()
    assert not config.train.resume
    own = from_dict(yaml.safe_load((tmp_path / "trials" / f"{number:04d}" / "config.yaml").read_text()))
    assert replace(config, train=own.train) == own
    assert replace(config.train, out_dir=own.train.out_dir, resume=True) == own.train


def test_best_yaml_of_a_forked_trial_starts_from_scratch_and_says_so(tmp_path: Path) -> None:
    fork = Fork(10, 1, {"optim.lr": 1e-3})
    write_results(tmp_path, SWEEP, [outcome(tmp_path, 0, ((10, 0.9), (20, 0.5)), forks=(fork,))])
    text = (tmp_path / "best.yaml").read_text()
    assert "each on the state of a trial before" in text
    assert "0.5 at step 20" in text  # what it scored with other settings is not theirs
    assert parse_config(["--config", str(tmp_path / "best.yaml")]).train.fork_from is None


def test_no_best_yaml_without_a_score_or_without_its_config(tmp_path: Path) -> None:
    trial = outcome(tmp_path, 0, ((10, 0.5),))
    write_results(tmp_path, SWEEP, [trial])
    assert (tmp_path / "best.yaml").is_file()
    write_results(tmp_path, SWEEP, [replace(trial, scores=((10, math.inf),))])
    assert not (tmp_path / "best.yaml").exists()
    (trial.folder / "config.yaml").unlink()
    write_results(tmp_path, SWEEP, [trial])
    assert not (tmp_path / "best.yaml").exists()
    assert "is gone, so there is no best.yaml" in (tmp_path / "sweep.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.html", "trials", "trials.csv"]


def test_tensorboard_has_the_settings_beside_the_curves(tmp_path: Path) -> None:
    settings = {"optim.lr": 1e-3, "optim.name": "adamw", "data.mirror": True, "data.x": None, "model.sizes": [1, 2]}
    trial = outcome(tmp_path, 3, ((10, 0.5), (20, 0.25)), settings=settings, label="a row", state="stopped")
    with SummaryWriter(str(trial.folder / "tensorboard")) as writer:
        for step, score in trial.scores:
            writer.add_scalar("eval/miou", score, step)
    write_hparams(trial, "miou")

    events = EventAccumulator(str(trial.folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/miou")] == list(trial.scores)
    assert [(event.step, event.value) for event in events.Scalars("best/miou")] == [(10, 0.5)]
    noted = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent(metadata.PLUGIN_NAME).items()
    }
    hparams = noted[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    assert {key: hparams[key].number_value for key in ("optim.lr", "data.mirror")} == {
        "optim.lr": 1e-3,
        "data.mirror": 1,
    }
    texts = {key: hparams[key].string_value for key in ("optim.name", "data.x", "model.sizes", "state", "row")}
    expected = {"optim.name": "adamw", "data.x": "null", "model.sizes": "[1, 2]", "state": "stopped", "row": "a row"}
    assert texts == expected
    metrics = {info.name.tag for info in noted[metadata.EXPERIMENT_TAG].experiment.metric_infos}
    assert metrics == {"eval/miou", "best/miou"}


def test_tensorboard_gets_no_run_of_a_trial_that_never_started(tmp_path: Path) -> None:
    never = Outcome(0, "invalid", {"optim.lr": -1.0}, "max", tmp_path / "trials" / "0000")
    write_hparams(never, "miou")
    assert not list(tmp_path.iterdir())
    unscored = outcome(tmp_path, 1, ())
    write_hparams(unscored, "miou")
    assert list((unscored.folder / "tensorboard").iterdir())


def test_best_of_forks_begins_anew_where_the_sweep_did(tmp_path: Path) -> None:
    forked = outcome(tmp_path, 0, ((10, 0.5), (20, 0.6)), forks=(Fork(10, 1, {"optim.lr": 2e-4}),))
    write_results(tmp_path, replace(SWEEP, init_from="runs/s4"), [forked])
    config = parse_config(["--config", str(tmp_path / "best.yaml")])
    assert (config.train.init_from, config.train.fork_from) == ("runs/s4", None)

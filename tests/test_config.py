"""Config files, dotted overrides and their errors, through the real command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from avs_dist.config import Config, config_hash, from_dict, to_dict
from avs_dist.launch import cli
from avs_dist.launch.train import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_files_compose_from_left_to_right_and_the_command_line_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {neck: {channels: 64}, tpavi: {stages: [2, 3]}}\noptim: {lr: 1e-3}\n")
    second.write_text("model: {neck: {kind: one_layer}}\noptim: {lr: 5e-4}\n")
    config = parse_config(["--config", str(first), "--config", str(second), "--seed", "7", "--local_rank=1"])
    assert config.model.neck.channels == 64
    assert config.model.neck.kind == "one_layer"
    assert config.model.tpavi.stages == (2, 3)
    assert config.optim.lr == 5e-4
    assert config.seed == 7
    assert parse_config(["--config", str(first), "--optim.lr", "2e-4"]).optim.lr == 2e-4


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optm.lr", "1"], "nearest known key: optim.lr"),
        (["--train.resum", "true"], "nearest known key: train.resume"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--engine.zero_stage", "5"], "engine.zero_stage"),
        (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
        (["--data.shards", "no_such_folder", "--train.out_dir", "unused"], "no_such_folder"),
    ],
)
def test_a_bad_setting_is_one_clear_line_and_exit_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(["train", *argv])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_unknown_key_in_a_file_is_named_with_the_nearest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("model: {nek: {channels: 64}}\n")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(path)])
    assert stop.value.code == 2
    assert "nearest known key: model.neck.channels" in capsys.readouterr().err


def test_dict_round_trip_and_hash() -> None:
    config = dataclasses.replace(Config(), seed=3)
    assert from_dict(to_dict(config)) == config
    assert config_hash(config) == config_hash(from_dict(to_dict(config)))
    assert config_hash(config) != config_hash(Config())
    with pytest.raises(ValueError, match="optim.lrr.*did you mean optim.lr"):
        from_dict({"optim": {"lrr": 1.0}})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path: Path) -> None:
    parse_config(["--config", str(path)])
    assert path.read_text().startswith("# ")

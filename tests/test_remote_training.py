"""Training over http with a server that fails: the same run as from the disk; a shard that is gone is damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faulty_server import Fault, serving
from test_damage_in_training import arguments, records, write_set

from avs_dist.launch import shards as shards_command
from avs_dist.launch.evaluate import main as evaluate
from avs_dist.launch.train import main as train
from avs_dist.launch.train import parse_config
from avs_dist.loader import TrainBatches
from avs_dist.shards.index import ShardIndex


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips in two shards for training, 8 in one for validation."""
    return Path(write_set(tmp_path_factory.mktemp("data") / "set", clips=40).directory)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in records(out, "train")]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_failing_server_does_not_change_the_run(folder: Path, tmp_path: Path, workers: str) -> None:
    train(arguments(folder, tmp_path / "local", "--train.max_steps", "6"))
    faults = {
        "index.json": [Fault(status=503)],
        "train-00000.tar": [Fault(status=500), Fault(cut_at=900_000)],
        "train-00001.tar": [Fault(flip_at=5_000), Fault(delay_s=0.3)],
        "val-00000.tar": [Fault(cut_at=70_000)],
    }
    with serving(folder, faults) as server:
        cache = ("--data.cache_dir", str(tmp_path / "cache"), "--data.workers", workers)
        train(arguments(server.url, tmp_path / "remote", "--train.max_steps", "6", *cache))
        first = {name: server.count(name) for name in faults}
        train(arguments(server.url, tmp_path / "again", "--train.max_steps", "6", *cache))
        again = {name: server.count(name) for name in faults if name != "index.json"}
        assert shards_command.main(["info", server.url]) == 0
        assert evaluate(["--checkpoint", str(tmp_path / "remote"), "--split", "val"]) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "again") == losses(tmp_path / "local")
    assert records(tmp_path / "remote", "eval")[0]["miou"] == records(tmp_path / "local", "eval")[0]["miou"]
    assert not (tmp_path / "remote/damaged.json").exists()
    assert again == {name: count for name, count in first.items() if name != "index.json"}  # all came from the cache


def test_a_cache_that_is_too_small_for_the_shuffle_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clips for training take 2.5 MB."""
    with serving(folder) as server:
        for gigabytes, window, told in (("0.002", "4096", True), ("0.002", "20", False), ("0.003", "4096", False)):
            more = ("--data.cache_gb", gigabytes, "--data.shuffle_window", window)
            config = parse_config(arguments(server.url, tmp_path / "run", *more))
            TrainBatches(config, ShardIndex.load(server.url))
            assert ("fetched again and again" in capsys.readouterr().err) == told


def test_a_shard_that_is_gone_is_damage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--train.max_steps", "10", "--data.cache_dir", str(tmp_path / "cache"))
    with serving(folder, {"train-00001.tar": [Fault(status=404)] * 50}) as server:
        train(arguments(server.url, tmp_path / "run", *more, "--data.max_damaged", "0.6"))
        report = json.loads((tmp_path / "run/damaged.json").read_text())
        assert report["counts"] == {"unreadable": 20}
        assert {clip["shard"] for clip in report["clips"]} == {f"{server.url}/train-00001.tar"}
        with pytest.raises(RuntimeError, match=r"clips of train of http.* data\.max_damaged=0\.01 allows 1"):
            train(arguments(server.url, tmp_path / "strict", *more))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"ftp"):
        train(arguments("ftp://host/shards", tmp_path / "ftp", *more))

"""What a trial does at each of its starts: goes on, forks once, forks again, and never loses its place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from avs_dist.checkpoint import MANIFEST
from avs_dist.config import Config, to_dict
from avs_dist.launch.sweeps import trial
from avs_dist.launch.sweeps.trial import Job, prepare
from avs_dist.saving import seal

START = {"optim.lr": 1e-3}


def checkpoint(trials: Path, number: int, step: int) -> Path:
    folder = trials / f"{number:04d}/checkpoints/step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights of {number} at {step}")
    seal(folder, Config(), step=step, metrics={})
    return folder


def job(trials: Path, **settings: Any) -> Job:
    config = to_dict(Config())
    config["train"]["init_from"] = "runs/s4"
    return Job(1, str(trials / "0001"), config, settings or START)


def test_first_start_and_restart_go_on_in_the_folder(tmp_path: Path) -> None:
    own = checkpoint(tmp_path, 1, 5)
    for origin in (None, str(own)):
        config = prepare(job(tmp_path), origin)
        assert (config.train.out_dir, config.train.resume) == (str(tmp_path / "0001"), True)
        assert (config.optim.lr, config.train.fork_from, config.train.init_from) == (1e-3, None, "runs/s4")
    assert own.is_dir()
    assert trial.settings_of(tmp_path / "0001") == START
    assert trial.settings_of(tmp_path) is None


def test_fork_takes_the_state_of_the_other_and_new_settings(tmp_path: Path) -> None:
    other, own = checkpoint(tmp_path, 0, 10), checkpoint(tmp_path, 1, 5)
    config = prepare(job(tmp_path, **{"optim.lr": 2e-3}), str(other))
    assert config.optim.lr == 2e-3
    assert config.train.init_from is None
    assert not own.exists()
    assert config.train.fork_from is not None
    copied = Path(config.train.fork_from)
    shutil.rmtree(other)  # its run has gone on
    assert (copied / "model.safetensors").read_text() == "weights of 0 at 10"
    (fork,) = trial.forks_of(tmp_path / "0001")
    assert (fork.step, fork.source, fork.settings) == (10, 0, {"optim.lr": 2e-3})


def test_restart_after_a_fork_does_not_fork_again(tmp_path: Path) -> None:
    other = checkpoint(tmp_path, 0, 10)
    prepare(job(tmp_path), str(other))
    own = checkpoint(tmp_path, 1, 15)  # not told yet when it was killed
    config = prepare(job(tmp_path), str(other))
    assert own.is_dir()
    assert len(trial.forks_of(tmp_path / "0001")) == 1
    assert config.train.fork_from is not None
    prepare(job(tmp_path), None)  # a new start of the sweep knows of no origin
    assert own.is_dir()
    assert trial.settings_of(tmp_path / "0001") == START


def test_the_same_origin_again_is_meant_once_the_scheduler_heard_of_progress(tmp_path: Path) -> None:
    other = checkpoint(tmp_path, 0, 10)
    prepare(job(tmp_path), str(other))
    own = checkpoint(tmp_path, 1, 15)
    trial.reported(tmp_path / "0001")
    prepare(job(tmp_path, **{"optim.lr": 5e-4}), str(other))
    assert not own.exists()
    assert len(trial.forks_of(tmp_path / "0001")) == 2
    assert trial.settings_of(tmp_path / "0001") == {"optim.lr": 5e-4}


def test_killed_in_the_middle_of_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, own = checkpoint(tmp_path, 0, 10), checkpoint(tmp_path, 1, 5)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for name, module in (("write_text", trial), ("rmtree", shutil)):  # before and after it is written down
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(job(tmp_path, **{"optim.lr": 2e-3}), str(other))
        assert own.is_dir()
    config = prepare(job(tmp_path, **{"optim.lr": 2e-3}), str(other))
    assert not own.exists()
    assert config.train.fork_from is not None
    assert config.optim.lr == 2e-3
    assert len(trial.forks_of(tmp_path / "0001")) == 1


def test_killed_while_the_state_of_another_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(job(tmp_path, **{"optim.lr": 2e-3}), str(checkpoint(tmp_path, 0, 10)))
    trial.reported(tmp_path / "0001")

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(job(tmp_path, **{"optim.lr": 3e-3}), str(checkpoint(tmp_path, 0, 20)))
    config = prepare(job(tmp_path), None)  # as a sweep that is resumed does
    assert config.optim.lr == 2e-3
    assert config.train.fork_from is not None
    assert config.train.fork_from.endswith("fork-1/step-000010")
    assert (Path(config.train.fork_from) / MANIFEST).is_file()
    prepare(job(tmp_path, **{"optim.lr": 3e-3}), str(tmp_path / "0000/checkpoints/step-000020"))
    assert [path.name for path in sorted((tmp_path / "0001").glob("fork-*"))] == ["fork-2"]


def test_origin_that_was_removed_gives_way_to_the_newest_of_its_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 0, 20)
    config = prepare(job(tmp_path), str(tmp_path / "0000/checkpoints/step-000010"))
    assert config.train.fork_from is not None
    assert config.train.fork_from.endswith("step-000020")
    assert trial.forks_of(tmp_path / "0001")[0].step == 20
    with pytest.raises(RuntimeError, match="no checkpoint to go on from"):
        prepare(job(tmp_path), str(tmp_path / "0002/checkpoints/step-000010"))


def test_other_that_has_come_to_its_end_is_no_origin(tmp_path: Path) -> None:
    prepare(job(tmp_path), None)
    own, other = checkpoint(tmp_path, 1, 990), checkpoint(tmp_path, 0, Config().train.max_steps)
    config = prepare(job(tmp_path, **{"optim.lr": 5e-4}), str(other))  # the settings it would have had
    assert own.is_dir()
    assert config.train.fork_from is None
    assert trial.forks_of(tmp_path / "0001") == ()
    assert config.optim.lr == START["optim.lr"]  # with which it has trained


def test_copies_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_links)
    config = prepare(job(tmp_path), str(checkpoint(tmp_path, 0, 10)))
    assert config.train.fork_from is not None
    assert (Path(config.train.fork_from) / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("sizes differ"), False),
        (NotImplementedError("a kind of RuntimeError"), False),
        (ValueError("can't allocate memory"), False),
        (OSError("can't allocate memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_faults(error: Exception, noted: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error)), trial.noted(tmp_path):
        raise error
    assert bool(trial.told(tmp_path, trial.OUT_OF_MEMORY)) == noted
    prepare(Job(0, str(tmp_path), to_dict(Config()), {}), None)
    assert not trial.told(tmp_path, trial.OUT_OF_MEMORY)  # of an earlier start


def test_settings_that_cannot_train_are_told_from_faults(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), trial.noted(tmp_path):
        raise ValueError("wrong shards\nmore")
    assert trial.told(tmp_path, trial.REFUSED) == "ValueError: wrong shards"
    prepare(Job(0, str(tmp_path), to_dict(Config()), {}), None)
    assert not trial.told(tmp_path, trial.REFUSED)


def test_prints_of_a_trial_are_in_its_log(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from avs_dist.launch.sweeps import trial
print("before", flush=True)
try:
    with trial.printing_to(Path(sys.argv[1])):
        print("within", flush=True)
        raise ValueError("broken")
except ValueError:
    print("after")
"""
    log = tmp_path / "trials/log.txt"
    out = subprocess.run([sys.executable, "-c", program, log], capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == ("before\nafter\n", "")
    assert log.read_text().startswith("within\n")
    assert log.read_text().endswith("ValueError: broken\n")


def test_settings_are_put_into_the_nested_config() -> None:
    config = {"a": {"b": {"c": 1}}, "d": 2}
    assert trial.merged(config, {"a.b.c": 3, "d": [4]}) == {"a": {"b": {"c": 3}}, "d": [4]}
    assert json.dumps(config) == '{"a": {"b": {"c": 1}}, "d": 2}'

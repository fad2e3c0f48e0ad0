"""A signal to one rank, at any moment: all ranks save together and leave with 75, and the resumed run loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from free_ranks import Launched, launched
from safetensors.torch import load_file
from test_damage_in_training import arguments, records, write_set

from avs_dist import interruption, trainer
from avs_dist.checkpoint import find_checkpoint
from avs_dist.engine import Engine
from avs_dist.launch.train import main as train
from avs_dist.modules.denoiser import DDIMSampler
from avs_dist.saving import Saver

MORE = ("--train.max_steps", "4", "--train.eval_every", "2", "--optim.warmup_steps", "3")
DIFFUSION = ("--model.system", "diffusion", *MORE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_set(tmp_path_factory.mktemp("data") / "set", clips=20).directory)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(out) / "model.safetensors")


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(arguments(shards, out, *MORE)) == 0
    return out


def signals_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    """This process gets a signal while it is in that call of a function."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


# where, in which call of it, and the steps that are saved: batches of the evaluation are agreed on, one by one
MOMENTS = {
    "start": (trainer, "build_system", 1, None),
    "warm-up": (Engine, "train_step", 1, 1),
    "training": (Engine, "train_step", 4, 4),
    "evaluation": (Engine, "predict", 1, 2),
    "end of evaluation": (Engine, "predict", 2, 2),
    "saving": (Saver, "save", 1, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_and_the_resumed_run_is_the_uninterrupted_one(
    moment: str, shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    owner, name, call, step = MOMENTS[moment]
    number = signal.SIGUSR1 if moment == "warm-up" else signal.SIGTERM
    before = [signal.getsignal(each) for each in interruption.SIGNALS]
    with monkeypatch.context() as patch:
        signals_at(patch, owner, name, call, number)
        assert train(arguments(shards, tmp_path / "run", *MORE)) == 75
    assert [signal.getsignal(each) for each in interruption.SIGNALS] == before
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped by")]
    assert len(told) == 1
    assert told[0].startswith(f"stopped by {number.name} (rank 0) after step {step or 0}: ")
    assert told[0].endswith("continue with --train.resume true")
    if step is None:
        assert not (tmp_path / "run/checkpoints/last.json").exists()
    else:
        assert f"saved in {tmp_path / 'run/checkpoints' / f'step-{step:06d}'};" in told[0]
    assert train(arguments(shards, tmp_path / "run", *MORE, "--train.resume", "true")) == 0
    assert all(torch.equal(value, weights(tmp_path / "run")[name]) for name, value in weights(whole).items())
    assert records(tmp_path / "run", "eval") == records(whole, "eval")  # what was cut is made up for


def test_a_signal_while_codes_are_sampled(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signals_at(patch, DDIMSampler, "sample", 1, signal.SIGTERM)
        assert train(arguments(shards, tmp_path / "run", *DIFFUSION)) == 75
    assert find_checkpoint(tmp_path / "run").name == "step-000002"
    assert not records(tmp_path / "run", "eval")


def test_a_run_at_its_end_is_not_preempted(shards: Path, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(whole, tmp_path / "run")
    signals_at(monkeypatch, trainer, "build_system", 1, signal.SIGTERM)
    assert train(arguments(shards, tmp_path / "run", *MORE, "--train.resume", "true")) == 0


def test_other_threads_and_plain_calls_set_no_handlers() -> None:
    seen: list[Any] = []

    def note() -> None:
        with interruption.noted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
    before = signal.getsignal(signal.SIGTERM)
    with interruption.noted():
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    assert interruption.received() is None


def begin(run: Launched, out: Path, steps: int) -> None:
    """Wait until the run has made so many steps in all."""
    run.until(lambda: (out / "metrics.jsonl").is_file() and len(records(out, "train")) >= steps)


LONG = ("--train.max_steps", "1000", "--engine.zero_stage", "2", "--train.resume", "true")


@pytest.mark.slow
def test_one_rank_or_the_launcher_gets_the_signal_under_deepspeed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with launched("deepspeed", arguments(shards, out, *LONG)) as run:
        begin(run, out, 3)
        run.ranks()[1].send_signal(signal.SIGUSR1)
        assert run.ends() == 75
        first = find_checkpoint(out)
        assert f"stopped by SIGUSR1 (rank 1) after step {len(records(out, 'train'))}: saved in {first};" in run.told()
    with launched("deepspeed", arguments(shards, out, *LONG)) as run:
        begin(run, out, len(records(out, "train")) + 3)
        assert f"resumed from {first}" in run.told()
        run.launcher_of_ranks().send_signal(signal.SIGTERM)
        assert run.ends() == 1  # the launcher's own; it forwards the signal
        assert f"stopped by SIGTERM (rank 0) after step {len(records(out, 'train'))}: saved in" in run.told()
        assert find_checkpoint(out) != first


@pytest.mark.slow
def test_a_signal_to_all_processes_under_torchrun_ends_no_loading_process(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with launched("torchrun", arguments(shards, out, *LONG, "--data.workers", "1")) as run:
        begin(run, out, 3)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.ends() != 0
        assert f"after step {len(records(out, 'train'))}: saved in {find_checkpoint(out)}" in run.told()
        assert "has no batch" not in run.told()

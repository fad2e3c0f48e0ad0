"""The log of a run on a full disk: told once, no error, and it goes on when there is room."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avs_dist.config import Config, TrainConfig
from avs_dist.damage import DamageLog
from avs_dist.nonfinite import Fault, NonFiniteError, SkippedSteps
from avs_dist.run_log import RunLog
from avs_dist.shards.faults import Damage


@contextmanager
def full(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_full_disk_is_told_once_and_the_log_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(Config(), train=TrainConfig(max_steps=600, log_every=1, out_dir=str(tmp_path)))
    damaged, skipped = DamageLog(10, 1.0, "train of x"), SkippedSteps(10, tmp_path, 0)
    with RunLog(config, first_step=0) as log:
        log.step(0, {"loss": 1.0}, 0.1)
        damaged.add([Damage("train", 3, "c", "s" * 3000, 0, "checksum", "r")])
        with full(2000):
            for step in range(1, 300):
                log.step(step, {"loss": 1.0}, 0.1)
            log.damage(300, damaged)
            error = NonFiniteError(300, [Fault(0, {"bce": "nan"}, False, [], ["clip" * 1000])])
            skipped.add(error)
            log.skipped(error, skipped)
        assert not (tmp_path / "damaged.json").exists()
        log.damage(301, damaged)
        log.evaluation(400, {"miou": 0.5}, {})
    assert capsys.readouterr().err.count("warning: the log in") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]  # whole lines only
    assert 10 < len(steps) < 100
    assert steps == [*range(1, len(steps)), 400]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(steps)
    assert (tmp_path / "damaged.json").is_file()
    assert not list(tmp_path.glob(".*.partial"))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("eval/miou")] == [400]

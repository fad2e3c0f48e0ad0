"""Losses and gradients that are not finite: all ranks skip the step as if it had not been, or stop in the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from free_ranks import DEADLINE_S, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_damage_in_training import arguments, records, write_set

from avs_dist.checkpoint import find_checkpoint
from avs_dist.clip import Clip
from avs_dist.launch.cli import run as command
from avs_dist.launch.train import main as train
from avs_dist.tasks.segmentation import SegmentationTask

# Uni-Code has a codebook and networks that learn in the forward pass, TPAVI batch statistics and two micro-batches
CASES = ["unicode-fp32-0", "unicode-fp32-2", "unicode-fp32-3", "unicode-bf16-1", "tpavi-fp32-2"]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """What both ranks found in each case."""
    command = ["tests/nonfinite_ranks.py", *CASES]
    with started(command, command) as ranks:
        codes = [rank.ends(2 * DEADLINE_S) for rank in ranks]
        assert codes == [0, 0], ranks[0].told()[-3000:] + ranks[1].told()[-3000:]
        lines = [[json.loads(line) for line in rank.told().splitlines() if line.startswith("{")] for rank in ranks]
    return {one["case"]: [one, other] for one, other in zip(*lines, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_leaves_no_trace_on_any_rank(case: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Weights, buffers, moments and step counts are, bit for bit, those of a run that never saw the batch."""
    for rank in found[case]:
        assert rank["differ"] == []
        assert rank["finite"]
        assert rank["compared"] > 100
        assert [told["step"] for told in rank["told"]] == [1, 2]
        loss, gradient = rank["told"]
        assert loss["text"].startswith("step 1: loss is not finite (")
        assert [fault["rank"] for fault in loss["faults"] if "clip0-1-1" in " ".join(fault["clips"])] == [1]
        assert gradient["text"].startswith("step 2: gradient is not finite (")
        assert not any(fault["terms"] for fault in gradient["faults"])
        if case.startswith("unicode"):  # batch statistics carry the gradients of TPAVI to the other rank
            assert [fault["rank"] for fault in gradient["faults"]] == [1]
            assert not gradient["faults"][0]["buffers"]
            assert gradient["faults"][0]["clips"] == [f"clip{i}-1-2" for i in range(4)]
    assert found[case][0]["told"] == found[case][1]["told"]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 training clips, of which one has a sound that overflows in the network, from where it is augmented on."""
    augment = SegmentationTask.augment

    def loud(task: SegmentationTask, batch: Clip, step: int) -> Clip:
        factor_B = torch.tensor([1e30 if key == "train000" else 1.0 for key in batch.key])
        return augment(task, replace(batch, mel_BTFM=batch.mel_BTFM * factor_B[:, None, None, None]), step)

    monkeypatch.setattr(SegmentationTask, "augment", loud)
    return Path(write_set(tmp_path / "set", clips=20).directory)


def test_skipped_steps_are_counted_and_listed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(arguments(shards, run, "--train.max_steps", "5"))  # one epoch
    [bad] = json.loads((run / "nonfinite.json").read_text())["steps"]
    [rank] = bad["ranks"]
    assert "train000" in rank["clips"]
    assert len(rank["clips"]) == 4
    assert rank["terms"] == {}  # a variance that is infinite hides the sound from the loss, and stays
    assert "trunk.audio_encoder" in rank["buffers"][0]
    counts = [line.get("skipped", 0) for line in records(run, "train")]
    assert counts == [int(step >= bad["step"]) for step in range(5)]
    assert ["loss" in line for line in records(run, "train")] == [step != bad["step"] for step in range(5)]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [point.value for point in board.Scalars("train/skipped")] == [1.0] * (5 - bad["step"])
    assert capsys.readouterr().err.count(f"skipped: step {bad['step']}: buffer is not finite (rank 0: trunk.") == 1
    # the next epoch, after a resume: counted on
    train(arguments(shards, run, "--train.max_steps", "10", "--train.resume", "true"))
    assert json.loads((run / "nonfinite.json").read_text())["count"] == records(run, "train")[-1]["skipped"] == 2


def test_too_many_in_a_row_stop_the_run_and_the_steps_done_are_saved(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("--train.global_batch", "20", "--train.max_nonfinite", "1")
    assert command("train", arguments(shards, tmp_path / "row", *every)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "avs-dist train: failed: 2 in a row, train.max_nonfinite=1: step 1: buffer is not finite (rank 0: " in last
    assert "lower optim.lr" in last
    assert find_checkpoint(tmp_path / "row").name == "step-000001"
    assert json.loads((tmp_path / "row/nonfinite.json").read_text())["count"] == 2
    assert command("train", arguments(shards, tmp_path / "none", "--train.max_nonfinite", "0")) == 1
    assert "failed: step" in capsys.readouterr().err.splitlines()[-1]
    assert not any(line.get("skipped") for line in records(tmp_path / "none", "train"))

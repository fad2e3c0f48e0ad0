"""Real trainings over shards from strangers: they run to the end or stop with a report, and lose nothing else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tampered_shards import Malicious, appended, edited, rewrite, with_members

from avs_dist.checkpoint import data_state, find_checkpoint
from avs_dist.damage import NoBatchError, TooManyDamagedError
from avs_dist.engine import Engine
from avs_dist.launch.evaluate import main as evaluate
from avs_dist.launch.train import main as train
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import encode_clip
from avs_dist.shards.schema import Sample
from avs_dist.shards.write import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
SIZE, SECONDS, CLIPS = 32, 2, 200


def write_set(folder: Path, seed: int = 0, clips: int = CLIPS) -> ShardIndex:
    """Noise that nothing can be learnt from, in two shards for training and one each for the rest."""
    folder.mkdir()
    draw, shards = np.random.default_rng(seed), []
    for split, first, last in (("train", 0, clips // 2), ("train", clips // 2, clips), ("val", 0, 8)):
        writer = ShardWriter(folder, split, int(first > 0))
        for number in range(first, last):
            sample = Sample(
                f"{split}{number:03d}",
                draw.integers(0, 256, (SECONDS, SIZE, SIZE, 3), dtype=np.uint8),
                draw.standard_normal((SECONDS, 96, 64), dtype=np.float32),
                draw.integers(0, 2, (SECONDS, SIZE, SIZE), dtype=np.uint8),
                np.ones(SECONDS, dtype=bool),
                {"sound": "ok"},
            )
            writer.add(sample, encode_clip(sample))
        shards.append(writer.close())
    settings = {
        "source": "test",
        "source_rule": "-",
        "image_size": SIZE,
        "clip_seconds": SECONDS,
        "frame_format": "raw",
    }
    index = ShardIndex(folder, settings, tuple(shards), ())
    index.save()
    return index


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_set(tmp_path_factory.mktemp("data") / "set").directory)


@pytest.fixture
def copy(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "copy"))


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    """50 steps of 4 clips are one epoch."""
    return [
        "--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(shards), "--data.workers", "0",
        "--train.out_dir", str(out), "--train.max_steps", "50", "--train.global_batch", "4", "--train.log_every", "1",
        "--train.eval_every", "0", "--optim.schedule", "constant", *more,
    ]  # fmt: skip


def records(out: Path, phase: str) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == phase]


def flip_bits(folder: Path, clips: list[int]) -> None:
    """A bit in each of these training clips."""
    for shard in ShardIndex.load(folder).split("train"):
        data = bytearray((folder / shard.name).read_bytes())
        for clip in shard.clips:
            if int(clip.key.removeprefix("train")) in clips:
                data[clip.offset + clip.length // 2] ^= 4
        (folder / shard.name).write_bytes(data)


def hostile(folder: Path, marker: Path, canary: str) -> None:
    """Malice in eight clips, 1 % of the clips with a flipped bit, and one shard cut short by three clips."""
    bad_mel = np.full((SECONDS, 96, 64), np.nan, np.float32)
    evil = pickle.dumps(Malicious(marker))
    bomb = np.lib.format.magic(1, 0) + b"\x76\0{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 9), }"
    changes: list[Callable[[bytes], bytes]] = [
        lambda segment: appended(segment, "train000.pyd", evil),  # not even damage: nobody looks at it
        lambda segment: appended(segment, f"train001/../../{canary}", b"x"),
        lambda segment: appended(segment, canary, b"x"),
        lambda segment: appended(segment, "train003.link", kind=b"2", linkname=canary),
        lambda segment: appended(segment, f"pipe:mkdir {marker}", b"x"),
        lambda segment: appended(segment, "train005.huge", size=7 * 2**30),
        with_members(lambda members: {**members, "frames.npy": bomb}),
        with_members(lambda members: {**members, "mel.npy": pickle.dumps(bad_mel)}),
        with_members(lambda members: {**members, "json": evil}),
    ]
    for number, change in enumerate(changes):
        rewrite(folder, change, "train", number)
    flip_bits(folder, [60, 61])
    last = ShardIndex.load(folder).split("train")[-1]
    os.truncate(folder / last.name, last.clips[-3].offset + 5000)


WATCHED = """
import os, sys
opened, marker = [], {marker!r}

def hook(event, args):
    if event in ("open", "os.mkdir") and {canary!r} in os.path.abspath(str(args[0])):
        opened.append(str(args[0]))
    if event in ("os.system", "subprocess.Popen") and "mkdir" in str(args):
        opened.append(str(args))

sys.addaudithook(hook)
from avs_dist.launch.cli import run
code = run("train", sys.argv[1:])
print("opened", opened, "marker", os.path.exists(marker))
open({canary!r}).close()
print("the hook works:", len(opened) > 0)
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["0.3", "0.02"])
def test_a_hostile_set_is_trained_to_the_end_or_reported(copy: Path, tmp_path: Path, bound: str) -> None:
    """13 of 200 clips are damaged; 0.02 allows 4."""
    marker, canary = tmp_path / "marker", tmp_path / "canary"
    canary.write_text("secret")
    hostile(copy, marker, str(canary))
    command = [sys.executable, "-c", WATCHED.format(marker=str(marker), canary=str(canary))]
    command += arguments(copy, tmp_path / "run", "--data.max_damaged", bound)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "opened [] marker False" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "the hook works: True" in done.stdout
    report = json.loads((tmp_path / "run/damaged.json").read_text())
    told = {kind: done.stderr.count(f"damaged clip ({kind}:") for kind in report["counts"]}
    assert set(told.values()) == {1}  # once for each kind, however many there are
    if bound == "0.3":
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(records(tmp_path / "run", "train")) == 50
        assert report["counts"] == {"tar": 4, "truncated": 3, "checksum": 2, "array": 2, "schema": 1, "oversize": 1}
        assert {clip["name"] for clip in report["clips"]} == {
            *(f"train{n:03d}" for n in (*range(1, 9), 60, 61, 197, 198, 199))
        }
        assert "13 of 200 clips of train" in done.stdout
    else:
        assert done.returncode == 1
        message = done.stderr.splitlines()[-1]
        assert "5 of 200 clips of train" in message
        assert len(report["clips"]) == 5
        assert "data.max_damaged=0.02 allows 4" in message
        assert all(f"{kind} " in message and f"{kind}: shard" in message for kind in report["counts"])
        assert "offset" in message
        steps = len(records(tmp_path / "run", "train"))
        assert find_checkpoint(tmp_path / "run").name == f"step-{steps:06d}"  # what was done is not lost


def test_losses_are_those_of_the_clips_that_stand_in(copy: Path, healthy: Path, tmp_path: Path) -> None:
    """Up to the first damaged clip nothing changes; the run is the same with loading processes."""
    flip_bits(copy, [60])
    steps = ["--train.max_steps", "12"]
    train(arguments(healthy, tmp_path / "healthy", *steps, "--train.global_batch", "16"))
    train(arguments(copy, tmp_path / "damaged", *steps, "--train.global_batch", "16"))
    losses = [[line["loss"] for line in records(tmp_path / run, "train")] for run in ("healthy", "damaged")]
    damaged_at = json.loads((tmp_path / "damaged/damaged.json").read_text())
    assert [clip["name"] for clip in damaged_at["clips"]] == ["train060"]
    differ = [a != b for a, b in zip(*losses, strict=True)]
    assert any(differ)
    assert differ == sorted(differ)
    train(arguments(copy, tmp_path / "workers", *steps, "--train.global_batch", "16", "--data.workers", "2"))
    assert [line["loss"] for line in records(tmp_path / "workers", "train")] == losses[1]


def test_one_damaged_clip_is_allowed_unless_none_is(copy: Path, tmp_path: Path) -> None:
    flip_bits(copy, [100])
    train(arguments(copy, tmp_path / "one", "--data.max_damaged", "0.001"))
    with pytest.raises(RuntimeError, match=r"1 of 200 clips of train .* allows 0"):
        train(arguments(copy, tmp_path / "none", "--data.max_damaged", "0"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_set_that_cannot_be_read_at_all_ends_the_run_with_a_report(tmp_path: Path, workers: str) -> None:
    folder = tmp_path / "set"
    write_set(folder, clips=10)
    flip_bits(folder, list(range(10)))
    more = ("--data.workers", workers)
    with pytest.raises(NoBatchError, match="10 clips one after the other cannot be read"):
        train(arguments(folder, tmp_path / "all", "--data.max_damaged", "1", *more))
    with pytest.raises(TooManyDamagedError, match=r"3 of 10 clips of train .* allows 2; .*CRC-32"):
        train(arguments(folder, tmp_path / "some", "--data.max_damaged", "0.2", *more))
    assert json.loads((tmp_path / "some/damaged.json").read_text())["counts"] == {"checksum": 3}


def test_shards_that_vanish_do_not_lose_the_steps_done(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.train_step

    def train_step(engine: Engine, batches: list[Any], number: int) -> dict[str, float]:
        if number == 3:
            for shard in copy.glob("train-*.tar"):
                shard.unlink()
        return step(engine, batches, number)

    monkeypatch.setattr(Engine, "train_step", train_step)
    with pytest.raises(TooManyDamagedError, match="unreadable"):
        train(arguments(copy, tmp_path / "run"))
    assert find_checkpoint(tmp_path / "run").name == "step-000004"


def test_damage_is_not_forgotten_over_a_resume_and_mended_clips_are_forgiven(
    copy: Path, healthy: Path, tmp_path: Path
) -> None:
    flip_bits(copy, list(range(200)))
    more = ("--data.max_damaged", "0.03", "--train.resume", "true", "--train.max_steps", "2")
    with pytest.raises(TooManyDamagedError, match="7 of 200"):
        train(arguments(copy, tmp_path / "run", *more))
    listed = (tmp_path / "run/damaged.json").read_text()
    with pytest.raises(TooManyDamagedError, match="7 of 200"):
        train(arguments(copy, tmp_path / "run", *more))
    shutil.copytree(healthy, copy, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "run", tmp_path / "begun")
    train(arguments(copy, tmp_path / "begun", "--train.resume", "true", "--train.max_steps", "2"))
    assert len(json.loads(listed)["clips"]) == 7
    train(arguments(copy, tmp_path / "long", "--train.max_steps", "2"))
    (tmp_path / "long/damaged.json").write_text(listed)
    flip_bits(copy, [json.loads(listed)["clips"][0]["clip"], 150])
    train(arguments(copy, tmp_path / "long", "--train.resume", "true", "--train.max_steps", "3"))
    report = json.loads((tmp_path / "long/damaged.json").read_text())
    assert [clip["clip"] for clip in report["clips"]][:1] == [json.loads(listed)["clips"][0]["clip"]]
    assert len(report["clips"]) <= 2


def test_a_clip_that_fits_no_batch_is_damage(copy: Path, tmp_path: Path) -> None:
    loud = with_members(lambda members: {**members, "mel.npy": members["mel.npy"][:128] + b"\xff\xff\x7f\x7f" * 12288})
    rewrite(copy, loud, "train", 0)
    train(arguments(copy, tmp_path / "run", "--data.max_damaged", "0.01"))
    assert json.loads((tmp_path / "run/damaged.json").read_text())["counts"] == {"array": 1}


def test_damage_in_the_evaluation_is_counted_and_does_not_lose_the_training(copy: Path, tmp_path: Path) -> None:
    shard = ShardIndex.load(copy).split("val")[0]
    data = bytearray((copy / shard.name).read_bytes())
    for number in (1, 2):
        data[shard.clips[number].offset + 700] ^= 1
    (copy / shard.name).write_bytes(data)
    train(arguments(copy, tmp_path / "allowed", "--train.max_steps", "3", "--data.max_damaged", "0.25"))
    [measured] = records(tmp_path / "allowed", "eval")
    assert (measured["damaged_clips"], measured["frames"]) == (2, 6 * SECONDS)
    report = json.loads((tmp_path / "allowed/damaged.json").read_text())
    assert [(clip["split"], clip["name"]) for clip in report["clips"]] == [("val", "val001"), ("val", "val002")]
    with pytest.raises(RuntimeError, match=r"2 of 8 clips of val .* allows 1"):
        train(arguments(copy, tmp_path / "run", "--train.max_steps", "3", "--data.max_damaged", "0.2"))
    assert find_checkpoint(tmp_path / "run").name == "step-000003"
    assert not records(tmp_path / "run", "eval")
    # what was not measured when the run had to stop is measured first when it goes on
    more = ("--train.max_steps", "3", "--data.max_damaged", "0.25", "--train.resume", "true")
    train(arguments(copy, tmp_path / "run", *more))
    [measured] = records(tmp_path / "run", "eval")
    assert (measured["step"], measured["frames"]) == (3, 6 * SECONDS)
    assert (tmp_path / "run/checkpoints/best.json").is_file()
    checkpoint = ("--checkpoint", str(tmp_path / "run"), "--split", "val", "--audio", "all")
    with pytest.raises(RuntimeError, match="2 of 8 clips of val .*--max-damaged"):
        evaluate([*checkpoint, "--max-damaged", "0.1"])
    assert evaluate([*checkpoint, "--json", str(tmp_path / "e.json")]) == 0
    rows = json.loads((tmp_path / "e.json").read_text())["results"]
    assert list(rows) == ["real", "muted", "swapped"]
    assert {(row["frames"], row["damaged_clips"]) for row in rows.values()} == {(6 * SECONDS, 2)}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(out) / "model.safetensors")


def test_a_resumed_run_takes_the_very_next_clips(healthy: Path, tmp_path: Path) -> None:
    """Bit for bit the uninterrupted run, from a moved copy of the shards, over the end of an epoch, with a mixture."""
    other = write_set(tmp_path / "other", seed=1, clips=10).directory
    moved = shutil.copytree(healthy, tmp_path / "moved")

    def run(out: str, shards: Path, steps: int, *more: str) -> None:
        mixture = json.dumps({str(shards): 1, str(other): 2})
        more = ("--train.max_steps", str(steps), "--data.mixture", mixture, *more)
        train(arguments(shards, tmp_path / out, *more))

    run("whole", healthy, 8)
    run("halves", healthy, 5)
    run("halves", Path(moved), 8, "--train.resume", "true")
    assert all(
        torch.equal(value, weights(tmp_path / "halves")[name]) for name, value in weights(tmp_path / "whole").items()
    )
    state = data_state(tmp_path / "halves")
    assert state is not None
    assert state.position == 8 * 4


def test_a_resume_may_change_the_batch_and_goes_on_behind_the_clips_taken(healthy: Path, tmp_path: Path) -> None:
    train(arguments(healthy, tmp_path / "run", "--train.max_steps", "3"))
    more = ("--train.resume", "true", "--train.max_steps", "5", "--train.global_batch", "8")
    train(arguments(healthy, tmp_path / "run", *more, "--engine.grad_accumulation", "2"))
    state = data_state(tmp_path / "run")
    assert state is not None
    assert state.position == 3 * 4 + 2 * 8


def test_a_resume_over_other_clips_is_refused(copy: Path, healthy: Path, tmp_path: Path) -> None:
    """The same clips in other shards would come in another order."""
    train(arguments(copy, tmp_path / "run", "--train.max_steps", "2"))
    resume = ("--train.resume", "true", "--train.max_steps", "4")
    shorter = write_set(tmp_path / "shorter", clips=100).directory
    with pytest.raises(ValueError, match="middle of other data.*clips, shards or shares"):
        train(arguments(Path(shorter), tmp_path / "run", *resume))
    with pytest.raises(ValueError, match=r"data\.shuffle_window 4096 there, 7 here"):
        train(arguments(copy, tmp_path / "run", *resume, "--data.shuffle_window", "7"))


def test_sets_of_a_mixture_must_be_alike(copy: Path, healthy: Path, tmp_path: Path) -> None:
    edited(copy, lambda data: data["settings"].update(image_size=64))
    with pytest.raises(ValueError, match=rf"data\.mixture: {copy} and data\.shards=.* differ in image_size"):
        train(arguments(healthy, tmp_path / "run", "--data.mixture", json.dumps({str(copy): 1.0, str(healthy): 1.0})))
    with pytest.raises(ValueError, match=r"data\.mixture=.*positive share"):
        train(arguments(healthy, tmp_path / "run", "--data.mixture", json.dumps({str(healthy): 0.0})))

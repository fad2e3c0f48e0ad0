"""Checkpoints: resume repeats the run bit for bit, damage is survived or named. (Kills: test_kills.)"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avs_dist import checkpoint
from avs_dist.config import Config, NeckConfig
from avs_dist.launch.train import parse_config
from avs_dist.trainer import train

ROOT = Path(__file__).resolve().parents[1]


# of all that draws: codes, their divergences, mirrored clips
ECMVAE = (
    "--model.system", "ecmvae", "--model.latent.dim", "4", "--model.latent.samples", "2", "--loss.avm", "ms3_kl",
    "--loss.segmentation", "structure", "--data.mirror", "0.5",
)  # fmt: skip


@pytest.fixture
def config(ms3_shards: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """A tiny run; with further arguments where a test is parametrised with them."""
    return parse_config(
        ["--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(ms3_shards), "--data.workers", "0",
         "--optim.schedule", "constant", "--train.out_dir", str(tmp_path / "run"), "--train.max_steps", "4",
         "--train.eval_every", "2", "--train.log_every", "1", *getattr(request, "param", ())]
    )  # fmt: skip


def _with_train(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.mark.parametrize("config", [(), ECMVAE], ids=["tpavi", "ecmvae"], indirect=True)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config: Config, tmp_path: Path) -> None:
    whole = load_file(train(config) / "model.safetensors")
    halves = _with_train(config, out_dir=str(tmp_path / "halves"))
    train(_with_train(halves, max_steps=2))
    resumed = train(_with_train(halves, resume=True))
    again = load_file(resumed / "model.safetensors")
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    lines = [json.loads(line) for line in (tmp_path / "halves/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] != "codes"] == [1, 2, 2, 3, 4, 4]


def test_weights_of_another_run_start_a_new_one(config: Config, tmp_path: Path) -> None:
    first = train(_with_train(config, max_steps=2))
    fresh = _with_train(config, max_steps=1, out_dir=str(tmp_path / "fresh"), init_from=str(tmp_path / "run"))
    frozen = dataclasses.replace(fresh, optim=dataclasses.replace(fresh.optim, lr=0.0, weight_decay=0.0))
    started = load_file(train(frozen) / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, started[name]) or "running" in name or "num_batches" in name, name
    other = dataclasses.replace(
        _with_train(fresh, out_dir=str(tmp_path / "other")),
        model=dataclasses.replace(config.model, neck=NeckConfig("one_layer", 16)),
    )
    with pytest.raises(ValueError, match=r"train\.init_from.*another model.*size mismatch"):
        train(other)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        train(_with_train(other, init_from=str(tmp_path / "nowhere")))


def test_a_used_folder_is_refused_without_resume(config: Config) -> None:
    train(_with_train(config, max_steps=1))
    with pytest.raises(ValueError, match="already holds step-000001"):
        train(config)


def test_other_settings_or_damage_are_refused_at_resume(config: Config) -> None:
    folder = train(_with_train(config, max_steps=2))
    other = dataclasses.replace(config, seed=99)
    with pytest.raises(ValueError, match="seed 0 there, 99 here"):
        train(_with_train(other, resume=True))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        train(_with_train(config, resume=True))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load_system(folder)


def test_a_pointer_to_a_deleted_folder_is_ignored(config: Config) -> None:
    folder = train(_with_train(config, max_steps=1))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.find_checkpoint(config.train.out_dir)


def test_a_split_without_masks_is_refused_before_the_first_step(config: Config) -> None:
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_split="vall"))
    with pytest.raises(ValueError, match="no split 'vall'"):
        train(wrong)
    assert not Path(config.train.out_dir).exists()


def test_pointers_and_loading(config: Config) -> None:
    folder = train(config)
    root = folder.parent
    assert json.loads((root / "last.json").read_text())["step"] == 4
    assert json.loads((root / "best.json").read_text())["miou"] >= json.loads((root / "last.json").read_text())["miou"]
    assert len(list(root.glob("step-*"))) <= 3
    system, loaded = checkpoint.load_system(root.parent)
    assert loaded == config
    assert not system.training
    assert checkpoint.image_size(root.parent) == 64
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.find_checkpoint(root.parent / "tensorboard")

"""The training loop: its steps are those of the mirrored clips, worked out by hand from the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avs_dist import trainer
from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.launch.train import parse_config
from avs_dist.loader import TrainBatches
from avs_dist.shards.index import ShardIndex
from avs_dist.systems import build_system
from avs_dist.tasks import build_task

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
ECMVAE = ("--model.system", "ecmvae", "--model.latent.dim", "4", "--loss.segmentation", "structure")
PUBLIC = (*ECMVAE, "--model.compat", "published_code")


def tiny(shards: Path, out: Path, share: float, *more: str) -> Config:
    """Two steps of two micro-batches, which leave the weights as they are."""
    return parse_config(
        ["--config", str(ROOT / "configs/demo.yaml"), "--data.shards", str(shards), "--data.workers", "0",
         "--data.mirror", str(share), "--optim.lr", "0", "--optim.weight_decay", "0", "--train.out_dir", str(out),
         "--train.max_steps", str(STEPS), "--train.log_every", "1", "--engine.grad_accumulation", "2", *more]
    )  # fmt: skip


def by_hand(clip: Clip, step: int, config: Config) -> Clip:
    """All frames of a clip together; in the public code each labelled frame by itself."""
    each_frame = config.model.compat == "published_code"
    frames, masks = clip.frames_BTCHW.clone(), clip.masks_BTHW.clone()
    number_BT = ClipDraws(config.seed, step, clip.key).uniform("mirror", frames.shape[1] if each_frame else 1)
    for b in range(len(clip)):
        for t in range(frames.shape[1]):
            number = number_BT[b, t] if each_frame else number_BT[b, 0]
            if number < config.data.mirror and (clip.labelled_BT[b, t] or not each_frame):
                frames[b, t], masks[b, t] = frames[b, t].flip(-1), masks[b, t].flip(-1)
    return replace(clip, frames_BTCHW=frames, masks_BTHW=masks)


def losses_by_hand(config: Config) -> list[float]:
    """Mean of the micro-batches of each step."""
    torch.manual_seed(config.seed)
    system = build_system(config).train()
    losses = []
    for step, clips in enumerate(TrainBatches(config, ShardIndex.load(config.data.shards))):
        with torch.no_grad():
            each = [sum(system.loss_terms(by_hand(clip, step, config).to("cpu"), step).values()) for clip in clips]
        losses.append(torch.stack(each).mean().item())
    return losses


@pytest.mark.parametrize(
    ("share", "more"), [(0.0, ()), (1.0, ()), (0.5, ECMVAE), (0.5, PUBLIC)], ids=["none", "all", "clips", "frames"]
)
def test_losses_of_a_run_are_those_of_the_mirrored_clips(ms3_shards, tmp_path, share, more):
    config = tiny(ms3_shards, tmp_path / "run", share, *more)
    trainer.train(config)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    got = [line["loss"] for line in lines if line["phase"] == "train"]
    want = losses_by_hand(config)
    assert got == pytest.approx(want, rel=1e-6)
    # and of no other share of them
    other = replace(config, data=replace(config.data, mirror=1.0 - share if share != 0.5 else 0.0))
    assert losses_by_hand(other) != pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("more", [ECMVAE, PUBLIC], ids=["clips", "frames"])
def test_clips_are_mirrored_with_the_draws_of_their_step(ms3_shards, tmp_path, more):
    config = tiny(ms3_shards, tmp_path, 0.5, *more)
    (clip, _), _ = TrainBatches(config, ShardIndex.load(config.data.shards))
    clip.labelled_BT[:, -1] = False
    task, turned = build_task(config), []
    for step in range(8):
        got, want = task.augment(clip, step), by_hand(clip, step, config)
        assert torch.equal(got.frames_BTCHW, want.frames_BTCHW)
        assert torch.equal(got.masks_BTHW, want.masks_BTHW)
        turned.append((got.frames_BTCHW != clip.frames_BTCHW).flatten(2).any(2))
    turned_SBT = torch.stack(turned)
    assert bool((turned_SBT != turned_SBT[:1]).any())
    # whole clips, or single frames and never one without a mask
    assert bool((turned_SBT[..., 0] == turned_SBT[..., 1]).all()) == (more is ECMVAE)
    assert bool(turned_SBT[..., -1].any()) == (more is ECMVAE)


def test_one_clip_at_a_time_cannot_be_contrasted(ms3_shards, tmp_path):
    alone = ("--model.system", "diffusion", "--train.global_batch", "2")
    with pytest.raises(ValueError, match="nothing to contrast"):
        trainer.train(tiny(ms3_shards, tmp_path / "run", 0.0, *alone))
    build_task(tiny(ms3_shards, tmp_path / "run", 0.0, *alone, "--loss.diffusion.contrastive", "0"))

"""Training Uni-Code with the real trainer: evaluation, checkpoints, resume, and what is refused at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avs_dist import checkpoint, trainer
from avs_dist.config import Config
from avs_dist.launch.cli import run
from avs_dist.launch.train import parse_config
from avs_dist.loader import eval_loader
from avs_dist.pairing import mean_code, pairing_score

ROOT = Path(__file__).resolve().parents[1]


def config(shards: Path, out: Path, steps: int, *more: str) -> Config:
    return parse_config(
        ["--config", str(ROOT / "configs/demo_unicode.yaml"), "--data.shards", str(shards), "--data.workers", "0",
         "--train.out_dir", str(out), "--train.max_steps", str(steps), "--train.global_batch", "8",
         "--train.log_every", "1", "--train.eval_every", "2", "--model.unicode.codebook.num_codes", "16",
         "--model.unicode.codebook.reset_after", "2", *more]
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_run_that_is_resumed_ends_as_one_without_a_break(stage, cmg_shards, tmp_path):
    more = ("--engine.zero_stage", stage)
    whole = trainer.train(config(cmg_shards, tmp_path / "whole", 4, *more))
    trainer.train(config(cmg_shards, tmp_path / "halves", 2, *more))
    resumed = trainer.train(config(cmg_shards, tmp_path / "halves", 4, *more, "--train.resume", "true"))
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert {"codebook.codes", "codebook.updates", "club.audio.exp_avg_sq", "club.visual.step"} <= set(expected)
    assert int(expected["codebook.updates"]) == 4
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_best_checkpoint_pairs_best_and_metrics_are_logged(cmg_shards, tmp_path):
    last = trainer.train(config(cmg_shards, tmp_path, 6))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["pairing"] for r in records if r["phase"] == "eval"}
    assert list(scores) == [2, 4, 6]
    best = json.loads((last.parent / "best.json").read_text())
    assert best["pairing"] == max(scores.values()) == scores[best["step"]]
    evaluated = next(r for r in records if r["phase"] == "eval")
    assert {"codes/used", "codes/shared", "codes/agreement", "perplexity/audio"} <= set(evaluated)
    trained = next(r for r in records if r["phase"] == "train")
    assert {"reconstruction", "commitment", "club", "cpc", "align", "observed/agreement"} <= set(trained)


def test_the_logged_pairing_is_that_of_the_split(cmg_shards, tmp_path):
    settings = config(cmg_shards, tmp_path, 2, "--train.global_batch", "3")  # 8 clips: the last batch has padding
    folder = trainer.train(settings)
    system, _ = checkpoint.load_system(folder)
    loader = eval_loader(settings, "val", 8)
    batch, positions = next(iter(loader))
    assert positions == list(range(8))
    encoded = system.encode(batch.to("cpu"))
    means = [mean_code(encoded[m].quantised_BTD, encoded[m].valid_BT) for m in ("audio", "visual")]
    agreement = (encoded["audio"].indices_BT == encoded["visual"].indices_BT).float().mean().item()
    record = next(
        r for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if r["phase"] == "eval"
    )
    assert record["pairing"] == pytest.approx(pairing_score(*means))
    assert record["codes/agreement"] == pytest.approx(agreement)


def test_pairing_score_counts_the_clips_that_are_further_away():
    one = torch.tensor([[0.0], [1.0], [2.0]])
    assert pairing_score(one, one) == 1.0
    assert pairing_score(one, torch.zeros(3, 1)) == 0.5
    # clip 0: own at 2, others at 1 and 0: none further; clip 1: own at 0, both others further; clip 2: own at 2, ...
    other = torch.tensor([[2.0], [1.0], [0.0]])
    assert pairing_score(one, other) == pytest.approx((0 + 2 + 0) / 6)
    with pytest.raises(ValueError, match="at least 2"):
        pairing_score(one[:1], one[:1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.unicode.audio_channels", "128"), r"set model.unicode.audio_channels=16"),
        (("--model.unicode.visual_shape", "[7,7,512]"), r"set model.unicode.visual_shape=\[3, 3, 24\]"),
        (("--model.unicode.inputs", "media"), "set model.unicode.inputs=features"),
        (("--model.unicode.predict_steps", "10"), "model.unicode.predict_steps=10: clips in .* have 10 s"),
        (("--train.global_batch", "1"), "one clip at a time leaves nothing to compare"),
        (("--engine.grad_accumulation", "2"), "engine.grad_accumulation=2: codebook and negatives"),
        (("--model.compat", "published_code"), "configs/unicode/published_code.yaml"),
        (("--data.mirror", "0.5"), "data.mirror=0.5: is for masks"),
        (("--model.system", "tpavi"), "features without masks; set model.system=unicode"),
        (("--data.eval_split", "dev"), "has no split 'dev'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(overrides, message, cmg_shards, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer.train(config(cmg_shards, tmp_path, 2, *overrides))


def test_one_clip_at_a_time_is_enough_where_nothing_is_compared(cmg_shards, tmp_path):
    alone = ("--loss.unicode.cpc", "0", "--loss.unicode.club", "0", "--loss.unicode.align", "cross_reconstruction")
    assert trainer.train(config(cmg_shards, tmp_path, 2, *alone, "--train.global_batch", "1")).is_dir()


def test_clips_are_refused_where_features_are_expected(ms3_shards, tmp_path):
    with pytest.raises(ValueError, match="set model.unicode.inputs=media"):
        trainer.train(config(ms3_shards, tmp_path, 2))


def test_evaluate_says_what_to_use_instead(cmg_shards, tmp_path, capsys):
    trainer.train(config(cmg_shards, tmp_path / "run", 2))
    words = ["--checkpoint", str(tmp_path / "run"), "--shards", str(cmg_shards), "--split", "test"]
    assert run("evaluate", words) == 2
    assert "avs-dist downstream" in capsys.readouterr().err

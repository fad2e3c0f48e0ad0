"""Evaluation over clips: which frames count, and independence of the batches and the ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.metrics import roc_auc_score

from avs_dist.clip import Clip, collate
from avs_dist.evaluate import definitions, evaluate, measure, results_table
from avs_dist.launch.cli import run
from avs_dist.metrics import SegmentationMetrics
from avs_dist.semantic_metrics import SemanticMetrics
from avs_dist.shards.schema import Sample
from avs_dist.systems.base import Prediction

ROOT = Path(__file__).resolve().parents[1]
SPREAD = ["std", "std_right", "std_wrong", "error_auroc"]


def make_samples(num_clips: int = 11, num_classes: int = 2) -> list[Sample]:
    """Clips of 3 to 5 seconds with silent seconds; every fourth is labelled in its first frame only."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(num_clips):
        seconds = 3 + i % 3
        masks = (rng.random((seconds, 16, 16)) < 0.3).astype(np.uint8)
        if num_classes > 2:
            masks *= rng.integers(1, num_classes, masks.shape, dtype=np.uint8)
        masks[rng.random(seconds) < 0.3] = 0
        labelled = np.arange(seconds) < (1 if i % 4 == 3 else seconds)
        samples.append(
            Sample(
                name=f"clip{i}",
                frames_THWC=rng.integers(0, 256, (seconds, 16, 16, 3), dtype=np.uint8),
                mel_TFM=np.zeros((seconds, 96, 64), np.float32),
                masks_THW=masks * labelled[:, None, None].astype(np.uint8),
                labelled_T=labelled,
            )
        )
    return samples


def predict(clip: Clip) -> Prediction:
    """A system that knows nothing of the masks: brightness of the red channel."""
    assert not torch.is_grad_enabled()
    return Prediction(clip.to("cpu").normalised_BTCHW[:, :, 0] * 2)


def predict_several(clip: Clip) -> Prediction:
    """The same mask with a variance, 0 to 0.25: brightness of the green channel."""
    return replace(predict(clip), variance_BTHW=clip.to("cpu").normalised_BTCHW[:, :, 1].sigmoid() / 4)


def predict_classes(clip: Clip) -> Prediction:
    """Background, or the brightest of red, green and blue; a frame of padding is equal in all of them."""
    frames_BTCHW = clip.to("cpu").normalised_BTCHW
    class_logits = torch.cat([torch.zeros_like(frames_BTCHW[:, :, :1]), frames_BTCHW], dim=2)
    return replace(predict_several(clip), class_logits_BTKHW=class_logits)


def batches_of(
    samples: list[Sample], batch_size: int, rank: int = 0, size: int = 1
) -> Iterator[tuple[Clip, list[int]]]:
    """The loader's contract: strided over ranks, equally many batches on each, clip 0 with position -1 as padding."""
    rounds = -(-len(samples) // (batch_size * size))
    mine = list(range(rank, rounds * batch_size * size, size))
    for start in range(0, len(mine), batch_size):
        positions = [p if p < len(samples) else -1 for p in mine[start : start + batch_size]]
        yield collate([samples[max(p, 0)] for p in positions]), positions


def test_counts_labelled_existing_frames_once():
    samples = make_samples()
    expected = SegmentationMetrics()
    for position, sample in enumerate(samples):
        clip = collate([sample])
        kept = torch.from_numpy(sample.labelled_T)
        with torch.no_grad():
            logits = predict(clip).logits_BTHW[0][kept]
        expected.update(logits, clip.masks_BTHW[0][kept], [position] * int(kept.sum()))
    results = evaluate(predict, batches_of(samples, 4))
    assert results == expected.compute()
    assert results["frames"] == sum(int(s.labelled_T.sum()) for s in samples)
    assert results["batch_size"] == 4


def test_spread_of_the_same_pixels():
    std, wrong = [], []
    samples = make_samples()
    for sample in samples:
        clip = collate([sample])
        with torch.no_grad():
            prediction = predict_several(clip)
        std.append(prediction.variance_BTHW[0][sample.labelled_T].double().sqrt().flatten())
        wrong.append(((prediction.logits_BTHW[0] > 0) != (clip.masks_BTHW[0] > 0))[sample.labelled_T].flatten())
    std_P, wrong_P = torch.cat(std).numpy(), torch.cat(wrong).numpy()
    results = evaluate(predict_several, batches_of(samples, 4))
    assert results["std"] == pytest.approx(std_P.mean(), rel=1e-6)
    assert results["std_right"] == pytest.approx(std_P[~wrong_P].mean(), rel=1e-6)
    assert results["std_wrong"] == pytest.approx(std_P[wrong_P].mean(), rel=1e-6)
    assert results["error_auroc"] == pytest.approx(roc_auc_score(wrong_P, std_P), abs=1e-3)
    # nothing new, and nothing else, for a system that gives one mask
    one_mask = evaluate(predict, batches_of(samples, 4))
    assert one_mask == {key: value for key, value in results.items() if key not in SPREAD}


def test_frames_that_do_not_exist_never_count():
    samples = make_samples()
    plain = list(batches_of(samples, 4))
    # a wrong label on the padding of a short clip
    marked = [(replace(clip, labelled_BT=clip.labelled_BT | ~clip.valid_BT), positions) for clip, positions in plain]
    assert not all(bool(clip.valid_BT.all()) for clip, _ in plain)
    assert evaluate(predict_several, marked) == evaluate(predict_several, plain)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 20])
def test_batch_size_does_not_change_a_bit(batch_size):
    samples = make_samples()
    expected = evaluate(predict_several, batches_of(samples, 4))
    assert evaluate(predict_several, batches_of(samples, batch_size)) == expected


def test_published_batch_size_is_a_choice_of_the_metric():
    samples = make_samples()
    one = evaluate(predict, batches_of(samples, 4), batch_size_compat=1)
    four = evaluate(predict, batches_of(samples, 4))
    assert one["f_score"] == four["f_score"]
    assert one["f_score_batched"] != four["f_score_batched"]


def test_classes_of_the_frames_that_count():
    """Neither padding, where truth and prediction agree on background, nor a frame without a label."""
    samples = make_samples(num_classes=4)
    expected = SemanticMetrics(4)
    for sample in samples:
        clip, kept = collate([sample]), torch.from_numpy(sample.labelled_T)
        with torch.no_grad():
            class_logits = predict_classes(clip).class_logits_BTKHW
        expected.update(class_logits[0][kept], clip.masks_BTHW[0][kept])
    plain = list(batches_of(samples, 4))
    measured = measure(predict_classes, plain)
    without_spread = {key: value for key, value in measured.metrics.items() if key not in SPREAD}
    assert without_spread == expected.compute()
    assert measured.classes is not None
    assert [row["frames"] for row in measured.classes.rows()] == expected.results()[1].frames_K.tolist()
    assert {"miou", "frames", "frames_with_sound"} <= set(measured.metrics)
    # the deviation of the sounding probability, as without classes
    spread = evaluate(predict_several, [(binary(clip), positions) for clip, positions in plain])
    assert {key: measured.metrics[key] for key in SPREAD} == {key: spread[key] for key in SPREAD}

    marked = [(replace(clip, labelled_BT=clip.labelled_BT | ~clip.valid_BT), positions) for clip, positions in plain]
    assert not all(bool(clip.valid_BT.all()) for clip, _ in plain)
    assert evaluate(predict_classes, marked) == measured.metrics
    for batch_size in (1, 3, 20):
        assert evaluate(predict_classes, batches_of(samples, batch_size)) == measured.metrics
    assert measure(predict, batches_of(make_samples(), 4)).classes is None


def binary(clip: Clip) -> Clip:
    return replace(clip, masks_BTHW=(clip.masks_BTHW > 0).to(torch.uint8))


def _rank_main(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results = evaluate(predict_several, batches_of(make_samples(), 2, rank, size))
    classes = evaluate(predict_classes, batches_of(make_samples(num_classes=4), 2, rank, size))
    torch.save((results, classes), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_world_size_does_not_change_a_bit(size, tmp_path: Path):
    expected = evaluate(predict_several, batches_of(make_samples(), 4))
    classes = evaluate(predict_classes, batches_of(make_samples(num_classes=4), 4))
    mp.spawn(_rank_main, (size, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=size)
    for rank in range(size):
        assert torch.load(tmp_path / f"out.{rank}", weights_only=True) == (expected, classes)


def test_unlabelled_data_is_an_error():
    sample = make_samples(1)[0]
    unlabelled = Sample("x", sample.frames_THWC, sample.mel_TFM, sample.masks_THW * 0, sample.labelled_T & False)
    with pytest.raises(ValueError, match="no labelled frames"):
        evaluate(predict, batches_of([unlabelled], 1))


def test_table_names_each_number():
    row = evaluate(predict, batches_of(make_samples(), 4))
    text = results_table({"real": row, "swapped": {**row, "miou": row["miou"] - 0.25}})
    lines = text.splitlines()
    assert lines[0].split() == ["sound", "mIoU", "sounding", "silent", "F", "F", "batched"]
    assert lines[1].split()[:2] == ["real", f"{row['miou']:.4f}"]
    assert "real - swapped: +0.2500 mIoU" in text
    assert f"{row['frames']} frames" in text
    assert "best threshold of each batch" in text
    assert text.endswith("(batches of 4)")
    no_silence = {k: v for k, v in row.items() if k != "miou_silent"}
    assert "silent" not in results_table({"real": no_silence}).splitlines()[0]
    assert "std" not in text


def test_table_shows_a_spread_where_there_is_one():
    row = evaluate(predict_several, batches_of(make_samples(), 4))
    lines = results_table({"real": row}).splitlines()
    assert lines[0].split()[-6:] == ["std", "std", "right", "std", "wrong", "AUROC"]
    assert lines[1].split()[-4:] == [f"{row[name]:.4f}" for name in SPREAD]
    assert lines[-1].startswith("AUROC")
    assert lines[-5].endswith("(batches of 4)")


def test_table_of_classes():
    row = evaluate(predict_classes, batches_of(make_samples(num_classes=4), 4))
    text = results_table({"real": row, "muted": {**row, "miou": row["miou"] - 0.125}})
    lines = text.splitlines()
    columns = ["mIoU", "mIoU -bg", "present", "set", "set -bg", "F", "F -bg", "F present"]
    assert lines[0].split("  ", 1)[1].split() == " ".join([*columns, "std std right std wrong AUROC"]).split()
    keys = ["miou", "miou_no_background", "miou_present", "miou_dataset", "miou_dataset_no_background", "f_score",
            "f_score_no_background", "f_score_present", *SPREAD]  # fmt: skip
    assert lines[1].split() == ["real", *(f"{row[key]:.4f}" for key in keys)]
    assert "real - muted: +0.1250 mIoU" in text
    assert "a class never seen counts 0" in text
    for binary_text in ("threshold", "silent frame", "batches of"):
        assert binary_text not in text
    # the file also explains what the table has no room for
    assert set(definitions({"real": row})) == set(row) - {"frames", "frames_with_sound"}


@pytest.fixture(scope="module")
def trained(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps by the real command: enough for the sound to have some effect."""
    out = tmp_path_factory.mktemp("trained") / "run"
    settings = {"data.shards": ms3_shards, "data.workers": 0, "train.out_dir": out, "train.max_steps": 4}
    settings |= {"train.eval_every": 0, "optim.warmup_steps": 0, "model.backbone.name": "resnet10t"}
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "launch/train.py", "--config", "configs/demo.yaml", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


def evaluate_command(trained: Path, out: Path, *options: str) -> list[str]:
    return ["--checkpoint", str(trained), "--split", "train", "--json", str(out), *options]


def test_command_measures_each_kind_of_sound(trained, tmp_path, capsys):
    out = tmp_path / "new folder" / "results.json"
    assert run("evaluate", evaluate_command(trained, out, "--audio", "all")) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert list(written["results"]) == ["real", "muted", "swapped"]
    assert written["split"] == "train"
    assert Path(written["checkpoint"]).name == "step-000004"
    real, muted, swapped = written["results"].values()
    assert real["frames"] == muted["frames"] == swapped["frames"] == 80  # 16 clips of 5 seconds
    assert len({json.dumps(r) for r in (real, muted, swapped)}) == 3  # the sound reaches the network
    assert f"{real['miou']:.4f}" in printed
    assert "real - swapped" in printed
    assert "miou" in written["definitions"]
    assert "std" not in written["definitions"]

    assert run("evaluate", evaluate_command(trained, out, "--audio", "swapped", "--batch", "7")) == 0
    again = json.loads(out.read_text())["results"]
    assert list(again) == ["swapped"]
    # a convolution may round differently in another batch, and a pixel on the threshold then falls on the other side
    assert again["swapped"] == pytest.approx(swapped, abs=5e-4)


def test_command_on_two_ranks_gives_the_same(trained, tmp_path):
    assert run("evaluate", evaluate_command(trained, tmp_path / "one.json")) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "launch/evaluate.py", *evaluate_command(trained, tmp_path / "two.json", "--batch", "3")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("frames, ") == 1  # one table, from rank 0
    one, two = (json.loads((tmp_path / name).read_text())["results"]["real"] for name in ("one.json", "two.json"))
    assert two == pytest.approx(one, abs=5e-4)


def test_command_errors_are_one_line(trained, tmp_path, capsys):
    for options, message in (
        (["--checkpoint", str(tmp_path)], f"no checkpoint in {tmp_path}"),
        (["--checkpoint", str(trained), "--split", "nope"], "nope"),
        (["--checkpoint", str(trained), "--shards", str(tmp_path)], str(tmp_path)),
        (["--checkpoint", str(trained), "--batch", "0"], "--batch 0: must be at least 1"),
    ):
        assert run("evaluate", options) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("avs-dist evaluate: error: ")
        assert message in error

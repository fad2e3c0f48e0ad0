"""Scores over the number of denoising steps: what is measured for each, the picture, and the command."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import small_model, write_checkpoint

from avs_dist.checkpoint import load_system
from avs_dist.clip import Clip
from avs_dist.config import DiffusionConfig
from avs_dist.denoising_figure import LEAST_SPAN, Point, _limits, denoising_png, measure_steps
from avs_dist.evaluate import evaluate
from avs_dist.launch.cli import run
from avs_dist.loader import eval_loader
from avs_dist.report_figures import MODEL, TRUTH
from avs_dist.systems.diffusion import set_num_steps

DIFFUSION = DiffusionConfig(dim=8, hidden=16, widths=(32,) * 7, train_steps=4, steps=2)


@pytest.fixture(scope="module")
def diffusion(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(system="diffusion", diffusion=DIFFUSION)
    return write_checkpoint(tmp_path_factory.mktemp("run") / "ldm", model, ms3_shards)


def places(picture: bytes, colour: str) -> np.ndarray:
    """(row, column) of the pixels of a colour."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(pixels - wanted).sum(-1) < 30)


def test_each_number_of_steps_is_evaluated_by_itself(diffusion: Path) -> None:
    system, config = load_system(diffusion, "cpu")
    with torch.no_grad():  # codes so large that their last digits move the masks
        for name, parameter in system.named_parameters():
            if name.startswith("denoiser."):
                parameter *= 1.5
    batches = eval_loader(config, "test", batch_size=2)
    points = measure_steps(system, batches, [1, 4])
    assert [point.steps for point in points] == [1, 4]
    assert points[0].f_score != points[1].f_score
    for point in points:
        set_num_steps(system, point.steps)
        scores = evaluate(lambda clip: system.predict(clip.to("cpu")), batches)
        assert (point.miou, point.f_score) == (scores["miou"], scores["f_score"])
        assert point.seconds_per_clip > 0


def test_too_many_steps_are_refused_before_anything_is_measured(diffusion: Path) -> None:
    system, _ = load_system(diffusion, "cpu")

    def batches() -> Iterator[tuple[Clip, list[int]]]:
        pytest.fail("measured")
        yield

    with pytest.raises(ValueError, match="steps"):
        measure_steps(system, batches(), [1, DIFFUSION.train_steps + 1])


def test_the_curves_rise_where_the_scores_do() -> None:
    points = [Point(1, 0.2, 0.9, 0.1), Point(5, 0.6, 0.5, 0.1), Point(10, 0.7, 0.4, 0.1)]
    picture = denoising_png(points, "run\nsplit test", 10)
    miou, f_score = places(picture, TRUTH), places(picture, MODEL)
    for found, rises in ((miou, True), (f_score, False)):
        assert len(found) > 100
        left, right = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
        assert (left[0] > right[0]) == rises  # rows count from the top
    assert miou[:, 0].max() < f_score[:, 0].min()  # mIoU above F


def test_a_curve_without_f_where_nothing_sounds() -> None:
    picture = denoising_png([Point(1, 0.2, None, 0.1), Point(2, 0.3, None, 0.1)], "run", 2)
    assert len(places(picture, TRUTH)) > 100
    assert len(places(picture, MODEL)) == 0


@pytest.mark.parametrize(("options", "steps"), [([], [1, 2, 3, 4]), (["--steps", "3", "1", "3"], [1, 3])])
def test_command(
    diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], steps: list[int]
) -> None:
    out, scores = tmp_path / "new folder" / "steps.png", tmp_path / "scores.json"
    checkpoint = ["--checkpoint", str(diffusion), "--split", "test"]
    assert run("report", ["denoising", *checkpoint, "--out", str(out), *options]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    assert [point["steps"] for point in written["points"]] == steps
    assert (written["split"], written["config_steps"]) == ("test", 2)
    assert all(math.isfinite(value) for point in written["points"] for value in point.values())
    assert min(Image.open(out).size) > 500
    printed = capsys.readouterr().out
    for point in written["points"]:
        assert f"{point['steps']:>4} steps  mIoU {point['miou']:.4f}  F {point['f_score']:.4f}" in printed
    assert str(out) in printed
    if 2 in steps:  # those of the config: as `avs-dist evaluate` measures
        assert run("evaluate", [*checkpoint, "--json", str(scores)]) == 0
        real = json.loads(scores.read_text())["results"]["real"]
        assert (written["points"][1]["miou"], written["points"][1]["f_score"]) == (real["miou"], real["f_score"])


def test_command_errors_are_one_line(
    diffusion: Path, ms3_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tpavi = write_checkpoint(tmp_path / "tpavi", small_model(), ms3_shards)
    for checkpoint, options, message in (
        (tpavi, [], "TPAVISystem does not denoise"),
        (diffusion, ["--steps", "1", "5"], "model.diffusion.steps=5: must be from 1 to model.diffusion.train_steps=4"),
        (diffusion, ["--steps", "0"], "--steps 0: must be at least 1"),
        (diffusion, ["--out", "steps.json"], "--out steps.json: must end in .png"),
        (diffusion, ["--split", "nope"], "nope"),
    ):
        assert run("report", ["denoising", "--checkpoint", str(checkpoint), *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("avs-dist report: error: ")
        assert message in error


def test_a_flat_curve_looks_flat():
    low, high = _limits([0.8351, 0.8365])
    assert high - low == pytest.approx(1.1 * LEAST_SPAN)
    low, high = _limits([0.2, 0.8])
    assert (low, high) == pytest.approx((0.17, 0.83))

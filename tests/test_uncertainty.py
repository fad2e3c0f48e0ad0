"""The spread of the masks over prior samples: its measures, its pictures, and how many samples there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import write_video
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from untrained import small_model, write_checkpoint

from avs_dist.clip import Clip
from avs_dist.config import LatentConfig, TPAVIConfig
from avs_dist.launch.cli import run
from avs_dist.predict import predict_video
from avs_dist.systems.base import Prediction, System
from avs_dist.uncertainty import UncertaintyMetrics, set_num_samples

NAMES = ["std", "std_right", "std_wrong", "error_auroc"]


def make_frames(std_P: np.ndarray, wrong_P: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, variance and masks [2,H,W] of pixels with that deviation, of which those were classified wrongly."""
    rng = np.random.default_rng(1)
    truth_P = rng.random(std_P.size) < 0.4
    logits_P = np.where(truth_P != wrong_P, 1.0, -1.0) * rng.uniform(0.1, 3.0, std_P.size)
    size = (2, 10, std_P.size // 20)
    return (
        torch.from_numpy(logits_P).float().view(size),
        torch.from_numpy(std_P**2).view(size),
        torch.from_numpy(truth_P.astype(np.uint8)).view(size),
    )


def measured(std_P: np.ndarray, wrong_P: np.ndarray) -> dict[str, float]:
    metrics = UncertaintyMetrics()
    metrics.update(*make_frames(std_P, wrong_P))
    return metrics.compute()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_equals_the_means_and_the_roc_of_all_pixels(scale):
    """Also where all deviations are tiny, as those of a trained system are."""
    rng = np.random.default_rng(0)
    wrong_P = rng.random(4000) < 0.2
    std_P = scale * np.where(wrong_P, rng.beta(4, 4, 4000), rng.beta(2, 8, 4000)) / 2
    got = measured(std_P, wrong_P)
    assert list(got) == NAMES
    assert got["std"] == pytest.approx(std_P.mean(), rel=1e-5)
    assert got["std_right"] == pytest.approx(std_P[~wrong_P].mean(), rel=1e-5)
    assert got["std_wrong"] == pytest.approx(std_P[wrong_P].mean(), rel=1e-5)
    assert got["error_auroc"] == pytest.approx(roc_auc_score(wrong_P, std_P), abs=1e-3)


def test_ties_count_half():
    rng = np.random.default_rng(0)
    wrong_P = rng.random(2000) < 0.3
    std_P = rng.integers(0, 4, 2000) / 8  # few values: most pairs are ties
    expected = roc_auc_score(wrong_P, std_P)
    assert measured(std_P, wrong_P)["error_auroc"] == pytest.approx(expected, abs=1e-12)
    assert measured(np.full(2000, 0.5), wrong_P)["error_auroc"] == 0.5
    assert measured(wrong_P * 0.5, wrong_P)["error_auroc"] == 1
    assert measured(~wrong_P * 0.5, wrong_P)["error_auroc"] == 0


def test_what_is_not_there_is_left_out():
    assert UncertaintyMetrics().compute() == {}
    std_P = np.full(100, 0.25)
    assert measured(std_P, np.zeros(100, bool)) == {"std": 0.25, "std_right": 0.25}
    assert measured(std_P, np.ones(100, bool)) == {"std": 0.25, "std_wrong": 0.25}


def test_unusable_variances():
    logits, variance, masks = make_frames(np.full(100, 0.25), np.zeros(100, bool))
    with pytest.raises(ValueError, match="one shape"):
        UncertaintyMetrics().update(logits, variance[:1], masks)
    variance[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN in 1 of 100 pixels"):
        UncertaintyMetrics().update(logits, variance, masks)
    metrics = UncertaintyMetrics()
    metrics.update(logits, torch.full_like(variance, -1e-9), masks)  # rounding of E[p^2] - E[p]^2
    assert metrics.compute()["std"] == 0


QUARTERS = (0.09, -1e-9, 0.36, 0.0001)  # variances: usual, of rounding, of std beyond 0.5, small


class QuarterSystem(System):
    """Variances that differ between the quarters of the picture and take turns over the seconds of a window."""

    def __init__(self, spread: bool = True) -> None:
        super().__init__()
        self.spread = spread
        self.num_samples = 8 if spread else None
        self.keys: list[str] = []

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        self.keys += clip.key
        logits_BTHW = clip.frames_BTCHW.mean(2)
        if not self.spread:
            return Prediction(logits_BTHW)
        turns = [torch.from_numpy(np.roll(QUARTERS, t)).float().view(2, 2) for t in range(logits_BTHW.shape[1])]
        variance_1THW = F.interpolate(torch.stack(turns)[None], logits_BTHW.shape[-2:], mode="nearest")
        return Prediction(logits_BTHW, variance_1THW)


def paint(video: Path, out: Path, system: System) -> dict:
    return predict_video(system, video, out, image_size=64, progress=False)


def test_prediction_writes_the_deviation_at_the_size_of_the_video(tmp_path: Path) -> None:
    system = QuarterSystem()
    summary = paint(write_video(tmp_path / "film.mp4", 12, fps=2), tmp_path / "out", system)
    folder = tmp_path / "out" / "film"
    assert summary["uncertainty"] == str(folder / "uncertainty")
    assert sorted(p.name for p in (folder / "uncertainty").iterdir()) == [f"{n:04d}.png" for n in range(1, 7)]
    assert len(set(system.keys)) == 2  # windows are told apart, so that each has draws of its own
    for second in range(6):
        # the second window reaches back to second 1 and gives second 5
        turn = second if second < 5 else 4
        picture = np.asarray(Image.open(folder / "uncertainty" / f"{second + 1:04d}.png"))
        assert picture.shape == (96, 160)
        assert picture.dtype == np.uint8
        variance_HW = np.roll(QUARTERS, turn).reshape(2, 2).repeat(32, 0).repeat(32, 1)
        rows, columns = (np.arange(96) + 0.5) * 64 / 96 - 0.5, (np.arange(160) + 0.5) * 64 / 160 - 0.5
        places = np.meshgrid(rows, columns, indexing="ij")
        std_HW = np.sqrt(map_coordinates(variance_HW, places, order=1, mode="nearest").clip(0))
        assert np.abs(picture - (std_HW * 510).clip(0, 255)).max() < 0.51
        assert summary["seconds"][second]["mean_std"] == pytest.approx(std_HW.mean(), rel=1e-4)


def test_pictures_of_an_earlier_system_do_not_stay(tmp_path: Path) -> None:
    video = write_video(tmp_path / "film.mp4", 4, fps=2)
    paint(video, tmp_path, QuarterSystem())
    summary = paint(video, tmp_path, QuarterSystem(spread=False))
    assert "uncertainty" not in summary
    assert "mean_std" not in summary["seconds"][0]
    assert sorted(p.name for p in (tmp_path / "film").iterdir()) == ["masks", "overlay.mp4", "summary.json"]


def test_number_of_samples() -> None:
    system = QuarterSystem()
    set_num_samples(system, 3)
    assert system.num_samples == 3
    with pytest.raises(ValueError, match="samples 0: must be at least 1"):
        set_num_samples(system, 0)
    with pytest.raises(ValueError, match="QuarterSystem draws no samples"):
        set_num_samples(QuarterSystem(spread=False), 3)


@pytest.fixture(scope="module")
def ecmvae(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(system="ecmvae", latent=LatentConfig(samples=3))
    return write_checkpoint(tmp_path_factory.mktemp("ecmvae"), model, ms3_shards)


def test_commands_take_the_number_of_samples(ecmvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, video = tmp_path / "results.json", write_video(tmp_path / "film.mp4", 4, fps=2)
    spreads = {}
    for samples in ("1", "2", None):
        option = [] if samples is None else ["--samples", samples]
        assert run("evaluate", ["--checkpoint", str(ecmvae), "--split", "val", "--json", str(out), *option]) == 0
        results = json.loads(out.read_text())
        assert run("predict", ["--checkpoint", str(ecmvae), str(video), "--out", str(tmp_path / "out"), *option]) == 0
        summary = json.loads((tmp_path / "out" / "film" / "summary.json").read_text())
        if samples == "1":  # one mask differs from nothing
            assert "std" not in results["results"]["real"]
            assert "uncertainty" not in summary
            continue
        assert set(NAMES) < set(results["definitions"])
        spreads[samples] = results["results"]["real"]["std"], summary["seconds"][0]["mean_std"]
        assert summary["uncertainty"] in capsys.readouterr().out
    assert min(*spreads["2"], *spreads[None]) > 0
    assert spreads["2"] != spreads[None]


def test_samples_of_a_system_without_a_prior_are_an_error(
    ms3_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(tpavi=TPAVIConfig(stages=(3,)))
    checkpoint = str(write_checkpoint(tmp_path / "tpavi", model, ms3_shards))
    video = str(write_video(tmp_path / "film.mp4", 4, fps=2))
    for command, *options in (("evaluate",), ("predict", video, "--out", str(tmp_path / "out"))):
        assert run(command, ["--checkpoint", checkpoint, "--samples", "4", *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error == f"avs-dist {command}: error: samples 4: TPAVISystem draws no samples, it gives one mask"

"""The picture of the latent codes: which frames are in it, one embedding of all codes, and their silhouette score."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from untrained import small_model, write_checkpoint

from avs_dist.clip import Clip
from avs_dist.config import LatentConfig
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.latent_figure import Embedding, choose_frames, collect_codes, embed, latents_png
from avs_dist.launch.cli import run
from avs_dist.report_figures import MODEL, QUIET, TRUTH
from avs_dist.systems.base import LatentCodes, Prediction, System

CODES = ("s_v", "s_a", "c")


def clusters(distance: float, count: int = 40, length: int = 16) -> dict[str, np.ndarray]:
    """Three codes whose centres lie `distance` apart, each with unit variance."""
    rng = np.random.default_rng(0)
    return {name: distance * np.eye(3, length)[i] + rng.normal(size=(count, length)) for i, name in enumerate(CODES)}


class NumberedSystem(System):
    """The codes of a frame are its first pixel (prior), ten times that (posterior, a mixture)."""

    def __init__(self, variational: bool = True) -> None:
        super().__init__()
        self.variational = variational

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        raise NotImplementedError

    def latents(self, clip: Clip) -> LatentCodes:
        number_BT1 = clip.frames_BTCHW[:, :, 0, 0, :1]
        prior = Gaussian(number_BT1, torch.zeros_like(number_BT1))
        experts = tuple(Gaussian(factor * number_BT1, prior.log_var) for factor in (5, 15))
        return LatentCodes({"c": prior}, {"c": Mixture(experts)} if self.variational else {})


def numbered_batches() -> Iterator[tuple[Clip, list[int]]]:
    """Frames 1, 2, 3 ... of clips of 3 and 2 seconds; frame 2 of each clip has no mask; the last clip is padding."""
    valid_BT = torch.tensor([[True, True, True], [True, True, False]])
    labelled_BT = torch.tensor([[True, False, True], [True, False, False]])
    masks = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for start, positions in ((0, [0, 1]), (5, [2, -1])):
        numbers_BT = start + torch.tensor([[1.0, 2, 3], [4, 5, 99]])
        frames = numbers_BT[..., None, None, None].expand(2, 3, 3, 4, 4)
        yield Clip(frames, torch.zeros(2, 3, 96, 64), masks, labelled_BT, valid_BT, ("a", "b")), positions


def test_frames_that_exist_are_collected_once_and_of_the_posterior_those_with_a_mask():
    prior = collect_codes(NumberedSystem(), numbered_batches(), "prior")
    assert prior["c"].tolist() == [[n] for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    posterior = collect_codes(NumberedSystem(), numbered_batches(), "posterior")
    assert posterior["c"].tolist() == [[n] for n in (10, 30, 40, 60, 80)]
    with pytest.raises(ValueError, match="NumberedSystem has no posterior"):
        collect_codes(NumberedSystem(variational=False), numbered_batches(), "posterior")


def test_the_same_frames_are_chosen_of_every_code():
    codes = {name: np.arange(100.0)[:, None] + offset for name, offset in zip(CODES, (0, 1000, 2000), strict=True)}
    chosen = choose_frames(codes, 30, seed=1)
    numbers = chosen["s_v"][:, 0]
    assert len(set(numbers)) == 30
    assert (np.diff(numbers) > 0).all()
    assert (chosen["s_a"][:, 0] == numbers + 1000).all()
    assert (choose_frames(codes, 30, seed=2)["s_v"][:, 0] != numbers).any()
    assert choose_frames(codes, 1000, seed=1)["c"].shape == (100, 1)
    with pytest.raises(ValueError, match="9 frames found: an embedding needs at least 10"):
        choose_frames({"c": np.zeros((9, 4))}, 1000, seed=0)


def test_one_embedding_of_all_codes_and_their_silhouette():
    codes = clusters(distance=30)
    embedding = embed(codes, seed=0)
    assert embedding.labels == [name for name in CODES for _ in range(40)]
    assert embedding.points_P2.shape == (120, 2)
    # by hand: mean distance to the own code (a) and to the nearest other one (b)
    points = np.concatenate(list(codes.values()))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1).reshape(120, 3, 40)
    own = np.arange(120) // 40
    a = distance[np.arange(120), own].sum(1) / 39
    others = distance.mean(2)
    others[np.arange(120), own] = np.inf
    b = others.min(1)
    assert embedding.silhouette == pytest.approx(((b - a) / np.maximum(a, b)).mean(), rel=1e-6)
    # codes that lie apart stay apart in the plane: the nearest neighbour of each point is of its own code
    plane = np.linalg.norm(embedding.points_P2[:, None] - embedding.points_P2[None], axis=-1) + 1e9 * np.eye(120)
    assert (own[plane.argmin(1)] == own).all()
    assert (embed(codes, seed=0).points_P2 == embedding.points_P2).all()
    assert abs(embed(clusters(distance=0), seed=0).silhouette) < 0.05


def test_few_frames_one_code_and_one_dimension_can_be_drawn():
    rng = np.random.default_rng(0)
    one = embed({"z": rng.normal(size=(10, 1))}, seed=0)
    assert one.silhouette is None
    assert np.isfinite(one.points_P2).all()
    assert one.to_dict()["counts"] == {"z": 10}


def test_codes_that_cannot_be_embedded():
    with pytest.raises(ValueError, match="all codes of all frames are equal"):
        embed({name: np.ones((20, 4)) for name in CODES}, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        embed({"c": np.full((20, 4), np.nan)}, seed=0)
    with pytest.raises(ValueError, match=r"different length.*'s_v': 4, 'c': 5"):
        embed({"s_v": np.ones((20, 4)), "c": np.ones((20, 5))}, seed=0)


def test_each_code_has_its_colour_where_its_points_are():
    points = np.concatenate([np.array(centre) + np.zeros((20, 2)) for centre in ((-1, 1), (1, 1), (0, -1))])
    embedding = Embedding(points, [name for name in CODES for _ in range(20)], 0.5)
    picture = np.asarray(Image.open(io.BytesIO(latents_png(embedding, "run\nsplit test"))).convert("RGB")).astype(int)
    centres = []
    for colour in (TRUTH, MODEL, QUIET):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        found = np.argwhere(np.abs(picture[:800] - wanted).sum(-1) < 30)  # above the legend
        assert len(found) > 10
        centres.append(found.mean(0))
    (y_v, x_v), (y_a, x_a), (y_c, x_c) = centres
    assert x_v < x_c < x_a
    assert max(y_v, y_a) < y_c


@pytest.fixture(scope="module")
def ecmvae(ms3_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "vae", small_model(system="ecmvae"), ms3_shards)


@pytest.mark.parametrize("source", ["prior", "posterior"])
def test_command(ecmvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    out = tmp_path / "new folder" / "codes.png"
    options = ["--split", "train", "--frames", "20", "--from", source, "--out", str(out)]
    assert run("report", ["latents", "--checkpoint", str(ecmvae), *options]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["counts"] == dict.fromkeys(CODES, 20)
    assert written["labels"] == [name for name in CODES for _ in range(20)]
    assert np.isfinite(np.array(written["coordinates"])).all()
    assert np.array(written["coordinates"]).shape == (60, 2)
    assert (written["split"], written["from"], written["frames"]) == ("train", source, 20)
    assert min(Image.open(out).size) > 500
    printed = capsys.readouterr().out
    assert printed.startswith(f"silhouette score {written['silhouette']:+.3f}: near 1 each code lies in a region")
    assert str(out) in printed


def test_command_errors_are_one_line(
    ecmvae: Path, ms3_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tpavi = str(write_checkpoint(tmp_path / "tpavi", small_model(), ms3_shards))
    features = small_model(system="ecmvae", latent=LatentConfig(kind="ae"))
    ae = str(write_checkpoint(tmp_path / "ae", features, ms3_shards))
    for checkpoint, options, message in (
        (tpavi, [], "TPAVISystem has no latent codes"),
        (ae, ["--from", "posterior"], "ECMVAESystem has no posterior (model.latent.kind ae)"),
        (str(ecmvae), ["--frames", "9"], "--frames 9: an embedding needs at least 10"),
        (str(ecmvae), ["--seed", "-1"], "--seed -1: must be at least 0"),
        (str(ecmvae), ["--out", "codes.json"], "--out codes.json: must end in .png"),
        (str(ecmvae), ["--split", "nope"], "nope"),
    ):
        assert run("report", ["latents", "--checkpoint", checkpoint, *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("avs-dist report: error: ")
        assert message in error

"""Parameter counts of the networks against those of the papers, and the table that shows them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from avs_dist.launch.benchmarks import models
from avs_dist.launch.cli import run
from avs_dist.systems.base import System

LABELS = [model.label for model in models.MODELS]


@pytest.fixture(scope="module")
def systems() -> dict[str, System]:
    """All networks without their numbers, which takes a second where the numbers take a minute."""
    with torch.device("meta"):
        return {model.label: models.build(model) for model in models.MODELS}


@pytest.mark.parametrize(("label", "published_m"), [("R50", 33.97), ("PVT", 91.18)])
def test_the_published_configuration_has_the_published_size(systems, label, published_m):
    parts = models.count(systems[f"ECMVAE of the public code, {label}"])
    assert models.total(parts) / 1e6 == pytest.approx(published_m, rel=0.03)
    # with what the public code holds and does not use the rest is small
    assert (models.total(parts) + parts[models.UNUSED]) / 1e6 == pytest.approx(published_m, rel=0.003)


def test_latent_diffusion_has_the_published_size(systems):
    """94.48 M with PVT; E_phi, E_psi, D_tau and the denoiser have 4 M of them."""
    system = systems["latent diffusion, PVT"]
    assert models.total(models.count(system)) / 1e6 == pytest.approx(94.48, rel=0.03)
    added = (system.mask_encoder, system.condition_encoder, system.generator.injection, system.denoiser)
    own = sum(parameter.numel() for module in added for parameter in module.parameters())
    assert own / 1e6 == pytest.approx(4.0, abs=0.2)


def test_tpavi_has_the_published_size(systems):
    parts = models.count(systems["TPAVI, PVT"])
    assert round((models.total(parts) + parts[models.UNUSED]) / 1e6, 2) == 101.32
    assert models.total(models.count(systems["TPAVI, R50"])) / 1e6 == pytest.approx(70.50, rel=0.04)


def conv(inputs: int, outputs: int, edge: int, bias: bool = True) -> int:
    return inputs * outputs * edge**2 + bias * outputs


def test_parts_are_those_of_the_papers(systems):
    """Hand arithmetic with the stages of ResNet50 and 128 channels (TPAVI: 256)."""
    stages = (256, 512, 1024, 2048)
    paper = models.count(systems["ECMVAE of the paper, R50"])
    code = models.count(systems["ECMVAE of the public code, R50"])
    tpavi = models.count(systems["TPAVI, R50"])
    assert paper["necks"] == sum(conv(c, 128, 3) for c in stages)
    three_layer = [conv(c, 128, 1, False) + 2 * conv(128, 128, 3, False) + 3 * 2 * 128 for c in stages]
    assert code["necks"] == sum(three_layer)
    assert tpavi["necks"] == sum(4 * conv(c, 256, 3) for c in stages)
    # a block: align (not in the public ECMVAE code), theta, phi, g, W_z, batch and layer normalisation
    block = 3 * conv(128, 64, 1) + conv(64, 128, 1) + 2 * 128 + 2 * 128
    assert code["TPAVI"] == 4 * block
    assert paper["TPAVI"] == 4 * (block + conv(128, 128, 1))
    # seven residual units and a head
    assert paper["decoder"] == 7 * 2 * conv(128, 128, 3) + conv(128, 64, 3) + conv(64, 16, 3) + conv(16, 1, 1)
    assert paper[models.UNUSED] == 2 * conv(128, 128, 3)
    assert code[models.UNUSED] == 2 * 2 * (conv(128, 128, 3, False) + 2 * 128)  # in each of two decoders
    assert tpavi["codes"] == tpavi["training only"] == 0
    assert paper["codes"] == code["codes"]
    fusion_and_injection = 2 * conv(32, 16, 1) + conv(128 + 32, 128, 1)
    second_generator = code["necks"] + fusion_and_injection + code["decoder"]
    heads = 4 * conv(16, 16, 1) - 3 * conv(16, 6, 1)  # of the information bound: paper, public code
    assert code["training only"] - paper["training only"] == second_generator - heads


@pytest.mark.parametrize("label", LABELS)
def test_every_parameter_is_counted_once(systems, label):
    parts = models.count(systems[label])
    everything = sum(parameter.numel() for parameter in systems[label].parameters())
    assert models.total(parts) == everything - parts["audio"]
    assert parts["audio"] == 72_141_184
    assert models.total(parts) == sum(parts[part] for part in models.PARTS if part != "audio")


def test_a_parameter_of_no_part_is_an_error(systems):
    larger = nn.Module()
    larger.trunk, larger.extra = systems["TPAVI, R50"].trunk, nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight belongs to no part"):
        models.count(larger)


def test_the_table_says_how_far_the_counts_are_from_the_paper():
    parts = {"audio": 72_141_184, "backbone": 90_000_000, "decoder": 3_006_600, "unused unit": 500_000}
    counted = dict.fromkeys(models.PARTS, 0) | parts
    result = {"parameters": counted, "ms": {"p20": 1.0, "p50": 123.4, "p80": 200.0}}
    pvt = next(model for model in models.MODELS if model.label == "ECMVAE of the public code, PVT")
    rows = [(pvt, result), (models.MODELS[0], {"failed": "crashed (exit code -9)"})]
    table = models.markdown({"device": "some"}, rows)
    assert "| 93.01 | 91.18 | +2.0% | 93.51 |" in table
    assert f"| {pvt.label} | 1.0 | 123.4 | 200.0 | 46 |" in table
    assert f"- {models.MODELS[0].label}: crashed (exit code -9)" in table
    assert "72.14" in table
    assert models.as_json({}, rows)["rows"][0]["ms"]["p50"] == 123.4


def test_a_prediction_is_timed_with_one_draw(monkeypatch):
    """A small network, as the large ones take a while."""
    model = models.Model("small", ("demo.yaml", "demo_ecmvae.yaml"), 1.0, 1.0)
    drawn = []
    predict = type(models.build(model)).predict
    monkeypatch.setattr(
        type(models.build(model)), "predict", lambda self, clip: drawn.append(self.num_samples) or predict(self, clip)
    )
    found = models.measure(model, "cpu", repeats=2, tiny=True)
    assert 0 < found["ms"]["p20"] <= found["ms"]["p50"] <= found["ms"]["p80"]
    assert drawn == [1, 1, 1]  # once to load, twice timed


@pytest.mark.parametrize("option", [["--dtypes", "float16"], ["--size", "hw=3"], ["--implementations", "ours"]])
def test_options_of_the_hot_spots_are_refused(option, capsys):
    assert run("bench", ["models", *option]) == 2
    said = capsys.readouterr().err
    assert re.search(f"{option[0]}: the networks", said)
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_all_networks(tmp_path, capsys):
    paths = tmp_path / "models.json", tmp_path / "models.md"
    words = [
        "models",
        "--tiny",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--json",
        str(paths[0]),
        "--markdown",
        str(paths[1]),
    ]
    assert run("bench", [*words, "--markdown", str(paths[1])]) == 0
    assert [row["label"] for row in json.loads(paths[0].read_text())["rows"]] == LABELS
    table = paths[1].read_text()
    assert table in capsys.readouterr().out
    assert "Notes" not in table

"""`avs-dist bench scaling`: the limits of the model, its arithmetic by hand, and what the command shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from avs_dist.launch import bench
from avs_dist.launch.benchmarks.scaling_counted import DEFAULT, Counted
from avs_dist.launch.benchmarks.scaling_model import (
    Assumptions,
    collective_seconds,
    efficiency,
    model_step,
    reading_seconds,
    slowest_of,
)
from avs_dist.launch.benchmarks.traffic import ZERO, Sent

# nothing takes time but computing and, where a test says so, one other thing
IDEAL = Assumptions(
    node_gb_s=1e15, network_gb_s=1e15, node_hop_us=0, network_hop_us=0, call_us=0, straggling=0, clips_s=1e15,
    node_read_gb_s=1e15,
)  # fmt: skip
SENT = [
    Sent("all_reduce", ZERO, 4, 1_000_000, 4_000_000),
    Sent("all_gather", ZERO, 2, 1_000_000, 2_000_000),
    Sent("all_reduce", "avs_dist.kernels.moments", 100, 50_000, 400_000),
]
GFLOP = 1000.0


def test_one_gpu_only_computes() -> None:
    step = model_step(Assumptions(), 1, GFLOP, SENT)
    assert step.seconds == step.computing == pytest.approx(4 * 1e12 / (989e12 * 0.3))


@pytest.mark.parametrize("gpus", [2, 8, 64, 1024])
def test_without_limits_every_gpu_counts_in_full(gpus: int) -> None:
    assert efficiency(model_step(IDEAL, gpus, GFLOP, SENT), model_step(IDEAL, 1, GFLOP, SENT)) == pytest.approx(1.0)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_what_a_ring_sends_is_what_was_counted(gpus: int) -> None:
    slow = replace(IDEAL, node_gb_s=1.0, network_gb_s=1.0 / 8, bandwidth_share=1.0)
    for each in SENT:
        assert collective_seconds(slow, gpus, each) * 1e9 == pytest.approx(each.sent_bytes(gpus))
    step = model_step(slow, gpus, GFLOP, SENT)
    counted = sum(each.sent_bytes(gpus) for each in SENT)
    assert (step.gradients + step.weights + step.own) * 1e9 == pytest.approx(counted)
    assert counted == pytest.approx((2 * 4e6 + 2e6 + 2 * 4e5) * (gpus - 1) / gpus)


def test_collectives_of_two_nodes_by_hand() -> None:
    cluster = Assumptions(bandwidth_share=1.0)  # 8 GPUs x 50 GB/s leave a node, 450 GB/s are within it
    gather = collective_seconds(cluster, 16, SENT[1])
    assert gather == pytest.approx(2 * (10e-6 + 14 * 2e-6 + 6e-6) + 2e6 * 15 / 16 / 400e9)
    # few bytes: the tree, along the GPUs of a node and over one link between two, there and back
    few = Sent("all_reduce", ZERO, 1, 10, 40)
    assert collective_seconds(cluster, 16, few) == pytest.approx(10e-6 + 2 * (7 * 2e-6 + 6e-6) + 2 * 40 / 400e9)
    within = collective_seconds(cluster, 8, SENT[1])
    assert within == pytest.approx(2 * (10e-6 + 7 * 2e-6) + 2e6 * 7 / 8 / 450e9)


def test_overlap_hides_no_more_than_there_is_to_hide_behind() -> None:
    slow = replace(IDEAL, node_gb_s=0.1, network_gb_s=0.1)
    bare, half, full = (model_step(replace(slow, overlap=share), 8, GFLOP, SENT) for share in (0.0, 0.5, 1.0))
    assert bare.gradients > bare.computing
    assert half.gradients == pytest.approx(bare.gradients - min(bare.gradients / 2, bare.computing * 2 / 3))
    assert full.gradients == pytest.approx(bare.gradients - bare.computing * 2 / 3)
    assert full.own == bare.own > 0


def test_the_slowest_of_many() -> None:
    assert slowest_of(1) == 0
    assert slowest_of(2) == pytest.approx(0.5642, abs=0.03)  # 1 / sqrt(pi)
    assert slowest_of(1024) == pytest.approx(3.2, abs=0.1)


def test_a_step_is_no_shorter_than_reading_its_clips() -> None:
    hungry = replace(IDEAL, clips_s=10.0)
    assert model_step(hungry, 8, GFLOP, SENT).seconds == pytest.approx(4 / 10)
    assert reading_seconds(replace(hungry, loaders=4), 8) == pytest.approx(1 / 10)
    disk = replace(IDEAL, node_read_gb_s=1.0)
    assert reading_seconds(disk, 1) == pytest.approx(4 * 1.131e6 / 1e9)
    assert reading_seconds(disk, 64) == pytest.approx(8 * 4 * 1.131e6 / 1e9)


def test_the_counts_that_come_along_are_those_of_the_network() -> None:
    counted = Counted.load(DEFAULT)
    assert counted.parameters == 100_140_417
    passes = {
        stage: sum(each.passed_elements for each in sent if each.owner == ZERO) / counted.parameters
        for stage, sent in counted.sent.items()
    }
    assert passes[0] == pytest.approx(2, rel=0.01)
    assert [passes[1], passes[2]] == pytest.approx([3, 3], rel=0.01)
    assert 2 < passes[3] <= 3  # what is gathered again in the backward pass, and what is not


def test_the_command_shows_its_assumptions_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, file = tmp_path / "plots/scaling.png", tmp_path / "scaling.json"
    words = ["scaling", "--gpus", "8", "64", "--stage", "2", "--assume", "network_gb_s=5", "clips=2"]
    assert bench.main([*words, "--out", str(png), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("A model, not a measurement: ")
    assert "- network_gb_s = 5: GB/s of a GPU to other nodes, each way" in shown
    assert "- utilisation = 0.3: " in shown
    found = json.loads(file.read_text())
    assert found["assumed"]["clips"] == 2
    assert [step["gpus"] for step in found["steps"]["2"]] == [1, 8, 64]
    shares = [step["efficiency"] for step in found["steps"]["2"]]
    assert 1 == shares[0] > shares[1] > shares[2] > 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--assume", "bandwith=3"], "--assume bandwith=3: there is gpus_per_node, "),
        (["--assume", "clips=many"], "--assume clips=many: many is no int"),
        (["--assume", "overlap=1.5"], "overlap=1.5: must be at most 1"),
        (["--assume", "node_gb_s=0"], "node_gb_s=0: must be at least"),
        (["--counted", __file__], "is not what `avs-dist bench scaling --count` writes"),
        (["--gpus", "8", "0"], "--gpus 0: at least 1"),
        (["--config", "configs/demo.yaml"], "--config goes with --count"),
        (["--count", "x.json"], "--count: name the network with --config FILE"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as told:  # noqa: PT011  # the message is looked at below
        bench.main(["scaling", *words])
    assert message in str(told.value)

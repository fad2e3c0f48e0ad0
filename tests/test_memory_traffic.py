"""Memory and traffic: ZeRO's arithmetic against live engines, collectives counted, and what switches save memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import switch_ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from avs_dist import world
from avs_dist.config import Config, EngineConfig
from avs_dist.engine import Engine, stop
from avs_dist.launch.benchmarks import memory
from avs_dist.launch.benchmarks.memory_rank import Case, random_batches
from avs_dist.launch.benchmarks.memory_report import excess, held_of
from avs_dist.launch.benchmarks.memory_state import Watch, paper_formula, storages, zero_formula
from avs_dist.launch.benchmarks.ranks import launch
from avs_dist.launch.benchmarks.traffic import ZERO, Sent, TrafficCounter
from avs_dist.launch.train import parse_config
from avs_dist.systems import build_system
from avs_dist.trainer import train

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs/demo.yaml")


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield world.start()
    stop()


def _config(*words: str) -> Config:
    return parse_config(["--config", DEMO, "--train.global_batch", "1", "--optim.warmup_steps", "0", *words])


def test_formulas_of_zero() -> None:
    of_paper = [[paper_formula(stage).bytes(100, ranks) for ranks in (1, 2, 4)] for stage in range(4)]
    assert of_paper == [[1600, 1600, 1600], [1600, 1000, 700], [1600, 900, 550], [1600, 800, 400]]
    fp32 = [[zero_formula(stage, "fp32").bytes(100, ranks) for ranks in (1, 2, 4)] for stage in range(4)]  # type: ignore[arg-type]
    assert fp32 == [[1600, 1600, 1600], [2000, 1400, 1100], [2000, 1200, 800], [2000, 1000, 500]]
    # as the paper, but for gradients of 4 bytes, beside which ZeRO 1 keeps those of 2
    bf16 = [[zero_formula(stage, "bf16").bytes(100, ranks) for ranks in (1, 2, 4)] for stage in range(4)]  # type: ignore[arg-type]
    assert bf16 == [[1600, 1600, 1600], [2000, 1400, 1100], [1800, 1000, 600], [1800, 900, 450]]
    assert [str(zero_formula(stage, "bf16")) for stage in (0, 1, 3)] == ["16P", "8P + 12P/W", "18P/W"]


def test_collectives_are_counted_with_who_asked_for_them(device: torch.device) -> None:
    with TrafficCounter() as counter:
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(5, dtype=torch.float64), async_op=True).wait()
        dist.broadcast(torch.ones(7, dtype=torch.int64), 0)
        dist.all_gather([torch.empty(3, dtype=torch.bfloat16)], torch.ones(3, dtype=torch.bfloat16))
        dist.all_gather_into_tensor(torch.empty(4), torch.ones(4))
        dist.reduce_scatter_tensor(torch.empty(6), torch.ones(6))
        dist.barrier()
        world.any_rank(True)  # one process has no one to ask
    found = {each.collective: each[2:] for each in counter.sent()}
    assert found == {
        "all_reduce": (2, 15, 80),
        "broadcast": (1, 7, 56),
        "all_gather": (2, 7, 22),
        "reduce_scatter": (1, 6, 24),
    }
    assert [each.bytes for each in counter.sent()] == [80, 56, 24, 22]
    reduced = counter.sent()[0]
    assert (reduced.passed_elements, reduced.sent_bytes(1), reduced.sent_bytes(4)) == (30, 0, 120)
    dist.all_reduce(torch.ones(10))
    assert counter.sent()[0].calls == 2  # not what comes after


def test_every_byte_of_an_engine_is_found_once(device: torch.device) -> None:
    case = Case((DEMO,), 1, 0, "fp32")
    [clip], before = random_batches(case), storages()
    engine = Engine(build_system(case.config(), load_pretrained=False), case.config(), device)
    watch = Watch(engine._engine, before)
    for step in range(2):
        engine.train_step([clip], step)
    weights = sum(p.numel() for p in engine.system.parameters())
    buffers = sum(b.numel() * b.element_size() for b in engine.system.buffers())
    held = watch.held()
    kinds = {
        kind: held.by_kind[kind] for kind in ("parameters", "gradients", "masters", "moments", "frozen", "buckets")
    }
    assert kinds.pop("moments") == pytest.approx(8 * weights, rel=1e-3)  # and the number of steps of each
    # the step has let the gradients go; they were there before
    assert kinds == {"parameters": 4 * weights, "gradients": 0, "masters": 0, "frozen": 0, "buckets": 0}
    assert held.most_gradients == 4 * weights
    assert held.by_kind["buffers"] == buffers
    extra = torch.empty(12_345, dtype=torch.uint8)
    assert watch.held().by_kind["other"] == held.by_kind["other"] + extra.nbytes


def test_cases_of_all_parts_leave_their_figures_under_different_names() -> None:
    args = memory._parser().parse_args(["--size", "64"])
    cases = {case for part in memory.PARTS for case in memory._cases(part, args)}
    assert len({case.name for case in cases}) == len(cases) > 30


@pytest.mark.slow
def test_two_ranks_hold_and_send_what_zero_says(tmp_path: Path) -> None:
    """ResNet-18, as a network that is too small has more in its odd ends than ten percent."""
    (tmp_path / "r18.yaml").write_text("model: {backbone: {name: resnet18}}\n")
    files = (DEMO, str(tmp_path / "r18.yaml"))
    cases = [Case(files, 2, 1, "fp32"), Case(files, 2, 2, "bf16"), Case(files, 2, 3, "bf16")]
    found = memory.measure(cases, tmp_path, 300.0)
    assert not [figures["failed"] for figures in found.values() if "failed" in figures]
    for case, passes in zip(cases, (3, 3, 2), strict=True):
        figures = found[case]
        parameters, sent = figures["parameters"], [Sent(**row) for row in figures["sent"]]
        assert abs(excess(case, figures)) < 0.1
        assert sum(each.passed_elements for each in sent) / parameters == pytest.approx(passes, rel=0.01)
        own = sum(each.bytes for each in sent if each.owner != ZERO)
        assert 0 < own < 0.01 * sum(each.bytes for each in sent)
        assert held_of(figures).by_kind["other"] < 0.01 * 4 * parameters
    large = {row["collective"] for row in found[cases[2]]["sent"] if row["elements"] > 0.1 * parameters}
    assert large == {"all_gather", "reduce_scatter"}
    assert memory.exit_code({"state": list(found.items())}, 0.1) == 0
    with pytest.raises(RuntimeError, match=r"resnet|r18.*model state [+-]"):
        memory.exit_code({"state": list(found.items())}, 1e-6)


def _gradients(config: Config) -> tuple[dict[str, Any], int]:
    """Gradients and buffers after a backward pass in training mode, and the bytes kept for it."""
    torch.manual_seed(0)
    system = build_system(config, load_pretrained=False).train()
    if config.engine.activation_checkpointing:
        system.recompute_activations()
    [clip] = random_batches(Case((DEMO,), 1, 0, "fp32"))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)  # stochastic depth draws from it
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.stack(list(system.loss_terms(clip, 0).values())).sum()
    loss.backward()
    found = {name: p.grad for name, p in system.named_parameters()} | dict(system.named_buffers())
    return found, sum(kept.values())


@pytest.mark.parametrize("backbone", ["resnet10t", "pvt_v2_b0"])
def test_checkpointed_activations_change_nothing_but_memory(backbone: str) -> None:
    """Also where batch statistics move and blocks are left out at random."""
    off = _config("--model.backbone.name", backbone)
    plain, much = _gradients(off)
    on = dataclasses.replace(off, engine=dataclasses.replace(off.engine, activation_checkpointing=True))
    recomputed, little = _gradients(on)
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    assert little < 0.75 * much


def test_switches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.offload=optimizer needs engine\.zero_stage 1, 2 or 3"):
        EngineConfig(zero_stage=0, offload="optimizer")
    features = parse_config(["--config", str(ROOT / "configs/demo_unicode.yaml")])
    with pytest.raises(ValueError, match=r"engine\.activation_checkpointing: UnicodeSystem has no backbone"):
        build_system(features, load_pretrained=False).recompute_activations()


@pytest.mark.slow
def test_switches_on_two_ranks_train_as_without(tmp_path: Path) -> None:
    """Blocks repeat the collectives of their batch normalisation; under ZeRO 3 their weights come and go."""
    words = ["resnet10t:1:false:none", "resnet10t:1:true:optimizer"]
    words += ["pvt_v2_b0:3:false:none", "pvt_v2_b0:3:true:optimizer"]
    lines: list[str] = []
    assert launch(switch_ranks.__file__, words, 2, 300.0, lines.append) == ""
    told = [json.loads(line.split(switch_ranks.FOUND)[1]) for line in lines if switch_ranks.FOUND in line]
    found = dict(told)
    assert list(found) == words
    assert [each["left"] for each in found.values()] == [0, 0, 0, 0]
    for plain, switched in ((0, 1), (2, 3)):
        assert found[words[switched]]["losses"] == pytest.approx(found[words[plain]]["losses"], rel=1e-6)
        assert found[words[switched]]["weights"] == pytest.approx(found[words[plain]]["weights"], rel=1e-5, abs=1e-6)
    assert found[words[1]] == found[words[0]]  # ZeRO 3 scales clipped gradients in another order on the host


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_offload_is_resumed_bit_for_bit(stage: int, ms3_shards: Path, tmp_path: Path) -> None:
    """And without it as well: what is stored does not know of it."""
    common = ("--data.shards", str(ms3_shards), "--data.workers", "0", "--optim.schedule", "constant")
    common += ("--engine.zero_stage", str(stage))
    offload = ("--engine.offload", "optimizer")

    def weights(run: str, steps: int, *words: str) -> dict[str, torch.Tensor]:
        out = ("--train.out_dir", str(tmp_path / run), "--train.max_steps", str(steps))
        return load_file(train(_config(*common, *out, *words)) / "model.safetensors")

    whole = weights("whole", 3, *offload)
    weights("halves", 2, *offload)
    shutil.copytree(tmp_path / "halves", tmp_path / "other")
    resumed = weights("halves", 3, *offload, "--train.resume", "true")
    without = weights("other", 3, "--train.resume", "true")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        # ZeRO 3 scales the clipped gradients in another order on the host
        torch.testing.assert_close(without[name], value, rtol=1e-5, atol=1e-6, msg=name)

"""A run goes on with other ranks and another ZeRO stage as if nothing had changed: the real trainer, all systems.

All worlds of 1, 2 and 4 ranks are forked off one process, see `elastic_ranks`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from avs_dist.shards.children import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
MIDDLE, END = 3, 6  # steps

SYSTEMS = {
    "tpavi": ("demo.yaml",),
    "ecmvae": ("demo.yaml", "demo_ecmvae.yaml"),
    "diffusion": ("demo.yaml", "demo_diffusion.yaml"),
    "unicode": ("demo_unicode.yaml",),
}


class Case(NamedTuple):
    """`ranks` and ZeRO `stage` before and after the middle."""

    system: str
    ranks: tuple[int, int]
    stage: tuple[int, int]
    precision: str = "fp32"

    @property
    def reference(self) -> str:
        return f"{self.system}-{self.precision}-1x0"

    @property
    def before(self) -> str:
        return f"{self.system}-{self.precision}-{self.ranks[0]}x{self.stage[0]}"

    @property
    def after(self) -> str:
        return f"{self.before}-then-{self.ranks[1]}x{self.stage[1]}"


TRAINED = [
    Case("tpavi", (1, 2), (0, 3)),
    Case("tpavi", (2, 4), (2, 1)),
    Case("tpavi", (4, 2), (1, 0)),
    Case("unicode", (2, 1), (3, 2)),
    Case("unicode", (2, 2), (3, 3)),
    Case("ecmvae", (2, 1), (2, 3)),
    Case("diffusion", (2, 1), (3, 1)),
    Case("tpavi", (2, 4), (3, 1), "bf16"),
    Case("tpavi", (2, 1), (0, 2), "bf16"),
]

# loaded and saved again at once, and with which engine.offload
RESAVED = [
    (Case("tpavi", (4, 1), (1, 0)), "none"),
    (Case("tpavi", (2, 4), (2, 3)), "optimizer"),
    (Case("unicode", (2, 4), (3, 2)), "none"),
    (Case("ecmvae", (2, 1), (2, 0)), "none"),
    (Case("diffusion", (1, 4), (0, 1)), "none"),
    (Case("tpavi", (2, 1), (3, 0), "bf16"), "none"),
    (Case("tpavi", (2, 1), (0, 1), "bf16"), "none"),
    (Case("tpavi", (2, 1), (3, 2), "bf16"), "optimizer"),
]


class Jobs:
    """The jobs of all cases, each once, in an order in which each finds its source."""

    def __init__(self, out: Path, shards: dict[str, Path]) -> None:
        self.out, self._shards, self.found, self.told = out, shards, {}, ""
        for case in [*TRAINED, *(case for case, _ in RESAVED)]:
            self._train(case, case.reference, 1, 0)
            self._train(case, case.before, case.ranks[0], case.stage[0])
        for case in TRAINED:
            self._train(case, case.after, case.ranks[1], case.stage[1], case.before)
        for case, offload in RESAVED:
            more = ("--engine.offload", offload)
            self._add("save again", case, f"{case.after}-{offload}", case.ranks[1], case.stage[1], case.before, more)
        trouble = ("--train.save_every", "1", "--train.max_steps", "3", "--train.keep_last", "3")
        self._add("one rank in trouble", TRAINED[0], "trouble", 2, 2, None, trouble)
        self._add("train", TRAINED[0], "after trouble", 2, 2, "trouble", ("--train.max_steps", "4"), step="")

    def middle(self, run: str) -> Path:
        return self.out / run / "checkpoints" / f"step-{MIDDLE:06d}"

    def _train(self, case: Case, name: str, ranks: int, stage: int, source: str | None = None) -> None:
        if name not in self.found:
            self._add("train", case, name, ranks, stage, source)

    def _add(
        self,
        kind: str,
        case: Case,
        name: str,
        ranks: int,
        stage: int,
        source: str | None,
        more: tuple[str, ...] = (),
        step: str = f"step-{MIDDLE:06d}",
    ) -> None:
        """A job; the checkpoint `step` of the run `source` is there at its start, with "" all of them."""
        arguments = [
            argument for file in SYSTEMS[case.system] for argument in ("--config", str(ROOT / "configs" / file))
        ]
        shards = self._shards["features" if case.system == "unicode" else "clips"]
        arguments += [
            "--data.shards", str(shards), "--data.workers", "0", "--train.out_dir", str(self.out / name),
            "--train.max_steps", str(END), "--train.save_every", str(MIDDLE), "--train.eval_every", "0",
            "--train.log_every", "1", "--train.global_batch", "4", "--train.resume", str(source is not None).lower(),
            "--optim.schedule", "constant", "--optim.lr", "2e-4", "--engine.zero_stage", str(stage),
            "--engine.precision", case.precision, *more,
        ]  # fmt: skip
        self.found[name] = {
            "kind": kind,
            "ranks": ranks,
            "source": source and str(self.out / source),
            "step": step,
            "out": str(self.out / name),
            "arguments": arguments,
        }


def _free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def runs(ms3_shards: Path, cmg_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All of them, done."""
    out = tmp_path_factory.mktemp("runs")
    jobs = Jobs(out, {"clips": ms3_shards, "features": cmg_shards})
    ports = _free_ports(len(jobs.found))
    listed = [{**job, "port": port} for job, port in zip(jobs.found.values(), ports, strict=True)]
    (out / "jobs.json").write_text(json.dumps(listed))
    command = [sys.executable, "tests/elastic_ranks.py", str(out / "jobs.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580, preexec_fn=die_with_parent
    )
    assert done.returncode == 0, done.stderr[-8000:]
    jobs.told = done.stderr
    return jobs


def losses(run: Path) -> dict[int, dict[str, float]]:
    """The terms of the loss by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    other = ("phase", "step", "lr", "seconds_per_step")
    train = [record for record in records if record["phase"] == "train"]
    return {record["step"]: {k: v for k, v in record.items() if k not in other} for record in train}


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{END:06d}" / "model.safetensors")


def remembered(folder: Path) -> dict[str, Tensor]:
    """Masters, moments and steps of every parameter, whole, put together from the pieces of all ranks."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in sorted((folder / "state").iterdir()):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, start = key.rsplit(":", 1)
                pieces.setdefault(name, {})[int(start)] = file.get_tensor(key)
    whole = {}
    for name, parts in pieces.items():
        if name.startswith("step:"):
            assert len({float(value) for value in parts.values()}) == 1, name
            whole[name] = next(iter(parts.values()))
            continue
        filled = 0
        for start in sorted(parts):
            assert start == filled, name  # no gap, nothing twice
            filled += parts[start].numel()
        whole[name] = torch.cat([parts[start] for start in sorted(parts)])
    return whole


def _id(case: Case) -> str:
    return case.after


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED, ids=_id)
def test_a_run_goes_on_with_other_ranks_and_stage(case: Case, runs: Jobs) -> None:
    resumed, reached = losses(runs.out / case.after), weights(runs.out / case.after)
    assert sorted(resumed) == [MIDDLE + 1, MIDDLE + 2, END]
    if case.ranks[0] == case.ranks[1] and case.stage[0] == case.stage[1]:
        exact, theirs = losses(runs.out / case.before), weights(runs.out / case.before)
        assert resumed == {step: exact[step] for step in resumed}
        assert all(torch.equal(value, theirs[name]) for name, value in reached.items())
    tolerance = {"fp32": 1e-5, "bf16": 2e-3}[case.precision]
    whole, alone = losses(runs.out / case.reference), weights(runs.out / case.reference)
    for step, terms in resumed.items():
        assert terms == pytest.approx(whole[step], rel=tolerance, abs=tolerance), step
    apart = sum(float((alone[name].double() - value.double()).square().sum()) for name, value in reached.items())
    size = sum(float(value.double().square().sum()) for value in alone.values())
    assert (apart / size) ** 0.5 <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("case", "offload"), RESAVED, ids=[f"{case.after}-{off}" for case, off in RESAVED])
def test_what_the_optimisers_remember_is_the_same_bit_for_bit(case: Case, offload: str, runs: Jobs) -> None:
    before = remembered(runs.middle(case.before))
    again = remembered(runs.middle(f"{case.after}-{offload}/again"))
    kinds = {name.split(":")[0] for name in before}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if case.precision == "bf16" else set())
    assert {float(value) for name, value in before.items() if name.startswith("step")} == {MIDDLE}
    assert before.keys() == again.keys()
    for name, value in before.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.slow
def test_all_ranks_agree_where_one_alone_cannot_write_or_sees_damage(runs: Jobs) -> None:
    told = [line for line in runs.told.splitlines() if "warning: " in line]
    room = [line for line in told if "the checkpoint of step 2 could not be written (rank 1: " in line]
    assert len(room) == 1
    assert "File too large" in room[0]
    assert "step-000001 stays the newest; make room" in room[0]
    skipped = [line for line in told if "step-000003 is skipped, and kept as damaged-step-000003" in line]
    assert len(skipped) == 1
    assert "model.safetensors is damaged" in skipped[0]
    before, after = (
        sorted(path.name for path in (runs.out / run / "checkpoints").glob("*step*"))
        for run in ("trouble", "after trouble")
    )
    assert before == ["step-000001", "step-000003"]
    assert after == ["damaged-step-000003", "step-000003", "step-000004"]  # the first went as the fourth came
    assert sorted(losses(runs.out / "after trouble")) == [2, 3, 4]

"""The cases of `bench parity`: a system, a ZeRO stage, numbers of ranks and micro-batches; and what each is equal to.

Nothing here needs DeepSpeed or a process group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avs_dist.config import Config
from avs_dist.launch.train import parse_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TIMEOUT_S = 120.0  # a rank that waits longer for the others ends the launch
Data = Literal["clips", "sequences"]


@dataclass(frozen=True)
class Trained:
    """A system at toy size, with everything switched on that could depend on the number of ranks.

    data:  what it is trained on.
    files: config files, from left to right.
    words: settings after them.
    """

    data: Data
    files: tuple[str, ...]
    words: tuple[str, ...]


MASKS_BATCH = 8
_MASKS = (
    "--train.global_batch",
    str(MASKS_BATCH),
    "--data.mirror",
    "0.5",
    "--optim.lr",
    "1e-4",
    "--optim.warmup_steps",
    "20",
)
SYSTEMS = {
    "tpavi": Trained("clips", ("demo.yaml",), (*_MASKS, "--loss.avm", "ms3_kl")),
    "ecmvae": Trained("clips", ("demo.yaml", "demo_ecmvae.yaml"), (*_MASKS, "--loss.avm", "ms3_kl")),
    "diffusion": Trained("clips", ("demo.yaml", "demo_diffusion.yaml"), (*_MASKS, "--model.diffusion.eta", "0.5")),
    "unicode": Trained(
        "sequences",
        ("demo_unicode.yaml",),
        (
            *("--train.global_batch", "16", "--optim.lr", "4e-4", "--optim.warmup_steps", "20"),
            # few steps with clones: they are so near their originals that rounding may decide which is nearest
            *("--model.unicode.codebook.num_codes", "32", "--model.unicode.codebook.reset_after", "19"),
            *("--loss.unicode.club_lr", "1e-4"),
        ),
    ),
}
# without batch normalisation and contrast a step over several micro-batches is that over the whole batch
SEPARABLE = Trained(
    "clips",
    ("demo.yaml",),
    (*_MASKS, "--model.backbone.name", "pvt_v2_b0", "--model.tpavi.stages", "[]"),
)


@dataclass(frozen=True)
class Case:
    """One short training.

    nudged: it begins with weights that are one rounding away, up or down: what rounding alone makes of a training.
    """

    system: str
    stage: int
    ranks: int
    accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    nudged: bool = False

    @property
    def name(self) -> str:
        parts = [self.system, f"zero{self.stage}", f"{self.ranks}ranks"]
        parts += [f"{self.accumulation}micro"] if self.accumulation > 1 else []
        parts += ["nudged"] if self.nudged else []
        return "-".join(parts)

    @property
    def reference(self) -> Case:
        """The same training in one process, without ZeRO and accumulation."""
        return dataclasses.replace(self, stage=0, ranks=1, accumulation=1, nudged=False)

    def config(self, steps: int, shards: dict[Data, str]) -> Config:
        """Its settings; `shards` by what they hold."""
        trained = trained_as(self.system)
        files = [word for name in trained.files for word in ("--config", str(CONFIGS / name))]
        return parse_config(
            [
                *(*files, *trained.words, "--data.shards", shards[trained.data], "--data.workers", "0"),
                *(
                    "--engine.timeout_s",
                    str(TIMEOUT_S),
                    "--train.max_steps",
                    str(steps),
                    "--engine.zero_stage",
                    str(self.stage),
                ),
                *("--engine.grad_accumulation", str(self.accumulation), "--engine.precision", self.precision),
            ]
        )


def trained_as(system: str) -> Trained:
    return SEPARABLE if system == "separable" else SYSTEMS[system]


def table(
    systems: Sequence[str],
    stages: Sequence[int],
    ranks: Sequence[int],
    accumulations: Sequence[int],
    precision: Literal["fp32", "bf16"],
) -> list[Case]:
    """All cases but the references, in the order of the table: of each system the control first."""
    cases = []
    for system in systems:
        cases += [Case(system, 0, 1, 1, precision, nudged=True)]
        cases += [Case(system, stage, count, 1, precision) for stage in stages for count in ranks]
    cases += [
        Case("separable", stage, count, micro, precision)
        for stage in stages
        for count in ranks
        for micro in accumulations
        if MASKS_BATCH % (count * micro) == 0
    ]
    return [case for case in cases if case != case.reference]

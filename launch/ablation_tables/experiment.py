"""How the rows of a paper get their data and their scores: the commands, and what these leave."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Command = tuple[object, ...]


@dataclass(frozen=True)
class Plan:
    """All that the scores depend on; clips (80% train, 10% val, 10% test), side of the frames in pixels if any."""

    paper: str
    config: tuple[str, ...]
    clips: int
    size: int | None
    steps: int
    seed: int


class Column(NamedTuple):
    """A score: its key in `Experiment.scores`, its heading, and how it is written."""

    key: str
    heading: str
    form: str = ".3f"


class Experiment(ABC):
    """Data and scores.

    setting:        Of the synthetic data of all rows.
    columns:        What is measured of each row.
    published_form: How the scores of the paper are written.
    legend:         What the columns say.
    size:           Default side of the frames in pixels; None: there are none.
    """

    setting: str
    columns: tuple[Column, ...]
    published_form: str
    legend: str
    size: int | None

    @abstractmethod
    def described(self, plan: Plan) -> str:
        """The clips, in words."""

    @abstractmethod
    def data(self, setting: str, clips: Path, shards: Path, plan: Plan) -> tuple[Command, ...]:
        """The commands that make clips, and shards of them."""

    @abstractmethod
    def measure(self, run: Path, shards: Path, out: Path) -> Command:
        """The command that measures a run and writes `out`, at once and last."""

    @abstractmethod
    def scores(self, measured: Path, records: list[dict[str, float]]) -> dict[str, float | None]:
        """By the keys of the columns.

        Args:
            measured: what `measure` wrote.
            records: what training wrote to metrics.jsonl.
        """


class Masks(Experiment):
    """Segmentation of synthetic S4 and MS3 clips."""

    setting = "ms3"
    columns = (Column("miou", "toy mIoU"), Column("f_score", "toy F"))
    published_form = ".2f"
    legend = "mIoU and F are those of `avs-dist evaluate`"
    size = 64

    def described(self, plan: Plan) -> str:
        return f"{plan.clips} synthetic clips of {plan.size} x {plan.size} pixels"

    def data(self, setting: str, clips: Path, shards: Path, plan: Plan) -> tuple[Command, ...]:
        size = ("--size", plan.size)
        return (
            ("synth", "--out", clips, "--setting", setting, "--clips", plan.clips, "--seed", plan.seed, *size),
            ("shards", "build", "--source", f"avsbench-{setting}", "--root", clips, "--out", shards, *size),
        )

    def measure(self, run: Path, shards: Path, out: Path) -> Command:
        return ("evaluate", "--checkpoint", run, "--shards", shards, "--split", "test", "--json", out)

    def scores(self, measured: Path, records: list[dict[str, float]]) -> dict[str, float | None]:
        found = json.loads(measured.read_text())["results"]["real"]
        return {column.key: found[column.key] for column in self.columns}


class Codes(Experiment):
    """Heads on the codes of synthetic paired sequences, trained on one modality and tested on the other."""

    setting = "cmg"
    columns = (
        Column("visual_to_audio", "toy V->A"),
        Column("audio_to_visual", "toy A->V"),
        Column("visual_to_visual", "toy V->V"),
        Column("audio_to_audio", "toy A->A"),
        Column("agreement", "same code", ".1%"),
        Column("shared", "shared codes", ".1%"),
    )
    published_form = ".1f"
    legend = (
        "V->A: accuracy on sound of a head that learnt from pictures, on test clips (`avs-dist downstream classify`); "
        "the paper's scores are with VGGSound-AVEL 40K. Of the validation clips at the end of the training: same code, "
        "the seconds at which modalities have one code; shared codes, the codes in use of which each modality has at "
        "least a fifth of the tokens (Fig. 4)"
    )
    size = None

    def described(self, plan: Plan) -> str:
        return f"{plan.clips} synthetic clips of features"

    def data(self, setting: str, clips: Path, shards: Path, plan: Plan) -> tuple[Command, ...]:
        root = clips / "VGGSound-AVEL"
        return (
            ("synth", "--out", clips, "--setting", setting, "--clips", plan.clips, "--seed", plan.seed),
            ("shards", "build", "--source", "vggsound-avel", "--root", root, "--out", shards),
        )

    def measure(self, run: Path, shards: Path, out: Path) -> Command:
        return ("downstream", "classify", "--checkpoint", run, "--shards", shards, "--json", out)

    def scores(self, measured: Path, records: list[dict[str, float]]) -> dict[str, float | None]:
        results = json.loads(measured.read_text())["results"]
        accuracy = next(result["scores"] for result in results if result["name"] == "accuracy")
        last = [record for record in records if record["phase"] == "eval"][-1]
        pairs = (("visual", "audio"), ("audio", "visual"), ("visual", "visual"), ("audio", "audio"))
        return {
            **{f"{trained}_to_{tested}": accuracy[trained][tested] for trained, tested in pairs},
            "agreement": last["codes/agreement"],
            "shared": last["codes/shared"],
        }

"""Papers and their tables, which are sweeps: the files of configs/sweeps that bear the paper's name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from avs_dist.launch.ablation_tables.experiment import Experiment
from avs_dist.launch.parser import Parser
from avs_dist.launch.sweeps.settings import RowConfig, SweepConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FULL, FROM_S4 = "full", "from_s4"  # variants without a file of their own
START = "train.init_from"  # of rows that go on from a training on S4
Key = int | str  # of a table, or the name of a figure or selection


class Row(NamedTuple):
    """One row of a table; `variant` names its files of configs/, joined by "+", or is one of those above."""

    label: str
    variant: str
    config: RowConfig  # with whole paths


class Table(NamedTuple):
    """A table; `published` are headings of the paper's scores."""

    title: str
    published: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Paper:
    """What `avs-dist ablations` needs to run the tables of a paper at toy scale.

    name:         Its sweeps are configs/sweeps/NAME_table4.yaml, NAME_fig3.yaml and so on.
    title:        In words.
    base:         Files of configs/ that every row starts from.
    out:          Default folder of the results.
    experiment:   Which data, and what is measured.
    clips, steps: Defaults, of the data and of each training.
    """

    name: str
    title: str
    base: tuple[str, ...]
    out: str
    experiment: Experiment
    clips: int
    steps: int

    @property
    def keys(self) -> list[Key]:
        """Tables by number, then figures and selections by name ("fig3")."""
        names = [path.stem.removeprefix(f"{self.name}_") for path in (CONFIGS / "sweeps").glob(f"{self.name}_*.yaml")]
        numbers = sorted(int(name.removeprefix("table")) for name in names if name.startswith("table"))
        return [*numbers, *sorted(name for name in names if not name.startswith("table"))]

    @property
    def known(self) -> str:
        """The keys, as a person would say it."""
        numbers = [key for key in self.keys if isinstance(key, int)]
        names = [key for key in self.keys if isinstance(key, str)]
        return ", ".join([f"{numbers[0]} to {numbers[-1]}", *names])

    def table(self, key: Key) -> Table:
        """
        Raises:
            FileNotFoundError: there is no such sweep.
        """
        name = f"table{key}" if isinstance(key, int) else key
        return read_table(CONFIGS / "sweeps" / f"{self.name}_{name}.yaml")


def read_table(path: Path) -> Table:
    """The rows of a sweep."""
    parser = Parser(prog=path.name)
    parser.add_class_arguments(SweepConfig, "sweep")
    parsed = parser.parse_object({"sweep": yaml.safe_load(path.read_text())})
    sweep: SweepConfig = parser.instantiate_classes(parsed)["sweep"]
    rows = []
    for label, row in sweep.rows.items():
        configs = tuple(str((path.parent / name).resolve()) for name in row.configs)
        rows.append(Row(label, _variant(row), dataclasses.replace(row, configs=configs)))
    return Table(sweep.title, sweep.published, tuple(rows))


def _variant(row: RowConfig) -> str:
    return FROM_S4 if START in row.settings else "+".join(Path(name).stem for name in row.configs) or FULL

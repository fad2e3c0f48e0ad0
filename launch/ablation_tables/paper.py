"""Rows, tables and papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from avs_dist.launch.ablation_tables.experiment import Experiment

FULL, S4, FROM_S4 = "full", "s4", "from_s4"  # variants without a file of their own
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")


class Row(NamedTuple):
    """One row of a table; `variant` names files of the paper's folder, joined by "+", or is one of those above."""

    label: str
    variant: str
    published: float | tuple[float, ...] | None  # as the experiment says; None for rows of ours


class Table(NamedTuple):
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Paper:
    """Tables by number, figures and selections by name ("fig3"), and the files of configs/ that run them.

    base:         Files that every row starts from, at toy scale.
    overlays:     Folder of the files that variants name.
    out:          Default folder of the results.
    experiment:   Which data, and what is measured.
    clips, steps: Defaults, of the data and of each training.
    roman:        The paper writes its numbers in Roman numerals.
    """

    title: str
    base: tuple[str, ...]
    overlays: str
    out: str
    experiment: Experiment
    clips: int
    steps: int
    tables: dict[int | str, Table]
    roman: bool = False

    def name(self, key: int | str) -> str:
        """The table or figure as the paper calls it, or the selection."""
        if isinstance(key, str):
            return f"Fig. {key.removeprefix('fig')}" if key.startswith("fig") else key.capitalize()
        return f"Table {_ROMAN[key - 1] if self.roman else key}"

    @property
    def known(self) -> str:
        """Keys of the tables, as a person would say it."""
        numbers = [key for key in self.tables if isinstance(key, int)]
        names = [key for key in self.tables if isinstance(key, str)]
        return ", ".join([f"{numbers[0]} to {numbers[-1]}", *names])

    def files(self, variant: str) -> list[str]:
        """What a variant puts after the base, below configs/."""
        if variant in (FULL, S4, FROM_S4):
            return []
        return [f"{self.overlays}/{name}.yaml" for name in variant.split("+")]

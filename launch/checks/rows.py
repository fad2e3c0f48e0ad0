"""One line of the doctor's table, and the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
_COLOURS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"}


@dataclass(frozen=True)
class Row:
    """One finding.

    state:  "ok"; "warn": training runs, but look at it; "fail": training does not run, or not well.
    name:   what was looked at.
    found:  what was found, in one line.
    advice: what to do about it; empty where nothing is to be done.
    """

    state: str
    name: str
    found: str
    advice: str = ""

    def text(self, width: int, colour: bool) -> str:
        state = f"{_COLOURS[self.state]}{self.state:<4}\033[0m" if colour else f"{self.state:<4}"
        return f"{state}  {self.name:<{width}}  {self.found}" + (f"  -> {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Options:
    """What a host is asked about.

    out_dir:     where checkpoints will go.
    shards:      folder or url; None leaves the check out.
    cache_dir:   of shards from a url; None for the default.
    ranks:       local processes of the collective.
    master_port: that of the training.
    many_hosts:  whether other hosts must reach this one.
    within_s:    longest wait for a process of its own: the try of the GPUs, the local collective.
    """

    out_dir: str
    shards: str | None = None
    cache_dir: str | None = None
    ranks: int = 1
    master_port: int = 29500
    many_hosts: bool = False
    within_s: float = 60.0


Check = Callable[[Options], Row | list[Row]]


def findings(checks: dict[str, Check], options: Options) -> list[Row]:
    """The rows of all checks; one that breaks is a row too, because the others still say something."""
    rows: list[Row] = []
    for name, check in checks.items():
        try:
            found = check(options)
        except Exception as error:
            found = Row(FAIL, name, one_line(error), "the check itself broke: mend this first")
        rows += found if isinstance(found, list) else [found]
    return rows


def one_line(error: BaseException) -> str:
    """Kind and text of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def table(rows: Iterable[Row], colour: bool) -> str:
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    return "\n".join(row.text(width, colour) for row in rows)


def failed(rows: Iterable[Row]) -> bool:
    return any(row.state == FAIL for row in rows)


def counted(rows: Iterable[Row]) -> str:
    """How many rows of each state, such as "20 ok, 2 warn"."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in (OK, WARN, FAIL) if state in states)


def size(number: float) -> str:
    """Bytes as a person reads them."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 1000 else f"{number:.0f} {units[0]}"


def existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def from_dict(values: dict[str, Any]) -> Row:
    return Row(**values)

"""Figures of `bench loader` as Markdown tables that go into shards/README.md as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avs_dist.launch.benchmarks.report import table

Row = dict[str, Any]
PARTS = ("rate", "video", "workers", "memory", "start")


_PER_S, _PER_CPU_S = _PER_SECONDS = ("clips_per_s", "clips_per_cpu_s")


def markdown(facts: Row, about: str, found: Mapping[str, Sequence[Row]]) -> str:
    tables = {"rate": _rate, "video": _video, "workers": _workers, "memory": _memory, "start": _start}
    paragraphs = [
        "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".",
        f"{about[0].upper()}{about[1:]}; batches of 4; medians, p20-p80 in brackets.",
    ]
    for part, rows in found.items():
        measured = [row for row in rows if "failed" not in row]
        paragraphs += tables[part](measured) if measured else []
    notes = [f"- {row['label']}: {row['failed']}" for rows in found.values() for row in rows if "failed" in row]
    return "\n\n".join([*paragraphs, *(["Notes:\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def _rate(rows: Sequence[Row]) -> list[str]:
    rates = {row["label"]: row[_PER_S]["p50"] for row in rows}
    literal, plain = rates.get("literal AVSBench"), rates.get("webdataset, same raw shards")
    cells = [["loader", "kB a clip", "clips/s", "x literal", "x webdataset", "clips per CPU second"]]
    for row in rows:
        rate = rates[row["label"]]
        compared = [_times(rate, literal), _times(rate, plain)]
        cells.append([row["label"], f"{row['kb']:.0f}", _spread(row), *compared, _spread(row, _PER_CPU_S)])
    text = (
        "One process, one thread: clips/s of one core, by the clock and by the time that the process was running (they "
        "differ where other programs run). Ours delivers frames as uint8, to be normalised where the network is; "
        "`normalised` does that in the same process, as the literal loader does."
    )
    return ["### rate", text, table(cells)]


def _video(rows: Sequence[Row]) -> list[str]:
    rates: dict[str, dict[str, Row]] = {}
    for row in rows:
        rates.setdefault(row["film"], {})[row["kind"]] = row
    cells = [["film", "ours, clips/s", "raw decord, clips/s", "ours / raw", "by CPU seconds"]]
    for film, by_kind in rates.items():
        ours, raw = by_kind.get("ours"), by_kind.get("decord")
        shares = [f"{ours[key]['p50'] / raw[key]['p50']:.0%}" if ours and raw else "-" for key in _PER_SECONDS]
        cells.append([film, *(_spread(row) if row else "-" for row in (ours, raw)), *shares])
    text = (
        "Windows of 5 s, one frame a second. Ours: reader and decoding child together, with log-mel, masks and "
        "collation. Raw: decord.VideoReader of the same bytes as a file, get_batch of the wanted frames, resized to "
        "the same size, in one process."
    )
    return ["### video", text, table(cells)]


def _workers(rows: Sequence[Row]) -> list[str]:
    numbers = list(dict.fromkeys(row["workers"] for row in rows))
    cells = [["frames", *(f"data.workers {number}" for number in numbers)]]
    for frames in dict.fromkeys(row["frames"] for row in rows):
        by_number = {row["workers"]: _spread(row) for row in rows if row["frames"] == frames}
        cells.append([frames, *(by_number.get(number, "-") for number in numbers)])
    return ["### workers", "Clips/s that reach the training process.", table(cells)]


def _memory(rows: Sequence[Row]) -> list[str]:
    cells = [["frames", "clips", "MiB after a tenth", "MiB after all", "growth"]]
    for row in rows:
        first, last = row["resident_mib"][0], row["resident_mib"][-1]
        cells.append([row["label"], f"{row['clips']:,}", f"{first:.0f}", f"{last:.0f}", f"{last / first - 1:+.1%}"])
    return ["### memory", "Resident memory of the process and its children.", table(cells)]


def _start(rows: Sequence[Row]) -> list[str]:
    cells = [["run", "seconds to the first batch"], *([row["label"], _spread(row, "seconds", 3)] for row in rows)]
    text = (
        f"{rows[0]['clips']:,} clips of one second; restored in the middle of the third epoch, behind "
        f"{rows[0]['position']:,} clips; the state has {rows[0]['state_bytes']} bytes. The clock starts when Python "
        "and the library are loaded; a loading process has to load them itself."
    )
    return ["### start and resume", text, table(cells)]


def _spread(row: Row, key: str = _PER_S, digits: int = 1) -> str:
    values = row[key]
    if values["p50"] >= 100:
        digits = 0
    low, middle, high = (f"{values[name]:,.{digits}f}" for name in ("p20", "p50", "p80"))
    return f"{middle} ({low}-{high})"


def _times(rate: float, other: float | None) -> str:
    return "-" if other is None else f"{rate / other:.2f}"

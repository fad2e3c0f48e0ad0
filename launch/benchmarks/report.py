"""Figures as JSON, and as Markdown tables that go into kernels/README.md as they are."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from avs_dist.launch.benchmarks import ceilings
from avs_dist.launch.benchmarks.problem import Case, describe
from avs_dist.launch.benchmarks.registry import OPS

ROOT = Path(__file__).resolve().parents[2]

# results in the order in which they were measured
Rows = list[tuple[Case, dict[str, Any]]]


def facts(device: str, command: str) -> dict[str, Any]:
    """What must stand beside a figure: machine, versions, commit, date, command."""
    found: dict[str, Any] = {"device": _device_name(device), "threads": torch.get_num_threads()}
    if device == "cuda":
        found |= {"cuda": torch.version.cuda or torch.version.hip, "driver, clocks and power before": _gpu_state()}
    return found | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def rank_facts(device: str, command: str) -> dict[str, Any]:
    """The same beside a figure of several ranks."""
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "accelerate")}
    return {**facts(device, command), **versions, "cores": os.cpu_count()}


def as_json(facts: dict[str, Any], rates: dict[str, float], rows: Rows) -> dict[str, Any]:
    return {"facts": facts, "ceilings": rates, "rows": [{**vars(case), **result} for case, result in rows]}


def markdown(facts: dict[str, Any], rates: dict[str, float], rows: Rows) -> str:
    parts = ["; ".join(f"{name}: {value}" for name, value in facts.items()) + "."]
    measured = ", ".join(f"{name} {rate:.4g} {ceilings.unit(name)}" for name, rate in rates.items())
    parts.append(f"Ceilings measured in this run: {measured} (copy: bytes read + written; others: square matrices).")
    parts.append(_legend(facts))
    for name in dict.fromkeys(case.op for case, _ in rows):
        parts.append(_op_tables(name, [row for row in rows if row[0].op == name], rates))
    return "\n\n".join(parts) + "\n"


def _legend(facts: dict[str, Any]) -> str:
    times = "Microseconds, median."
    if "cuda" in facts:
        times = "Microseconds, median: replay of a CUDA graph with a cold L2 cache / eager wall time, Python included."
    return (
        f"{times} p20-p80, rate and share of the ceiling are those of ours; speed-ups are ours against the literal "
        "formula and against the best of all others, like compared with like; below 1 (bold) ours loses."
    )


def _op_tables(name: str, rows: Rows, rates: dict[str, float]) -> str:
    op = OPS[name]
    seen = dict.fromkeys(case.implementation for case, _ in rows)
    forms = [form for form in op.implementations if form in seen]
    legend = "\n".join(f"- {form}: {op.implementations[form]}" for form in forms)
    head = ["size", *forms, "p20-p80", "rate", "of ceiling", "vs literal", "vs best", "peak MiB", "error"]
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for case, result in rows:
        groups.setdefault((describe(case.size), case.dtype), {})[case.implementation] = result
    modes = list(dict.fromkeys(mode for _, result in rows for mode in result.get("modes", {})))
    tables = []
    for mode in modes or ["-"]:
        lines = [_line(head), _line(["---"] * len(head))]
        lines += [_line([f"{size} {dtype}", *_cells(forms, of, mode, rates)]) for (size, dtype), of in groups.items()]
        tables.append(f"{mode}:\n\n" + "\n".join(lines))
    notes = [f"- {case}: {result[key]}" for case, result in rows for key in ("skipped", "failed") if key in result]
    notes += [
        f"- {case} {mode}: no graph: {figures['graph_failed']}"
        for case, result in rows
        for mode, figures in result.get("modes", {}).items()
        if "graph_failed" in figures
    ]
    notes += _choices_of_auto(rows)
    closing = ["Notes:\n\n" + "\n".join(notes)] if notes else []
    return "\n\n".join([f"### {name}: {op.title}", legend, *tables, *closing])


def _choices_of_auto(rows: Rows) -> list[str]:
    """Where AVS_KERNELS=auto leaves the kernels, because they were measured to lose."""
    chosen = [(case, result["auto"]) for case, result in rows if "auto" in result]
    torches = [
        f"- auto takes torch for {op} at {describe(case.size)} {case.dtype}"
        for case, forms in chosen
        for op, form in forms.items()
        if form == "torch"
    ]
    return torches or (["- auto takes the kernels at all of these sizes"] if chosen else [])


def _cells(forms: list[str], results: dict[str, dict[str, Any]], mode: str, rates: dict[str, float]) -> list[str]:
    """Cells of one row: a time for each implementation, then what is said of ours."""
    figures = {form: results.get(form, {}).get("modes", {}).get(mode) for form in forms}
    ours = figures.get("ours")
    cells = [_times(figures[form]) for form in forms]
    if ours is None:
        return [*cells, *["-"] * 7]
    best = ours.get("graph_us") or ours["wall_us"]
    work = ours.get("work")
    rate, share = "-", "-"
    if work:
        reached = ceilings.rate(work["amount"], best["p50"], work["ceiling"])
        rate = f"{reached:.3g} {ceilings.unit(work['ceiling'])}"
        share = f"{reached / rates[work['ceiling']]:.0%} of {work['ceiling']}" if work["ceiling"] in rates else "-"
    others = [_speedup(ours, figures[form]) for form in forms if not form.startswith("ours")]
    against_best = min((speedup for speedup in others if speedup is not None), default=None)
    literal = _speedup(ours, figures.get("literal"))
    peaks = " / ".join(f"{figures[form]['peak_mib']:.0f}" if figures[form] else "-" for form in forms)
    error = f"{results['ours']['error']:.0e}"
    spread = f"{_number(best['p20'])}-{_number(best['p80'])}"
    return [*cells, spread, rate, share, _factor(literal), _factor(against_best), peaks, error]


def _times(figures: dict[str, Any] | None) -> str:
    """Graph replay / eager wall, or the one that there is."""
    if figures is None:
        return "-"
    wall = _number(figures["wall_us"]["p50"])
    return f"{_number(figures['graph_us']['p50'])} / {wall}" if "graph_us" in figures else wall


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _speedup(ours: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """Graph against graph where both have one, else wall against wall."""
    if other is None:
        return None
    kind = "graph_us" if "graph_us" in ours and "graph_us" in other else "wall_us"
    return other[kind]["p50"] / ours[kind]["p50"]


def _factor(speedup: float | None) -> str:
    if speedup is None:
        return "-"
    return f"{speedup:.3g}x" if speedup >= 1 else f"**{speedup:.2f}x**"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown of rows of cells, the first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_state() -> str:
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw"
    return _output(["nvidia-smi", query, "--format=csv,noheader"]).splitlines()[0]


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain"])
    return f"{commit} with changes" if commit != "unknown" and changed not in ("", "unknown") else commit


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

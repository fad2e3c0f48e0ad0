"""The tables of sweep.html: the rows of a paper's table, and all trials."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from avs_dist.launch.sweeps.charts import settings_keys
from avs_dist.launch.sweeps.marks import MARKS
from avs_dist.launch.sweeps.outcome import Outcome
from avs_dist.launch.sweeps.scales import is_number, short
from avs_dist.launch.sweeps.study import BASELINE
from avs_dist.launch.sweeps.summary import Summary

SORT = """<script>
for (const table of document.querySelectorAll("table.trials")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // empty ones last, either way
      const numbers = [Number(a), Number(b)];
      return turn * (numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1]);
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  }));
}
</script>"""


def is_row(outcome: Outcome) -> bool:
    return outcome.label not in ("", BASELINE)


def rows_section(sweep: Summary, outcomes: Sequence[Outcome], best: Outcome | None) -> str:
    """The table as the paper has it; several trials of a row count with their mean."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in filter(is_row, outcomes):
        rows.setdefault(outcome.label, []).append(outcome)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in ("row", sweep.objective, *sweep.published_columns, "trials"))
    body = ""
    for label, trials in rows.items():
        published = [short(score) for score in trials[0].published]
        published += ["–"] * (len(sweep.published) - len(published))
        texts = (label, _mean([one.best[1] for one in trials if one.best]), *published, states(trials))
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        body += f"<tr{_class('best' if best in trials else '')}>{cells}</tr>"
    return (
        "<h2>Rows</h2>"
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _mean(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return short(scores[0]) if scores else "–"
    return f"{short(statistics.fmean(scores))} ± {statistics.stdev(scores):.2g}"


def trials_section(folder: Path, sweep: Summary, outcomes: Sequence[Outcome], best: Outcome | None) -> str:
    if not outcomes:
        return ""
    keys = settings_keys(outcomes)
    labelled, told = any(one.label for one in outcomes), any(one.reason for one in outcomes)
    head = ["trial", *(["row"] if labelled else []), "state", f"best {sweep.objective}", "at step", "last step"]
    head += [*keys, "time", "starts", *(["reason"] if told else [])]
    texts = {"row", "state", "reason", *(key for key in keys if not _all_numbers(key, outcomes))}
    columns = "".join(
        f"<th{_class('text' if text in texts else '')}><button>{escape(text)}</button></th>" for text in head
    )
    body = ""
    sign = -1 if sweep.mode == "max" else 1
    for one in sorted(outcomes, key=lambda one: (sign * one.best[1] if one.best else math.inf, one.number)):
        link = quote(os.path.relpath(one.folder, folder))
        cells = [_cell(one.number, f'<a href="{link}/">{one.number}</a>')]
        cells += [_cell(one.label, kind="text")] if labelled else []
        cells += [_cell(one.state, escape(_state(one)), "text")]
        cells += [_cell(value) for value in (*((one.best[1], one.best[0]) if one.best else ("", "")), one.step or "")]
        cells += [_cell(one.settings.get(key, ""), kind="text" if key in texts else "") for key in keys]
        cells += [_cell(one.seconds, duration(one.seconds) if one.seconds else ""), _cell(one.starts)]
        cells += [_cell(one.reason, kind="text reason")] if told else []
        body += f"<tr{_class('best' if one is best else '')}>{''.join(cells)}</tr>\n"
    return (
        '<h2>Trials</h2><p class="hint">Click a heading to sort; the number leads to the folder of the run.</p>'
        f'<div class="scroll long"><table class="trials"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any, shown: str | None = None, kind: str = "") -> str:
    by = repr(value) if is_number(value) else short(value)  # sorted by all digits
    return f'<td{_class(kind)} data-value="{escape(by)}">{escape(short(value)) if shown is None else shown}</td>'


def duration(seconds: float) -> str:
    """As 1 h 05 min, 3 min 20 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def states(outcomes: Sequence[Outcome]) -> str:
    """How many trials are in which state."""
    counts = Counter(outcome.state for outcome in outcomes)
    return ", ".join(f"{mark.sign} {counts[state]} {state}" for state, mark in MARKS.items() if counts[state])


def _state(outcome: Outcome) -> str:
    return f"{MARKS[outcome.state].sign} {outcome.state}"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _all_numbers(key: str, outcomes: Sequence[Outcome]) -> bool:
    return all(is_number(outcome.settings[key]) for outcome in outcomes if key in outcome.settings)

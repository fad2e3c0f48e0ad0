"""sweep.html: what a sweep has found, as one file that needs no network."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from avs_dist import report_html as html
from avs_dist.launch.sweeps.charts import bars, settings_and_score
from avs_dist.launch.sweeps.curves import curves
from avs_dist.launch.sweeps.importance import importance
from avs_dist.launch.sweeps.marks import Figure
from avs_dist.launch.sweeps.outcome import Outcome, best_of
from avs_dist.launch.sweeps.scales import short
from avs_dist.launch.sweeps.summary import Summary
from avs_dist.launch.sweeps.tables import SORT, duration, is_row, rows_section, states, trials_section

_ROUGH = 30  # trials with which importance says little more than a direction
_STYLE = """<style>
main { max-width: 1320px; } p { max-width: 120ch; }
.trials, .rows { font-size: .86rem; }
.trials th, .trials td, .rows th, .rows td { padding: 6px 12px; }
.trials tr td, .rows tr td { font-weight: 400; }
.trials tr.best td, .rows tr.best td { font-weight: 650; background: #fdf1e7; }
.trials th:first-child, .trials td:first-child { min-width: 0; padding-left: 8px; }
.trials td.text, .trials th.text { text-align: left; }
.trials td.text { white-space: normal; max-width: 24em; overflow-wrap: anywhere; }
.trials td.reason { white-space: normal; min-width: 22em; max-width: 40em; overflow-wrap: anywhere; }
.trials thead th { position: sticky; top: 0; background: #fff; box-shadow: inset 0 -1px var(--line); }
.trials button { all: unset; cursor: pointer; white-space: nowrap; }
.trials button:focus-visible { outline: 2px solid var(--truth); outline-offset: 3px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.long { max-height: 46rem; overflow: auto; }
.settings { font-size: .92rem; width: auto; } .settings td { text-align: left; white-space: normal; }
.settings td:first-child { color: var(--muted); min-width: 0; padding-right: 28px; }
.settings tr td { font-weight: 400; padding-top: 5px; padding-bottom: 5px; overflow-wrap: anywhere; }
</style>"""


def sweep_page(folder: Path, sweep: Summary, outcomes: Sequence[Outcome], has_config: bool) -> str:
    """The page that will lie in `folder`, where `has_config` tells whether best.yaml is there."""
    best = best_of(list(outcomes))
    drawn = _charts(sweep, outcomes)
    body = [
        _STYLE,
        html.header(sweep.title or "Sweep", _notes(sweep, outcomes)),
        f"<pre>{escape(sweep.command)}</pre>",
        html.cards(_cards(sweep, outcomes, best)),
        _best_section(folder, best, has_config) if best else "",
        rows_section(sweep, outcomes, best),
        f"<script>{get_plotlyjs()}</script>" if any("Plotly.newPlot" in part for part in drawn) else "",
        *drawn,
        trials_section(folder, sweep, outcomes, best),
        SORT,
    ]
    return html.page(sweep.title or "Sweep", body)


def _notes(sweep: Summary, outcomes: Sequence[Outcome]) -> list[str]:
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.started))
    took = duration((time.time() if sweep.ended is None else sweep.ended) - sweep.started)
    state = {
        "running": f"Running for {took}; this page is written again while it goes on",
        "finished": f"Finished after {took}",
        "interrupted": f"Interrupted after {took}; the same command with --resume goes on",
    }[sweep.state]
    wanted = "high" if sweep.mode == "max" else "low"
    notes = [
        f"{state}. Started {begun}. Searcher: {sweep.searcher}; scheduler: {sweep.scheduler}; "
        f"{sweep.objective} should be {wanted}."
    ]
    if not any(outcome.best for outcome in outcomes):
        notes.append(
            f"No trial has a finite {sweep.objective} yet: there is nothing to draw."
            if sweep.state == "running"
            else f"No trial has a finite {sweep.objective}: the table tells what became of them."
        )
    return notes


def _cards(sweep: Summary, outcomes: Sequence[Outcome], best: Outcome | None) -> list[html.Card]:
    cards = []
    if best and best.best:
        step, score = best.best
        cards.append(html.Card(short(score), f"best {sweep.objective}", f"{_name(best)}, at step {step}"))
        if sweep.baseline is not None and math.isfinite(sweep.baseline):
            gain = (score - sweep.baseline) * (1 if sweep.mode == "max" else -1)
            word = "better" if gain >= 0 else "worse"
            meaning = f"the default config has {short(float(sweep.baseline))}"
            cards.append(html.Card(short(abs(gain)), f"{word} than the default", meaning))
    cards.append(html.Card(str(len(outcomes)), "trial" if len(outcomes) == 1 else "trials", states(outcomes)))
    spent = sum(outcome.seconds for outcome in outcomes)
    again = sum(max(0, outcome.starts - 1) for outcome in outcomes)
    meaning = (
        f"over all trials; {again} times one went on after a fault or an interruption" if again else "over all trials"
    )
    cards.append(html.Card(duration(spent), "of training", meaning))
    return cards


def _best_section(folder: Path, best: Outcome, has_config: bool) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(short(value))}</td></tr>" for key, value in best.settings.items()
    )
    rows = rows or "<tr><td>nothing is changed</td></tr>"
    command = shlex.join(["avs-dist", "train", "--config", str(folder / "best.yaml")])
    then = (
        f"<pre>{escape(command)}</pre>"
        if has_config
        else f'<p class="hint">Its config.yaml in {escape(str(best.folder))} is gone, so there is no best.yaml.</p>'
    )
    forked = (
        '<p class="hint">It came to these settings in steps, each on the state of a trial before: trained from scratch '
        "they may score otherwise.</p>"
        if best.forks
        else ""
    )
    return (
        f'<h2>The best: {escape(_name(best))}</h2><table class="settings"><tbody>{rows}</tbody></table>{forked}{then}'
    )


def _charts(sweep: Summary, outcomes: Sequence[Outcome]) -> list[str]:
    over_steps = curves(outcomes, sweep.objective, sweep.baseline)
    if over_steps is None:
        return []
    parts, rows = [], any(map(is_row, outcomes))
    by_settings = None if rows else settings_and_score(outcomes, sweep.objective)
    if by_settings:
        parts += ["<h2>Settings and score</h2>", _hint(_settings_hint(by_settings, outcomes))]
        parts += [_drawn("settings", by_settings)]
    hint = (
        "The darker the better, the best in orange. Click a state to hide its trials; point at a line for its settings."
    )
    parts += ["<h2>Score over steps</h2>", _hint(hint), _drawn("curves", over_steps)]
    return parts if rows else parts + _importance(outcomes)


def _settings_hint(figure: Figure, outcomes: Sequence[Outcome]) -> str:
    parallel = figure["data"][0]["type"] == "parcoords"
    hint = f"A {'line' if parallel else 'point'} is a trial; the darker the better, the best in orange."
    if unscored := sum(outcome.best is None for outcome in outcomes):
        hint += f" {unscored} without a score {'is' if unscored == 1 else 'are'} not drawn."
    return hint + (" Drag along an axis to choose, click it to undo." if parallel else "")


def _importance(outcomes: Sequence[Outcome]) -> list[str]:
    found = importance(outcomes)
    parts = ["<h2>What the score depends on</h2>"]
    if found.shares:
        scored = sum(outcome.best is not None for outcome in outcomes)
        rough = f" With {scored} trials a rough guide." if scored < _ROUGH else ""
        hint = (
            "Share of the variance of the trials' ranks that a random forest lays to each setting alone (fANOVA). "
            "Trials that were stopped early count with the score they had, a setting that only some have in those."
            + rough
        )
        parts += [_hint(hint), _drawn("importance", bars(found.shares))]
    return parts + ([_hint(" ".join(found.notes))] if found.notes else [])


def _drawn(name: str, figure: Figure) -> str:
    buttons = {"settings": ["toImage"], "curves": ["toImage", "zoom2d", "pan2d", "resetScale2d"]}.get(name)
    # named one by one: among the others is one that sends the chart to a server
    shown = {"modeBarButtons": [buttons]} if buttons else {"displayModeBar": False}
    return to_html(
        figure,
        config={**shown, "displaylogo": False, "responsive": True},
        include_plotlyjs=False,
        full_html=False,
        default_height=f"{figure['layout']['height']}px",
        validate=False,  # by the tests
        div_id=name,
    )


def _name(outcome: Outcome) -> str:
    return f"trial {outcome.number}" + (f" ({outcome.label})" if outcome.label else "")


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'

"""Score over steps, as a figure of plotly.js in plain dicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from plotly.colors import sample_colorscale

from avs_dist.launch.sweeps.marks import (
    BEST,
    INK,
    MARKS,
    MUTED,
    SCALE,
    Figure,
    described,
    figure,
    line_axis,
    lines,
    shades,
)
from avs_dist.launch.sweeps.outcome import Fork, Outcome, State, best_of
from avs_dist.launch.sweeps.scales import is_logarithmic, short

_MAX_NUMBERED = 12  # trials whose lines have their number at the end
Point = tuple[int, float]  # step and score


class Landing(NamedTuple):
    """Where a trial went on from another one, and from which score."""

    outcome: Outcome
    fork: Fork
    score: float


def curves(outcomes: Sequence[Outcome], objective: str, baseline: float | None) -> Figure | None:
    """A line for each trial that has a score; where it was forked, it jumps to the score of the other trial."""
    scored = [outcome for outcome in outcomes if outcome.best]
    best = best_of(scored)
    if best is None:
        return None
    dark, by_number = shades(scored), {outcome.number: outcome for outcome in outcomes}
    traces = [_legend(state) for state in MARKS if any(outcome.state == state for outcome in scored)]
    if baseline is not None and math.isfinite(baseline):
        traces.append(_baseline(baseline, max(outcome.step for outcome in scored)))
    numbered, landings = _numbered(scored), []
    for outcome in sorted(scored, key=lambda outcome: (outcome is best, dark[outcome.number])):
        path, new = _path(outcome, by_number)
        colour = BEST if outcome is best else sample_colorscale(SCALE, [dark[outcome.number]])[0]
        width = 3.5 if outcome is best else 1.8 if len(scored) <= _MAX_NUMBERED else 1.2
        traces.append(_curve(outcome, path, colour, width, outcome.number in numbered))
        landings += new
    traces += [*([_jumps(landings)] if landings else []), _star(best)]
    scores = [score for outcome in scored for _, score in outcome.scores if math.isfinite(score)]
    return figure(
        traces,
        540,
        {"l": 70, "r": 40, "t": 60, "b": 50},
        xaxis=line_axis("step", rangemode="tozero"),
        yaxis=line_axis(objective, **({"type": "log", "dtick": "D2"} if is_logarithmic(scores) else {})),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )


def _path(outcome: Outcome, by_number: dict[int, Outcome]) -> tuple[list[Point], list[Landing]]:
    """Its scores, with those that it went on from."""
    path, landings = list(outcome.scores), []
    for fork in outcome.forks:
        source = by_number.get(fork.source)
        known = [score for step, score in source.scores if step <= fork.step] if source else []
        if known and math.isfinite(known[-1]):
            path.append((fork.step, known[-1]))
            landings.append(Landing(outcome, fork, known[-1]))
    return sorted(path, key=lambda point: point[0]), landings  # stable: behind its own score of the same step


def _numbered(scored: Sequence[Outcome]) -> set[int]:
    """Trials whose lines have room for a number at their end."""
    if len(scored) > _MAX_NUMBERED:
        return set()
    ends = {
        outcome.number: next(point for point in reversed(outcome.scores) if math.isfinite(point[1]))
        for outcome in scored
    }
    scores = [score for outcome in scored for _, score in outcome.scores if math.isfinite(score)]
    apart = 0.03 * (max(scores) - min(scores))
    taken: dict[int, Point] = {}
    for number, (step, score) in ends.items():
        if all(step != other or abs(score - there) >= apart for other, there in taken.values()):
            taken[number] = (step, score)
    return set(taken)


def _curve(outcome: Outcome, path: Sequence[Point], colour: str, width: float, numbered: bool) -> dict[str, Any]:
    mark, between = MARKS[outcome.state], len(path) - 1
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if numbered else "lines+markers",
        "x": [step for step, _ in path],
        "y": [score if math.isfinite(score) else None for _, score in path],
        "line": {"color": colour, "width": width, "dash": mark.dash},
        "marker": {
            "symbol": ["circle"] * between + [mark.symbol],
            "size": [4] * between + [9],
            "color": colour,
            "line": {"width": 0, "color": colour},
        },
        "text": [""] * between + [f"  {outcome.number}"],
        "textposition": "middle right",
        "cliponaxis": False,
        "legendgroup": outcome.state,
        "showlegend": False,
        "meta": [described(outcome)],
        "hovertemplate": "%{meta[0]}<br>step %{x}: <b>%{y:.4g}</b><extra></extra>",
    }


def _legend(state: State) -> dict[str, Any]:
    """A line without points, whose name turns all of its state on and off."""
    mark = MARKS[state]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [None],
        "y": [None],
        "line": {"color": MUTED, "dash": mark.dash},
        "marker": {"symbol": mark.symbol, "size": 9, "color": MUTED},
        "name": state,
        "legendgroup": state,
    }


def _baseline(score: float, step: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [0, step],
        "y": [score, score],
        "line": {"color": INK, "width": 1.5, "dash": "longdashdot"},
        "name": f"default config: {short(score)}",
        "hovertemplate": "default config: %{y:.4g}<extra></extra>",
    }


def _jumps(landings: Sequence[Landing]) -> dict[str, Any]:
    texts = []
    for outcome, fork, _ in landings:
        changed = "<br>".join(lines(fork.settings))
        texts.append(f"<b>trial {outcome.number}</b> goes on from trial {fork.source} with<br>{changed}")
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [fork.step for _, fork, _ in landings],
        "y": [score for _, _, score in landings],
        "marker": {"symbol": "diamond", "size": 11, "color": "#fff", "line": {"color": INK, "width": 2}},
        "name": "goes on from another trial",
        "customdata": texts,
        "hovertemplate": "step %{x}: %{customdata}<extra></extra>",
    }


def _star(best: Outcome) -> dict[str, Any]:
    step, score = best.best or (0, math.nan)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [step],
        "y": [score],
        "marker": {"symbol": "star", "size": 17, "color": BEST, "line": {"color": "#fff", "width": 1}},
        "name": f"best: trial {best.number}, {short(score)}",
        "cliponaxis": False,
        "meta": [described(best)],
        "hovertemplate": "%{meta[0]}<br>step %{x}: <b>%{y:.4g}</b><extra></extra>",
    }

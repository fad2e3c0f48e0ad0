"""How the charts of a sweep draw a trial: the colour of its score, the mark of its state, its text under the pointer.

Text of configs is escaped wherever plotly.js, which reads tags in it, gets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from avs_dist.launch.sweeps.outcome import Outcome, State
from avs_dist.launch.sweeps.scales import is_logarithmic, short

Figure = dict[str, Any]
INK, MUTED, LINE, BEST = "#1c2430", "#6b7686", "#e6e9ee", "#d55e00"
# one hue from pale to dark, told apart with any eyes; orange for the best stands out from all of it
SCALE: list[list[Any]] = [[0.0, "#b3bfcc"], [0.4, "#5fa2d0"], [0.7, "#1f68ad"], [1.0, "#08306b"]]
_FONT = {"family": 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif', "color": INK}


class Mark(NamedTuple):
    """A state: the end of its line, the line, and the same sign in text."""

    symbol: str
    dash: str
    sign: str


MARKS: dict[State, Mark] = {
    "complete": Mark("circle", "solid", "●"),
    "stopped": Mark("x", "dot", "✕"),
    "failed": Mark("triangle-down", "dash", "▼"),
    "out of memory": Mark("square", "dash", "■"),
    "running": Mark("circle-open", "solid", "○"),
    "waiting": Mark("diamond-open", "dash", "◇"),  # with a line where a sweep was interrupted
    "invalid": Mark("cross", "dash", "✚"),
}


def figure(traces: list[dict[str, Any]], height: int, margin: dict[str, int], **layout: Any) -> Figure:
    base = {"height": height, "margin": margin, "font": _FONT, "plot_bgcolor": "#fff", "paper_bgcolor": "#fff"}
    pointer = {"hovermode": "closest", "hoverlabel": {"align": "left"}}
    return {"data": traces, "layout": {**base, **pointer, **layout}}


def line_axis(title: str = "", **rest: Any) -> dict[str, Any]:
    """A plain axis with a grid."""
    return {"title": {"text": escape(title)}, "gridcolor": LINE, "zeroline": False, **rest}


def shades(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Number of each trial with a score -> 0 to 1, the best, for SCALE.

    All of the worst tenth have 0, so that a few bad ones do not take up the whole scale.
    """
    sign = 1 if outcomes[0].mode == "max" else -1
    scores = {outcome.number: outcome.best[1] for outcome in outcomes if outcome.best}
    if is_logarithmic(list(scores.values())):
        scores = {number: math.log(score) for number, score in scores.items()}
    ranked = sorted(sign * score for score in scores.values())
    low, span = ranked[len(ranked) // 10], ranked[-1] - ranked[len(ranked) // 10]
    return {number: max(0.0, (sign * score - low) / span) if span else 1.0 for number, score in scores.items()}


def described(outcome: Outcome) -> str:
    """Its name, state and settings, as lines to show under the pointer."""
    name = f"<b>trial {outcome.number}</b>" + (f" {cut(outcome.label, 60)}" if outcome.label else "")
    state = outcome.state + (f": {cut(outcome.reason, 90)}" if outcome.reason else "")
    return "<br>".join([name, state, *lines(outcome.settings)])


def lines(settings: dict[str, Any]) -> list[str]:
    return [f"{escape(key)}: {cut(short(value), 60)}" for key, value in settings.items()]


def cut(text: str, length: int) -> str:
    return escape(text if len(text) <= length else f"{text[: length - 1]}…")

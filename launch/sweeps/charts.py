"""Settings against score, and what the score depends on, as figures of plotly.js in plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from avs_dist.launch.sweeps.marks import BEST, LINE, MARKS, SCALE, Figure, cut, described, figure, line_axis, shades
from avs_dist.launch.sweeps.outcome import Outcome, best_of
from avs_dist.launch.sweeps.scales import MISSING, Axis, axis, exact

# plotly.js draws these lines by one scale of colours: its end is for the best
_SCALE_WITH_BEST = [*([0.98 * place, colour] for place, colour in SCALE), [0.99, BEST], [1.0, BEST]]


def settings_keys(outcomes: Sequence[Outcome]) -> list[str]:
    """All that any trial has, in the order they come."""
    return list(dict.fromkeys(key for outcome in outcomes for key in outcome.settings))


def settings_and_score(outcomes: Sequence[Outcome], objective: str) -> Figure | None:
    """The trials with settings and a score: points where one setting varies, lines over parallel axes where more do."""
    scored = [outcome for outcome in outcomes if outcome.best and outcome.settings]
    keys = [key for key in settings_keys(scored) if _varies(key, scored)]
    if not keys:
        return None
    dark, best = shades(scored), best_of(scored)
    scored.sort(key=lambda outcome: (outcome is best, dark[outcome.number]))  # later ones lie on top
    colours = [1.0 if outcome is best else 0.98 * dark[outcome.number] for outcome in scored]
    places = {key: axis([outcome.settings.get(key, MISSING) for outcome in scored]) for key in keys}
    if len(keys) == 1:
        return _points(scored, colours, keys[0], places[keys[0]], objective)
    places[objective] = axis([outcome.best[1] for outcome in scored if outcome.best])
    return _parallel(colours, places)


def bars(shares: dict[str, float]) -> Figure:
    """Settings with their shares, the greatest on top."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(shares.values()),
        "y": [escape(key) for key in shares],
        "text": [f"{share:.0%}" for share in shares.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": SCALE[2][1]},
        "hoverinfo": "skip",
    }
    return figure(
        [trace],
        70 + 34 * len(shares),
        {"l": 20, "r": 50, "t": 10, "b": 40},
        xaxis=line_axis(tickformat=".0%", rangemode="tozero"),
        yaxis={"autorange": "reversed", "automargin": True, "type": "category", "ticksuffix": "  "},
        bargap=0.35,
    )


def _varies(key: str, outcomes: Sequence[Outcome]) -> bool:
    return len({exact(outcome.settings[key]) if key in outcome.settings else None for outcome in outcomes}) > 1


def _points(scored: Sequence[Outcome], colours: Sequence[float], key: str, place: Axis, objective: str) -> Figure:
    """The best is the last of them."""
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": list(place.places),
        "y": [outcome.best[1] for outcome in scored if outcome.best],
        "marker": {
            "symbol": [*(MARKS[outcome.state].symbol for outcome in scored[:-1]), "star"],
            "size": [10] * (len(scored) - 1) + [17],
            "color": list(colours),
            "colorscale": _SCALE_WITH_BEST,
            "cmin": 0,
            "cmax": 1,
            "opacity": 1,
            "line": {"width": 0},
        },
        "customdata": [described(outcome) for outcome in scored],
        "hovertemplate": "%{customdata}<br><b>%{y:.4g}</b><extra></extra>",
    }
    room = 0.03 * ((place.high - place.low) or 1.0)
    names = {"tickvals": list(place.ticks), "ticktext": [cut(name, 22) for name in place.ticks.values()]}
    across = line_axis(key, range=[place.low - room, place.high + room], **names)
    return figure([trace], 420, {"l": 70, "r": 40, "t": 20, "b": 50}, xaxis=across, yaxis=line_axis(objective))


def _parallel(colours: Sequence[float], places: dict[str, Axis]) -> Figure:
    trace = {
        "type": "parcoords",
        "dimensions": [_dimension(name, place) for name, place in places.items()],
        "line": {
            "color": list(colours),
            "colorscale": _SCALE_WITH_BEST,
            "cmin": 0,
            "cmax": 1,
        },
        "labelangle": -12 if len(places) > 5 else 0,
        "labelfont": {"size": 13},
        "tickfont": {"size": 12},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},  # the ends of the range say nothing
        "unselected": {"line": {"color": LINE, "opacity": 0.4}},
    }
    return figure([trace], 440, {"l": 90, "r": 70, "t": 80, "b": 30})


def _dimension(name: str, place: Axis) -> dict[str, Any]:
    room = 0.02 * ((place.high - place.low) or 1.0)
    return {
        "label": escape(name),
        "values": list(place.places),
        "range": [place.low - room, place.high + room],
        "tickvals": list(place.ticks),
        "ticktext": [cut(text, 22) for text in place.ticks.values()],
    }

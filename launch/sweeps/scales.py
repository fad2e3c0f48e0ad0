"""Settings and scores as text, and as places on an axis."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

MISSING = object()  # a setting that a trial does not have; None is a value


def exact(value: Any) -> str:
    """A setting as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def short(value: Any) -> str:
    """A setting or score to be read by people."""
    return f"{value:.4g}" if isinstance(value, float) else exact(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether numbers are better seen by their orders of magnitude: they span one or more, evenly only so."""
    low, high = min(values), max(values)
    if low <= 0 or high < 10 * low:
        return False
    middle = sorted(values)[len(values) // 2]
    place, place_log = (middle - low) / (high - low), math.log(middle / low) / math.log(high / low)
    return abs(place_log - 0.5) < abs(place - 0.5)


@dataclass(frozen=True)
class Axis:
    """Where values stand.

    Args:
        places: one for each value.
        low: end of the axis.
        high: its other end.
        ticks: place and name of what is named on it.
    """

    places: tuple[float, ...]
    low: float
    high: float
    ticks: dict[float, str]


def axis(values: Sequence[Any]) -> Axis:
    """Numbers stand by size, or order of magnitude; anything else as categories. What is missing stands below all."""
    there = [value for value in values if value is not MISSING]
    places, ticks = _numbers(there) if all(map(is_number, there)) else _categories(there)
    low, high = min(places), max(places)
    if len(there) == len(values):
        return Axis(tuple(places), low, high, ticks)
    below = low - 0.15 * ((high - low) or 1.0)
    rest = iter(places)
    all_places = tuple(below if value is MISSING else next(rest) for value in values)
    return Axis(all_places, below, high, {below: "not set", **ticks})


def _numbers(values: Sequence[float]) -> tuple[list[float], dict[float, str]]:
    logarithmic = is_logarithmic(values)
    places = [math.log10(value) if logarithmic else float(value) for value in values]
    few = {place: f"{value:.4g}" for place, value in zip(places, values, strict=True)}
    if len(few) <= 6 and len(values) > 2 * len(few):  # a choice of numbers
        return places, few
    return places, (_decades if logarithmic else _round_numbers)(min(places), max(places))


def _categories(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    names = sorted({exact(value) for value in values})
    return [float(names.index(exact(value))) for value in values], dict(enumerate(names))


def _decades(low: float, high: float) -> dict[float, str]:
    """Powers of ten between two logarithms, with 2 and 5 times them where there are few."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = {exponent + math.log10(f): _power(f, exponent) for exponent in exponents for f in factors}
        inside = {place: name for place, name in ticks.items() if low - 1e-9 <= place <= high + 1e-9}
        if len(inside) <= 8:
            break
    return inside


def _power(factor: int, exponent: int) -> str:
    return f"{factor * 10.0**exponent:g}" if -2 <= exponent <= 3 else f"{factor}e{exponent}"


def _round_numbers(low: float, high: float) -> dict[float, str]:
    places = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return {float(place): f"{place:.6g}" for place in places if low <= place <= high} or {low: f"{low:.6g}"}

"""The search space of a sweep: what may be tried of which config key, written as in `optim.lr: loguniform(1e-5, 1e-3)`.

    uniform(low, high)      any number between              int(low, high)      whole numbers, both ends included
    loguniform(low, high)   evenly over the decades         logint(low, high)   whole numbers, evenly over the decades
    choice(a, b, ...)       one of them                     grid(a, b, ...)     each of them, in all combinations
    3                       always this

A key may stand under a condition: {value: loguniform(1e-5, 1e-2), when: {optim.name: adamw}}; `when` names keys that
stand before it, with one value or a list of them. Where the condition is not met the base config's value stays.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)


class Draw(Protocol):
    """Where values come from: a trial of an Optuna study."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Range:
    """Numbers from low to high."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, key: str, trial: Draw) -> float:
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def examples(self) -> tuple[float, ...]:
        """Values that must pass for all to pass."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of some values; `grid`: each of them must be tried."""

    options: tuple[Any, ...]
    grid: bool = False

    def draw(self, key: str, trial: Draw) -> Any:
        return json.loads(trial.suggest_categorical(key, [label(option) for option in self.options]))

    def examples(self) -> tuple[Any, ...]:
        return self.options


@dataclass(frozen=True)
class Parameter:
    """A config key, its values, and the values of other keys under which it counts."""

    key: str
    domain: Range | Choice
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def counts(self, settings: Mapping[str, Any]) -> bool:
        return all(key in settings and settings[key] in allowed for key, allowed in self.when)


Space = tuple[Parameter, ...]


def parse_space(raw: Mapping[str, Any]) -> Space:
    """The parameters, in their order.

    Raises:
        ValueError: one cannot be read, or its condition names a key that does not stand before it.
    """
    space: list[Parameter] = []
    for key, written in raw.items():
        when: Any = {}
        if isinstance(written, Mapping):
            if unknown := set(written) - {"value", "when"}:
                raise ValueError(f"space: {key}: unknown '{min(unknown)}'; there are value and when")
            if "value" not in written:
                raise ValueError(f"space: {key} needs a value, such as loguniform(1e-5, 1e-3)")
            written, when = written["value"], written.get("when", {})
        parameter = Parameter(key, _domain(key, written), _conditions(key, when, space))
        space.append(parameter)
    return tuple(space)


def draw(space: Space, trial: Draw) -> dict[str, Any]:
    """Settings of one trial, by config key."""
    settings: dict[str, Any] = {}
    for parameter in space:
        if parameter.counts(settings):
            settings[parameter.key] = parameter.domain.draw(parameter.key, trial)
    return settings


def cells(space: Space) -> list[dict[str, Any]]:
    """All combinations of what stands under grid(...), as far as conditions let them count; one empty if none does."""
    grids = [each for each in space if isinstance(each.domain, Choice) and each.domain.grid]
    free = {each.key for each in space} - {each.key for each in grids}
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*(each.domain.examples() for each in grids)):
        cell: dict[str, Any] = {}
        for parameter, value in zip(grids, values, strict=True):
            hangs_on_free = any(key in free for key, _ in parameter.when)
            if hangs_on_free or parameter.counts(cell):
                cell[parameter.key] = value
        found[label(cell)] = cell
    return list(found.values())


def examples(space: Space) -> Iterator[dict[str, Any]]:
    """Settings that together have every option and both ends of every range, with what their conditions ask for."""
    by_key = {each.key: each for each in space}
    for parameter in space:
        for value in parameter.domain.examples():
            settings: dict[str, Any] = {}
            _meet(parameter, by_key, settings)
            yield {**settings, parameter.key: value}


def within(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were changed by a factor, back in their ranges."""
    found = dict(settings)
    for parameter in space:
        if isinstance(domain := parameter.domain, Range):
            value = min(max(found[parameter.key], domain.low), domain.high)
            found[parameter.key] = round(value) if domain.whole else value
    return found


def label(value: Any) -> str:
    """A value as text that `json.loads` takes back."""
    return json.dumps(value)


def _meet(parameter: Parameter, by_key: Mapping[str, Parameter], settings: dict[str, Any]) -> None:
    for key, allowed in parameter.when:
        _meet(by_key[key], by_key, settings)
        settings[key] = allowed[0]


def _domain(key: str, written: Any) -> Range | Choice:
    call = _CALL.fullmatch(written) if isinstance(written, str) else None
    if call is None:
        return Choice((written,))
    name, arguments = call[1], _arguments(key, call[2])
    if name in ("choice", "grid"):
        if not arguments:
            raise ValueError(f"space: {key}: {name}() needs at least one value")
        if len({label(each) for each in arguments}) < len(arguments):
            raise ValueError(f"space: {key}: {written} has a value twice")
        return Choice(tuple(arguments), grid=name == "grid")
    ranges = {"uniform": (False, False), "loguniform": (True, False), "int": (False, True), "logint": (True, True)}
    if name not in ranges:
        near = difflib.get_close_matches(name, [*ranges, "choice", "grid"], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"space: {key}: unknown {name}(...){hint}; there are {', '.join(ranges)}, choice and grid")
    log, whole = ranges[name]
    return _range(key, written, arguments, log, whole)


def _range(key: str, written: str, arguments: list[Any], log: bool, whole: bool) -> Range:
    try:
        low, high = (float(each) for each in arguments)
    except (TypeError, ValueError):
        raise ValueError(f"space: {key}: {written} must have two numbers, the least and the greatest") from None
    if not low < high or (log and low <= 0):
        rule = "the first must be positive and less than the second" if log else "the first must be less"
        raise ValueError(f"space: {key}: {written}: {rule}")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"space: {key}: {written}: both must be whole numbers")
    return Range(low, high, log, whole)


def _arguments(key: str, text: str) -> list[Any]:
    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ValueError(f"space: {key}: ({text}) cannot be read: {str(error).splitlines()[0]}") from error
    if len(found) == 1 and isinstance(found[0], list):  # choice([a, b]) is choice(a, b)
        found = found[0]
    return [_number(each) for each in found]


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _conditions(key: str, when: Any, before: list[Parameter]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(when, Mapping):
        raise ValueError(f"space: {key}: when must be keys with their values, such as {{optim.name: adamw}}")
    known = {each.key: each for each in before}
    conditions = []
    for other, allowed in when.items():
        if other not in known:
            raise ValueError(f"space: {key}: when names {other}, which must stand before it in the space")
        values = tuple(map(_number, allowed if isinstance(allowed, list) else [allowed]))
        domain = known[other].domain
        if not isinstance(domain, Choice):
            raise ValueError(f"space: {key}: when can ask for a value of choice(...) or grid(...), {other} is a range")
        if strange := [value for value in values if value not in domain.options]:
            raise ValueError(f"space: {key}: when asks for {other}={strange[0]}, which is not among its values")
        conditions.append((other, values))
    return tuple(conditions)

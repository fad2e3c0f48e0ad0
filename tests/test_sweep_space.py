"""The search space: how it is read, what is drawn from it, and what it must cover before the first trial."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from avs_dist.launch.sweeps.space import Choice, Range, cells, draw, examples, parse_space, within

SPACE = {
    "optim.lr": "loguniform(1e-5, 1e-3)",
    "optim.name": "choice(adam, adamw)",
    "optim.weight_decay": {"value": "uniform(0, 0.1)", "when": {"optim.name": "adamw"}},
    "train.global_batch": "grid(2, 4)",
    "optim.warmup_steps": {"value": "grid(0, 10)", "when": {"train.global_batch": [4]}},
    "model.tpavi.stages": "choice([[0, 1], [2, 3]])",
    "seed": 7,
}


class Fixed:
    """Draws the first option, and the low or high end of each range."""

    def __init__(self, name: str = "adam", batch: int = 2, low: bool = True) -> None:
        self.options = {"optim.name": f'"{name}"', "train.global_batch": str(batch)}
        self.low = low
        self.asked: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append(f"{name} {low:g} {high:g} {log}")
        return low if self.low else high

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return low if self.low else high

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.options.get(name, choices[0])


def test_settings_have_a_key_only_where_its_condition_is_met() -> None:
    space = parse_space(SPACE)
    assert draw(space, Fixed()) == {
        "optim.lr": 1e-5, "optim.name": "adam", "train.global_batch": 2, "model.tpavi.stages": [0, 1], "seed": 7,
    }  # fmt: skip
    trial = Fixed("adamw", batch=4)
    settings = draw(space, trial)
    assert settings["optim.weight_decay"] == 0.0
    assert settings["optim.warmup_steps"] == 0
    assert trial.asked == ["optim.lr 1e-05 0.001 True", "optim.weight_decay 0 0.1 False"]


def test_grid_is_every_combination_whose_conditions_are_met() -> None:
    assert cells(parse_space(SPACE)) == [
        {"train.global_batch": 2},
        {"train.global_batch": 4, "optim.warmup_steps": 0},
        {"train.global_batch": 4, "optim.warmup_steps": 10},
    ]
    assert cells(parse_space({"optim.lr": "uniform(0, 1)"})) == [{}]


def test_examples_have_every_option_and_both_ends_under_their_conditions() -> None:
    found = list(examples(parse_space(SPACE)))
    for expected in (
        {"optim.lr": 1e-5}, {"optim.lr": 1e-3}, {"optim.name": "adam"}, {"model.tpavi.stages": [2, 3]},
        {"optim.name": "adamw", "optim.weight_decay": 0.1}, {"train.global_batch": 4, "optim.warmup_steps": 10},
    ):  # fmt: skip
        assert expected in found
    assert not any("optim.weight_decay" in each and each.get("optim.name") != "adamw" for each in found)


@pytest.mark.parametrize(
    ("written", "domain"),
    [
        ("loguniform(1e-5, 1e-3)", Range(1e-5, 1e-3, log=True)),
        ("uniform(-1, 2.5)", Range(-1, 2.5)),
        ("int(1, 8)", Range(1, 8, whole=True)),
        ("logint(1, 64)", Range(1, 64, log=True, whole=True)),
        ("choice(true, null, 1e-3, 'x y')", Choice((True, None, 1e-3, "x y"))),
        ("choice([1, 2])", Choice((1, 2))),
        ("grid(1)", Choice((1,), grid=True)),
        ("adam", Choice(("adam",))),
        (0.5, Choice((0.5,))),
    ],
)
def test_values_are_read(written: Any, domain: Range | Choice) -> None:
    assert parse_space({"optim.lr": written})[0].domain == domain


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"a": "loguniformm(1, 2)"}, "unknown loguniformm(...) (did you mean loguniform?)"),
        ({"a": "loguniform(0, 1)"}, "the first must be positive"),
        ({"a": "uniform(2, 1)"}, "the first must be less"),
        ({"a": "uniform(1)"}, "must have two numbers"),
        ({"a": "int(1, 2.5)"}, "both must be whole numbers"),
        ({"a": "choice()"}, "at least one value"),
        ({"a": "choice(1, 1)"}, "a value twice"),
        ({"a": "choice([1)"}, "cannot be read"),
        ({"a": {"when": {"b": 1}}}, "needs a value"),
        ({"a": {"value": 1, "wen": {}}}, "unknown 'wen'"),
        ({"a": {"value": 1, "when": {"b": 1}}, "b": "choice(1, 2)"}, "must stand before it"),
        ({"b": "uniform(0, 1)", "a": {"value": 1, "when": {"b": 1}}}, "b is a range"),
        ({"b": "choice(1, 2)", "a": {"value": 1, "when": {"b": 3}}}, "not among its values"),
        ({"a": {"value": 1, "when": "b"}}, "when must be keys with their values"),
    ],
)
def test_mistakes_are_told_by_key(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"space: a: .*{re.escape(message)}|space: a .*{re.escape(message)}"):
        parse_space(space)


def test_changed_settings_are_put_back_into_their_ranges() -> None:
    space = parse_space({"a": "loguniform(1e-3, 1)", "b": "int(1, 4)", "c": "choice(x, y)"})
    assert within(space, {"a": 1.2, "b": 4.8, "c": "y"}) == {"a": 1, "b": 4, "c": "y"}
    assert within(space, {"a": 1e-4, "b": 2.4, "c": "x"}) == {"a": 1e-3, "b": 2, "c": "x"}
    assert math.isclose(within(space, {"a": 0.5, "b": 3, "c": "x"})["a"], 0.5)

"""sweep.html: it needs no network, shows no text of a config as markup, and tells the truth about the trials."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from avs_dist.launch.sweeps.charts import bars, settings_and_score
from avs_dist.launch.sweeps.curves import curves
from avs_dist.launch.sweeps.importance import importance
from avs_dist.launch.sweeps.marks import BEST
from avs_dist.launch.sweeps.outcome import Fork, Outcome
from avs_dist.launch.sweeps.page import sweep_page
from avs_dist.launch.sweeps.scales import MISSING, axis, is_logarithmic
from avs_dist.launch.sweeps.study import BASELINE
from avs_dist.launch.sweeps.summary import Summary

SWEEP = Summary("a sweep", "miou", "max", "avs-dist sweep", "random", "asha", "finished", 0.0, 3900.0)
EVIL = '<img src="http://evil.example/x">&</script><script>alert(1)</script>'


class Reader(HTMLParser):
    """Tags, addresses, and the text that is seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self._texts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        where = self.tags[-1] if self.tags else ""
        if self.cdata_elem is None:
            self._texts.append(data)
        elif where == "script":
            self.scripts.append(data)


def trial(number: int, settings: dict[str, Any], *scores: float, **values: Any) -> Outcome:
    """Evaluated every 10 steps."""
    steps = tuple((10 * place, score) for place, score in enumerate(scores, start=1))
    state, mode = values.pop("state", "complete"), values.pop("mode", "max")
    return Outcome(number, state, settings, mode, Path("sweep/trials") / f"{number:04d}", scores=steps, **values)


def drawn(count: int, score: Any, seed: int = 0) -> list[Outcome]:
    """Trials over lr (log), name, decay (only of "adamw") and size, with a given score of their settings."""
    rng, trials = np.random.default_rng(seed), []
    for number in range(count):
        settings: dict[str, Any] = {"lr": float(10 ** rng.uniform(-5, -2)), "name": ["adam", "adamw"][number % 2]}
        if number % 2:
            settings["decay"] = float(10 ** rng.uniform(-4, -1))
        settings |= {"size": int(rng.integers(1, 5)), "fixed": 3}
        value = float(score(settings) + 0.02 * rng.normal())
        trials.append(trial(number, settings, value - 0.1, value))
    return trials


def page(trials: list[Outcome], sweep: Summary = SWEEP, has_config: bool = True) -> Reader:
    return Reader(sweep_page(Path("sweep"), sweep, trials, has_config))


def test_page_needs_no_network_and_takes_no_text_for_markup() -> None:
    trials = drawn(12, lambda settings: -math.log10(settings["lr"]))
    trials[3] = replace(trials[3], settings={**trials[3].settings, "name": EVIL, EVIL: 1}, reason=EVIL, state="failed")
    sweep = replace(SWEEP, title=EVIL, command=EVIL, objective=EVIL, searcher=EVIL, scheduler=EVIL)
    plain, seen = page(trials), page(trials, sweep)
    assert not [address for address in seen.addresses if re.match(r"\s*(\w+:|//)", address)]
    assert seen.tags.count("script") == plain.tags.count("script")
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert seen.text.count(" ".join(EVIL.split())) >= 6
    assert len([script for script in seen.scripts if "plotly.js v" in script]) == 1
    charts = [script for script in seen.scripts if "Plotly.newPlot(" in script and "plotly.js v" not in script]
    assert len(charts) == 3
    assert not any("<img" in chart or "\\u003cimg" in chart for chart in charts)  # plotly.js would read it as a tag


def test_charts_have_no_button_that_sends_them_away() -> None:
    seen = page(drawn(12, lambda settings: settings["lr"]))
    configs = [
        json.loads(found) for script in seen.scripts for found in re.findall(r'\{[^{}]*"responsive"[^{}]*\}', script)
    ]
    assert len(configs) == 3
    for config in configs:
        buttons = {name for group in config.get("modeBarButtons", []) for name in group}
        assert buttons <= {"toImage", "zoom2d", "pan2d", "resetScale2d"}
        assert bool(buttons) == (config.get("displayModeBar") is not False)


def test_page_without_scores_says_so_and_is_small() -> None:
    waiting = [trial(number, {"lr": 1e-3}, state="waiting") for number in range(3)]
    broken = [trial(0, {"lr": 1e-3}, math.nan, math.inf, state="failed", reason="11 steps in a row were not finite")]
    running = page(waiting, replace(SWEEP, state="running", ended=None))
    assert "No trial has a finite miou yet: there is nothing to draw." in running.text
    assert "3 waiting" in running.text
    failed = page(broken)
    assert "No trial has a finite miou: the table tells what became of them." in failed.text
    assert "11 steps in a row were not finite" in failed.text
    assert "No trial" in page([]).text
    assert not any("plotly" in script for one in (running, failed) for script in one.scripts)


def test_summary_compares_with_the_default_in_either_mode() -> None:
    high = [trial(0, {"lr": 1e-3}, 0.25, 0.75), trial(1, {"lr": 1e-2}, 0.5, starts=3, state="stopped", seconds=4000.0)]
    seen = page(high, replace(SWEEP, baseline=0.5)).text
    assert "0.75 best miou trial 0, at step 20 0.25 better than the default the default config has 0.5" in seen
    assert "● 1 complete, ✕ 1 stopped" in seen
    assert "Finished after 1 h 05 min" in seen
    assert "1 h 06 min of training over all trials; 2 times one went on after" in seen
    low = [replace(one, mode="min") for one in high]
    seen = page(low, replace(SWEEP, mode="min", baseline=0.125)).text
    assert "0.25 best miou trial 0, at step 10 0.125 worse than the default" in seen


def test_rows_are_a_table_with_published_scores_and_no_search() -> None:
    rows = [
        trial(0, {"a": 1}, 0.5, label="full", published=(57.5, 0.7)),
        trial(1, {"a": 1}, 0.75, label="full", published=(57.5, 0.7)),
        trial(2, {"b": 2}, label="ours", state="failed"),
    ]
    seen = page(rows, replace(SWEEP, published=("mIoU", "F")))
    assert "row miou published mIoU published F trials full 0.625 ± 0.18 57.5 0.7 ● 2 complete ours – – –" in seen.text
    assert "Score over steps" in seen.text
    assert "Settings and score" not in seen.text
    assert "depends on" not in seen.text


def test_the_default_is_no_row_and_has_no_settings_to_compare() -> None:
    trials = [trial(0, {}, 0.3, label=BASELINE), *drawn(12, lambda settings: settings["size"])]
    assert "published" not in page(trials).text
    assert "Settings and score" in page(trials).text
    values = settings_and_score(trials, "miou")["data"][0]["dimensions"][0]["values"]  # type: ignore[index]
    assert len(values) == 12
    assert list(importance(trials).shares)[0] == "size"
    assert "Trials with a score: 9" in importance(trials[:10]).notes[0]


def test_trials_are_listed_best_first_with_links_to_their_runs() -> None:
    trials = [
        trial(0, {"lr": 1e-3}, 0.25),
        trial(1, {"lr": 1e-2}, 0.5),
        trial(2, {}, state="out of memory", reason="x"),
    ]
    seen = page([replace(one, folder=Path("sweep/tri als") / f"{one.number}") for one in trials])
    assert seen.addresses == ["tri%20als/1/", "tri%20als/0/", "tri%20als/2/"]


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_figures_are_valid(count: int) -> None:
    trials = drawn(count, lambda settings: 10 * settings["lr"])
    trials[0] = replace(trials[0], scores=((10, 0.1), (20, math.nan), (30, 0.2)), state="stopped")
    one_setting = [replace(one, settings={"lr": one.settings["lr"]}) for one in trials]
    figures = [settings_and_score(trials, "miou"), settings_and_score(one_setting, "miou")]
    figures += [curves(trials, "miou", 0.1), bars(importance(trials).shares)]
    assert (None in figures) == (count == 1)
    for figure in filter(None, figures):
        go.Figure(figure)  # raises for what plotly.js does not know
    assert [figure["data"][0]["type"] for figure in figures[:2] if figure] == (
        ["parcoords", "scatter"] if count > 1 else []
    )


def test_the_best_stands_out_and_stopped_lines_look_different() -> None:
    trials = [
        trial(0, {"lr": 1.0}, 0.2, 0.3),
        trial(1, {"lr": 2.0}, 0.1, state="stopped"),
        trial(2, {"lr": 3.0}, 0.4, 0.35),
    ]
    lines = {line["meta"][0][:14]: line for line in curves(trials, "miou", None)["data"] if "meta" in line}  # type: ignore[index]
    colours = {name: line["line"]["color"] for name, line in lines.items() if "line" in line}
    best = [line for line in lines.values() if line["marker"].get("symbol") == "star"]
    assert [(star["x"], star["y"]) for star in best] == [([10], [0.4])]
    assert len(set(colours.values())) == len(colours)
    data = curves(trials, "miou", None)["data"]  # type: ignore[index]
    drawn_lines = [line for line in data if line["mode"].startswith("lines") and line["x"] != [None]]
    assert [line["line"]["color"] == BEST for line in drawn_lines] == [False, False, True]  # the last lies on top
    assert [line["line"]["dash"] for line in drawn_lines] == ["dot", "solid", "solid"]
    assert [line["marker"]["symbol"][-1] for line in drawn_lines] == ["x", "circle", "circle"]
    assert {line["name"] for line in data if line["x"] == [None]} == {"complete", "stopped"}


def test_the_best_lies_on_top_of_its_equals() -> None:
    equals = [trial(number, {"lr": float(number), "size": 1 - number}, 0.5) for number in range(2)]
    lines = [line for line in curves(equals, "miou", None)["data"] if line["mode"].startswith("lines")]  # type: ignore[index]
    assert lines[-1]["meta"][0].startswith("<b>trial 0</b>")
    assert settings_and_score(equals, "miou")["data"][0]["line"]["color"][-1] == 1.0  # type: ignore[index]


def test_a_forked_line_jumps_to_the_score_that_it_went_on_from() -> None:
    good = trial(0, {"lr": 1.0}, 0.5, 0.6, 0.7)
    forked = trial(1, {"lr": 1.2}, 0.1, 0.2, 0.65, forks=(Fork(20, 0, {"lr": 1.2}), Fork(25, 9, {"lr": 1.2})))
    data = curves([good, forked], "miou", None)["data"]  # type: ignore[index]
    line = next(line for line in data if line["x"][:1] == [10] and len(line["x"]) == 4)
    assert list(zip(line["x"], line["y"], strict=True)) == [(10, 0.1), (20, 0.2), (20, 0.6), (30, 0.65)]
    jumps = next(trace for trace in data if trace.get("name") == "goes on from another trial")
    assert (jumps["x"], jumps["y"]) == ([20], [0.6])  # trial 9 is not known
    assert "trial 1</b> goes on from trial 0 with<br>lr: 1.2" in jumps["customdata"][0]


def test_scales_follow_how_values_are_spread() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert is_logarithmic(list(10 ** rng.uniform(-5, -2, 20)))
        assert not is_logarithmic(list(rng.uniform(0, 1, 500)))
    assert not is_logarithmic([-1.0, 10.0, 100.0])
    places = axis([1e-4, MISSING, 1e-2, 1e-3])
    assert places.places == pytest.approx((-4, -4.3, -2, -3))
    assert places.ticks[places.places[1]] == "not set"
    assert places.ticks[-3.0] == "1e-3"
    assert places.ticks[-2.0] == "0.01"
    mixed = axis(["b", None, 2, "b"])
    assert [mixed.ticks[place] for place in mixed.places] == ["b", "null", "2", "b"]
    few = axis([2, 4, 8, 8, 4, 2, 2, 4])
    assert sorted(few.ticks.values()) == ["2", "4", "8"]


@pytest.mark.parametrize("seed", range(3))
def test_importance_finds_what_was_planted(seed: int) -> None:
    found = importance(drawn(40, lambda s: -abs(math.log10(s["lr"]) + 3.5) + 0.1 * s["size"], seed))
    assert list(found.shares)[0] == "lr"
    assert sum(found.shares.values()) == pytest.approx(1)
    assert any("fixed does not vary" in note for note in found.notes)
    by_name = importance(drawn(40, lambda s: (s["name"] == "adam") + 0.1 * s["size"], seed))
    assert list(by_name.shares)[0] == "name"
    # a conditional one counts by what it moves of all, here little, and then half of the trials as lr moves all
    little = importance(drawn(40, lambda s: 5 * (s["name"] == "adam") + 0.1 * math.log10(s.get("decay", 1.0)), seed))
    assert list(little.shares)[:2] == ["name", "decay"]
    assert little.shares["decay"] < 0.2
    both = importance(drawn(60, lambda s: math.log10(s.get("decay", 10**-2.5)) + math.log10(s["lr"]), seed))
    assert list(both.shares)[:2] == ["lr", "decay"]


def test_importance_says_why_there_is_none() -> None:
    few = importance(drawn(9, lambda settings: settings["lr"]))
    assert not few.shares
    assert "Trials with a score: 9; 10 are needed" in few.notes[0]
    half = importance(drawn(14, lambda settings: settings["size"]))
    assert "decay" not in half.shares
    assert any("decay counts in too few trials: 7" in note for note in half.notes)
    same = importance([trial(number, {"lr": float(number)}, 0.5) for number in range(12)])
    assert same.notes == ("All trials have the same score.",)
    half_alike = importance(
        [
            trial(
                number,
                {"lr": float(number), **({"decay": 1.0 / number} if number % 2 else {})},
                0.5 if number % 2 else number,
            )
            for number in range(40)
        ]
    )
    assert half_alike.shares == {"lr": pytest.approx(1.0), "decay": 0.0}
    lone = importance([trial(number, {"lr": float(number)}, float(number)) for number in range(12)])
    assert "Only lr can be judged" in lone.notes[0]
    unscored = importance([trial(number, {"lr": 1.0}, math.nan) for number in range(12)])
    assert "Trials with a score: 0" in unscored.notes[0]

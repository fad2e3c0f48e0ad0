"""The study: which trials there are, what became of them, and that a sweep that was killed goes on with the same."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from avs_dist.launch.sweeps.settings import RowConfig, SchedulerConfig, SweepConfig
from avs_dist.launch.sweeps.space import parse_space
from avs_dist.launch.sweeps.study import BASELINE, Study

LR = {"optim.lr": "loguniform(1e-5, 1e-1)"}


def study(folder: Path, fits: Any = None, **values: Any) -> Study:
    sweep = SweepConfig(**{"samples": 3, "space": LR, **values})
    return Study(folder, sweep, parse_space(sweep.space), "miou", fits or (lambda row, settings: None))


def measured(there: Study, number: int, *scores: float) -> None:
    """The log that a training leaves."""
    folder = there.trial_folder(number)
    folder.mkdir(parents=True)
    lines = [json.dumps({"phase": "eval", "step": 10 * k, "miou": score}) for k, score in enumerate(scores, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"phase": "eval", "st']))  # the last is being written


def rest(there: Study) -> list[Any]:
    return list(iter(there.next, None))


def test_killed_at_any_moment_the_same_trials_come_again(tmp_path: Path) -> None:
    whole = rest(study(tmp_path / "whole", samples=6))
    assert [each.number for each in whole] == list(range(6))
    rng, found = random.Random(1), {}
    for _ in range(4):  # starts, each killed after some trials were handed out
        there = study(tmp_path / "killed", samples=6)
        for _ in range(rng.randrange(1, 4)):
            if draft := there.next():
                assert found.setdefault(draft.number, draft) == draft
                if rng.random() < 0.3:
                    there.end(draft.number, "complete")
    found |= {draft.number: draft for draft in rest(study(tmp_path / "killed", samples=6))}
    assert [found[number] for number in range(6)] == whole


def test_other_seeds_and_more_samples(tmp_path: Path) -> None:
    first = rest(study(tmp_path / "a"))
    assert rest(study(tmp_path / "b", seed=1)) != first
    assert len({draft.settings["optim.lr"] for draft in first}) == 3
    for draft in first:
        study(tmp_path / "a").end(draft.number, "complete")
    assert [draft.number for draft in rest(study(tmp_path / "a", samples=5))] == [3, 4]


def test_what_became_of_them(tmp_path: Path) -> None:
    there = study(tmp_path, samples=6)
    for number in range(5):
        there.next()
        there.started(number)
    measured(there, 0, 0.3, 0.5, 0.4)
    measured(there, 1, 0.2)
    there.report(0, 10, 0.3)
    there.worked(0, 12.0)
    there.started(0)
    there.worked(0, 3.0)
    there.end(0, "complete")
    there.end(1, "stopped")
    there.end(2, "out of memory", "no room")
    there.failed(3, "it broke")
    found = study(tmp_path, samples=6).outcomes(active=[4])
    assert [each.state for each in found] == ["complete", "stopped", "out of memory", "failed", "running", "waiting"]
    assert found[0].scores == ((10, 0.3), (20, 0.5), (30, 0.4))
    assert found[0].best == (20, 0.5)
    assert (found[0].seconds, found[0].starts, found[1].starts) == (15.0, 2, 1)
    assert [each.reason for each in found[2:4]] == ["no room", "it broke"]
    again = study(tmp_path, samples=6)
    assert [draft.number for draft in rest(again)] == [3, 4, 5]  # what failed is tried again
    assert [each.state for each in again.outcomes(active=[3])][3:] == ["running", "waiting", "waiting"]


def test_lowest_counts_where_scores_should_be_low(tmp_path: Path) -> None:
    there = study(tmp_path, mode="min", searcher="tpe")
    there.next()
    measured(there, 0, 0.3, 0.1, float("nan"))
    there.end(0, "complete")
    assert there.outcomes()[0].best == (20, 0.1)


def test_rows_and_grid_are_all_tried(tmp_path: Path) -> None:
    rows = {"KL": RowConfig(published=(56.38,)), "JS": RowConfig()}
    there = study(tmp_path, samples=2, rows=rows, space={"seed": "grid(1, 2)", **LR})
    drafts = rest(there)
    assert sorted((draft.row, draft.settings["seed"]) for draft in drafts) == sorted(
        2 * [(row, seed) for row in ("KL", "JS") for seed in (1, 2)]
    )
    assert {(each.label, each.published) for each in there.outcomes()} == {("KL", (56.38,)), ("JS", ())}


def test_waiting_trials_show_what_is_fixed(tmp_path: Path) -> None:
    found = study(tmp_path, samples=1, space={"seed": "grid(1, 2)", **LR}).outcomes()
    assert [(each.state, each.settings) for each in found] == [("waiting", {"seed": 1}), ("waiting", {"seed": 2})]


def test_baseline_is_the_first_trial_and_has_no_settings(tmp_path: Path) -> None:
    there = study(tmp_path, baseline=True)
    assert (first := there.next()) is not None
    assert first.settings == {}
    assert [each.label for each in there.outcomes()] == [BASELINE, "", "", ""]
    assert [draft.number for draft in rest(study(tmp_path, baseline=True))] == [0, 1, 2, 3]


def test_settings_that_do_not_fit_are_told_and_replaced(tmp_path: Path) -> None:
    space = {"engine.zero_stage": "choice(0, 1)", "engine.offload": "choice(none, optimizer)"}

    def fits(row: str, settings: dict[str, Any]) -> None:
        if settings["engine.zero_stage"] == 0 and settings["engine.offload"] == "optimizer":
            raise ValueError("offload needs a stage")

    there = study(tmp_path, fits, samples=8, space=space)
    assert len(rest(there)) == 8
    invalid = [each for each in there.outcomes() if each.state == "invalid"]
    assert invalid
    assert all(each.reason == "offload needs a stage" for each in invalid)
    assert len(there.outcomes()) == 8 + len(invalid)
    assert len(rest(study(tmp_path, fits, samples=8, space=space))) == 8  # none more for those that were replaced
    assert len(rest(study(tmp_path, fits, samples=10, space=space))) == 10


def test_space_without_settings_that_fit_is_refused(tmp_path: Path) -> None:
    def never(row: str, settings: dict[str, Any]) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="trials were drawn whose settings do not fit together, the last: no"):
        rest(study(tmp_path, never))


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_torn_end_of_the_journal_loses_no_more_than_its_lines(cut: int, tmp_path: Path) -> None:
    first = rest(study(tmp_path))
    journal = tmp_path / "study.log"
    journal.write_bytes(journal.read_bytes()[:-cut])
    for _ in range(2):
        again = rest(study(tmp_path))
        assert again == first
    study(tmp_path).end(0, "complete")
    assert [draft.number for draft in rest(study(tmp_path))] == [1, 2]


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_tpe_draws_by_the_scores_before(searcher: str, tmp_path: Path) -> None:
    drawn: list[list[float]] = []
    for best in (1e-2, 1e-4):
        there = study(tmp_path / f"{best}", searcher=searcher, samples=14)
        drawn.append([])
        while draft := there.next():
            drawn[-1].append(draft.settings["optim.lr"])
            measured(there, draft.number, -abs(math.log10(drawn[-1][-1] / best)))
            there.end(draft.number, "complete")
    high, low = drawn
    assert high[:10] == low[:10]  # at random, to begin with
    assert (high[10:] == low[10:]) == (searcher == "random")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to try"),
        ({"space": LR, "samples": 0}, "sweep.samples"),
        ({"space": LR, "scheduler": SchedulerConfig("pbt")}, "pbt changes settings of a population"),
        ({"rows": {"a": RowConfig()}, "baseline": True}, "its own row"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(**values)

"""Which settings the scores depend on: fANOVA, the share of the variance that a random forest lays to each alone.

It is the variance of the ranks of the scores, so that a few trials that diverged are not all it is about.

F. Hutter, H. Hoos, K. Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from avs_dist.launch.sweeps.outcome import Outcome
from avs_dist.launch.sweeps.scales import exact, is_logarithmic, is_number

MIN_TRIALS = 10  # with fewer, a forest finds patterns in noise
_TREES = 16  # ranks as 64 do, in a quarter of the time
Scored = tuple[dict[str, Any], float]  # settings of a trial, and its score or the rank of it


@dataclass(frozen=True)
class Importance:
    """Shares of the settings, greatest first, which sum up to 1; and why others, or all, have none, in sentences."""

    shares: dict[str, float]
    notes: tuple[str, ...]


def importance(outcomes: Sequence[Outcome]) -> Importance:
    """Of the trials that have settings and a score.

    A conditional setting counts among the trials that have it; its share is weighted by their part of all variance.
    """
    scored = _ranked([(outcome.settings, outcome.best[1]) for outcome in outcomes if outcome.best and outcome.settings])
    if len(scored) < MIN_TRIALS:
        return Importance(
            {}, (f"Trials with a score: {len(scored)}; {MIN_TRIALS} are needed to tell what it depends on.",)
        )
    variance = _variance(scored)
    if not variance:
        return Importance({}, ("All trials have the same score.",))
    shares: dict[str, float] = {}
    notes: list[str] = []
    groups: dict[tuple[int, ...], list[str]] = {}  # settings by the trials that have them
    for key in dict.fromkeys(key for settings, _ in scored for key in settings):
        places = tuple(place for place, (settings, _) in enumerate(scored) if key in settings)
        if _is_constant([scored[place] for place in places], key):
            notes.append(f"{key} does not vary.")
        elif len(places) < MIN_TRIALS:
            notes.append(f"{key} counts in too few trials: {len(places)}, {MIN_TRIALS} are needed.")
        else:
            groups.setdefault(places, []).append(key)
    for places, keys in groups.items():
        having = [scored[place] for place in places]
        weight = len(having) / len(scored) * _variance(having) / variance
        alone = _alone(having)
        shares |= {key: weight * alone.get(key, 0.0) for key in keys}
    if len(shares) == 1:
        return Importance(
            {}, (f"Only {next(iter(shares))} can be judged: there is nothing to weigh it against.", *notes)
        )
    total = math.fsum(shares.values())
    ranked = sorted(shares, key=lambda key: -shares[key])
    return Importance({key: shares[key] / total for key in ranked} if total else {}, tuple(notes))


def _ranked(scored: Sequence[Scored]) -> list[Scored]:
    """The ranks in place of the scores; equal scores share the mean of theirs."""
    order = sorted(score for _, score in scored)
    return [(settings, (bisect_left(order, score) + bisect_right(order, score)) / 2) for settings, score in scored]


def _variance(scored: Sequence[Scored]) -> float:
    return statistics.pvariance([rank for _, rank in scored])


def _is_constant(scored: Sequence[Scored], key: str) -> bool:
    return len({exact(settings[key]) for settings, _ in scored}) == 1


def _alone(scored: Sequence[Scored]) -> dict[str, float]:
    """Shares of the settings that all of these trials have and that vary among them; they sum up to 1."""
    keys = [key for key in scored[0][0] if all(key in settings for settings, _ in scored)]
    columns = {key: _column([settings[key] for settings, _ in scored]) for key in keys if not _is_constant(scored, key)}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()  # in memory
    distributions = {key: distribution for key, (distribution, _) in columns.items()}
    for place, (_, rank) in enumerate(scored):
        params = {key: values[place] for key, (_, values) in columns.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=rank))
    try:
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=_TREES, seed=0))
    except RuntimeError:  # all of these score alike, so no tree splits them
        return {}


def _column(values: Sequence[Any]) -> tuple[BaseDistribution, Sequence[Any]]:
    """The forest weighs a range evenly: what is seen by orders of magnitude enters by its logarithm."""
    if not all(map(is_number, values)):
        names = [exact(value) for value in values]
        return CategoricalDistribution(sorted(set(names))), names
    numbers = [math.log(value) if is_logarithmic(values) else float(value) for value in values]
    return FloatDistribution(min(numbers), max(numbers)), numbers

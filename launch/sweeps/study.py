"""The trials of a sweep, kept on disk: an Optuna study whose journal, study.log, is the one truth of which there are.

Everything a sweep has decided is in the journal before it is acted on, so a sweep that was killed at any moment goes on
with the same trials: those that were running are handed out again, with their number and so with their folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from avs_dist.launch.sweeps import trial as run
from avs_dist.launch.sweeps.outcome import Outcome, State
from avs_dist.launch.sweeps.settings import SweepConfig
from avs_dist.launch.sweeps.space import Choice, Parameter, Space, cells, draw, label

ROW = "row"  # the parameter of a table of rows; no config key
BASELINE = "the config as it is"  # label of the trial without settings
_NAME, _JOURNAL = "sweep", "study.log"


@dataclass(frozen=True)
class Draft:
    """A trial to be run: its number, row (empty without a table) and settings."""

    number: int
    row: str
    settings: dict[str, Any]


class Study:
    """The trials in `folder`, made at the first start.

    Args:
        objective: key of the score in metrics.jsonl.
        fits: raises ValueError for settings of a row that do not fit together.
    """

    def __init__(self, folder: Path, sweep: SweepConfig, space: Space, objective: str, fits: Any) -> None:
        self._folder, self._sweep, self._objective, self._fits = folder, sweep, objective, fits
        rows = tuple(sweep.rows)
        self._space = ((Parameter(ROW, Choice(rows, grid=True)),) if rows else ()) + space
        folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(folder / _JOURNAL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / _JOURNAL)))
        direction: Literal["maximize", "minimize"] = "maximize" if sweep.mode == "max" else "minimize"
        self._study = optuna.create_study(storage=storage, study_name=_NAME, direction=direction, load_if_exists=True)
        if sweep.baseline and not self._trials():
            self._study.enqueue_trial({}, user_attrs={"baseline": True})
        first: list[dict[str, Any]] = [{}] if sweep.baseline else []
        planned = first + sweep.samples * cells(self._space)
        for cell in planned[len(self._trials()) - self._replaced() :]:
            self._study.enqueue_trial({key: label(value) for key, value in cell.items()})
        self._read: dict[int, tuple[tuple[int, ...], tuple[tuple[int, float], ...]]] = {}
        self._begun = [each.number for each in self._trials() if each.state is TrialState.RUNNING]

    def trial_folder(self, number: int) -> Path:
        return run.folder_of(self._folder, number)

    def __len__(self) -> int:
        """Trials, whatever their state."""
        return len(self._trials())

    def next(self) -> Draft | None:
        """The next trial: first those that a former start has left; None when there are no more.

        Raises:
            ValueError: most settings that are drawn do not fit together.
        """
        while True:
            draft = self._next()
            if draft is None:
                return None
            try:
                self._fits(draft.row, draft.settings)
            except ValueError as error:
                self._replace(draft, str(error))
                continue
            self._note(draft.number, reason="")
            return draft

    def report(self, number: int, step: int, score: float) -> None:
        """A score, for the searcher; what is shown comes from metrics.jsonl."""
        if math.isfinite(score) and step not in self._trials()[number].intermediate_values:
            self._trial(number).report(score, step)

    def worked(self, number: int, seconds: float) -> None:
        """So long a trial has trained since its present start."""
        attrs = self._attrs(number)
        self._note(number, seconds={**attrs.get("seconds", {}), str(attrs.get("starts", 1)): round(seconds, 2)})

    def started(self, number: int) -> None:
        """A process has begun to train it."""
        self._note(number, starts=self._attrs(number).get("starts", 0) + 1)

    def end(self, number: int, state: Literal["complete", "stopped", "out of memory"], reason: str = "") -> None:
        """A trial that will not be run again."""
        scores = [score for _, score in self._scores(number) if math.isfinite(score)]
        self._note(number, state=state, reason=reason)
        if state == "complete" and scores:
            best = max(scores) if self._sweep.mode == "max" else min(scores)
            self._study.tell(number, best)
        elif state == "stopped" and scores:
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def failed(self, number: int, reason: str) -> None:
        """A trial that no retry helped; when the sweep is resumed, it is tried again."""
        self._note(number, state="failed", reason=reason)

    def outcomes(self, active: Sequence[int] = ()) -> list[Outcome]:
        """All trials, by number.

        Args:
            active: those that run now.
        """
        return [self._outcome(each, each.number in active) for each in self._trials()]

    def _next(self) -> Draft | None:
        if self._begun:
            trial = self._trial(self._begun.pop(0))
            self._note(trial.number, state=None)
        elif any(each.state is TrialState.WAITING for each in self._trials()):
            trial = self._study.ask()
        else:
            return None
        if self._attrs(trial.number).get("baseline"):
            return Draft(trial.number, "", {})
        self._study.sampler = self._sampler(trial.number)
        settings = draw(self._space, trial)  # what was drawn before comes again
        row = settings.pop(ROW, "")
        return Draft(trial.number, row, run.settings_of(self.trial_folder(trial.number)) or settings)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A fresh one for each trial: what is drawn hangs on the seed and the trials before, not on interruptions."""
        seed = int(np.random.SeedSequence([self._sweep.seed, number]).generate_state(1)[0])
        if self._sweep.searcher == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def _replace(self, draft: Draft, reason: str) -> None:
        """Another one is drawn in its place; noted first, so that a kill does not lose it."""
        fixed = self._trials()[draft.number].system_attrs.get("fixed_params", {})
        invalid = self._replaced() + 1
        if 2 * invalid > len(self._trials()):
            raise ValueError(f"{invalid} trials were drawn whose settings do not fit together, the last: {reason}")
        self._study.enqueue_trial(fixed)
        self._note(draft.number, state="invalid", reason=reason)
        self._study.tell(draft.number, state=TrialState.FAIL)

    def _replaced(self) -> int:
        return sum(each.user_attrs.get("state") == "invalid" for each in self._trials())

    def _outcome(self, trial: FrozenTrial, active: bool) -> Outcome:
        attrs, folder = trial.user_attrs, self.trial_folder(trial.number)
        settings = {key: json.loads(value) if isinstance(value, str) else value for key, value in trial.params.items()}
        row = settings.pop(ROW, "")
        if trial.state is TrialState.WAITING:
            fixed = trial.system_attrs.get("fixed_params", {})
            settings = {key: json.loads(value) for key, value in fixed.items()}
            row = settings.pop(ROW, "")
        state: State = attrs.get("state") or ("running" if active else "waiting")
        return Outcome(
            number=trial.number,
            state=state,
            settings=run.settings_of(folder) or settings,
            mode=self._sweep.mode,
            folder=folder,
            label=BASELINE if attrs.get("baseline") else row,
            reason=attrs.get("reason", ""),
            scores=self._scores(trial.number),
            seconds=sum(attrs.get("seconds", {}).values()),
            starts=attrs.get("starts", 0),
            forks=run.forks_of(folder),
            published=self._sweep.rows[row].published if row else (),
        )

    def _scores(self, number: int) -> tuple[tuple[int, float], ...]:
        """Read again where the log has changed."""
        path = self.trial_folder(number) / "metrics.jsonl"
        try:
            now = path.stat()
        except FileNotFoundError:
            return ()
        seen = (now.st_ino, now.st_size, now.st_mtime_ns)
        if number not in self._read or self._read[number][0] != seen:
            self._read[number] = seen, _evaluations(path, self._objective)
        return self._read[number][1]

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _attrs(self, number: int) -> dict[str, Any]:
        return self._trials()[number].user_attrs

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._trials()[number]._trial_id)

    def _note(self, number: int, **values: Any) -> None:
        storage, identity = self._study._storage, self._trials()[number]._trial_id
        for key, value in values.items():
            storage.set_trial_user_attr(identity, key, value)


def _evaluations(path: Path, objective: str) -> tuple[tuple[int, float], ...]:
    """Step and score of the evaluations that a run has logged."""
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that is being written
            continue
        if record.get("phase") == "eval" and objective in record:
            found[int(record["step"])] = float(record[objective])
    return tuple(sorted(found.items()))


def _cut_torn_line(journal: Path) -> None:
    """What a kill or a full disk has left of the last line: Optuna would write on behind it, and never read that."""
    if journal.is_file() and not (text := journal.read_bytes()).endswith(b"\n"):
        with open(journal, "r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)

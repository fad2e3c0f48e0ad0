"""A sweep as a whole, for those who read its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Summary:
    """What the results say beside the trials.

    Args:
        title: what the sweep is for.
        objective: the metric that counts, as in metrics.jsonl.
        mode: whether it should be high or low.
        command: as it was typed.
        searcher: where settings come from.
        scheduler: what stops trials, or changes them.
        state: "interrupted" can be continued.
        started: seconds since 1970.
        ended: seconds since 1970; None while it is running.
        baseline: objective of the default config, where it was measured.
        published: headings of the scores that a paper gives the rows.
        init_from: where the trainings of a space begin, if not from scratch.
    """

    title: str
    objective: str
    mode: Literal["max", "min"]
    command: str
    searcher: str
    scheduler: str
    state: Literal["running", "finished", "interrupted"]
    started: float
    ended: float | None = None
    baseline: float | None = None
    published: tuple[str, ...] = ()
    init_from: str | None = None

    @property
    def published_columns(self) -> list[str]:
        """Headings of the paper's scores in the results."""
        return [f"published {heading}" for heading in self.published]

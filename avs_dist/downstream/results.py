"""Results of heads that were trained on one modality and tested on each: the table, and the same for a JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

WIDTH = 100  # of printed text


@dataclass(frozen=True)
class Measure:
    """One metric of all heads.

    scores:   by the modality trained on, then by that tested on.
    labelled: by the modality trained on: what the head scores there on held-out clips of its own data set; where that
              is unknown there is none. As published: on the clips that are measured.
    chance:   by the modality tested on: the best constant answer.
    epochs:   by the modality trained on, then by that tested on: after which epoch the head was measured.
    """

    name: str
    meaning: str
    scores: dict[str, dict[str, float]]
    labelled: dict[str, float]
    chance: dict[str, float]
    epochs: dict[str, dict[str, int]]

    def ratio(self, trained: str, tested: str) -> float | None:
        """The score of another modality, relative to that of the labelled one."""
        own = self.labelled.get(trained, 0.0)
        return self.scores[trained][tested] / own if own > 0 else None

    def to_dict(self) -> dict[str, Any]:
        ratios = {
            trained: {tested: self.ratio(trained, tested) for tested in row if tested != trained}
            for trained, row in self.scores.items()
        }
        return {**asdict(self), "ratio": ratios}


def table(measure: Measure) -> str:
    """The metric as text: a row for each head, a column for each modality it was tested on."""
    tested = list(measure.chance)
    header = ["trained on", *(f"on {m}" for m in tested), "labelled"]
    body = [
        [trained, *(_cell(measure, trained, m) for m in tested), _number(measure.labelled.get(trained))]
        for trained in measure.scores
    ]
    body.append(["best constant", *(_number(measure.chance[m]) for m in tested), ""])
    return f"{fill(f'{measure.name}: {measure.meaning}', WIDTH)}\n{aligned([header, *body])}"


LEGEND = (
    "trained on     the modality whose labels the head has seen; (x 0.75) is a score relative to labelled\n"
    "labelled       its score in that modality, the bound of what can transfer: on held-out clips of its data, or,\n"
    "               for a published metric, on the clips that are measured\n"
    "best constant  what the best answer that ignores the clip would score"
)


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    first, *others = (max(len(line[i]) for line in lines) for i in range(len(lines[0])))
    rows = [[line[0].ljust(first), *(c.rjust(w) for c, w in zip(line[1:], others, strict=True))] for line in lines]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _cell(measure: Measure, trained: str, tested: str) -> str:
    value = measure.scores[trained].get(tested)
    ratio = measure.ratio(trained, tested) if value is not None and trained != tested else None
    return _number(value) + ("" if ratio is None else f" (x {ratio:.2f})")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

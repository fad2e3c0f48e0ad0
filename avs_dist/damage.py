"""Damaged clips of a run: counted by kind, told once for each kind, and a bound above which the run stops.

All ranks know of all damage and decide alike.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from avs_dist import interruption, world
from avs_dist.interruption import Preempted
from avs_dist.shards.faults import KINDS, Damage
from avs_dist.shards.files import write_text

REPORT_FILE = "damaged.json"


class DataError(RuntimeError):
    """The data cannot go on; raised on all ranks alike, so that they can still save together."""


class TooManyDamagedError(DataError):
    """More clips are damaged than the bound allows; the message is the report."""


class NoBatchError(DataError):
    """A rank has no batch."""


class DamageLog:
    """The damaged clips of one split that a run has met, each once.

    Args:
        num_clips: Clips that it may meet.
        max_damaged: Share of them that may be damaged; one clip may always be, unless this is 0.
        label: What to call the clips, such as "train of runs/shards".
    """

    def __init__(self, num_clips: int, max_damaged: float, label: str) -> None:
        self._num_clips, self._max_damaged, self._label = num_clips, max_damaged, label
        self.allowed = max(1, int(max_damaged * num_clips)) if max_damaged > 0 else 0
        self._found: dict[int, Damage] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def damages(self) -> list[Damage]:
        """In the order in which they were met."""
        return list(self._found.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many clips by kind of damage, the most frequent first."""
        return _by_kind(self.damages)

    def add(self, damages: Sequence[Damage]) -> None:
        """Note damage; the first of a kind is told on rank 0."""
        for damage in damages:
            if world.is_main() and damage.kind not in self.counts:
                more = "further clips of this kind are counted in silence"
                tqdm.write(f"damaged clip ({damage.kind}: {KINDS[damage.kind]}): {damage}; {more}", file=sys.stderr)
            self._found.setdefault(damage.clip, damage)

    def check(self) -> None:
        """Raises TooManyDamagedError, with the report, where the bound is exceeded."""
        if len(self) > self.allowed:
            raise TooManyDamagedError(
                f"{self.summary()}, data.max_damaged={self._max_damaged:g} allows {self.allowed}; the first of each "
                f"kind: {'; '.join(self._first_of_each_kind())}. Look with `avs-dist shards verify`, then mend or "
                "rebuild the shards, or raise data.max_damaged (--max-damaged of other commands than train)"
            )

    def summary(self) -> str:
        """One line: how many, of which kinds."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts.items())
        return f"{len(self)} of {self._num_clips} clips of {self._label} are damaged ({kinds})"

    def _first_of_each_kind(self) -> list[str]:
        first: dict[str, Damage] = {}
        for damage in self._found.values():
            first.setdefault(damage.kind, damage)
        return [f"{kind}: {damage}" for kind, damage in first.items()]


def agree(log: DamageLog, damages: Sequence[Damage], failure: str | None = None) -> None:
    """Note what any rank has found or been told, on all ranks; collective.

    Args:
        failure: Why this rank has no batch, if so; then all ranks stop.

    Raises:
        Preempted: a rank got a signal to stop; on all ranks.
        TooManyDamagedError: the bound is exceeded; on all ranks.
        NoBatchError: a rank has no batch; on all ranks.
    """
    signal = interruption.received()
    if not world.any_rank(bool(damages) or failure is not None or signal is not None):
        return
    told = world.gather_objects((list(damages), failure, signal))
    log.add([damage for found, _, _ in told for damage in found])
    for rank, (_, _, signal) in enumerate(told):
        if signal is not None:
            raise Preempted(f"stopped by {signal} (rank {rank})")
    log.check()
    for rank, (_, reason, _) in enumerate(told):
        if reason is not None:
            raise NoBatchError(f"rank {rank} has no batch: {reason}")


def save_report(folder: Path, logs: Sequence[DamageLog]) -> None:
    """Write every damaged clip with its place and reason to damaged.json."""
    damages = [damage for log in logs for damage in log.damages]
    clips = [damage._asdict() for damage in damages]
    write_text(folder / REPORT_FILE, json.dumps({"counts": _by_kind(damages), "clips": clips}, indent=1) + "\n")


def _by_kind(damages: Sequence[Damage]) -> dict[str, int]:
    return dict(Counter(damage.kind for damage in damages).most_common())


def reported_clips(folder: Path, split: str) -> list[int]:
    """Ids of the clips of a split that damaged.json lists; none where there is no such file."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return []
    return [clip["clip"] for clip in json.loads(path.read_text())["clips"] if clip["split"] == split]

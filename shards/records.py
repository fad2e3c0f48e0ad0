"""Records of a build that can be killed at any time and started again.

Each finished shard leaves a record in `.build/` of the folder: how many clips were taken for it, what it holds, which
were skipped. index.json is written last, and then the records go.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avs_dist.shards.index import ShardEntry, ShardIndex, write_json
from avs_dist.shards.schema import AUDIO_ENCODER, INDEX_FILE

# settings that a build cannot compare when it begins
_KNOWN_AT_THE_END = (AUDIO_ENCODER,)


def empty_record() -> dict[str, Any]:
    """Record of a shard that holds nothing yet."""
    return {"taken": 0, "shard": None, "skipped": []}


class Records:
    """The finished shards of the build of one folder.

    Args:
        out: Folder of the shards.
        settings: What decides their bytes.
        max_skipped: Largest share of the clips that may be unusable.
    """

    def __init__(self, out: Path, settings: dict[str, Any], max_skipped: float) -> None:
        self._out, self._settings, self._max_skipped = out, settings, max_skipped
        self._folder = out / ".build"
        self._done: list[dict[str, Any]] = []

    def finished_index(self) -> ShardIndex | None:
        """The index, where the folder is finished; else the records are taken up, or begun.

        Raises:
            ValueError: If the folder holds something else.
        """
        if (self._out / INDEX_FILE).exists():
            index = ShardIndex.load(self._out)
            self._check_settings(index.settings)
            shutil.rmtree(self._folder, ignore_errors=True)
            return index
        path = self._folder / "settings.json"
        if path.exists():
            self._check_settings(json.loads(path.read_bytes()))
        else:
            foreign = sorted(p.name for p in self._out.iterdir() if p.suffix == ".tar")
            if foreign:
                raise ValueError(f"{self._out} holds tar files of something else ({foreign[0]}); use another --out")
            self._folder.mkdir(exist_ok=True)
            write_json(path, self._settings)
        for leftover in self._out.glob(".*.tmp"):
            leftover.unlink()
        return None

    def take_up(self, split: str) -> list[dict[str, Any]]:
        """Records of the shards of a split that an earlier run finished, up to the first that is missing."""
        found: list[dict[str, Any]] = []
        while (path := self._path(split, len(found))).exists():
            record = json.loads(path.read_bytes())
            shard = record["shard"]
            if shard and not _is_there(self._out / shard["name"], shard["bytes"]):
                break
            found.append(record)
        self._done += found
        return found

    def add(self, split: str, number: int, record: dict[str, Any]) -> None:
        """Keep the record of a shard that is finished."""
        write_json(self._path(split, number), record)
        self._done.append(record)

    def check_skipped(self, total: int) -> None:
        """See that no more than `max_skipped` of `total` clips were skipped so far.

        Raises:
            RuntimeError: If it is more, with the first reasons.
        """
        skipped = self._skipped()
        if len(skipped) > self._max_skipped * total:
            raise RuntimeError(
                f"{len(skipped)} of {total} clips cannot be used, --max-skipped allows {self._max_skipped:.2%}. "
                f"First reasons: {_reasons(skipped)}. Mend the files and build into an empty folder, or run again "
                "with a higher --max-skipped"
            )

    def finish(
        self, more_settings: dict[str, Any] | None = None, skipped_before: Sequence[dict[str, str]] = ()
    ) -> ShardIndex:
        """Write index.json and drop the records.

        Args:
            more_settings: What the settings of the index also tell.
            skipped_before: Clips that were skipped in an earlier build, of which this one is made.

        Raises:
            RuntimeError: If there is no shard.
        """
        shards = [ShardEntry.from_dict(record["shard"]) for record in self._done if record["shard"]]
        skipped = self._skipped()
        if not shards:
            raise RuntimeError(f"no usable clip: {_reasons(skipped)}")
        settings = self._settings | (more_settings or {})
        index = ShardIndex(self._out, settings, tuple(shards), (*skipped_before, *skipped))
        index.save()
        shutil.rmtree(self._folder)
        return index

    def _skipped(self) -> list[dict[str, str]]:
        return [clip for record in self._done for clip in record["skipped"]]

    def _path(self, split: str, number: int) -> Path:
        return self._folder / f"{split}-{number:05d}.json"

    def _check_settings(self, theirs: dict[str, Any]) -> None:
        names = dict.fromkeys(name for name in (*self._settings, *theirs) if name not in _KNOWN_AT_THE_END)
        pairs = [(name, theirs.get(name), self._settings.get(name)) for name in names]
        different = [f"{name} (there {there!r}, now {now!r})" for name, there, now in pairs if there != now]
        if different:
            raise ValueError(
                f"{self._out} holds a build with other settings: {', '.join(different)}; use another --out"
            )


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _reasons(skipped: Sequence[dict[str, str]]) -> str:
    return "; ".join(f"{clip['name']}: {clip['reason']}" for clip in skipped[:5])


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One build at a time in a folder, which is made; the lock goes with the process, however it ends.

    Raises:
        ValueError: If another build is running.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build is writing into {out}") from None
        yield

"""Where the bytes of shards come from: plain local files, read by byte range; `remote_store` has the same for URLs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.files import opened_plain
from avs_dist.shards.index import ShardEntry


class Store(Protocol):
    """Reads parts of shards."""

    def read(self, shard: ShardEntry, offset: int, length: int) -> memoryview:
        """Writable memory of its own with these bytes.

        Raises:
            ClipFault: "unreadable" or "truncated".
        """
        ...

    def upcoming(self, shards: Iterator[ShardEntry]) -> None:
        """These shards are wanted next, in this order (without end, and again and again); a store that fetches them may
        begin, and takes no more from the iterator than it needs."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class LocalStore:
    """Shards in a folder of this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, shard: ShardEntry, offset: int, length: int) -> memoryview:
        return read_range(self._directory / shard.name, offset, length)

    def upcoming(self, shards: Iterator[ShardEntry]) -> None:
        """Nothing: the kernel reads ahead."""

    def close(self) -> None:
        """Nothing is kept open."""


def read_range(path: Path, offset: int, length: int) -> memoryview:
    """Bytes of a plain file, in writable memory of their own.

    Raises:
        ClipFault: "unreadable" where there is no such file, or a link, pipe or device in its place; "truncated" where
            it ends earlier.
    """
    try:
        with opened_plain(path) as file:
            content = np.empty(length, dtype=np.uint8).data
            done = 0
            while done < length:
                count = os.preadv(file, [content[done:]], offset + done)
                if count == 0:
                    raise ClipFault("truncated", f"the file ends after {done} of {length} bytes")
                done += count
            return content
    except OSError as error:
        raise ClipFault("unreadable", f"cannot be read as a plain file: {error.strerror or error}") from error

"""Where the bytes of shards come from: plain local files, read by byte range; `remote_store` has the same for URLs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.index import ShardEntry

# never through a link, and never waiting for the other end of a pipe
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


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
        ClipFault: "unreadable" where there is no such file, or a link, pipe or device in its place; "truncated" where it
            ends earlier.
    """
    try:
        file = os.open(path, _PLAIN)
    except OSError as error:
        raise ClipFault("unreadable", f"cannot be opened as a plain file: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ClipFault("unreadable", "not a plain file (a link, pipe or device)")
        content = memoryview(np.empty(length, dtype=np.uint8)).cast("B")
        done = 0
        while done < length:
            count = os.preadv(file, [content[done:]], offset + done)
            if count == 0:
                raise ClipFault("truncated", f"the file ends after {done} of {length} bytes")
            done += count
        return content
    except OSError as error:
        raise ClipFault("unreadable", f"cannot be read: {error.strerror}") from error
    finally:
        os.close(file)

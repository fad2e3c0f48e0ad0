"""Locks between the processes of a host: files held with flock, which the kernel lets go when a process dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from avs_dist.shards.transfer import Stopped

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX
_POLL_S = 0.02


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Descriptor of a lock file, made with its folder if need be, not locked yet; its lock ends with the block.

    Lock files must stay: who locks a file that was removed does not exclude those who lock the next of that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has it open, too
        os.close(descriptor)


def try_lock(descriptor: int, kind: int) -> bool:
    """Take the lock, SHARED or EXCLUSIVE, if it is free; a lock of the other kind is let go in any case."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_until(condition: Callable[[], bool], longest_s: float, stopped: Event) -> bool:
    """Ask again and again until `condition` holds; False if it never did in that time.

    Raises:
        Stopped: When `stopped` is set.
    """
    end = time.monotonic() + longest_s
    while not condition():
        if time.monotonic() > end:
            return False
        if stopped.wait(_POLL_S):
            raise Stopped
    return True

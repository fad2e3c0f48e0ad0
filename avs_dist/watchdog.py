"""What a rank is doing, said aloud where it takes too long or where another rank is lost.

with watching(600):
    with phase("training step 12"):
        ...

The main thread may be stuck for ever, in a read from a lost file server or in a collective: a thread beside it then
says where, writes the stacks of all threads and ends the process. The launcher ends the other ranks.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from avs_dist import world

EXIT_CODE = os.EX_UNAVAILABLE  # 69
# beyond what a rank waits for others (world.PATIENCE), which it can tell better itself
LAST_RESORT = 1.5


class LostRankError(RuntimeError):
    """Another rank has gone, or does not answer in time."""


class _Phase:
    def __init__(self, describe: Callable[[], str], limit_s: float) -> None:
        self.describe, self.limit_s = describe, limit_s
        self.begin()

    def begin(self) -> None:
        self.started = time.monotonic()

    def is_overdue(self) -> bool:
        return 0 < self.limit_s < time.monotonic() - self.started


_phases: list[_Phase] = []  # the innermost one last
_timeout_s = 0.0


@contextmanager
def watching(timeout_s: float) -> Iterator[None]:
    """Within the block the process ends where a phase takes too long (EXIT_CODE); 0 sets no limit."""
    global _timeout_s
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(ended, min(1.0, timeout_s / 10)), name="watchdog", daemon=True)
    before, _timeout_s = _timeout_s, timeout_s
    if timeout_s:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        _timeout_s = before
        if timeout_s:
            thread.join()


def timeout_s() -> float:
    """What `watching` was given; 0 outside of it."""
    return _timeout_s


@contextmanager
def phase(what: str | Callable[[], str], patience: float = LAST_RESORT) -> Iterator[None]:
    """Tell what this rank does within the block; the end of an inner phase gives the outer one its full time again.

    Args:
        what: is done, such as "training step 12"; or makes this text when it is needed.
        patience: times engine.timeout_s that it may take.

    Raises:
        LostRankError: contact to another rank was lost within the block.
    """
    describe = what if callable(what) else lambda: what
    _phases.append(_Phase(describe, patience * _timeout_s))
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRankError(f"rank {world.rank()} lost another rank while {describe()}: {reason}") from error
    finally:
        for outer in _phases[-2:-1]:
            outer.begin()
        _phases.pop()


def _is_lost_contact(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors that name its source, or the pair of ranks."""
    if isinstance(error, LostRankError):
        return False
    signs = ("/gloo/", "pair closure", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _watch(ended: threading.Event, interval_s: float) -> None:
    while not ended.wait(interval_s):
        for current in _phases[-1:]:  # there may be none
            if current.is_overdue():
                _end(current)


def _end(stuck: _Phase) -> None:
    text = (
        f"rank {world.rank()} is stuck while {stuck.describe()}: more than {stuck.limit_s:g} s "
        f"(engine.timeout_s={_timeout_s:g}); what its threads do follows"
    )
    signal.alarm(5)  # ends the process where nobody empties the pipe behind stderr
    try:
        os.write(2, f"\navs-dist: {text}\n".encode())  # sys.stderr may be locked by a thread that is stuck
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    finally:  # also where nobody reads, or the log's disk is full
        os._exit(EXIT_CODE)

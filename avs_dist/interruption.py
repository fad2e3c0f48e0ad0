"""Signals, or a launcher that is gone, ask a run to stop: noted here, agreed on by all ranks at the next step or batch,
then saved and left.

SIGTERM is what cluster managers send before they take a machine away, SIGUSR1 what slurm's --signal option is often
set to. It is enough that one rank gets it. Standard library only, so that signals are noted before anything slow is
imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = os.EX_TEMPFAIL  # 75: the run is saved, start the same command again with --train.resume true

_received: str | None = None


class Preempted(Exception):
    """A signal asked the run to stop; raised on all ranks alike, so that they can save together."""


@contextmanager
def noted() -> Iterator[None]:
    """Within the block the signals no longer end the process but are noted, for `received`; afterwards the former
    handlers are back. Within another such block, and outside the main thread, where Python sets no handlers, it does
    nothing."""
    global _received
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGNALS[0]) is _note:
        yield
        return
    _received = None
    before = {each: signal.signal(each, _note) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _received = None


def received() -> str | None:
    """What asked this process to stop within `noted`, if anything: a signal by its name, or `reader_gone`."""
    return _received


def reader_gone() -> None:
    """Note that nobody is left to read what this process prints: its launcher, or the connection to it, has ended
    without a signal. The run must not go on beside the one that is started in its place."""
    global _received
    _received = _received or "the end of its launcher"


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number).name

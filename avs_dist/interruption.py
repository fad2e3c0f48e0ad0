"""Signals that ask a run to stop: noted here, agreed on by all ranks at the next step or batch, then saved and left.

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
    handlers are back. Outside the main thread, where Python sets no handlers, it does nothing."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, _note) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _received = None


def received() -> str | None:
    """Name of the signal that this process got within `noted`, if any."""
    return _received


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number).name

"""Child processes that neither die of a signal that is meant for their parent nor outlive it."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PARENTS = {signal.SIGTERM, signal.SIGUSR1}
_PR_SET_PDEATHSIG = 1


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that this thread starts within the block never get SIGTERM and SIGUSR1, which a cluster manager sends
    to all processes of a job: their parent decides when they end. SIGKILL ends them.

    Blocked signals are inherited from the very start, which no handler is; what the parent gets meanwhile is delivered
    at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends, however that is, and wherever this one is
    stuck (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

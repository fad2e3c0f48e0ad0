"""Measuring in another process: a hang or a crash there costs one case, and a fresh process has a peak of its own."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """A process that works off calls one after the other, and is replaced when one of them hangs or kills it.

    Args:
        fresh: every call gets a new process.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self._process: Any = None

    def call(self, function: Callable[..., Any], *args: Any, limit_s: float) -> Any:
        """What a function of some module returns.

        {"failed": why} when it raised or crashed, {"skipped": why} when it took too long.
        """
        if self._process is None:
            self._start()
        self._pipe.send((function, args))
        result: Any
        try:
            if not self._pipe.poll(limit_s):
                result, healthy = {"skipped": f"took more than {limit_s:g} s"}, False
            else:
                result, healthy = self._pipe.recv()
        except EOFError:
            self._process.join()
            result, healthy = {"failed": f"crashed (exit code {self._process.exitcode})"}, False
        if self.fresh or not healthy:
            self.stop()
        return result

    def stop(self) -> None:
        if self._process is not None:
            self._pipe.close()  # an idle process then ends by itself
            self._process.join(timeout=2.0)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()


def _serve(pipe: Connection) -> None:
    """Send (result, whether this process can go on) for each call."""
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            pipe.send((function(*args), True))
        except Exception as error:  # an error of CUDA would follow into the next case
            traceback.print_exc()
            message = " ".join(str(error).split())[-200:]
            pipe.send(({"failed": f"{type(error).__name__}: {message}"}, False))

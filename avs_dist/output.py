"""What a run prints is for people; that nobody can read it, or that its log file has no room, does not end the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def optional(reader_gone: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block, what stdout and stderr cannot take is lost without an error.

    Their reader may go first: a launcher that is told to stop closes the ssh of every rank before it tells the ranks,
    and one line of a progress bar would end them before they have saved.

    Args:
        reader_gone: called, maybe more than once, when there is nobody left to read.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Optional(before[0], reader_gone), _Optional(before[1], reader_gone)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _flush_or_drop(stream)


class _Optional:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO, reader_gone: Callable[[], None]) -> None:
        self._stream = stream
        self._reader_gone = reader_gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losses():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losses():
            self._stream.flush()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._reader_gone()
        except OSError:  # no room
            pass


def _flush_or_drop(stream: TextIO) -> None:
    """What is left in its buffer would otherwise turn the exit code into 120."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)

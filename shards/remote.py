"""Fetching files at urls over fsspec, through networks and servers that fail: retry, go on where it was cut, give up.

Credentials come from the environment or fsspec's own configuration; those within a url are never printed.
"""

from __future__ import annotations

import importlib.util
import io
import random
import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from avs_dist.shards.transfer import FetchError, RangeFault, Stopped, Stream, TransferFault, shown

# scheme -> package that fsspec needs for it
SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# a try that brings so much is progress: the failed tries are counted anew
PROGRESS_BYTES = 2**20
# its own, so that waiting takes no numbers from the generators that a training draws from
_JITTER = random.Random()


@dataclass(frozen=True)
class Patience:
    """How long failing transfers are put up with.

    tries:           failed tries in a row, without progress, after which a fetch gives up.
    first_wait_s:    wait after the first of them; it doubles from try to try up to longest_wait_s.
    stall_s:         longest time without an answer or a byte.
    min_bytes_per_s: a transfer slower than this over stall_s has failed.
    """

    tries: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    stall_s: float = 30.0
    min_bytes_per_s: int = 64 * 2**10

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after so many failed tries: at random, so that not all ranks come back at once."""
        longest = min(self.first_wait_s * 2.0 ** (failures - 1), self.longest_wait_s)
        return longest * _JITTER.uniform(0.5, 1.0)

    def longest_s(self, size: int) -> float:
        """Seconds in which a fetch of `size` bytes that makes any progress has ended."""
        return size / self.min_bytes_per_s + self.tries * (self.stall_s + self.longest_wait_s)


DEFAULT_PATIENCE = Patience()
# somebody waits in front of the screen
SHORT_PATIENCE = Patience(tries=4)


def is_url(text: str) -> bool:
    """Whether `text` is a url rather than the path of a local folder."""
    return _URL.match(text) is not None


def refuse_url(option: str, path: Path) -> None:
    """For what must be a local folder.

    Raises:
        ValueError: If it looks like a url; a Path has lost one of its slashes.
    """
    if _URL_AS_PATH.match(str(path)):
        raise ValueError(f"{option} {shown(str(path))}: must be a folder on this machine")


def check_url(url: str) -> str:
    """The scheme of a url that can be fetched from, one of SCHEMES.

    Raises:
        ValueError: For another scheme, or without a host or bucket.
        ImportError: If the package for this scheme is not installed.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"{shown(url)}: {error}") from error
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"{shown(url)}: unknown scheme '{parts.scheme}'; use {known} or the path of a local folder")
    if not parts.netloc.rpartition("@")[2]:
        raise ValueError(f"{shown(url)}: no host or bucket after {parts.scheme}://")
    package = SCHEMES[parts.scheme]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{shown(url)}: {parts.scheme}:// needs another package: pip install {package}")
    return parts.scheme


def join_url(folder: str, name: str) -> str:
    """The url of a file in a folder; a query (a signature, a token) stays at the end.

    name: a plain file name; what means something in a url is quoted.
    """
    parts = urlsplit(folder)
    quoted = quote(name, safe="") if parts.scheme in ("http", "https") else name
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quoted}", fragment=""))


def fetch(
    url: str, file: BinaryIO, size: int, patience: Patience = DEFAULT_PATIENCE, stopped: Event | None = None
) -> None:
    """Write the `size` bytes at `url` to `file`, from its first byte on.

    file:    seekable; never more than `size` bytes are written.
    stopped: calls the fetch off when set.

    Raises:
        FetchError: If the file is missing or refused (MissingError, RefusedError), or the last try failed.
        ValueError, ImportError: See `check_url`.
        Stopped: If it was called off.
    """
    _fetch(url, file, size, size, patience, stopped or Event())


def fetch_bytes(url: str, limit: int, patience: Patience = SHORT_PATIENCE) -> bytes:
    """The file at `url`.

    Raises:
        FetchError: If it has more than `limit` bytes, and as in `fetch`.
        ValueError, ImportError: See `check_url`.
    """
    file = io.BytesIO()
    _fetch(url, file, None, limit, patience, Event())
    file.truncate()
    return file.getvalue()


def _fetch(url: str, file: BinaryIO, size: int | None, limit: int, patience: Patience, stopped: Event) -> None:
    scheme = check_url(url)
    file.seek(0)
    failures, furthest = 0, 0
    while True:
        try:
            with _open(url, scheme, file.tell(), patience.stall_s) as stream:
                _receive(url, stream, file, size, limit, patience, stopped)
            file.flush()
            return
        except TransferFault as fault:
            if file.tell() >= furthest + PROGRESS_BYTES:
                failures, furthest = 0, file.tell()
            failures += 1
            if failures >= patience.tries:
                raise FetchError(f"{shown(url)}: gave up after {failures} tries, the last: {fault}") from None
            if isinstance(fault, RangeFault):
                file.seek(0)
        if stopped.wait(patience.wait_s(failures)):
            raise Stopped


def _open(url: str, scheme: str, offset: int, stall_s: float) -> AbstractContextManager[Stream]:
    # imported when needed, so that local shards do not wait for these packages
    if scheme in ("http", "https"):
        from avs_dist.shards.http_stream import open_http

        return open_http(url, offset, stall_s)
    from avs_dist.shards.object_stream import open_object

    return open_object(url, offset, stall_s)


def _receive(
    url: str, stream: Stream, file: BinaryIO, size: int | None, limit: int, patience: Patience, stopped: Event
) -> None:
    """One try, to the end of the file; `file` stands where the next one may go on."""
    expected = stream.total if size is None else size
    if stream.total not in (None, expected):
        raise RangeFault(f"it has {stream.total} bytes there, {expected} are expected")
    if expected is not None and expected > limit:
        raise FetchError(f"{shown(url)}: it has {expected} bytes, at most {limit} are accepted")
    file.seek(stream.begin)
    pace = _Pace(patience)
    for chunk in stream.chunks:
        if stopped.is_set():
            raise Stopped
        if file.tell() + len(chunk) > (limit if expected is None else expected):
            raise RangeFault(f"more bytes came than the {limit if expected is None else expected} expected")
        file.write(chunk)
        pace.add(len(chunk))
    if expected is not None and file.tell() < expected:
        raise TransferFault(f"it ended after {file.tell()} of {expected} bytes")


class _Pace:
    """Notices a transfer that drips."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._since, self._received = time.monotonic(), 0

    def add(self, received: int) -> None:
        """Count some bytes; raises TransferFault if there were too few over the last stall_s."""
        self._received += received
        passed = time.monotonic() - self._since
        if passed < self._patience.stall_s:
            return
        if self._received < self._patience.min_bytes_per_s * passed:
            raise TransferFault(f"only {self._received} bytes came in {passed:.1f} s")
        self._since, self._received = time.monotonic(), 0

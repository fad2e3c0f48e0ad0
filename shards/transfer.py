"""What the parts of fetching share: errors that name a url without its secrets, and a file under way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

MAX_TOLD = 200
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")


class FetchError(OSError):
    """A file could not be fetched; the message names its url without credentials."""


class MissingError(FetchError, FileNotFoundError):
    """There is no such file."""


class RefusedError(FetchError, PermissionError):
    """The server does not give the file to us."""


class TransferFault(Exception):
    """One try has failed; another one may succeed."""


class RangeFault(TransferFault):
    """The file cannot be had from that byte on: the next try has to begin with its first byte."""


class Stopped(Exception):
    """Waiting or fetching was called off."""


class Stream(NamedTuple):
    """A file under way.

    begin:  the byte that the first chunk begins with.
    total:  bytes of the whole file as far as the server tells; None where it does not.
    chunks: raise TransferFault where the transfer is cut or stalls.
    """

    begin: int
    total: int | None
    chunks: Iterator[bytes]


def shown(url: str) -> str:
    """The url without user, password, query and fragment, fit for messages and logs."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        return f"{url.partition('://')[0]}://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def told(error: Exception) -> str:
    """Kind and first words of a foreign error, which may hold whatever a server sends; every url in it as `shown`."""
    text = _URL_IN_TEXT.sub(lambda match: shown(match[0]), f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:MAX_TOLD]

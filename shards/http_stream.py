"""Files behind http and https, from any byte on, through the session that fsspec keeps."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.http import HTTPFileSystem

from avs_dist.shards.transfer import (
    FetchError,
    MissingError,
    RangeFault,
    RefusedError,
    Stream,
    TransferFault,
    shown,
    told,
)

CHUNK_BYTES = 2**18
MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
Result = TypeVar("Result")


@contextmanager
def open_http(url: str, offset: int, stall_s: float) -> Iterator[Stream]:
    """The bytes at `url` from `offset` on, or from 0 where the server knows no ranges.

    stall_s: longest wait for the answer, and for each chunk.

    Raises:
        MissingError, RefusedError, FetchError: If another try is of no use.
        TransferFault: If it may help.
    """
    # proxies come from the environment; a compressed answer is never unpacked, since it may grow to any size
    options = {"trust_env": True, "auto_decompress": False}
    files = fsspec.filesystem("http", client_kwargs=options)
    response = _wait(files, _get, files, url, offset, stall_s=stall_s)
    try:
        begin, total = _extent(response, url, offset)
        yield Stream(begin, total, _chunks(files, response, stall_s))
    finally:
        files.loop.call_soon_threadsafe(response.close)


def redirected(url: str, location: str) -> str:
    """Where a redirect of `url` leads.

    Raises:
        FetchError: If it leaves http(s), or leads from https to http, where everybody may read and change the answer.
    """
    try:
        target = urljoin(url, location)
        schemes = urlsplit(url).scheme, urlsplit(target).scheme
    except ValueError as error:
        raise FetchError(f"{shown(url)}: the server redirects to what is no url ({told(error)})") from None
    if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
        raise FetchError(f"{shown(url)}: the server redirects to {shown(target)}, which is not followed from there")
    return target


async def _get(files: HTTPFileSystem, url: str, offset: int) -> aiohttp.ClientResponse:
    session = await files.set_session()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    for _ in range(MAX_REDIRECTS):
        response = await session.get(
            url,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=CHUNK_BYTES,
        )
        if response.status not in _REDIRECTS:
            return response
        response.close()
        url = redirected(url, response.headers.get("Location", ""))
    raise FetchError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects")


def _extent(response: aiohttp.ClientResponse, url: str, offset: int) -> tuple[int, int | None]:
    """First byte and size of the whole file; raises what the status stands for."""
    status = response.status
    if status in (404, 410):
        raise MissingError(f"{shown(url)}: no such file (status {status}); check the url and whether all was uploaded")
    if status in (401, 403, 407):
        raise RefusedError(f"{shown(url)}: access refused (status {status}); check the url and its credentials")
    if status == 416:
        raise RangeFault(f"the server has nothing from byte {offset} on")
    if status >= 500 or status in _BUSY:
        raise TransferFault(f"status {status}")
    if status not in (200, 206):
        raise FetchError(f"{shown(url)}: status {status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise FetchError(f"{shown(url)}: the server sends it compressed ({encoding}); store and serve it as it is")
    if status == 200:
        return 0, response.content_length
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset:
        raise RangeFault(f"asked for the bytes from {offset} on, the server sends others")
    return offset, None if match[2] == "*" else int(match[2])


def _chunks(files: HTTPFileSystem, response: aiohttp.ClientResponse, stall_s: float) -> Iterator[bytes]:
    while chunk := _wait(files, response.content.read, CHUNK_BYTES, stall_s=stall_s):
        yield chunk


def _wait(files: HTTPFileSystem, function: Callable[..., Awaitable[Result]], *arguments: Any, stall_s: float) -> Result:
    try:
        return sync(files.loop, function, *arguments, timeout=stall_s)
    except FetchError:
        raise
    except ValueError as error:  # no url that can be asked for
        raise FetchError(told(error)) from None
    except FSTimeoutError:
        raise TransferFault(f"nothing came for {stall_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise TransferFault(told(error)) from None

"""Objects in s3, gs and az, block by block through fsspec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.exceptions import FSTimeoutError

from avs_dist.shards.transfer import (
    MissingError,
    RangeFault,
    RefusedError,
    Stream,
    TransferFault,
    shown,
    told,
)

BLOCK_BYTES = 4 * 2**20
# a block comes in one piece, so it may take longer than a chunk of a stream
_STALLS_A_BLOCK = 4


@contextmanager
def open_object(url: str, offset: int, stall_s: float) -> Iterator[Stream]:
    """The bytes at `url` from `offset` on.

    stall_s: longest wait for an answer; a block of 4 MiB may take four times as long.

    Raises:
        MissingError, RefusedError: If another try is of no use.
        TransferFault: If it may help.
    """
    # not url_to_fs, which takes a "::" in a name for a chain of storages
    scheme, _, path = url.partition("://")
    files = fsspec.filesystem(scheme, use_listings_cache=False)
    total = _call(url, stall_s, files.info, path)["size"]
    if offset > total:
        raise RangeFault(f"the object has {total} bytes, asked from byte {offset} on")

    def blocks() -> Iterator[bytes]:
        for begin in range(offset, total, BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, total)
            yield _call(url, stall_s * _STALLS_A_BLOCK, files.cat_file, path, start=begin, end=end)

    yield Stream(offset, total, blocks())


def _call(url: str, timeout_s: float, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, timeout=timeout_s, **options)
    except FSTimeoutError:
        raise TransferFault(f"nothing came for {timeout_s:g} s") from None
    except FileNotFoundError:
        raise MissingError(f"{shown(url)}: no such object; check the url and whether all was uploaded") from None
    except PermissionError:
        raise RefusedError(f"{shown(url)}: access refused; check the url and the credentials of the storage") from None
    except Exception as error:  # the packages behind fsspec have kinds of their own
        raise TransferFault(told(error)) from None

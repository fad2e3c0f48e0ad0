"""Shards at a url, read through the cache of this host; `store` has the same for local folders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.index import ShardEntry
from avs_dist.shards.read_ahead import ReadAhead
from avs_dist.shards.remote import check_url, join_url
from avs_dist.shards.shard_cache import CacheError, RemoteShard, ShardCache
from avs_dist.shards.store import read_range
from avs_dist.shards.transfer import FetchError, Stopped

# a shard that could not be fetched is not tried again for so long: its other clips would each wait as long
REST_S = 60.0
# of the cache, for what one process fetches ahead; the others may want other shards
AHEAD_SHARE = 4


class RemoteStore:
    """Reads parts of the shards below a url. Can be pickled; a copy starts its own thread when it needs one.

    Raises:
        ValueError, ImportError: If shards cannot be fetched from such a url.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        check_url(url)
        self._url, self._cache = url, cache
        self._ahead: ReadAhead | None = None
        # why a shard could not be fetched, and when
        self._failed: dict[str, tuple[str, float]] = {}

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str, ShardCache]]:
        return type(self), (self._url, self._cache)

    def read(self, shard: ShardEntry, offset: int, length: int) -> memoryview:
        """Writable memory of its own with these bytes.

        Raises:
            ClipFault: "unreadable" if the shard cannot be fetched, or "truncated".
            CacheError: If the cache cannot be used as it is set up.
        """
        if self._ahead is not None:
            self._ahead.reached(shard)
        self._raise_if_resting(shard)
        try:
            with self._cache.lease(self._remote(shard)) as path:
                return read_range(path, offset, length)
        except FetchError as error:
            self._failed[shard.name] = str(error), time.monotonic()
            raise ClipFault("unreadable", str(error)) from None

    def upcoming(self, shards: Iterator[ShardEntry]) -> None:
        """These shards are wanted next, one for each read, in order: they are fetched ahead from now on."""
        self.close()
        self._ahead = ReadAhead(shards, self._prepare, self._cache.max_bytes // AHEAD_SHARE)

    def close(self) -> None:
        """End the fetching ahead."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _prepare(self, shard: ShardEntry, stopped: Event) -> None:
        """Fetch a shard in the background; the reader learns of a failure when it comes to that shard."""
        if shard.name in self._failed:
            return
        try:
            self._cache.prepare(self._remote(shard), stopped)
        except FetchError as error:
            self._failed[shard.name] = str(error), time.monotonic()
        except (CacheError, Stopped):
            return  # the reader meets the first itself, if it lasts

    def _raise_if_resting(self, shard: ShardEntry) -> None:
        reason, since = self._failed.get(shard.name, ("", -REST_S))
        if time.monotonic() - since < REST_S:
            raise ClipFault("unreadable", reason)
        self._failed.pop(shard.name, None)

    def _remote(self, shard: ShardEntry) -> RemoteShard:
        return RemoteShard(join_url(self._url, shard.name), shard.bytes, shard.sha256)

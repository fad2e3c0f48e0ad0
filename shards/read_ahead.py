"""Fetching the next shards while the present ones are read: one thread, a bounded distance ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Event, Thread

from avs_dist.shards.index import ShardEntry

MAX_CLIPS_AHEAD = 1000
_CLOSE_S = 5.0


class ReadAhead:
    """Walks ahead of a reader through the shards that it wants, and fetches each one when it first meets it.

    Args:
        wanted: The shard of each read that will come, in order. Reads in between that are not announced do no harm.
        fetch: Brings a shard; must not raise, and return soon once the event is set.
        max_bytes: Bound for the shards between the reader and the thread, together.
    """

    def __init__(
        self, wanted: Iterator[ShardEntry], fetch: Callable[[ShardEntry, Event], None], max_bytes: int
    ) -> None:
        self._wanted, self._fetch, self._max_bytes = wanted, fetch, max_bytes
        # shards of the reads between the reader and the thread; and of reads that came before the thread got there
        self._ahead: deque[str] = deque()
        self._overtaken: deque[str] = deque(maxlen=MAX_CLIPS_AHEAD)
        self._sizes: dict[str, int] = {}
        self._moved = Condition()
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def reached(self, shard: ShardEntry) -> None:
        """Tell that the reader reads from this shard now."""
        with self._moved:
            if not self._ahead:
                self._overtaken.append(shard.name)
            elif self._ahead[0] == shard.name:
                self._ahead.popleft()
                self._moved.notify()

    def close(self) -> None:
        """End the thread; one that is stuck in a transfer is left to end by itself."""
        self._stopped.set()
        with self._moved:
            self._moved.notify()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        for shard in self._wanted:
            if shard.bytes > self._max_bytes:
                continue  # fetched when it is read
            with self._moved:
                while not self._stopped.is_set() and not self._has_room(shard):
                    self._moved.wait()
                if self._stopped.is_set():
                    return
                if shard.name in self._overtaken:
                    self._overtaken.remove(shard.name)
                    continue
                is_new = shard.name not in self._ahead
                self._ahead.append(shard.name)
            if is_new:
                self._fetch(shard, self._stopped)

    def _has_room(self, shard: ShardEntry) -> bool:
        self._sizes[shard.name] = shard.bytes
        names = {*self._ahead, shard.name}
        fits = sum(self._sizes[name] for name in names) <= self._max_bytes
        return fits and len(self._ahead) < MAX_CLIPS_AHEAD

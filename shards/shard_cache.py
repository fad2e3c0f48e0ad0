"""Whole shards on the local disk: fetched once for all processes of a host, checked, bounded in size.

All lies in one folder of its own below the cache directory, named by the SHA-256 of the shards:

    {sha256}.tar           a whole shard
    .{sha256}.tar.partial  one that is being fetched; it has its full size from the start, which reserves the room
    {sha256}.lock          shared by those who read the shard, exclusive for who fetches or removes it; its
                           modification time is that of the last use
    room.lock              held while room is counted and while files appear or disappear
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import NamedTuple

from avs_dist.shards.files import sha256_of
from avs_dist.shards.locks import EXCLUSIVE, SHARED, lock_file, try_lock, wait_until
from avs_dist.shards.remote import DEFAULT_PATIENCE, Patience, fetch
from avs_dist.shards.transfer import FetchError, shown

FOLDER = "avs-dist-shards-1"
CHECKSUM_TRIES = 3
_SHA256 = re.compile("[0-9a-f]{64}")
_OWN_FILE = re.compile(r"\.?([0-9a-f]{64})\.tar(?:\.partial)?")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheError(RuntimeError):
    """The cache cannot be used as it is set up: no shard can be read, whatever its server does."""


class RemoteShard(NamedTuple):
    """A shard at a url, with its size in bytes and its SHA-256 by the index."""

    url: str
    size: int
    sha256: str


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/avs_dist/shards`, else the same below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avs_dist" / "shards"


class ShardCache:
    """Shards on the local disk, shared by all processes with the same directory. Can be pickled.

    Args:
        directory: Made when needed, other files in it are left alone; None for `default_directory`.
        max_bytes: Bound for all shards together, those being fetched included.
        patience: With servers, and with other processes that fetch the same shard.
    """

    def __init__(self, directory: str | Path | None, max_bytes: int, patience: Patience = DEFAULT_PATIENCE) -> None:
        self.max_bytes = max_bytes
        self._folder = Path(directory or default_directory()) / FOLDER
        self._patience = patience
        # of shards whose SHA-256 was seen to be right: inode, size, time of the last change
        self._verified: dict[str, tuple[int, int, int]] = {}

    @contextmanager
    def lease(self, shard: RemoteShard, stopped: Event | None = None) -> Iterator[Path]:
        """The file of a shard, fetched if need be; the cache does not remove it within the block.

        Raises:
            FetchError: If it cannot be fetched, or its content is not what the index says.
            CacheError: If the disk is full, the cache too small, its folder not usable, or another process stuck.
            Stopped: When `stopped` is set.
        """
        with ExitStack() as held:
            with self._errors_named():
                lock = held.enter_context(lock_file(self._lock_of(shard.sha256)))
                self._acquire(lock, shard, stopped or Event())
            yield self._path_of(shard.sha256)

    def prepare(self, shard: RemoteShard, stopped: Event) -> None:
        """Fetch a shard, unless it is there or another process is at it; raises as `lease`."""
        with self._errors_named(), lock_file(self._lock_of(shard.sha256)) as lock:
            if try_lock(lock, EXCLUSIVE) and not self._is_whole(shard):
                self._fill(shard, stopped)
                os.utime(lock)

    def _acquire(self, lock: int, shard: RemoteShard, stopped: Event) -> None:
        """Hold the shared lock of a shard that is there."""
        self._wait_for(lock, SHARED, shard.size, stopped)
        while not self._is_whole(shard):
            self._wait_for(lock, EXCLUSIVE, shard.size, stopped)
            if not self._is_whole(shard):
                self._fill(shard, stopped)
            # between the two locks it may be removed again
            self._wait_for(lock, SHARED, shard.size, stopped)
        os.utime(lock)

    def _is_whole(self, shard: RemoteShard) -> bool:
        """Whether the file is there and right; its content is looked at once, and again when the file has changed."""
        path = self._path_of(shard.sha256)
        try:
            stamp = _stamp(path)
            if stamp[1] != shard.size:
                return False
            if self._verified.get(shard.sha256) != stamp and sha256_of(path) != shard.sha256:
                return False
        except FileNotFoundError:
            return False
        self._verified[shard.sha256] = stamp
        return True

    def _fill(self, shard: RemoteShard, stopped: Event) -> None:
        """Fetch a shard, under its exclusive lock."""
        if shard.size > self.max_bytes:
            raise CacheError(
                f"{shown(shard.url)} has {shard.size} bytes, more than the {self.max_bytes} of the whole cache: "
                "raise data.cache_gb"
            )
        path = self._path_of(shard.sha256)
        partial = path.with_name(f".{path.name}.partial")
        for left_over in (path, partial):  # damaged, or of a process that was killed
            left_over.unlink(missing_ok=True)
        try:
            self._reserve(partial, shard.size, stopped)
            self._download(shard, partial, stopped)
            with self._counting(stopped):
                partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        self._verified[shard.sha256] = _stamp(path)

    def _download(self, shard: RemoteShard, partial: Path, stopped: Event) -> None:
        for _ in range(CHECKSUM_TRIES):
            with partial.open("r+b") as file:
                fetch(shard.url, file, shard.size, self._patience, stopped)
            found = sha256_of(partial)
            if found == shard.sha256:
                return
        raise FetchError(
            f"{shown(shard.url)}: fetched {CHECKSUM_TRIES} times, its SHA-256 is {found}, but index.json says "
            f"{shard.sha256}: upload the shard and index.json of the same build"
        )

    def _reserve(self, partial: Path, size: int, stopped: Event) -> None:
        """Make `partial` with its full size as soon as there is room."""

        def reserved() -> bool:
            with self._counting(stopped):
                if not self._make_room(size):
                    return False
                with partial.open("xb") as file:
                    file.truncate(size)
                return True

        if not wait_until(reserved, self._longest_s(size), stopped):
            raise CacheError(
                f"{self._folder}: no room for {size} bytes, all {self.max_bytes} are in use by other processes: "
                "raise data.cache_gb"
            )

    def _make_room(self, size: int) -> bool:
        """Remove shards, the least recently used first and never one in use, until `size` more bytes fit."""
        used: dict[str, int] = {}
        for entry in os.scandir(self._folder):
            name = _OWN_FILE.fullmatch(entry.name)
            if name and entry.is_file(follow_symlinks=False):
                used[name[1]] = used.get(name[1], 0) + entry.stat(follow_symlinks=False).st_size
        total = sum(used.values())
        for sha256 in sorted(used, key=self._last_use):
            if total + size <= self.max_bytes:
                break
            if self._remove(sha256):
                total -= used[sha256]
        return total + size <= self.max_bytes

    def _remove(self, sha256: str) -> bool:
        """Remove a shard unless it is in use, or being fetched."""
        with lock_file(self._lock_of(sha256)) as lock:
            if not try_lock(lock, EXCLUSIVE):
                return False
            path = self._path_of(sha256)
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
            return True

    def _last_use(self, sha256: str) -> float:
        try:
            return self._lock_of(sha256).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def _counting(self, stopped: Event) -> Iterator[None]:
        """Nobody else counts room, or makes files appear or disappear, within the block."""
        with lock_file(self._folder / "room.lock") as lock:
            self._wait_for(lock, EXCLUSIVE, 0, stopped)
            yield

    def _wait_for(self, lock: int, kind: int, size: int, stopped: Event) -> None:
        if not wait_until(lambda: try_lock(lock, kind), self._longest_s(size), stopped):
            raise CacheError(
                f"{self._folder}: another process keeps a lock for more than {self._longest_s(size):.0f} s; "
                "end it, or choose another folder with data.cache_dir"
            )

    def _longest_s(self, size: int) -> float:
        return self._patience.longest_s(size) * CHECKSUM_TRIES

    def _path_of(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"not a SHA-256: {sha256!r:.80}")
        return self._folder / f"{sha256}.tar"

    def _lock_of(self, sha256: str) -> Path:
        return self._path_of(sha256).with_suffix(".lock")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Errors of the disk, within the block, become CacheErrors."""
        try:
            yield
        except FetchError:
            raise
        except OSError as error:
            if error.errno in _NO_SPACE:
                advice = "free some space, lower data.cache_gb, or choose a folder on another disk with data.cache_dir"
            else:
                advice = "choose another folder with data.cache_dir"
            raise CacheError(f"cache {self._folder}: {error.strerror or error}: {advice}") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """Inode, size and time of the last change of a file, a link not followed."""
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns

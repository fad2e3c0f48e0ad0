"""Where checkpoints go, and where clips come from."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, existing, one_line, size

if TYPE_CHECKING:
    from avs_dist.shards.index import ShardEntry, ShardIndex

GIB = 2**30
# a checkpoint of the published models with its optimiser state takes one to two GiB, and an old and a new one are
# there together
LEAST_ROOM, ENOUGH_ROOM = 4 * GIB, 20 * GIB
TEST_BYTES, BLOCK = 64 * 2**20, 4 * 2**20
IN_MEMORY = ("tmpfs", "ramfs")


def out_dir(options: Options) -> list[Row]:
    """Room, and a real write, fsync and rename in the folder (or, where it is not there yet, the nearest above it)."""
    folder = existing(options.out_dir)
    if not folder.is_dir():
        return [Row(FAIL, "out dir", f"{folder} is no folder", "choose another train.out_dir")]
    try:
        with tempfile.TemporaryDirectory(prefix=".avs-dist-doctor-", dir=folder) as scratch:
            rate = _write(Path(scratch) / "checkpoint")
            _replace(Path(scratch) / "pointer")
    except OSError as error:
        advice = "no checkpoint can be saved there: free some room, or choose another train.out_dir"
        return [Row(FAIL, "out dir", one_line(error), advice)]
    kind = _file_system(folder)
    written = f"{folder} ({kind}): {rate / 1e6:.0f} MB/s written with fsync; a rename replaces a file whole"
    slow = "saving will take long: use a faster disk" if rate < 20e6 else ""
    lost = "in memory: gone after a restart of the machine" if kind in IN_MEMORY else ""
    return [_room(folder), Row(WARN if slow or lost else OK, "out dir", written, lost or slow)]


def _room(folder: Path) -> Row:
    state = os.statvfs(folder)
    free, files = state.f_bavail * state.f_frsize, state.f_favail
    found = f"{size(free)} free"
    if state.f_files and files < 10_000:
        return Row(FAIL if files < 100 else WARN, "out dir room", f"{found}, {files} more files", "remove old files")
    told = FAIL if free < LEAST_ROOM else WARN if free < ENOUGH_ROOM else OK
    return Row(told, "out dir room", found, "" if told == OK else f"free some: {size(ENOUGH_ROOM)} or more is better")


def _write(path: Path) -> float:
    """Bytes a second of a file that is on the disk at the end."""
    block = os.urandom(BLOCK)  # a file system may compress
    begin = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(TEST_BYTES // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return TEST_BYTES / (time.perf_counter() - begin)


def _replace(path: Path) -> None:
    """The way a checkpoint's pointer is moved."""
    from avs_dist.shards.files import write_text

    for text in ("old", "new"):
        write_text(path, text)
    if path.read_text() != "new":
        raise OSError(f"{path.parent.parent}: a renamed file still has its old content")


def _file_system(folder: Path) -> str:
    """Its type, such as ext4 or nfs4, by the longest mount point that the folder lies below."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found = line.split()[:3]
        if Path(folder).resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def shards(options: Options) -> list[Row]:
    """The index, the size of every shard that can be seen, and the first clip of each split."""
    if options.shards is None:
        return []
    from avs_dist.shards.index import ShardIndex

    try:
        index = ShardIndex.load(options.shards)
    except (OSError, ValueError, ImportError) as error:
        return [
            Row(FAIL, "shards", one_line(error), "check data.shards; `avs-dist shards verify` finds what is damaged")
        ]
    if not index.shards:
        return [Row(FAIL, "shards", f"{index.place}: no shard", "build them again: avs-dist shards build --help")]
    total = sum(shard.bytes for shard in index.shards)
    clips = sum(len(shard.clips) for shard in index.shards)
    found = (
        f"{index.place}: {clips} clips in {len(index.shards)} shards, {size(total)}; splits {', '.join(index.splits)}"
    )
    problems = _remote_problems(index) if index.is_remote else _local_problems(index)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        advice = "copy or build them again; `avs-dist shards verify` checks every byte"
        return [Row(FAIL, "shards", problems[0] + more, advice)]
    rows = [Row(OK, "shards", found)]
    return [*rows, _cache(options, total)] if index.is_remote else rows


def _first(index: ShardIndex) -> list[ShardEntry]:
    """A shard of each split."""
    return [index.split(name)[0] for name in index.splits]


def _local_problems(index: ShardIndex) -> list[str]:
    from avs_dist.shards.faults import ClipFault
    from avs_dist.shards.store import LocalStore

    problems = []
    for shard in index.shards:
        path = Path(index.directory) / shard.name
        try:
            if (there := path.stat().st_size) != shard.bytes:
                problems.append(f"{path}: {there} bytes, the index says {shard.bytes}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    if problems:
        return problems
    store = LocalStore(Path(index.directory))
    for shard in _first(index):
        clip = shard.clips[0]
        try:
            if zlib.crc32(store.read(shard, clip.offset, clip.length)) != clip.crc32:
                problems.append(f"{index.place_of(shard)}: clip {clip.key} is not what the index says")
        except ClipFault as fault:
            problems.append(f"{index.place_of(shard)}: {fault}")
    return problems


class _FirstBytes(io.BytesIO):
    """Calls a fetch off once something has come."""

    def __init__(self, stopped: Event) -> None:
        super().__init__()
        self._stopped = stopped

    def write(self, data: Any) -> int:
        self._stopped.set()
        return super().write(data)


def _remote_problems(index: ShardIndex) -> list[str]:
    from avs_dist.shards.remote import SHORT_PATIENCE, fetch, join_url
    from avs_dist.shards.transfer import FetchError, Stopped

    problems = []
    for shard in _first(index):
        stopped = Event()
        try:
            fetch(
                join_url(str(index.directory), shard.name), _FirstBytes(stopped), shard.bytes, SHORT_PATIENCE, stopped
            )
        except Stopped:
            continue
        except (FetchError, ValueError, ImportError) as error:
            problems.append(" ".join(str(error).split()))
    return problems


def _cache(options: Options, total: int) -> Row:
    from avs_dist.shards.shard_cache import default_directory

    folder = existing(options.cache_dir or default_directory())
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {size(free)} free, all shards take {size(total)}"
    if not os.access(folder, os.W_OK):
        return Row(FAIL, "shard cache", f"{folder} cannot be written to", "set data.cache_dir to a folder of yours")
    if free < total:
        advice = (
            "set data.cache_dir to a larger disk, or data.cache_gb below what is free; shards are then fetched again"
        )
        return Row(WARN, "shard cache", found, advice)
    return Row(OK, "shard cache", found)


def index_hash(place: str) -> str:
    """SHA-256 of index.json of a folder or url, its first digits; or why it cannot be read."""
    from avs_dist.shards.files import sha256_of
    from avs_dist.shards.index import INDEX_FILE, MAX_INDEX_BYTES
    from avs_dist.shards.remote import fetch_bytes, is_url, join_url

    try:
        if is_url(place):
            return hashlib.sha256(fetch_bytes(join_url(place, INDEX_FILE), MAX_INDEX_BYTES)).hexdigest()[:16]
        return sha256_of(Path(place) / INDEX_FILE)[:16]
    except (OSError, ValueError, ImportError) as error:
        return one_line(error)

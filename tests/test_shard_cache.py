"""The cache of fetched shards: filled once by many processes, bounded, checked; and reading ahead into it."""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Fault, Server, serving

from avs_dist.shards import remote_store
from avs_dist.shards.faults import ClipFault
from avs_dist.shards.index import ShardEntry
from avs_dist.shards.locks import EXCLUSIVE, SHARED, lock_file, try_lock
from avs_dist.shards.read_ahead import ReadAhead
from avs_dist.shards.remote import Patience
from avs_dist.shards.remote_store import RemoteStore
from avs_dist.shards.shard_cache import FOLDER, CacheError, RemoteShard, ShardCache, default_directory
from avs_dist.shards.transfer import FetchError, MissingError, Stopped

SIZE = 300_000
NAMES = ["a", "b", "c", "d", "e"]
QUICK = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05, stall_s=1.0)
# the shortest that locks are waited for is 3 x 3 x 0.02 s
HASTY = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.01, stall_s=0.01, min_bytes_per_s=10**9)


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    for name in NAMES:
        (tmp_path / "served" / f"{name}.tar").write_bytes(content(name))
    return tmp_path / "served"


def shard(server: Server, name: str) -> RemoteShard:
    return RemoteShard(f"{server.url}/{name}.tar", SIZE, sha256(content(name)).hexdigest())


def entry(name: str) -> ShardEntry:
    return ShardEntry(f"{name}.tar", "train", sha256(content(name)).hexdigest(), SIZE, ())


def read(cache: ShardCache, server: Server, name: str) -> bytes:
    with cache.lease(shard(server, name)) as path:
        return path.read_bytes()


def cached(directory: Path) -> set[str]:
    """Names of the whole shards in a cache."""
    names = {sha256(content(name)).hexdigest(): name for name in NAMES}
    return {names[path.stem] for path in (directory / FOLDER).glob("*.tar") if path.stem in names}


def partials(directory: Path) -> list[Path]:
    return list((directory / FOLDER).glob(".*.partial"))


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


LEASE = """
import sys, time
from pathlib import Path
from avs_dist.shards.remote import Patience
from avs_dist.shards.shard_cache import RemoteShard, ShardCache
directory, url, size, sha256, wait_s = sys.argv[1:]
cache = ShardCache(Path(directory), 2 * int(size), Patience(tries=3, first_wait_s=0.01, stall_s=20))
with cache.lease(RemoteShard(url, int(size), sha256)) as path:
    print(len(path.read_bytes()), flush=True)
    time.sleep(float(wait_s))
"""


@contextmanager
def leasing(directory: Path, wanted: RemoteShard, wait_s: float = 0) -> Iterator[subprocess.Popen[str]]:
    """Another process that takes the shard and keeps it for a while; it is killed after the block."""
    arguments = [sys.executable, "-c", LEASE, str(directory), wanted.url, str(wanted.size), wanted.sha256, str(wait_s)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_shard_is_fetched_once(folder, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, QUICK)
    with serving(folder) as server:
        assert read(cache, server, "a") == content("a")
        again = pickle.loads(pickle.dumps(cache))
        assert read(again, server, "a") == content("a")
        assert read(ShardCache(tmp_path / "cache", SIZE, QUICK), server, "a") == content("a")
        assert server.count("a.tar") == 1
    assert partials(tmp_path / "cache") == []


def test_many_processes_fetch_a_shard_once(folder, tmp_path):
    with serving(folder, {"a.tar": [Fault(delay_s=1.0)]}) as server:
        wanted = shard(server, "a")
        with leasing(tmp_path, wanted) as p, leasing(tmp_path, wanted) as q, leasing(tmp_path, wanted) as r:
            answers = []
            threads = [
                threading.Thread(target=lambda: answers.append(read(ShardCache(tmp_path, SIZE), server, "a")))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for process in (p, q, r):
                assert process.communicate(timeout=60)[0] == f"{SIZE}\n"
            for thread in threads:
                thread.join(20)
        assert answers == [content("a")] * 2
        assert server.count("a.tar") == 1


def test_many_that_find_a_shard_missing_at_once_fetch_it_once(folder, tmp_path):
    with serving(folder) as server:
        wanted = shard(server, "a")
        cache = ShardCache(tmp_path, SIZE, QUICK)
        threads = [threading.Thread(target=read, args=(cache, server, "a")) for _ in range(6)]
        with lock_file(tmp_path / FOLDER / f"{wanted.sha256}.lock") as lock:
            assert try_lock(lock, SHARED)  # all of them get that far, none further
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            assert server.count("a.tar") == 0
        for thread in threads:
            thread.join(20)
        assert server.count("a.tar") == 1


def test_files_appear_under_the_lock_of_the_room(folder, tmp_path):
    room = tmp_path / FOLDER / "room.lock"
    with serving(folder, {"a.tar": [Fault(delay_s=0.3)]}) as server:
        thread = threading.Thread(target=read, args=(ShardCache(tmp_path, SIZE), server, "a"))
        with lock_file(room) as lock:
            assert try_lock(lock, EXCLUSIVE)
            thread.start()
            time.sleep(0.2)
            assert partials(tmp_path) == []
        eventually(lambda: server.count("a.tar") == 1)
        with lock_file(room) as lock:
            eventually(lambda: try_lock(lock, EXCLUSIVE))
            time.sleep(0.6)
            assert cached(tmp_path) == set()
        thread.join(20)
        assert cached(tmp_path) == {"a"}


def test_the_others_take_over_when_the_filler_is_killed(folder, tmp_path):
    with serving(folder, {"a.tar": [Fault(stall_at=SIZE // 2)]}) as server:
        wanted = shard(server, "a")
        with leasing(tmp_path, wanted) as filler:
            eventually(lambda: server.count("a.tar") == 1 and partials(tmp_path))
            with leasing(tmp_path, wanted) as waiting:
                time.sleep(0.2)
                assert server.count("a.tar") == 1
                filler.send_signal(signal.SIGKILL)
                assert waiting.communicate(timeout=60)[0] == f"{SIZE}\n"
        assert server.count("a.tar") == 2
    assert partials(tmp_path) == []


def test_what_a_killed_filler_left_is_no_longer_counted(folder, tmp_path):
    with serving(folder, {"a.tar": [Fault(stall_at=1000)]}) as server:
        with leasing(tmp_path, shard(server, "a")) as filler:
            eventually(lambda: partials(tmp_path))
            assert partials(tmp_path)[0].stat().st_size == SIZE
            filler.kill()
            filler.wait(20)
        assert partials(tmp_path)
        assert read(ShardCache(tmp_path, SIZE, QUICK), server, "b") == content("b")
    assert partials(tmp_path) == []
    assert cached(tmp_path) == {"b"}


def test_the_least_recently_used_are_removed_first(folder, tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE, QUICK)
    with serving(folder) as server:
        for name in "abcab":
            read(cache, server, name)
            time.sleep(0.02)  # times of files are kept in steps
        read(cache, server, "d")
        assert cached(tmp_path) == {"a", "b", "d"}
        time.sleep(0.02)
        read(cache, server, "e")
        assert cached(tmp_path) == {"b", "d", "e"}
        assert [server.count(f"{name}.tar") for name in NAMES] == [1] * 5


def test_fetching_ahead_counts_as_use(folder, tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE, QUICK)
    with serving(folder) as server:
        for name in "abc":
            read(cache, server, name)
            time.sleep(0.02)
        cache.prepare(shard(server, "a"), threading.Event())
        assert cached(tmp_path) == {"c", "a"}
        time.sleep(0.02)
        read(cache, server, "d")
        assert cached(tmp_path) == {"a", "d"}


def test_shards_in_use_are_kept(folder, tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE, QUICK)
    with serving(folder) as server:
        with leasing(tmp_path, shard(server, "a"), wait_s=60) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{SIZE}\n"
            for name in "bcd":
                assert read(cache, server, name) == content(name)
                assert cached(tmp_path) == {"a", name}
        read(cache, server, "e")
        read(cache, server, "b")
        assert cached(tmp_path) == {"e", "b"}


def test_without_room_a_shard_waits_and_then_names_the_setting(folder, tmp_path):
    with serving(folder) as server, ShardCache(tmp_path, SIZE, QUICK).lease(shard(server, "a")):
        with pytest.raises(CacheError, match=rf"no room for {SIZE} bytes.* in use by other processes: .*data.cache_gb"):
            read(ShardCache(tmp_path, SIZE, HASTY), server, "b")
        assert server.count("b.tar") == 0
        assert partials(tmp_path) == []
        with pytest.raises(CacheError, match=f"a.tar has {SIZE} bytes, more than the {SIZE - 1} .*data.cache_gb"):
            read(ShardCache(tmp_path / "other", SIZE - 1, QUICK), server, "a")


def test_room_is_reserved_while_shards_are_fetched(folder, tmp_path):
    with serving(folder, {"*": repeat(Fault(delay_s=0.2))}) as server:
        counts: list[int] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                # in one call, or a file could move from one part of the list to another
                counts.append(sum(".tar" in name for name in os.listdir(tmp_path / FOLDER)))

        threads = [threading.Thread(target=read, args=(ShardCache(tmp_path, 2 * SIZE), server, name)) for name in NAMES]
        (tmp_path / FOLDER).mkdir()
        watcher = threading.Thread(target=watch)
        for thread in [watcher, *threads]:
            thread.start()
        for thread in threads:
            thread.join(20)
        ended.set()
        watcher.join()
        assert max(counts) == 2
        assert {request.name for request in server.requests} == {f"{name}.tar" for name in NAMES}


def test_foreign_files_are_left_alone(folder, tmp_path):
    own = tmp_path / FOLDER
    (own / "0123.tar").mkdir(parents=True)
    outside = tmp_path / "outside.tar"
    outside.write_bytes(bytes(SIZE))
    foreign = [tmp_path / "x.tar", tmp_path / f"{'a' * 64}.tar", own / "notes.txt", own / "0123.tar" / "y.tar"]
    foreign += [own / "old.tar.partial", own / f"{'g' * 64}.tar", own / f"{'a' * 64}.tar.bak"]
    for file in foreign:
        file.write_bytes(bytes(SIZE))
    (own / f"{'b' * 64}.tar").symlink_to(outside)
    cache = ShardCache(tmp_path, SIZE, QUICK)
    with serving(folder) as server:
        for name in "abc":
            read(cache, server, name)
    assert all(file.read_bytes() == bytes(SIZE) for file in [*foreign, outside])
    assert (own / f"{'b' * 64}.tar").is_symlink()
    assert cached(tmp_path) == {"c"}


@pytest.mark.parametrize("damage", ["flipped", "short", "deleted", "link", "all deleted"])
@pytest.mark.parametrize("same_process", [True, False])
def test_damaged_and_deleted_files_are_fetched_again(folder, tmp_path, damage, same_process):
    cache = ShardCache(tmp_path, SIZE, QUICK)
    with serving(folder) as server:
        read(cache, server, "a")
        path = tmp_path / FOLDER / f"{shard(server, 'a').sha256}.tar"
        if damage == "flipped":
            path.write_bytes(bytes(SIZE))
        elif damage == "short":
            path.write_bytes(content("a")[:-1])
        elif damage == "all deleted":
            for file in path.parent.iterdir():
                file.unlink()
            path.parent.rmdir()
        else:
            path.unlink()
        if damage == "link":
            path.symlink_to(folder / "a.tar")
        cache = cache if same_process else ShardCache(tmp_path, SIZE, QUICK)
        assert read(cache, server, "a") == content("a")
        assert server.count("a.tar") == 2
        assert not path.is_symlink()


def test_wrong_bytes_are_fetched_again_and_then_named(folder, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE, QUICK)
    flip = Fault(flip_at=7)
    with serving(folder, {"a.tar": [flip, flip], "b.tar": repeat(flip)}) as server:
        assert read(cache, server, "a") == content("a")
        with pytest.raises(FetchError, match=f"{server.url}/b.tar: fetched 3 times, its SHA-256 is .* index.json"):
            read(cache, server, "b")
        with pytest.raises(MissingError, match="none.tar"):
            read(cache, server, "none")
    assert cached(tmp_path) == {"a"}
    assert partials(tmp_path) == []


def test_a_full_disk_is_named(folder, tmp_path):
    with serving(folder) as server:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
        try:
            with pytest.raises(CacheError, match=rf"{FOLDER}: .*: free some space.* data.cache_dir"):
                read(ShardCache(tmp_path, 2 * SIZE, QUICK), server, "a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert partials(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        serving(folder) as server,
        pytest.raises(CacheError, match=r"file/.*: choose another folder with data.cache_dir"),
    ):
        read(ShardCache(tmp_path / "file", SIZE, QUICK), server, "a")


def test_errors_of_the_reader_stay_what_they_are(folder, tmp_path):
    cache = ShardCache(tmp_path, SIZE, QUICK)
    with serving(folder) as server, pytest.raises(OSError, match="of the reader"), cache.lease(shard(server, "a")):
        raise OSError("of the reader")


def test_a_stuck_process_is_not_waited_for_without_end(folder, tmp_path):
    with serving(folder, {"a.tar": [Fault(stall_at=10)]}) as server:
        wanted = shard(server, "a")
        with leasing(tmp_path, wanted) as filler:
            eventually(lambda: partials(tmp_path))
            filler.send_signal(signal.SIGSTOP)
            with pytest.raises(CacheError, match="another process keeps a lock"):
                read(ShardCache(tmp_path, SIZE, HASTY), server, "a")
            stopped = threading.Event()
            stopped.set()
            with pytest.raises(Stopped), ShardCache(tmp_path, SIZE, QUICK).lease(wanted, stopped):
                pass


def test_a_checksum_is_never_a_path(tmp_path):
    for wrong in ("../../x", "", "A" * 64, "a" * 63):
        with (
            pytest.raises(ValueError, match="not a SHA-256"),
            ShardCache(tmp_path, 10).lease(RemoteShard("http://h/x", 1, wrong)),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_default_directory(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "avs_dist" / "shards"
    with serving(folder) as server:
        read(ShardCache(None, SIZE, QUICK), server, "a")
    assert cached(tmp_path / "avs_dist" / "shards") == {"a"}
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "avs_dist" / "shards"


def reader_threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_store_reads_ranges_and_names_what_it_cannot_fetch(folder, tmp_path, monkeypatch):
    with serving(folder) as server:
        store = RemoteStore(server.url, ShardCache(tmp_path, 2 * SIZE, QUICK))
        part = store.read(entry("a"), 1000, 5000)
        assert bytes(part) == content("a")[1000:6000]
        assert not part.readonly
        with pytest.raises(ClipFault, match="ends after 299000 of 300000") as fault:
            store.read(entry("a"), 1000, SIZE)
        assert fault.value.kind == "truncated"
        for _ in range(3):
            with pytest.raises(ClipFault, match=f"{server.url}/none.tar: no such file") as fault:
                store.read(entry("none"), 0, 10)
            assert fault.value.kind == "unreadable"
        assert server.count("none.tar") == 1
        (folder / "none.tar").write_bytes(content("none"))
        monkeypatch.setattr(remote_store, "REST_S", 0.0)
        assert bytes(store.read(entry("none"), 0, 10)) == content("none")[:10]
        assert bytes(pickle.loads(pickle.dumps(store)).read(entry("a"), 0, 10)) == content("a")[:10]
    with pytest.raises(ValueError, match="unknown scheme 'ftp'"):
        RemoteStore("ftp://h/x", ShardCache(tmp_path, SIZE))


def test_store_fetches_ahead_within_its_bound(folder, tmp_path):
    with serving(folder) as server:
        store = RemoteStore(server.url, ShardCache(tmp_path, 8 * SIZE, QUICK))
        assert reader_threads() == 0
        store.upcoming(entry(name) for name in "aabbabccdde")
        eventually(lambda: cached(tmp_path) == {"a", "b"})
        for name in "aabbab":
            store.read(entry(name), 0, 10)
        eventually(lambda: server.count("d.tar") == 1)
        assert server.count("e.tar") == 0
        for name in "ccdde":
            store.read(entry(name), 0, 10)
        eventually(lambda: reader_threads() == 0)
        assert [server.count(f"{name}.tar") for name in NAMES] == [1] * 5
        store.upcoming(map(entry, cycle("ab")))
        assert reader_threads() == 1
        copy = pickle.loads(pickle.dumps(store))
        store.close()
        copy.close()
        assert reader_threads() == 0


def test_what_fails_ahead_is_told_when_it_is_read(folder, tmp_path):
    with serving(folder, {"b.tar": repeat(Fault(status=503))}) as server:
        store = RemoteStore(server.url, ShardCache(tmp_path, 12 * SIZE, QUICK))
        store.upcoming(map(entry, "abc"))
        eventually(lambda: cached(tmp_path) == {"a", "c"})
        assert server.count("b.tar") == QUICK.tries
        store.read(entry("a"), 0, 10)
        with pytest.raises(ClipFault, match="b.tar: gave up after 3 tries, the last: status 503"):
            store.read(entry("b"), 0, 10)
        assert server.count("b.tar") == QUICK.tries
        store.close()


def test_closing_calls_off_what_is_fetched_ahead(folder, tmp_path):
    with serving(folder, {"a.tar": [Fault(drip_at=10)]}) as server:
        store = RemoteStore(server.url, ShardCache(tmp_path, 8 * SIZE))
        store.upcoming(map(entry, "ab"))
        eventually(lambda: server.count("a.tar") == 1)
        store.close()
        assert reader_threads() == 0
        assert partials(tmp_path) == []


def test_reading_ahead_follows_a_reader_that_jumps():
    fetched: list[str] = []
    order = "aaabbbcccdddeee"
    ahead = ReadAhead(map(entry, order), lambda wanted, _: fetched.append(wanted.name[0]), 2 * SIZE)
    eventually(lambda: fetched == ["a", "b"])
    for name in "aeaca":  # reads that were not announced lie between
        ahead.reached(entry(name))
    eventually(lambda: fetched == ["a", "b", "c"])
    for name in "bbbcccddd":
        ahead.reached(entry(name))
    eventually(lambda: fetched == list("abcde"))
    ahead.close()


def test_a_reader_may_overtake_the_reading_ahead():
    fetched: list[str] = []
    go_on = threading.Semaphore(0)

    def fetch(wanted: ShardEntry, _: threading.Event) -> None:
        fetched.append(wanted.name[0])
        go_on.acquire(timeout=20)

    ahead = ReadAhead(map(entry, "abcde"), fetch, 2 * SIZE)
    eventually(lambda: fetched == ["a"])
    for name in "abc":
        ahead.reached(entry(name))
    for _ in range(5):
        go_on.release()
    eventually(lambda: fetched == ["a", "d", "e"])
    ahead.close()

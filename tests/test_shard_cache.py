"""The cache of fetched shards: filled once by many processes, bounded, checked."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import pytest
from faulty_server import Fault, serving
from served_shards import NAMES, QUICK, SIZE, cached, content, eventually, partials, read, shard, write_shards

from avs_dist.shards.locks import EXCLUSIVE, SHARED, lock_file, try_lock
from avs_dist.shards.remote import Patience
from avs_dist.shards.shard_cache import FOLDER, CacheError, RemoteShard, ShardCache, default_directory
from avs_dist.shards.transfer import FetchError, MissingError, Stopped

# the shortest that locks are waited for is 3 x 3 x 0.02 s
HASTY = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.01, stall_s=0.01, min_bytes_per_s=10**9)

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "served")


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
            eventually(lambda: server.count("a.tar") == 1)
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

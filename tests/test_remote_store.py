"""Shards at a url as a store: ranges, faults that are told, and reading ahead."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, repeat
from pathlib import Path

import pytest
from faulty_server import Fault, serving
from served_shards import NAMES, QUICK, SIZE, cached, content, entry, eventually, partials, write_shards

from avs_dist.shards import remote_store
from avs_dist.shards.faults import ClipFault
from avs_dist.shards.index import ShardEntry
from avs_dist.shards.read_ahead import MAX_CLIPS_AHEAD, ReadAhead
from avs_dist.shards.remote_store import RemoteStore
from avs_dist.shards.shard_cache import ShardCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "served")


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
        for _ in range(2):
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
    for name in "eeeeee":
        ahead.reached(entry(name))
    time.sleep(0.1)
    assert fetched == ["a", "b"]
    for name in "aeaca":  # reads that were not announced lie between
        ahead.reached(entry(name))
    eventually(lambda: fetched == ["a", "b", "c"])
    for name, there in (("b", "abcd"), ("c", "abcde")):  # the thread has gone past the reader each time
        for _ in range(3):
            ahead.reached(entry(name))
        eventually(lambda there=there: fetched == list(there))
    ahead.close()


def test_reading_ahead_passes_over_what_is_too_large():
    fetched: list[str] = []
    shards = [replace(entry(name), bytes=3 * SIZE) if name == "b" else entry(name) for name in "abcd"]
    ahead = ReadAhead(iter(shards), lambda wanted, _: fetched.append(wanted.name[0]), 2 * SIZE)
    eventually(lambda: fetched == ["a", "c"])
    ahead.reached(shards[0])
    ahead.reached(shards[1])
    eventually(lambda: fetched == ["a", "c", "d"])
    ahead.close()


def test_reading_ahead_of_few_shards_walks_a_bounded_way():
    walked: list[str] = []

    def wanted() -> Iterator[ShardEntry]:
        for name in cycle("ab"):
            walked.append(name)
            yield entry(name)

    ahead = ReadAhead(wanted(), lambda *_: None, 2 * SIZE)
    eventually(lambda: len(walked) == MAX_CLIPS_AHEAD + 1)
    time.sleep(0.1)
    ahead.close()
    assert len(walked) == MAX_CLIPS_AHEAD + 1


def test_a_reader_may_overtake_the_reading_ahead():
    fetched: list[str] = []
    go_on = threading.Semaphore(0)

    def fetch(wanted: ShardEntry, _: threading.Event) -> None:
        fetched.append(wanted.name[0])
        go_on.acquire(timeout=20)

    ahead = ReadAhead(map(entry, "abcbde"), fetch, 2 * SIZE)
    eventually(lambda: fetched == ["a"])
    for name in "abc":
        ahead.reached(entry(name))
    for _ in range(5):
        go_on.release()
    eventually(lambda: fetched == ["a", "b", "d"])
    ahead.reached(entry("b"))
    eventually(lambda: fetched == ["a", "b", "d", "e"])
    ahead.close()

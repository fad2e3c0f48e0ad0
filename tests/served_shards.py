"""Shards of random bytes behind a faulty server, and what a cache has of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from faulty_server import Server

from avs_dist.shards.index import ShardEntry
from avs_dist.shards.remote import Patience
from avs_dist.shards.shard_cache import FOLDER, RemoteShard, ShardCache

SIZE = 300_000
NAMES = ["a", "b", "c", "d", "e"]
QUICK = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05, stall_s=1.0)


@cache
def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


def write_shards(folder: Path) -> Path:
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.tar").write_bytes(content(name))
    return folder


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

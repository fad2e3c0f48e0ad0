"""Fetching over http from a server that fails, and over the other storages of fsspec."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import fsspec
import pytest
from faulty_server import Fault, Server, serving
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem

from avs_dist.shards import remote
from avs_dist.shards.http_stream import redirected
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.remote import Patience, check_url, fetch, fetch_bytes, is_url, join_url
from avs_dist.shards.transfer import FetchError, MissingError, RefusedError, Stopped, shown, told

SIZE = 3_000_000
CONTENT = random.Random(0).randbytes(SIZE)
PATIENT = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05)
QUICK = Patience(tries=3, first_wait_s=0.01, longest_wait_s=0.05, stall_s=0.3)
# tries to spare on a busy machine, where a good server may seem to stall
STEADY = Patience(tries=8, first_wait_s=0.01, longest_wait_s=0.05, stall_s=0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path


def fetched(server: Server, patience: Patience = PATIENT, name: str = "a.tar") -> bytes:
    file = io.BytesIO()
    fetch(f"{server.url}/{name}", file, SIZE, patience)
    return file.getvalue()


FAULTS = {
    "status 500": Fault(status=500),
    "status 429": Fault(status=429),
    "late": Fault(delay_s=0.1),
    "too late": Fault(delay_s=1.0),
    "cut at once": Fault(cut_at=0),
    "cut": Fault(cut_at=2_000_000),
    "stalls at once": Fault(stall_at=0),
    "stalls": Fault(stall_at=2_000_000),
    "drips": Fault(drip_at=2_000_000),
    "claims less": Fault(claim=SIZE - 1),
    "claims more": Fault(claim=SIZE + 1),
    "sends more": Fault(chunked=True, surplus=10),
    "cut without length": Fault(chunked=True, cut_at=1_000_000),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_two_faults_in_a_row_are_survived(folder, kind):
    with serving(folder, {"a.tar": [FAULTS[kind]] * 2}) as server:
        assert fetched(server, STEADY) == CONTENT


@pytest.mark.parametrize("kind", ["cut", "cut without length"])
def test_servers_without_ranges_begin_anew(folder, kind):
    with serving(folder, {"a.tar": [FAULTS[kind]] * 2}, ranges=False) as server:
        assert fetched(server) == CONTENT
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [Fault(status=416), Fault(begin=5)], ids=["refused", "another range"])
def test_a_range_that_cannot_be_had_is_given_up(folder, fault):
    with serving(folder, {"a.tar": [Fault(cut_at=1_000_000), fault]}) as server:
        assert fetched(server) == CONTENT
    begins = [request.range for request in server.requests]
    assert begins[0] == begins[2] == ""
    assert begins[1].startswith("bytes=")


def test_a_cut_transfer_goes_on_where_it_was_cut(folder):
    with serving(folder, {"a.tar": [Fault(cut_at=1_000_000), Fault(status=503)]}) as server:
        assert fetched(server) == CONTENT
    begins = [int(request.range.strip("bytes=-") or 0) for request in server.requests]
    assert begins[0] == 0
    assert 0 < begins[1] == begins[2] <= 1_000_000


def test_tries_count_anew_after_progress(folder):
    cuts = [Fault(cut_at=1_200_000), Fault(status=500), Fault(cut_at=2_500_000), Fault(status=500)]
    with serving(folder, {"a.tar": cuts}) as server:
        assert fetched(server) == CONTENT
    # without ranges nothing new ever comes, and it must end
    with serving(folder, {"a.tar": repeat(Fault(cut_at=1_200_000))}, ranges=False) as server:
        with pytest.raises(FetchError, match="gave up after 3 tries"):
            fetched(server)
        assert len(server.requests) <= 5


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(status=500), "status 500"),
        (Fault(cut_at=100), "ClientPayloadError"),
        (Fault(stall_at=100), "nothing came for 0.3 s"),
        (Fault(drip_at=100), r"only \d+ bytes came in 0.3 s"),
        # the bytes behind the claimed ones are taken for another answer if they come with it
        (Fault(claim=17), "(it has 17 bytes there, 3000000 are expected|ClientResponseError: 400)"),
        (Fault(chunked=True, surplus=1), "more bytes came than the 3000000 expected"),
    ],
    ids=["status", "cut", "stalls", "drips", "claims less", "sends more"],
)
def test_the_last_try_is_an_error_with_url_tries_and_cause(folder, fault, cause):
    with serving(folder, {"a.tar": repeat(fault)}) as server:
        with pytest.raises(
            FetchError, match=f"^{server.url}/a.tar: gave up after 3 tries, the last: .*{cause}"
        ) as error:
            fetched(server, QUICK)
        assert len(server.requests) == 3
    assert len(str(error.value)) < 300


def test_a_server_that_is_not_there_is_named():
    with serving(Path()) as server:
        pass
    with pytest.raises(FetchError, match="gave up after 3 tries, the last: ClientConnectorError"):
        fetched(server, QUICK)


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, MissingError), (410, MissingError), (401, RefusedError), (403, RefusedError), (400, FetchError)],
)
def test_what_another_try_does_not_help_is_an_error_at_once(folder, status, error):
    with serving(folder, {"a.tar": repeat(Fault(status=status))}) as server:
        with pytest.raises(error, match=f"{server.url}/a.tar: .*{status}"):
            fetched(server)
        assert len(server.requests) == 1
    assert issubclass(MissingError, FileNotFoundError)
    assert issubclass(RefusedError, PermissionError)


def test_never_more_than_the_expected_bytes_are_written(folder):
    class Bounded(io.BytesIO):
        def write(self, chunk: object) -> int:
            assert self.tell() + len(chunk) <= SIZE  # type: ignore[arg-type]
            return super().write(chunk)  # type: ignore[arg-type]

    with (
        serving(folder, {"a.tar": repeat(Fault(chunked=True, surplus=10 * SIZE))}) as server,
        pytest.raises(FetchError, match="more bytes came"),
    ):
        fetch(f"{server.url}/a.tar", Bounded(), SIZE, QUICK)


def test_redirects_are_followed_within_http_only(folder):
    faults = {
        "moved": [Fault(status=302, location="/a.tar")],
        "file": [Fault(status=302, location="file:///etc/passwd")],
        "round": repeat(Fault(status=307, location="/round?key=secret")),
    }
    with serving(folder, faults) as server:
        assert fetched(server, name="moved") == CONTENT
        with pytest.raises(FetchError, match="redirects to file:///etc/passwd"):
            fetched(server, name="file")
        with pytest.raises(FetchError, match="/round: more than 10 redirects$"):
            fetched(server, name="round")


def test_what_is_no_url_is_an_error_with_its_name(folder):
    with pytest.raises(ValueError, match=r"^http://\.\.\.: Invalid IPv6 URL"):
        ShardIndex.load("http://[bad/x")
    with pytest.raises(FetchError, match="label"):
        ShardIndex.load("http://a..b/x")
    with (
        serving(folder, {"place": [Fault(status=302, location="http://[bad")]}) as server,
        pytest.raises(FetchError, match="/place: the server redirects to what is no url"),
    ):
        fetch_bytes(f"{server.url}/place", 10)


def test_no_redirect_leaves_encryption():
    assert redirected("http://a/x", "https://b/y?s=1") == "https://b/y?s=1"
    assert redirected("https://a/x/y", "../z") == "https://a/z"
    with pytest.raises(FetchError, match=r"^https://a/x: the server redirects to http://b/y,"):
        redirected("https://user:secret@a/x?key=secret", "http://b/y?key=secret")


def test_compressed_answers_are_refused_instead_of_unpacked(folder):
    fault = Fault(headers=(("Content-Encoding", "gzip"),))
    with serving(folder, {"a.tar": [fault]}) as server, pytest.raises(FetchError, match=r"compressed \(gzip\)"):
        fetched(server)


def test_fetch_bytes_has_a_bound(folder):
    with serving(folder, {"a.tar": [Fault(), Fault(cut_at=1_000_000), Fault(), Fault(chunked=True)]}) as server:
        url = f"{server.url}/a.tar"
        assert fetch_bytes(url, SIZE, PATIENT) == CONTENT
        assert fetch_bytes(url, SIZE, PATIENT) == CONTENT  # cut once
        assert len(server.requests) == 3
        assert fetch_bytes(url, SIZE, PATIENT) == CONTENT  # without a length
        with pytest.raises(FetchError, match="it has 3000000 bytes, at most 2999999 are accepted"):
            fetch_bytes(url, SIZE - 1, QUICK)
    with (
        serving(folder, {"a.tar": repeat(Fault(chunked=True))}) as server,
        pytest.raises(FetchError, match="more bytes came than the 2999999"),
    ):
        fetch_bytes(f"{server.url}/a.tar", SIZE - 1, QUICK)


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(drip_at=10)], ids=["in a wait", "in a transfer"])
def test_a_fetch_can_be_called_off(folder, fault):
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    patient = Patience(first_wait_s=60, longest_wait_s=60)
    begin = time.monotonic()
    with serving(folder, {"a.tar": repeat(fault)}) as server, pytest.raises(Stopped):
        fetch(f"{server.url}/a.tar", io.BytesIO(), SIZE, patient, stopped)
    assert time.monotonic() - begin < 10


def test_waits_grow_up_to_a_bound_and_differ():
    patience = Patience(first_wait_s=1, longest_wait_s=8)
    for failures, longest in enumerate([1, 2, 4, 8, 8, 8], start=1):
        waits = {patience.wait_s(failures) for _ in range(50)}
        assert longest / 2 <= min(waits) < max(waits) <= longest
    state = random.getstate()
    patience.wait_s(1)
    assert random.getstate() == state


def test_urls_are_told_from_paths():
    assert all(map(is_url, ["http://h/x", "S3://bucket/x", "ftp://h/x"]))
    assert not any(map(is_url, ["data/ms3", "../x", "pipe:cat x", "a:b", "", "1://x", "./http://x"]))


def test_unknown_schemes_are_refused():
    assert [check_url(url) for url in ("http://h/x", "HTTPS://h")] == ["http", "https"]
    for url in ("ftp://h/x", "file:///etc/passwd", "memory://x", "pipe:cat x", "simplecache::http://h/x"):
        with pytest.raises(ValueError, match=r"unknown scheme .* http://, https://, s3://, gs://, az://"):
            check_url(url)
    with pytest.raises(ValueError, match="no host or bucket after http://"):
        check_url("http:///x")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(remote.SCHEMES, "s3", "no_such_package")
    with pytest.raises(ImportError, match=r"s3://bucket/x: s3:// needs another package: pip install no_such_package"):
        fetch_bytes("s3://bucket/x", 10)


def test_names_are_joined_to_urls():
    assert join_url("http://h/data/", "a.tar") == "http://h/data/a.tar"
    assert join_url("https://h", "a.tar") == "https://h/a.tar"
    assert join_url("https://h/data?sig=a%2Fb", "a.tar") == "https://h/data/a.tar?sig=a%2Fb"
    assert join_url("http://h/data", "a?b#c%20.tar") == "http://h/data/a%3Fb%23c%2520.tar"
    assert join_url("s3://bucket/data", "a b.tar") == "s3://bucket/data/a b.tar"


def test_secrets_are_not_shown(folder):
    url = "https://user:pass@h:8/p/a.tar?sig=secret#secret"
    assert shown(url) == "https://h:8/p/a.tar"
    foreign = OSError(f"URL('{url}') and\n{url} " + 1000 * "x")
    assert told(foreign).startswith("OSError: URL('https://h:8/p/a.tar') and https://h:8/p/a.tar xxx")
    assert len(told(foreign)) == 200
    assert shown("http://[secret/x") == "http://..."
    for status in (404, 403, 400, 500):
        with serving(folder, {"a.tar": repeat(Fault(status=status))}) as server:
            address = server.url.replace("http://", "http://user:pass@") + "/a.tar?sig=secret"
            with pytest.raises(FetchError) as error:
                fetch(address, io.BytesIO(), SIZE, QUICK)
        assert "pass" not in str(error.value)
        assert "secret" not in str(error.value)
        assert error.value.__suppress_context__ or error.value.__context__ is None


class Storage(MemoryFileSystem):
    """Objects in memory in place of a storage on the network; `faults` has what happens before each block."""

    protocol = "s3"
    store: dict = {}
    pseudo_dirs = [""]
    faults: list[Callable[[], None]] = []
    ranges: list[tuple[int, int]] = []

    def cat_file(self, path, start=None, end=None, **options):
        assert options["timeout"] > 0
        self.ranges.append((start, end))
        if self.faults:
            self.faults.pop(0)()
        return super().cat_file(path, start, end)


def nothing() -> None:
    """Happens."""


def raising(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> type[Storage]:
    fsspec.register_implementation("s3", Storage, clobber=True)
    monkeypatch.setitem(remote.SCHEMES, "s3", "fsspec")
    Storage.store.clear()
    Storage.ranges.clear()
    Storage.faults.clear()
    fsspec.filesystem("s3").pipe("/bucket/big.tar", CONTENT * 4)
    return Storage


def test_objects_come_in_blocks_and_go_on_after_a_fault(storage):
    file = io.BytesIO()
    storage.faults += [nothing, raising(OSError("reset")), raising(FSTimeoutError())]
    fetch("s3://bucket/big.tar", file, 4 * SIZE, QUICK)
    assert file.getvalue() == CONTENT * 4
    block = 4 * 2**20
    assert storage.ranges == [(0, block)] + [(block, 2 * block)] * 3 + [(2 * block, 4 * SIZE)]
    assert fetch_bytes("s3://bucket/big.tar", 4 * SIZE, QUICK) == CONTENT * 4


def test_an_object_that_has_become_shorter_is_read_anew(storage):
    def replace() -> None:
        fsspec.filesystem("s3").pipe("/bucket/big.tar", b"short")
        raise OSError("reset")

    storage.faults += [nothing, replace]
    assert fetch_bytes("s3://bucket/big.tar", 4 * SIZE, QUICK) == b"short"


def test_names_of_objects_are_no_chains_of_storages(storage, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"local")
    for name in (f"file://{tmp_path}/x.tar", f"x::file://{tmp_path}/x.tar", "x::http:.tar"):
        with pytest.raises(MissingError):
            fetch_bytes(f"s3://bucket/{name}", 10, QUICK)


def test_faults_of_objects_are_named(storage):
    with pytest.raises(MissingError, match="s3://bucket/none.tar: no such object"):
        fetch_bytes("s3://bucket/none.tar", 10, QUICK)
    with pytest.raises(FetchError, match="it has 12000000 bytes, at most 10 are accepted"):
        fetch_bytes("s3://bucket/big.tar", 10, QUICK)
    storage.faults += [raising(PermissionError("secret"))]
    with pytest.raises(RefusedError, match="s3://bucket/big.tar: access refused"):
        fetch_bytes("s3://bucket/big.tar", 4 * SIZE, QUICK)
    storage.faults += [raising(FSTimeoutError())] * 3
    with pytest.raises(FetchError, match="gave up after 3 tries, the last: nothing came for 1.2 s"):
        fetch_bytes("s3://bucket/big.tar", 4 * SIZE, QUICK)
    storage.faults += [raising(RuntimeError("at http://k:secret@h/x?secret"))] * 3
    with pytest.raises(FetchError, match="gave up after 3 tries, the last: RuntimeError: at http://h/x$"):
        fetch_bytes("s3://bucket/big.tar", 4 * SIZE, QUICK)


def test_local_shards_do_not_wait_for_the_network_packages():
    check = "import sys, avs_dist.shards.remote as r; assert not {'aiohttp', 'fsspec', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})

"""A local http server that serves a folder and fails on demand.

with serving(folder, {"train-00000.tar": [Fault(status=503), Fault(cut_at=1000)]}) as server:
    fetch(f"{server.url}/train-00000.tar", ...)   # the first request gets the 503, the second is cut, the third is fine
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 2**16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; positions count from the first byte of the file.

    status:   answered instead of the file.
    delay_s:  before the answer.
    cut_at:   the connection is closed there.
    stall_at: nothing more comes from there on.
    drip_at:  from there on one byte comes every 20 ms.
    flip_at:  this byte is another one.
    claim:    length that is claimed instead of the true one.
    begin:    first byte that a range is said to begin with instead of the true one.
    chunked:  no length is told, and `surplus` bytes more come than there are.
    location: where the answer redirects to.
    headers:  more headers of the answer.
    """

    status: int = 200
    delay_s: float = 0.0
    cut_at: int | None = None
    stall_at: int | None = None
    drip_at: int | None = None
    flip_at: int | None = None
    claim: int | None = None
    begin: int | None = None
    chunked: bool = False
    surplus: int = 0
    location: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Request(NamedTuple):
    name: str
    range: str


class Server(NamedTuple):
    """url of the folder, and what was asked for so far."""

    url: str
    requests: list[Request]

    def count(self, name: str) -> int:
        return sum(request.name == name for request in self.requests)


@contextmanager
def serving(
    folder: Path, faults: Mapping[str, Iterable[Fault]] | None = None, *, ranges: bool = True
) -> Iterator[Server]:
    """Serve the files of a folder at 127.0.0.1 within the block.

    faults: by file name, or "*" for every file without its own, one for each request; none when they are used up.
    ranges: whether requests from a byte on are understood.
    """
    left = {name: iter(each) for name, each in (faults or {}).items()}
    requests: list[Request] = []
    lock, stopped = threading.Lock(), threading.Event()

    class Handler(_Handler):
        def next_fault(self, name: str) -> Fault:
            with lock:
                requests.append(Request(name, self.headers.get("Range", "")))
                return next(left.get(name, left.get("*", iter(()))), Fault())

    Handler.folder, Handler.stopped, Handler.ranges = folder, stopped, ranges
    server = _Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}", requests)
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def random_faults(seed: int, share: float, size: int) -> Iterator[Fault]:
    """Without end: every answer is late, an error, cut or altered with the probability `share`."""
    rng = random.Random(seed)
    while True:
        place = rng.randrange(size)
        kinds = [Fault(delay_s=0.1), Fault(status=500), Fault(status=503), Fault(cut_at=place), Fault(flip_at=place)]
        yield rng.choice(kinds) if rng.random() < share else Fault()


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    stopped: threading.Event
    ranges: bool

    def next_fault(self, name: str) -> Fault:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        fault = self.next_fault(name)
        self.stopped.wait(fault.delay_s)
        file = self.folder / name
        status = fault.status if file.is_file() or fault.status != 200 else 404
        if status != 200:
            self._answer_without_file(status, fault)
        else:
            self._answer(file.read_bytes(), fault)

    def _answer_without_file(self, status: int, fault: Fault) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if fault.location:
            self.send_header("Location", fault.location)
        self.end_headers()

    def _answer(self, content: bytes, fault: Fault) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.ranges else None
        begin = int(match[1]) if match else 0
        if begin >= len(content) > 0:
            self._answer_without_file(416, fault)
            return
        if fault.flip_at is not None:
            content = content[: fault.flip_at] + bytes([content[fault.flip_at] ^ 1]) + content[fault.flip_at + 1 :]
        self.send_response(206 if match else 200)
        if match:
            said = begin if fault.begin is None else fault.begin
            self.send_header("Content-Range", f"bytes {said}-{len(content) - 1}/{len(content)}")
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(content) - begin if fault.claim is None else fault.claim))
        for header in fault.headers:
            self.send_header(*header)
        self.end_headers()
        self._send(content[begin:] + bytes(fault.surplus), begin, fault)
        self.close_connection |= fault.claim is not None

    def _send(self, body: bytes, begin: int, fault: Fault) -> None:
        stops = [place for place in (fault.cut_at, fault.stall_at, fault.drip_at) if place is not None]
        whole = max(min(stops, default=begin + len(body)) - begin, 0)
        try:
            for first in range(0, whole, CHUNK_BYTES):
                self._write(body[first : min(first + CHUNK_BYTES, whole)], fault)
            if fault.cut_at is not None:
                time.sleep(0.2)  # a client loses what it has not yet taken out of its buffers
                self.close_connection = True
            elif fault.stall_at is not None:
                self.stopped.wait(60)
            elif fault.drip_at is not None:
                for i in range(whole, len(body)):
                    if self.stopped.wait(0.02):
                        break
                    self._write(body[i : i + 1], fault)
            elif fault.chunked:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has gone
            self.close_connection = True

    def _write(self, piece: bytes, fault: Fault) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if fault.chunked else piece)

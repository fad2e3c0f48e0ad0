"""What a run prints never ends it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from avs_dist import output

PROGRAM = """
import sys
from tqdm import tqdm
from avs_dist import output
gone = []
with output.optional(lambda: gone.append(1)):
    print("first line", flush=True)
    for step in tqdm(range(400), mininterval=0):
        print("step", step, "x" * 100)
        sys.stderr.flush()
open(sys.argv[1], "w").write("reader gone" if gone else "no room")
"""


def run(marker: Path, out: int, before: Callable[[], None] | None = None) -> int:
    command = [sys.executable, "-c", PROGRAM, str(marker)]
    root = Path(__file__).resolve().parents[1]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=root, env=env, stdout=out, stderr=out, preexec_fn=before, timeout=60).returncode


def test_a_reader_that_goes_does_not_end_the_run(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as out:
        assert run(tmp_path / "marker", out.fileno()) == 0
    assert (tmp_path / "marker").read_text() == "reader gone"


def test_a_log_without_room_does_not_end_the_run(tmp_path: Path) -> None:
    limit = 4096

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with open(tmp_path / "log", "wb") as out:
        assert run(tmp_path / "marker", out.fileno(), no_room) == 0
    assert (tmp_path / "marker").read_text() == "no room"
    assert (tmp_path / "log").read_text().startswith("first line")
    assert (tmp_path / "log").stat().st_size == limit


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_streams_are_put_back(stream: str) -> None:
    before = getattr(sys, stream)
    with output.optional():
        assert getattr(sys, stream).encoding == before.encoding
        assert getattr(sys, stream) is not before
    assert getattr(sys, stream) is before

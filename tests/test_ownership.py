"""One run at a time in a folder, which all hosts see."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avs_dist import ownership, world
from avs_dist.ownership import sole_owner

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from avs_dist.ownership import sole_owner
with sole_owner(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_run(folder: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "mine\n"
            yield run
        finally:
            run.kill()


def test_a_run_waits_for_the_one_that_is_ending_and_refuses_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with another_run(tmp_path, 2.0), sole_owner(tmp_path):
        assert "waits for another run in" in capsys.readouterr().err
    monkeypatch.setattr(ownership, "LONGEST_WAIT_S", 0.5)
    with another_run(tmp_path, 100.0) as other:
        with pytest.raises(RuntimeError, match=r"train\.out_dir=.* another run has written to it all the while"):
            sole_owner(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
        begin = time.monotonic()
        with sole_owner(tmp_path):  # the lock dies with its owner
            assert time.monotonic() - begin < 10


def test_a_folder_that_other_hosts_do_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SEEN_WITHIN_S", 0.3)
    monkeypatch.setattr(world, "broadcast_object", lambda value: value and "of another host")
    monkeypatch.setattr(ownership, "_take", lambda path, token, held: path.write_text("mine"))
    with pytest.raises(RuntimeError, match="is not the same folder on all hosts: ranks 0 do not see"):
        sole_owner(tmp_path).__enter__()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"train\.out_dir=.* cannot be used: rank 0: .*Error"):
        sole_owner(tmp_path / "file" / "run").__enter__()

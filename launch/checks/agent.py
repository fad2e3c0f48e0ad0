"""The doctor on a host of the cluster: answers questions that come over ssh.

    python -m avs_dist.launch.checks.agent

Each line of stdin is a question in JSON, {"ask": name, "number": n, ...}; each answer is a line of stdout that begins
with ANSWER, so that what a shell's start-up files print is not taken for one, and has the question's number. It ends
with its stdin, so a cut connection leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avs_dist.launch.checks import collective, local, network, software, storage
from avs_dist.launch.checks.rows import Options, existing, one_line

ANSWER = "avs-dist-doctor-answer "
_listening: list[socket.socket] = []
_ranks: list[subprocess.Popen[str]] = []
_left: set[Path] = set()


def clock() -> float:
    return time.time()


def examine(**options: Any) -> list[dict[str, str]]:
    return [dataclasses.asdict(row) for row in local.examine(Options(**options))]


def facts(shards: str | None) -> dict[str, Any]:
    """What must agree between hosts, and what is needed of one of them."""
    found: dict[str, Any] = {"same": software.facts(), "addresses": network.reachable_addresses(), "gpus": _num_gpus()}
    if shards is not None:
        found["same"]["index.json of the shards"] = storage.index_hash(shards)
    return found


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def leave(folder: str, token: str) -> str:
    """Write a file in a folder that should be the same on all hosts; its path."""
    path = existing(folder) / f".avs-dist-doctor-{token}"
    _left.add(path)
    path.write_text(token)
    return str(path)


def see(path: str, token: str) -> bool:
    """Whether that file is here too; a network file system may take a moment."""
    for _ in range(20):
        if Path(path).is_file() and Path(path).read_text() == token:
            return True
        time.sleep(0.1)
    return False


def remove(path: str) -> bool:
    Path(path).unlink(missing_ok=True)
    _left.discard(Path(path))
    return True


def listen(port: int) -> bool:
    """Listen on the port of the training until `close`."""
    server = socket.create_server(("", port), backlog=128)
    _listening.append(server)
    return True


def reach(address: str, port: int) -> str:
    """Empty where a connection comes about, else why not."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        return str(error)
    return ""


def close() -> bool:
    while _listening:
        _listening.pop().close()
    return True


def join(variables: dict[str, str]) -> bool:
    """Start one rank of an all_reduce; `joined` waits for it."""
    _ranks.append(collective.start(variables))
    return True


def joined(within_s: float) -> dict[str, Any]:
    return collective.outcome(_ranks.pop(), within_s)


QUESTIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (clock, examine, facts, leave, see, remove, listen, reach, close, join, joined)
}


def main() -> int:
    # what libraries print must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            print(ANSWER + json.dumps(_answered(json.loads(line))), file=answers, flush=True)
    except BrokenPipeError:  # nobody listens any more
        return 1
    finally:
        clean()
    return 0


def _answered(question: dict[str, Any]) -> dict[str, Any]:
    number = question.pop("number")
    try:
        return {"number": number, "answer": QUESTIONS[question.pop("ask")](**question)}
    except Exception as error:  # the other questions may still be answered
        return {"number": number, "error": one_line(error)}


def clean() -> None:
    """End and remove what the last questions would have, had they been asked."""
    for rank in _ranks:
        rank.kill()
    for path in _left:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())

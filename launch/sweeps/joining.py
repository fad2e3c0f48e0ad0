"""Starting a Ray beside this process, and joining a cluster: does anything answer there, and what to do if not."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_ANSWER_S = 10.0
_PAGE = "launch/cluster/ray/README.md"


@contextmanager
def other_group() -> Iterator[None]:
    """Processes that are started within the block are of another process group than this one.

    What asks this process to end is often sent to its whole group: it can only end in order while Ray is there.
    """
    if os.getsid(0) == os.getpid():  # which cannot leave its group
        yield
        return
    own = os.getpgid(0)
    keeper = subprocess.Popen(["sleep", "600"], preexec_fn=os.setpgrp)  # a group needs a member
    try:
        os.setpgid(0, keeper.pid)
        yield
    finally:
        os.setpgid(0, own)
        keeper.kill()
        keeper.wait()


def check_answers(address: str) -> None:
    """Find out soon what Ray, which asks again and again, would tell after minutes.

    Args:
        address: host:port of the head, or "auto" for the cluster that this host belongs to.

    Raises:
        ValueError: it is no such address.
        RuntimeError: nothing answers there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(f"--address {address}: give HOST:PORT of the cluster's head, or auto on one of its hosts")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"--address {address}: nothing answers there ({error}); is it up? {_PAGE}") from error


def why_not_joined(address: str, error: BaseException) -> str:
    """What Ray's error means, and the way out, in one line."""
    text = str(error.__cause__ or error)
    if "InvalidAuthToken" in text or "AUTH_TOKEN" in text:
        given = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
        return (
            f"--address {address}: not the token of the cluster (RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', '')}, "
            f"a token by {given[0] if given else 'the home folder at best'}); set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN_PATH to the file of its token, without RAY_AUTH_TOKEN: {_PAGE}"
        )
    if "No node info found" in text:
        return (
            f"--address {address}: this host is not in that cluster; run the sweep on one that is, or add this one by "
            f"ray start --address {address}: {_PAGE}"
        )
    return f"--address {address}: {text.strip().splitlines()[-1]} ({_PAGE})"

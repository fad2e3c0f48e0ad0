"""One run at a time in train.out_dir: two would overwrite and delete each other's checkpoints.

A run that was just told to stop may still be saving when the next one is started in its place: that one waits.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from avs_dist import world
from avs_dist.shards.locks import EXCLUSIVE, lock_file, try_lock

LOCK_FILE = ".lock"
LONGEST_WAIT_S = 60.0
# what one host has written may take so long to be seen on another
SEEN_WITHIN_S = 15.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_POLL_S = 0.2


@contextmanager
def sole_owner(out_dir: str | Path) -> Iterator[None]:
    """Have the folder of a run alone within the block; collective.

    The lock (flock) ends with the process, however that ends.

    Raises:
        RuntimeError: another run has it; it cannot be written to; or not all hosts see the same folder.
    """
    path = Path(out_dir) / LOCK_FILE
    token = world.broadcast_object(secrets.token_hex(8))
    with ExitStack() as held:
        if failure := world.on_main(lambda: _take(path, token, held)):
            raise RuntimeError(f"train.out_dir={out_dir} cannot be used: {failure}")
        blind = [str(rank) for rank, sees in enumerate(world.gather_objects(_sees(path, token))) if not sees]
        if blind:
            raise RuntimeError(
                f"train.out_dir={out_dir} is not the same folder on all hosts: ranks {', '.join(blind)} do not see "
                "what rank 0 writes there; choose one on a file system that all share"
            )
        yield


def _take(path: Path, token: str, held: ExitStack) -> None:
    lock = held.enter_context(lock_file(path))
    deadline, told = time.monotonic() + LONGEST_WAIT_S, False
    while not _try(lock):
        if time.monotonic() > deadline:
            raise RuntimeError("another run has written to it all the while; end that one, or choose another folder")
        if not told:
            told = True
            tqdm.write(f"waits for another run in {path.parent} to end", file=sys.stderr)
        time.sleep(_POLL_S)
    os.ftruncate(lock, 0)
    os.write(lock, token.encode())


def _try(lock: int) -> bool:
    try:
        return try_lock(lock, EXCLUSIVE)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True  # this file system knows no locks, so nothing can be said


def _sees(path: Path, token: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)

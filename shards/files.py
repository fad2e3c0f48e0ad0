"""Writing files so that a half-written one is never seen under its final name, and telling files apart."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# never through a link, and never waiting for the other end of a pipe
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text aside, flush it to disk, then rename it to `path`; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have it for files only
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest()


@contextmanager
def opened_plain(path: str | Path) -> Iterator[int]:
    """Descriptor of a plain file, open for reading within the block.

    Raises:
        OSError: If it cannot be opened, or is a link, pipe, device or folder.
    """
    try:
        file = os.open(path, _PLAIN)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"{path} is a symbolic link, which is not followed here: put the file itself there") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{path} is not a plain file but a link, pipe, device or folder")
        yield file
    finally:
        os.close(file)


def read_plain_file(path: str | Path, limit: int) -> bytes:
    """Content of a plain file.

    Raises:
        OSError: See `opened_plain`.
        ValueError: If it has more than `limit` bytes.
    """
    with opened_plain(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit} bytes")
    return content

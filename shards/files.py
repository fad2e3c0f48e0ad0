"""Writing files so that a half-written one is never seen under its final name, and telling files apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest()

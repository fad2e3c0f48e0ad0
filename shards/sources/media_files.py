"""Files below a folder, found in one walk: looking for each clip under every name it may have would take far longer."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

# split, category, clip
_MAX_DEPTH = 3


def files_below(folder: Path, endings: Collection[str]) -> dict[str, Path]:
    """Files by their path below the folder, with "/" and the ending in small letters; the outermost first.

    Args:
        folder: Looked through down to the third folder below it; it may be missing, and linked folders count.
        endings: Those that are taken, in small letters with their dot.
    """
    found = {}
    for path in _walk(folder, "", 0):
        stem, ending = os.path.splitext(path)
        if ending.lower() in endings:
            found[stem + ending.lower()] = folder / path
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def first_of(files: dict[str, Path], stems: Sequence[str], endings: Sequence[str]) -> Path | None:
    """The first file of `files_below` with one of the names, the earlier name and ending first."""
    names = (stem + ending for stem in stems for ending in endings)
    return next((files[name] for name in names if name in files), None)


def _walk(folder: Path, below: str, depth: int) -> Iterator[str]:
    """Paths of plain files below `folder / below`, relative to the folder."""
    try:
        with os.scandir(folder / below) as entries:
            here = [(entry.name, entry.is_dir(), entry.is_file()) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, is_folder, is_file in here:
        path = f"{below}/{name}" if below else name
        if is_folder and depth < _MAX_DEPTH:
            yield from _walk(folder, path, depth + 1)
        elif is_file:
            yield path

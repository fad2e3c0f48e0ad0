"""Pictures of one clip, one a second, numbered by their names; copies of a data set count from 0 or from 1."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# a number and an ending, behind what stands between them and the clip's name; copies lack the ".mp4"
_AFTER_A_NAME = re.compile(r"((?:\.mp4)?_)(\d{1,6})(\.(?:png|jpe?g))", re.IGNORECASE)
_NUMBER = re.compile(r"()(\d{1,6})(\.(?:png|jpe?g))", re.IGNORECASE)
FRAME_ENDINGS = (".png", ".jpg", ".jpeg")
MASK_ENDINGS = (".png",)

# the number in a picture's name, what stands before and what behind it
_Parts = tuple[int, str, str]


@dataclass(frozen=True)
class Pictures:
    """What one folder holds of a clip.

    folder:    Where they are, or should be.
    by_number: Each picture by the number in its name.
    before, ending: What stands around the number in the names.
    twice:     Names of two pictures of one number, where there are such.
    """

    folder: Path
    by_number: dict[int, Path]
    before: str
    ending: str
    twice: tuple[str, ...] = ()

    def files(self, first: int, count: int) -> tuple[Path, ...]:
        """The pictures first, first + 1, ..., also those that are not there."""
        numbers = range(first, first + count)
        return tuple(self.by_number.get(n) or self.folder / f"{self.before}{n}{self.ending}" for n in numbers)

    def missing(self, first: int, count: int) -> str | None:
        """What to say of those that are not there."""
        files = enumerate(self.files(first, count), start=first)
        absent = [path.name for number, path in files if number not in self.by_number]
        return f"missing frame files in {self.folder}: {', '.join(absent)}" if absent else None

    def seconds(self, first: int, limit: int) -> int:
        """Seconds up to the last of the pictures first, ..., first + limit - 1 that is there."""
        return max((n - first + 1 for n in self.by_number if first <= n < first + limit), default=0)


def find_pictures(folders: Sequence[Path], before: str, endings: tuple[str, ...], name: str = "") -> Pictures:
    """Pictures of a clip in the first of the folders that has any.

    Args:
        before: What stands before the number as published; with `name`, any of the known forms is found.
        endings: The accepted ones in small letters, the published one first.
        name: The clip's name where the names of its pictures begin with it.
    """
    for folder in folders:
        found = _numbered(folder, name, endings)
        if found:
            numbers = [number for (number, _, _), _ in found]
            twice = [path.name for (number, _, _), path in found if numbers.count(number) > 1]
            _, before, ending = found[0][0]
            by_number = {number: path for (number, _, _), path in found}
            return Pictures(folder, by_number, before, ending, tuple(twice[:2]))
    return Pictures(folders[0], {}, before, endings[0])


def first_number(frames: Pictures, masks: Pictures, seconds: int, published: int) -> tuple[int, str | None]:
    """The number of a clip's first second, 0 or 1, and why it cannot be told, naming the files.

    It cannot where frames and masks count from different numbers, where either has both 0 and the last number of those
    that count from 1, or where two pictures have the same number.

    Args:
        seconds: Length of a whole clip.
        published: The first number where it cannot be told.
    """
    for pictures in (frames, masks):
        if pictures.twice:
            return published, f"two files for one second in {pictures.folder}: {', '.join(pictures.twice)}"
        if 0 in pictures.by_number and max(pictures.by_number) == seconds:
            ends = ", ".join(pictures.by_number[number].name for number in (0, seconds))
            return published, f"{pictures.folder} counts from 0 and from 1: {ends}"
    lowest = [pictures.by_number[min(pictures.by_number)] for pictures in (frames, masks) if pictures.by_number]
    firsts = {0 if 0 in pictures.by_number else 1 for pictures in (frames, masks) if pictures.by_number}
    if len(firsts) == 2:
        return published, f"one counts from 0 and the other from 1: {lowest[0]}, {lowest[1]}"
    return firsts.pop() if firsts else published, None


def _numbered(folder: Path, name: str, endings: tuple[str, ...]) -> list[tuple[_Parts, Path]]:
    """The pictures of a clip in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    parsed = [(_parts(file, name), folder / file) for file in names]
    return [(parts, path) for parts, path in parsed if parts and parts[2].lower() in endings]


def _parts(file: str, name: str) -> _Parts | None:
    match = (_AFTER_A_NAME if name else _NUMBER).fullmatch(file, len(name)) if file.startswith(name) else None
    return (int(match[2]), name + match[1], match[3]) if match else None

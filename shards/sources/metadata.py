"""Csv files that list clips: their lines, and names that are safe to look for."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from avs_dist.shards.sources import SPLITS

# longest file name of the usual file systems
NAME_BYTES = 255
NAMES_FILE = "classes.txt"


def read_table(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Lines of a csv file, cells without the space around them; empty lines are left out.

    Raises:
        ValueError: If there is no line, or it is not csv in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            lines = [[cell.strip() for cell in line] for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        kind = {",": "comma", "\t": "tab"}[delimiter]
        raise ValueError(f"{path}: expected {kind}-separated lines in UTF-8: {error}") from error
    table = [line for line in lines if any(line)]
    if not table:
        raise ValueError(f"{path} is empty")
    return table


def read_records(path: Path, required: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """Lines of a csv file by the names of its header; cells that a line lacks are empty.

    Raises:
        ValueError: If a required column or every line is missing, or it is not csv in UTF-8.
    """
    header, *body = read_table(path, delimiter)
    absent = set(required) - set(header)
    if absent:
        raise ValueError(f"{path}: no column {', '.join(sorted(absent))} in its first line")
    if not body:
        raise ValueError(f"{path}: lists no clip")
    return [dict(zip_longest(header, line[: len(header)], fillvalue="")) for line in body]


def read_prompts(path: Path, categories: tuple[str, ...]) -> dict[str, str]:
    """Prompt of each category, from a csv with the columns label and prompt.

    Raises:
        ValueError: If a column is missing, or a category has no prompt.
    """
    prompts = {row["label"]: row["prompt"] for row in read_records(path, ("label", "prompt"))}
    missing = [category for category in categories if not prompts.get(category)]
    if missing:
        raise ValueError(f"{path}: no prompt for {', '.join(missing[:5])}")
    return {category: prompts[category] for category in categories}


def read_categories(path: Path, default_split: str) -> dict[str, tuple[str, str]]:
    """Category and split of each clip, from a csv with the columns category and video_id, or id ending in .mp4.

    Args:
        default_split: Where there is no column split.

    Raises:
        ValueError: If a column is missing, a clip is listed twice or has no category, or cannot name a file.
    """
    rows: dict[str, tuple[str, str]] = {}
    records = read_records(path, ("category",))
    if not {"video_id", "id"} & set(records[0]):
        raise ValueError(f"{path}: no column video_id or id in its first line")
    for cells in records:
        name = cells.get("video_id") or cells.get("id", "").removesuffix(".mp4")
        check_file_name(name, path, list(cells.values()), NAME_BYTES - len(".zip"))
        if name in rows:
            raise ValueError(f"{path}: clip {name} is listed twice")
        if not cells["category"]:
            raise ValueError(f"{path}: clip {name} has no category")
        rows[name] = cells["category"], check_split(cells.get("split", default_split), path, name)
    return rows


def read_names(root: Path, default: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the events, one on each line of classes.txt; the default without such a file.

    Raises:
        ValueError: If a name stands twice, or it is not text in UTF-8.
    """
    path = root / NAMES_FILE
    if not path.is_file():
        return default
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a name stands twice")
    return names


def check_split(split: str, path: Path, name: str) -> str:
    """The split of the clip `name`.

    Raises:
        ValueError: If it is none of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"{path}: clip {name}: split '{split}' is none of {', '.join(SPLITS)}")
    return split


def check_file_name(name: str, path: Path, line: list[str], limit: int = NAME_BYTES) -> None:
    """Refuse a name that would lead out of the folder that it is looked for in, or that no file can have.

    Raises:
        ValueError: If it is empty, ".", "..", longer than `limit` bytes, or holds "/" or NUL; names `path` and `line`.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > limit:
        raise ValueError(
            f"{path}: line {','.join(line)!r:.300}: expected a plain file name (not empty, '.' or '..', without '/' "
            f"and NUL, at most {limit} bytes), got {name!r:.300}"
        )


def only_file(root: Path, pattern: str) -> Path:
    """The one file of that name in a folder.

    Raises:
        FileNotFoundError: If there is none, or several.
    """
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{root}: expected exactly one {pattern}, found {names}")
    return found[0]

"""The AVSBench folders as published: S4 (`Single-source/`) and MS3 (`Multi-sources/`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avs_dist.shards.sources import SPLITS, ClipJob
from avs_dist.shards.sources.metadata import NAME_BYTES, check_file_name, check_split, only_file, read_table

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_NAME_COLUMNS = ("name", "video_id", "vid", "uid")
_CATEGORY_COLUMNS = ("category", "sounding_objects", "a_obj")
# what follows a clip's name in the name of a file: .mp4_10.png, .webm
_ENDING_BYTES = 15


@dataclass(frozen=True)
class Layout:
    """Folder names of one benchmark, relative to its data folder.

    folder:      Parent folder that the root may or may not include.
    data:        Folder with visual_frames, gt_masks, audio_wav, raw_videos.
    frame_infix: Between a clip's name and the number of a frame.
    """

    folder: str
    data: str
    metadata: str
    frame_infix: str
    frame_dir: str
    mask_dir: str


S4 = Layout(
    "Single-source", "s4_data", "s4_meta_data*.csv", "_", "{split}/{category}/{name}", "{split}/{category}/{name}"
)
MS3 = Layout("Multi-sources", "ms3_data", "ms3_meta_data*.csv", ".mp4_", "{name}", "{split}/{name}")


@dataclass(frozen=True)
class Row:
    """One line of the metadata."""

    name: str
    split: str
    category: str


def list_clips(layout: Layout, root: Path, clip_s: int, decode_video: bool) -> list[ClipJob]:
    """Every clip of the metadata file, train first.

    Args:
        root: The folder that holds `layout.folder`, or that folder itself.
        clip_s: Longest clip in seconds.
        decode_video: Take the frames from raw_videos even where visual_frames has them.

    Raises:
        FileNotFoundError: If the folder or its metadata is not there.
        ValueError: If the metadata cannot be understood.
    """
    base = root / layout.folder if (root / layout.folder).is_dir() else root
    data = base / layout.data
    if not data.is_dir():
        raise FileNotFoundError(f"--root {root}: neither {layout.folder}/{layout.data} nor {layout.data} is in it")
    rows = read_metadata(only_file(base, layout.metadata))
    if layout is S4 and any(not row.category for row in rows):
        raise ValueError(f"{base}: the S4 metadata needs a category for every clip")
    jobs = [_job(layout, data, row, clip_s, decode_video) for row in rows]
    return sorted(jobs, key=lambda job: SPLITS.index(job.split))


def read_metadata(path: Path) -> list[Row]:
    """Rows of a metadata csv, by column name where there is a header, else by what the columns hold.

    Without a header the first column is the name, the split is the column of train/val/test, and the category is the
    other column that is not a number, which covers both published column orders.

    Raises:
        ValueError: If there is no clip or no split column, a split is unknown, a clip is listed twice, or a name or
            category cannot name a folder.
    """
    table = read_table(path)
    header = [cell.lower() for cell in table[0]]
    if "split" in header:
        body, columns = table[1:], _columns_by_name(header)
    else:
        body, columns = table, _columns_by_content(table, path)
    name_at, split_at, category_at = columns
    if not body:
        raise ValueError(f"{path}: lists no clip")
    rows: dict[tuple[str, str], Row] = {}
    for line in body:
        if len(line) <= max(name_at, split_at, category_at or 0):
            raise ValueError(f"{path}: a line has too few columns: {','.join(line)}")
        row = Row(line[name_at], line[split_at], line[category_at] if category_at is not None else "")
        check_file_name(row.name, path, line, NAME_BYTES - _ENDING_BYTES)
        if row.category:
            check_file_name(row.category, path, line)
        check_split(row.split, path, row.name)
        if (row.split, row.name) in rows:
            raise ValueError(f"{path}: clip {row.name} is listed twice in {row.split}")
        rows[row.split, row.name] = row
    return list(rows.values())


def _columns_by_name(header: list[str]) -> tuple[int, int, int | None]:
    name = next((header.index(c) for c in _NAME_COLUMNS if c in header), 0)
    category = next((header.index(c) for c in _CATEGORY_COLUMNS if c in header), None)
    return name, header.index("split"), category


def _columns_by_content(table: list[list[str]], path: Path) -> tuple[int, int, int | None]:
    columns = [set(column) for column in zip(*table, strict=False)]
    split = next((i for i, column in enumerate(columns) if i and column <= set(SPLITS)), None)
    if split is None:
        raise ValueError(f"{path}: no column named 'split', and no column that holds only {', '.join(SPLITS)}")
    others = [i for i in range(1, len(columns)) if i != split]
    texts = [i for i in others if not all(cell.replace(".", "", 1).isdigit() for cell in columns[i])]
    return 0, split, texts[0] if texts else None


def _job(layout: Layout, data: Path, row: Row, clip_s: int, decode_video: bool) -> ClipJob:
    place = {"split": row.split, "category": row.category, "name": row.name}
    frames_at = data / "visual_frames" / layout.frame_dir.format(**place)
    masks_at = data / "gt_masks" / layout.mask_dir.format(**place)
    # published clips lie in folders by split (and category); copies in one flat folder are as common
    nested = f"{row.split}/{row.category}/{row.name}" if layout is S4 else f"{row.split}/{row.name}"
    video = _existing(data / "raw_videos", (nested, row.name), VIDEO_SUFFIXES)
    sound = _existing(data / "audio_wav", (nested, row.name), (".wav",)) or video
    frames, problem = ((), None) if decode_video else _frame_files(frames_at, f"{row.name}{layout.frame_infix}", clip_s)
    if not frames and video is None:
        problem = problem or f"neither {frames_at} nor a file {row.name}.mp4 in {data / 'raw_videos'} exists"
    elif sound is None:
        problem = problem or f"no {row.name}.wav in {data / 'audio_wav'} and no raw video to take the sound from"
    # S4 gives the first mask only for training (weak supervision)
    labelled = 1 if layout is S4 and row.split == "train" else clip_s
    return ClipJob(
        name=row.name,
        split=row.split,
        path=frames_at if frames else video or frames_at,
        frames=frames,
        video=None if frames else video,
        sound=sound,
        masks=tuple(masks_at / f"{row.name}_{k}.png" for k in range(1, labelled + 1)),
        seconds=clip_s,
        meta={"category": row.category} if row.category else {},
        problem=problem,
    )


def _existing(folder: Path, stems: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    # not with_suffix: names may contain dots
    candidates = (folder / f"{stem}{suffix}" for stem in stems for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def _frame_files(folder: Path, prefix: str, clip_s: int) -> tuple[tuple[Path, ...], str | None]:
    """Frames 1, 2, ... of a clip, and what is wrong with them (a gap)."""
    paths = [folder / f"{prefix}{k}.png" for k in range(1, clip_s + 1)]
    there = [path.is_file() for path in paths]
    count = max((k + 1 for k, exists in enumerate(there) if exists), default=0)
    missing = [path.name for path, exists in zip(paths[:count], there[:count], strict=True) if not exists]
    problem = f"missing frame files in {folder}: {', '.join(missing)}" if missing else None
    return tuple(paths[:count]), problem

"""The AVSBench folders S4 (`Single-source/`) and MS3 (`Multi-sources/`), as published and as copies have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avs_dist.shards.sources import SPLITS, ClipJob
from avs_dist.shards.sources.media_files import files_below, first_of
from avs_dist.shards.sources.metadata import NAME_BYTES, check_file_name, check_split, only_file, read_table
from avs_dist.shards.sources.pictures import FRAME_ENDINGS, MASK_ENDINGS, Pictures, find_pictures, first_number

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
SECONDS = 5
FRAMES, MASKS, SOUNDS, MELS, VIDEOS = "visual_frames", "gt_masks", "audio_wav", "audio_log_mel", "raw_videos"
_NAME_COLUMNS = ("name", "video_id", "vid", "uid")
_CATEGORY_COLUMNS = ("category", "sounding_objects", "a_obj")
# what follows a clip's name in the name of a file: .mp4_10.png, .webm
_ENDING_BYTES = 15


@dataclass(frozen=True)
class Layout:
    """Folder names of one benchmark, relative to its data folder.

    folder:      Parent folder that the root may or may not include.
    data:        Folder with visual_frames, gt_masks, audio_wav, audio_log_mel, raw_videos.
    frame_infix: Between a clip's name and the number of a frame.
    frames_at, masks_at, files_at: Where the published frames, masks, and single files of a clip lie.
    """

    folder: str
    data: str
    metadata: str
    frame_infix: str
    frames_at: str
    masks_at: str
    files_at: str


_NESTED, _BY_SPLIT, _FLAT = "{split}/{category}/{name}", "{split}/{name}", "{name}"
# folders of copies, beside those published
_PLACES = (_NESTED, _BY_SPLIT, "{category}/{name}", _FLAT)
S4 = Layout("Single-source", "s4_data", "s4_meta_data*.csv", "_", _NESTED, _NESTED, _NESTED)
MS3 = Layout("Multi-sources", "ms3_data", "ms3_meta_data*.csv", ".mp4_", _FLAT, _BY_SPLIT, _BY_SPLIT)

LAYOUTS = {"avsbench-s4": S4, "avsbench-ms3": MS3}


@dataclass(frozen=True)
class Row:
    """One line of the metadata."""

    name: str
    split: str
    category: str


def list_clips(layout: Layout, root: Path, clip_s: int, decode_video: bool, stored_mel: bool = False) -> list[ClipJob]:
    """Every clip of the metadata file, train first.

    Frames (png or jpg) and masks are numbered from 0 or from 1, with or without ".mp4" before it, and lie in folders of
    split and category, of either, or of the clip alone; so do the sound, the log-mel and the videos.

    Args:
        root: The folder that holds `layout.folder`, or that folder itself.
        clip_s: Longest clip in seconds.
        decode_video: Take the frames from raw_videos even where visual_frames has them.
        stored_mel: Take the log-mel from audio_log_mel instead of the sound.

    Raises:
        FileNotFoundError: If the folder or its metadata is not there.
        ValueError: If the metadata cannot be understood.
    """
    data = data_folder(layout, root)
    rows = read_metadata(only_file(data.parent, layout.metadata))
    if layout is S4 and any(not row.category for row in rows):
        raise ValueError(f"{data.parent}: the S4 metadata needs a category for every clip")
    disk = _Disk(layout, data, clip_s, decode_video, stored_mel)
    return sorted((disk.job(row) for row in rows), key=lambda job: SPLITS.index(job.split))


def data_folder(layout: Layout, root: Path) -> Path:
    """The folder that holds the frames, masks and sounds.

    Raises:
        FileNotFoundError: If it is not there.
    """
    base = root / layout.folder if (root / layout.folder).is_dir() else root
    if not (base / layout.data).is_dir():
        raise FileNotFoundError(f"--root {root}: neither {layout.folder}/{layout.data} nor {layout.data} is in it")
    return base / layout.data


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


class _Disk:
    """What lies in the data folder, asked clip by clip."""

    def __init__(self, layout: Layout, data: Path, clip_s: int, decode_video: bool, stored_mel: bool) -> None:
        self._layout, self._data, self._clip_s = layout, data, clip_s
        self._decode_video, self._stored_mel = decode_video, stored_mel
        self._videos = files_below(data / VIDEOS, VIDEO_SUFFIXES)
        self._sounds = files_below(data / SOUNDS, (".wav",))
        self._mels = files_below(data / MELS, (".pkl",)) if stored_mel else {}

    def job(self, row: Row) -> ClipJob:
        layout, stems = self._layout, _places(self._layout.files_at, row)
        video = first_of(self._videos, stems, VIDEO_SUFFIXES)
        sound = None if self._stored_mel else first_of(self._sounds, stems, (".wav",)) or video
        mel = first_of(self._mels, stems, (".pkl",))
        # S4 gives the first mask only for training (weak supervision)
        labelled = 1 if layout is S4 and row.split == "train" else self._clip_s
        frames, masks, problem = self._pictures(row, labelled)
        where = self._data / FRAMES / layout.frames_at.format(**vars(row))
        if not frames and video is None:
            problem = problem or f"neither {where} nor a file {row.name}.mp4 in {self._data / VIDEOS} exists"
        elif self._stored_mel and mel is None:
            problem = problem or f"no {row.name}.pkl in {self._data / MELS}"
        elif not self._stored_mel and sound is None:
            problem = problem or f"no {row.name}.wav in {self._data / SOUNDS} and no raw video to take the sound from"
        return ClipJob(
            name=row.name,
            split=row.split,
            path=frames[0].parent if frames else video or where,
            frames=frames,
            video=None if frames else video,
            sound=sound,
            mel=mel,
            masks=masks,
            seconds=self._clip_s,
            meta={"category": row.category} if row.category else {},
            problem=problem,
        )

    def _pictures(self, row: Row, labelled: int) -> tuple[tuple[Path, ...], tuple[Path, ...], str | None]:
        """Frames and masks of a clip, also those that miss, and what is wrong with them."""
        layout, clip_s = self._layout, self._clip_s
        frame_folders = [self._data / FRAMES / place for place in _places(layout.frames_at, row)]
        mask_folders = [self._data / MASKS / place for place in _places(layout.masks_at, row)]
        masks = find_pictures(mask_folders, f"{row.name}_", MASK_ENDINGS, row.name)
        if self._decode_video:
            frames = Pictures(frame_folders[0], {}, "", "")
        else:
            frames = find_pictures(frame_folders, f"{row.name}{layout.frame_infix}", FRAME_ENDINGS, row.name)
        first, problem = first_number(frames, masks, max(SECONDS, clip_s), published=1)
        # a labelled second without a frame is a gap, not the end of the clip
        count = max(frames.seconds(first, clip_s), masks.seconds(first, labelled)) if frames.by_number else 0
        return frames.files(first, count), masks.files(first, labelled), problem or frames.missing(first, count)


def _places(published: str, row: Row) -> list[str]:
    """Where something of a clip may lie, the published place first."""
    forms = dict.fromkeys((published, *(form for form in _PLACES if row.category or "{category}" not in form)))
    return [form.format(**vars(row)) for form in forms]

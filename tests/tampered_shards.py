"""Shards that somebody has tampered with, whose index fits all the same."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from avs_dist.shards.index import ShardIndex


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def rewrite(folder: Path, change: Callable[[bytes], bytes], split: str = "val", number: int = 0) -> ShardIndex:
    """Replace a clip of the first shard of a split by `change(its tar segment)`; index and later offsets follow."""
    index = ShardIndex.load(folder)
    shard = index.split(split)[0]
    data, clips, out = (folder / shard.name).read_bytes(), [], b""
    for i, clip in enumerate(shard.clips):
        segment = data[clip.offset : clip.offset + clip.length]
        segment = change(segment) if i == number else segment
        clips.append(replace(clip, offset=len(out), length=len(segment), crc32=zlib.crc32(segment)))
        out += segment
    (folder / shard.name).write_bytes(out)
    tampered = replace(shard, clips=tuple(clips), bytes=len(out))
    changed = replace(index, shards=tuple(tampered if s is shard else s for s in index.shards))
    changed.save()
    return ShardIndex.load(folder)


def appended(
    segment: bytes,
    name: str,
    data: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    form: int = tarfile.PAX_FORMAT,
    **fields: Any,
) -> bytes:
    """The segment with one more member; `fields` of its header, such as linkname, or size against the truth."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return segment + info.tobuf(form) + data + b"\0" * (-len(data) % 512)


def tar_members(segment: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(segment)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def with_members(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Callable[[bytes], bytes]:
    """A change of a segment, from one of its members by their names behind the key."""

    def changed(segment: bytes) -> bytes:
        named = tar_members(segment)
        key = next(iter(named)).split(".")[0]
        members = change({name.removeprefix(f"{key}."): data for name, data in named.items()})
        return b"".join(appended(b"", f"{key}.{name}", data) for name, data in members.items())

    return changed


def edited(folder: Path, change: Callable[[Any], Any]) -> Path:
    """Change index.json of the folder."""
    data = json.loads((folder / "index.json").read_text())
    change(data)
    (folder / "index.json").write_text(json.dumps(data))
    return folder

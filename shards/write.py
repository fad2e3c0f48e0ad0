"""Writing one tar shard, clip by clip; it gets its final name only when it is whole and on disk."""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import replace
from pathlib import Path

from avs_dist.shards.files import sync_directory
from avs_dist.shards.index import ClipEntry, ShardEntry
from avs_dist.shards.schema import MAX_CLIP_BYTES, FeatureSample, Sample, key_of

# two zero blocks end an archive, and archives are padded to records of 20 blocks
_RECORD = 20 * 512
_END = 2 * 512


class ShardWriter:
    """Collects clips into `{split}-{number}.tar`; a hidden temporary file until `close`."""

    def __init__(self, directory: Path, split: str, number: int) -> None:
        self.name = f"{split}-{number:05d}.tar"
        self.split = split
        self._path = directory / self.name
        self._temporary = directory / f".{self.name}.tmp"
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()
        self._clips: list[ClipEntry] = []
        self.bytes = 0

    def add(self, sample: Sample | FeatureSample, segment: bytes) -> None:
        """Append the tar segment of a clip (`members.encode_clip`, `feature_members.encode_features`).

        Raises:
            ValueError: If the segment is larger than readers accept.
        """
        entry = ClipEntry(
            key=key_of(sample.name),
            name=sample.name,
            offset=0,
            length=0,
            crc32=0,
            seconds=sample.seconds,
            labelled=sample.labelled_seconds,
            sound=sample.sound,
        )
        self.append(entry, segment)

    def append(self, entry: ClipEntry, segment: bytes) -> None:
        """Append the tar segment of a clip that `entry` describes, wherever that says it lies.

        Raises:
            ValueError: If the segment is larger than readers accept.
        """
        if len(segment) > MAX_CLIP_BYTES:
            raise ValueError(f"clip {entry.name} has {len(segment)} bytes, readers accept {MAX_CLIP_BYTES}")
        placed = replace(entry, offset=self.bytes, length=len(segment), crc32=zlib.crc32(segment))
        self._write(segment)
        self._clips.append(placed)

    def close(self) -> ShardEntry:
        """End the archive, flush it to disk, give it its name."""
        size = self.bytes + _END
        self._write(b"\0" * (size + (-size % _RECORD) - self.bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_directory(self._path.parent)
        return ShardEntry(self.name, self.split, self._sha256.hexdigest(), self.bytes, tuple(self._clips))

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)

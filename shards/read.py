"""Reading single clips out of tar shards by their byte ranges, through webdataset's tar iterator.

Shards may come from strangers. Nothing is ever unpickled: only our own decoders see the members. Nothing but plain
files of bounded size is accepted, and no name from a shard is used as a path or URL.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

os.environ["WDS_SECURE"] = "1"  # before the import: refuse pickles and pipes in every other code path, too
import webdataset as wds  # noqa: E402
from webdataset.tariterators import group_by_keys, tar_file_expander  # noqa: E402

from avs_dist.shards.feature_members import decode_features  # noqa: E402
from avs_dist.shards.index import ClipEntry, ShardIndex  # noqa: E402
from avs_dist.shards.members import decode_clip, decode_facts, decode_mel  # noqa: E402
from avs_dist.shards.plan import swapped  # noqa: E402
from avs_dist.shards.schema import (  # noqa: E402
    FEATURES,
    MAX_MEMBER_BYTES,
    MEL_BANDS,
    MEL_FRAMES,
    SILENT_LOG_MEL,
    FeatureSample,
    Sample,
)

Audio = Literal["real", "muted", "swapped"]


class DamagedClipError(ValueError):
    """A clip in a shard is not what the index says; names shard, offset and key."""


class ClipReader:
    """The clips of one split by id (ids count through the shards in order).

    Args:
        audio: "real"; "muted" (the log-mel of silence); "swapped" (that of the clip half the split away).

    Raises:
        ValueError: If there is no such split, or the sound of features should be replaced.
    """

    def __init__(self, index: ShardIndex, split: str, audio: Audio = "real") -> None:
        if audio not in ("real", "muted", "swapped"):
            raise ValueError(f"audio must be real, muted or swapped, got '{audio}'")
        self._kind = index.kind
        if audio != "real" and self._kind == FEATURES:
            raise ValueError(
                f"{index.directory} holds features, not log-mels that audio='{audio}' could replace: use 'real'"
            )
        shards = index.split(split)
        self.shard_counts = [len(shard.clips) for shard in shards]
        self._entries = [(index.directory / shard.name, entry) for shard in shards for entry in shard.clips]
        self._audio = audio
        if audio == "swapped":
            swapped(0, len(self))

    def __len__(self) -> int:
        return len(self._entries)

    def samples(self, clips: Iterable[int]) -> Iterator[Any]:
        """Decoded samples of the clips, in order: Sample, or FeatureSample where the shards hold features.

        Raises:
            DamagedClipError: If one is damaged.
        """
        asked: list[int] = []

        def sources() -> Iterator[dict[str, Any]]:
            for clip in clips:
                asked.append(clip)
                yield self._source(clip)

        pipeline = wds.DataPipeline(sources, tar_file_expander, group_by_keys)
        groups = iter(pipeline)
        count = 0
        while True:
            try:
                members = next(groups, None)
                if members is None:
                    break
                clip = asked[count]
                sample = self._sample(clip, members)
            except DamagedClipError:
                raise
            except (tarfile.TarError, OSError, ValueError, SyntaxError, EOFError) as error:
                raise self._damaged(asked[-1], error) from error
            count += 1
            yield sample

    def _source(self, clip: int) -> dict[str, Any]:
        path, entry = self._entries[clip]
        try:
            return {"url": path.name, "stream": io.BytesIO(read_segment(path, entry))}
        except (tarfile.TarError, OSError, ValueError) as error:
            raise self._damaged(clip, error) from error

    def _sample(self, clip: int, members: dict[str, Any]) -> Sample | FeatureSample:
        key = self._entries[clip][1].key
        if members["__key__"] != key:
            raise self._damaged(clip, ValueError(f"the shard holds clip {members['__key__']} there"))
        if self._kind == FEATURES:
            return decode_features(members)
        return decode_clip(members, self._replacement(clip, members))

    def _replacement(self, clip: int, members: dict[str, bytes]) -> np.ndarray | None:
        """Log-mel that replaces the clip's own; None keeps it."""
        if self._audio == "real":
            return None
        seconds = decode_facts(members)["seconds"]
        mel_TFM = np.full((seconds, MEL_FRAMES, MEL_BANDS), SILENT_LOG_MEL, dtype=np.float32)
        if self._audio == "swapped":
            donor_TFM = self._donor_mel(swapped(clip, len(self)))[:seconds]
            mel_TFM[: len(donor_TFM)] = donor_TFM
        return mel_TFM

    def _donor_mel(self, clip: int) -> np.ndarray:
        def has_sound(name: str) -> bool:
            return name.endswith((".json", ".mel.npy"))

        members = next(group_by_keys(tar_file_expander([self._source(clip)], select_files=has_sound)))
        return decode_mel(members, decode_facts(members)["seconds"])

    def _damaged(self, clip: int, error: Exception) -> DamagedClipError:
        path, entry = self._entries[clip]
        return DamagedClipError(f"shard {path}, offset {entry.offset}, clip {entry.key}: {error}")


def read_segment(path: Path, entry: ClipEntry) -> bytes:
    """The tar segment of one clip, checked before anything parses it further.

    Raises:
        ValueError, tarfile.TarError: If it is short, altered, or holds anything but plain files of accepted size.
    """
    with path.open("rb") as file:
        file.seek(entry.offset)
        segment = file.read(entry.length)
    if len(segment) != entry.length:
        raise ValueError(f"the file ends after {len(segment)} of {entry.length} bytes")
    if zlib.crc32(segment) != entry.crc32:
        raise ValueError("the CRC-32 does not match the index")
    # "r:" refuses compressed archives, which could unpack to any size
    with tarfile.open(fileobj=io.BytesIO(segment), mode="r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                raise ValueError(f"member {member.name!r} is not a plain file (a link, device or sparse file)")
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(f"member {member.name!r} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
    return segment

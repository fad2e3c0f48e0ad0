"""A clip's frames stored as video: the bytes of a small film, and what a reader needs to find its frames again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.frames import check_clip_bytes
from avs_dist.shards.schema import MAX_IMAGE_SIZE
from avs_dist.shards.segment import Members, member

VIDEO = "video"
DECODERS = ("pyav", "decord")
# Containers by the suffix of their members, under the names that FFmpeg has for them. A member is read as what it is
# said to be and nothing else: FFmpeg's own guess could be a playlist that opens other files.
CONTAINERS = {"mkv": "matroska", "mp4": "mp4", "avi": "avi", "ts": "mpegts"}
_MAX_AT = 2**62


@dataclass(frozen=True)
class StoredVideo:
    """Frames of a clip of T seconds inside a small film.

    data:    bytes of the film (or a view of them).
    suffix:  its container, one of CONTAINERS.
    decoder: which of DECODERS gives the frames that the build stored.
    at:      where the frame of each second is, ascending: its time in units of the stream's time base ("pyav"), or its
             number ("decord").
    size:    side that the frames are resized to.
    """

    data: Any
    suffix: str
    decoder: str
    at: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, facts: dict[str, Any], members: Members) -> StoredVideo:
        """From the facts of a clip, checked by `check_stored_video`, and its members.

        Raises:
            ClipFault: If the member is missing.
        """
        suffix = facts["suffix"]
        data = member(members, f"{VIDEO}.{suffix}")
        return cls(data, suffix, facts["decoder"], tuple(facts["at"]), facts["size"])

    @property
    def member(self) -> str:
        return f"{VIDEO}.{self.suffix}"

    @property
    def facts(self) -> dict[str, Any]:
        """What `of` needs beside the members."""
        return {"suffix": self.suffix, "decoder": self.decoder, "at": list(self.at), "size": self.size}


def check_stored_video(facts: Any, seconds: int) -> None:
    """See that the facts of a stored video are what `StoredVideo.of` relies on.

    Raises:
        ClipFault: If they are not.
    """
    if not isinstance(facts, dict):
        raise ClipFault("schema", f"json: '{VIDEO}' must be an object, got {facts!r:.80}")
    for key, known in (("suffix", tuple(CONTAINERS)), ("decoder", DECODERS)):
        if facts.get(key) not in known:
            raise ClipFault("schema", f"json: '{VIDEO}.{key}' must be one of {known}, got {facts.get(key)!r:.80}")
    size, at = facts.get("size"), facts.get("at")
    if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
        raise ClipFault("schema", f"json: '{VIDEO}.size' must be a side from 1 to {MAX_IMAGE_SIZE}, got {size!r:.80}")
    if not isinstance(at, list) or len(at) != seconds or not all(map(_is_place, at)) or at != sorted(at):
        message = f"json: '{VIDEO}.at' must be {seconds} ascending whole numbers, got {at!r:.80}"
        raise ClipFault("schema", message)
    check_clip_bytes((seconds, size, size, 3))


def _is_place(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_AT

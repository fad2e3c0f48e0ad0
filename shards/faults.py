"""What can be wrong with one clip of a shard: a kind that is counted, and a message that a person reads."""

from __future__ import annotations

from typing import NamedTuple

KINDS = {
    "unreadable": "the shard is missing, cannot be opened or fetched, or is no plain file",
    "truncated": "the shard ends before the clip does",
    "checksum": "the bytes are not those that were written",
    "tar": "not a plain tar segment of this clip: links, devices, foreign names, broken headers",
    "oversize": "a member or picture is larger than readers accept",
    "member": "a member is missing or stands twice",
    "schema": "the facts (json) are unusable or of another schema version",
    "picture": "a frame or mask cannot be decoded, or has another mode or size than it should",
    "mask": "a mask has another size than the frames, or a class that does not exist",
    "array": "an array is damaged, or has another type or shape than it should",
    "not_finite": "an array holds NaN or infinite values",
    "video": "the video member cannot be decoded, or not in time",
    "other": "the clip cannot be decoded for another reason",
}


class ClipFault(ValueError):
    """One clip cannot be used.

    kind: one of KINDS.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        assert kind in KINDS, kind
        self.kind = kind

    def __reduce__(self) -> tuple[type[ClipFault], tuple[str, str]]:
        return type(self), (self.kind, str(self))


def printable(text: str) -> str:
    """A name from a shard as a terminal may show it: without line breaks and control characters."""
    return text if text.isprintable() else repr(text)


class Damage(NamedTuple):
    """A damaged clip and its place.

    split:  that it is in.
    clip:   its id in the split.
    name:   its name.
    shard:  path or URL of the shard.
    offset: of the clip in it, in bytes.
    kind:   one of KINDS.
    reason: what a person reads.
    """

    split: str
    clip: int
    name: str
    shard: str
    offset: int
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}, offset {self.offset}, clip {printable(self.name)}: {self.reason}"


class DamagedClipError(ValueError):
    """A clip in a shard is not what the index says, or cannot be decoded."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage

    def __reduce__(self) -> tuple[type[DamagedClipError], tuple[Damage]]:
        return type(self), (self.damage,)

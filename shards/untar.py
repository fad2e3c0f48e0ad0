"""The members of one clip from the bytes of its tar segment, as views, with no name in it trusted.

Only what `segment.tar_segment` writes is accepted: plain files whose names begin with the clip's key, and pax records
of longer names. Links, devices, sparse files and other extensions of the format are refused, whatever they say.
"""

from __future__ import annotations

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.schema import MAX_MEMBER_BYTES
from avs_dist.shards.segment import BLOCK

_FILE, _PAX = (b"0", b"\0"), b"x"
_MAX_PAX_BYTES = 4096


def members_of(segment: memoryview, key: str) -> dict[str, memoryview]:
    """Content of each member by its name behind the key, as views of the segment.

    Raises:
        ClipFault: "tar" for anything but plain files of this clip, "oversize", or "member" where one stands twice.
    """
    members: dict[str, memoryview] = {}
    position, long_name = 0, None
    while position < len(segment):
        header = segment[position : position + BLOCK]
        if len(header) < BLOCK or bytes(header[257:262]) != b"ustar":
            raise ClipFault("tar", f"no tar header at byte {position} of the clip")
        name, kind, size = long_name or _name(header), bytes(header[156:157]), _size(header)
        begin = position + BLOCK
        position = begin + size + -size % BLOCK
        if size > MAX_MEMBER_BYTES:
            raise ClipFault("oversize", f"member {_shown(name)} claims {size} bytes, the limit is {MAX_MEMBER_BYTES}")
        if position > len(segment):
            raise ClipFault("tar", f"member {_shown(name)} claims {size} bytes, {len(segment) - begin} are there")
        content = segment[begin : begin + size]
        if kind == _PAX and long_name is None:
            long_name = _pax_path(content)
            continue
        long_name = None
        if kind not in _FILE:
            raise ClipFault("tar", f"member {_shown(name)} is not a plain file (a link, device or extension)")
        member = name.removeprefix(f"{key}.")
        if member == name or "/" in member:
            raise ClipFault("tar", f"member {_shown(name)} does not belong to clip {key}")
        if member in members:
            raise ClipFault("member", f"member {_shown(name)} stands twice")
        members[member] = content
    if long_name is not None:
        raise ClipFault("tar", "the clip ends with the header of a long name")
    return members


def _name(header: memoryview) -> str:
    name, prefix = (bytes(field).split(b"\0", 1)[0] for field in (header[:100], header[345:500]))
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _size(header: memoryview) -> int:
    """Octal digits, or a big-endian number behind a byte of 0x80, as sizes from 8 GiB on are written."""
    field = bytes(header[124:136])
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise ClipFault("tar", f"a size is written {field!r}")
    return int(digits, 8)


def _pax_path(content: memoryview) -> str:
    """The path in a pax header that holds this one record: "LENGTH path=NAME\\n"."""
    record = bytes(content[: _MAX_PAX_BYTES + 1])
    length, _, field = record.partition(b" ")
    name = field.removeprefix(b"path=").removesuffix(b"\n")
    if length != str(len(record)).encode() or field != b"path=" + name + b"\n" or not name or b"\n" in name:
        raise ClipFault("tar", f"a pax header that is no long name: {record[:80]!r}")
    return name.decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return repr(name)[:200]

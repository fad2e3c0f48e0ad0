"""Tar members of one clip, whatever it holds: the bytes of its segment, its facts and its arrays, checked when read.

Nothing here depends on the clock, the user or the machine, so that equal members give equal bytes.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from typing import Any

import numpy as np

from avs_dist.shards.schema import MAX_CLIP_SECONDS, MAX_MEMBER_BYTES, key_of

_BLOCK = 512
# what np.save writes before arrays of a few dimensions is shorter
_MAX_NPY_HEADER = 512


def tar_segment(name: str, members: dict[str, bytes]) -> bytes:
    """Bytes of the tar segment of the clip `name`: headers, data, padding; no end-of-archive blocks.

    Raises:
        ValueError: If a member is larger than readers accept.
    """
    return b"".join(_tar_member(f"{key_of(name)}.{member}", data) for member, data in sorted(members.items()))


def member(members: dict[str, bytes], name: str) -> bytes:
    """Content of one member.

    Raises:
        ValueError: If it is missing.
    """
    if name not in members:
        raise ValueError(f"member {name} is missing")
    return members[name]


def encode_facts(facts: dict[str, Any]) -> bytes:
    """The json member; `decode_facts` wants "name" and "seconds" in it."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()


def decode_facts(members: dict[str, bytes]) -> dict[str, Any]:
    """The json member of a clip.

    Raises:
        ValueError: If it is missing, no JSON object, or has no name or no usable length.
    """
    try:
        facts = json.loads(member(members, "json"))
    except RecursionError:
        raise ValueError("json: nested too deeply") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("name"), str):
        raise ValueError("json: expected an object with a 'name'")
    seconds = facts.get("seconds")
    if not isinstance(seconds, int) or not 1 <= seconds <= MAX_CLIP_SECONDS:
        raise ValueError(f"json: 'seconds' must be a whole number from 1 to {MAX_CLIP_SECONDS}, got {seconds!r}")
    return facts


def encode_npy(array: np.ndarray) -> bytes:
    """The array as np.save writes it."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(array), allow_pickle=False)
    return data.getvalue()


def decode_npy(members: dict[str, bytes], name: str) -> np.ndarray:
    """An array of numbers that `encode_npy` wrote; memory is taken only for data that are there.

    Raises:
        ValueError: If the member is missing, no npy file, of another kind than numbers, or not as long as it claims.
    """
    data = member(members, name)
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"npy version {version}, expected (1, 0)")
        if int.from_bytes(data[8:10], "little") > _MAX_NPY_HEADER:
            raise ValueError(f"the npy header is longer than {_MAX_NPY_HEADER} bytes")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    start = file.tell()
    if dtype.kind not in "fiub" or fortran_order:
        raise ValueError(f"{name} holds {dtype}, expected numbers in C order (np.save with allow_pickle=False)")
    if math.prod(shape) * dtype.itemsize != len(data) - start or min(shape, default=0) < 0:
        raise ValueError(f"{name} claims {dtype} {shape}, but has {len(data) - start} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).copy()


def _tar_member(name: str, data: bytes) -> bytes:
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name} has {len(data)} bytes, readers accept {MAX_MEMBER_BYTES}")
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, empty user names
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + data + b"\0" * (-len(data) % _BLOCK)

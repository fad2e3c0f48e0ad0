"""Tar members of one clip, whatever it holds: the bytes of its segment, its facts and its arrays, checked when read.

Nothing here depends on the clock, the user or the machine, so that equal members give equal bytes.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.schema import MAX_CLIP_SECONDS, MAX_MEMBER_BYTES, SCHEMA_VERSION, key_of

# Members of one clip by name (without the key): bytes, or views of the clip's segment.
Members = Mapping[str, Any]

BLOCK = 512
# what np.save writes before arrays of a few dimensions is shorter
_MAX_NPY_HEADER = 512
_MAX_JSON_BYTES = 2**20


def tar_segment(name: str, members: Members) -> bytes:
    """Bytes of the tar segment of the clip `name`: headers, data, padding; no end-of-archive blocks.

    Raises:
        ValueError: If a member is larger than readers accept.
    """
    return b"".join(_tar_member(f"{key_of(name)}.{member}", data) for member, data in sorted(members.items()))


def member(members: Members, name: str) -> Any:
    """Content of one member.

    Raises:
        ClipFault: If it is missing.
    """
    if name not in members:
        raise ClipFault("member", f"member {name} is missing")
    return members[name]


def encode_facts(facts: dict[str, Any]) -> bytes:
    """The json member; `decode_facts` wants "name" and "seconds" in it."""
    return json.dumps({**facts, "schema_version": SCHEMA_VERSION}, ensure_ascii=False, sort_keys=True).encode()


def decode_facts(members: Members) -> dict[str, Any]:
    """The json member of a clip, without the schema version.

    Raises:
        ClipFault: If it is missing, too long, no JSON object, of another schema version, or has no name or no usable
            length.
    """
    data = member(members, "json")
    if len(data) > _MAX_JSON_BYTES:
        raise ClipFault("oversize", f"json has {len(data)} bytes, the limit is {_MAX_JSON_BYTES}")
    try:
        facts = json.loads(bytes(data))
    except RecursionError:
        raise ClipFault("schema", "json: nested too deeply") from None
    except ValueError as error:
        raise ClipFault("schema", f"json: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("name"), str):
        raise ClipFault("schema", "json: expected an object with a 'name'")
    version = facts.pop("schema_version", SCHEMA_VERSION)  # the first shards do not tell it
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ClipFault("schema", f"json: schema version {version!r:.80}, this version reads {SCHEMA_VERSION}")
    seconds = facts.get("seconds")
    if type(seconds) is not int or not 1 <= seconds <= MAX_CLIP_SECONDS:
        message = f"json: 'seconds' must be a whole number from 1 to {MAX_CLIP_SECONDS}, got {seconds!r:.80}"
        raise ClipFault("schema", message)
    return facts


def encode_npy(array: np.ndarray) -> bytes:
    """The array as np.save writes it."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(array), allow_pickle=False)
    return data.getvalue()


def decode_npy(members: Members, name: str) -> np.ndarray:
    """An array of numbers that `encode_npy` wrote: a view where the member is writable memory, else a copy.

    Raises:
        ClipFault: If the member is missing, no npy file, of another kind than numbers, or not as long as it claims.
    """
    data = member(members, name)
    try:
        (shape, fortran_order, dtype), start = _npy_header(bytes(data[: _MAX_NPY_HEADER + 10]))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ClipFault("array", f"{name}: {error}") from error
    if dtype.kind not in "fiub" or fortran_order:
        message = f"{name} holds {dtype}, expected numbers in C order (np.save with allow_pickle=False)"
        raise ClipFault("array", message)
    if math.prod(shape) * dtype.itemsize != len(data) - start or min(shape, default=0) < 0:
        raise ClipFault("array", f"{name} claims {dtype} {shape}, but has {len(data) - start} bytes")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array if array.flags.writeable else array.copy()


def finite(array: np.ndarray, name: str) -> np.ndarray:
    """The array itself.

    Raises:
        ClipFault: If it holds NaN or infinite values.
    """
    if not np.isfinite(array).all():
        raise ClipFault("not_finite", f"{name} holds infinite values or NaN")
    return array


def _npy_header(head: bytes) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """Shape, order and type that an npy file begins with, and where its data begin."""
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version}, expected (1, 0)")
    if int.from_bytes(head[8:10], "little") > _MAX_NPY_HEADER:
        raise ValueError(f"the npy header is longer than {_MAX_NPY_HEADER} bytes")
    return np.lib.format.read_array_header_1_0(file), file.tell()


def _tar_member(name: str, data: bytes) -> bytes:
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name} has {len(data)} bytes, readers accept {MAX_MEMBER_BYTES}")
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, empty user names
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + data + b"\0" * (-len(data) % BLOCK)

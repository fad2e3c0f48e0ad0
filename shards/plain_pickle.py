"""Reading pickles of one plain array without unpickling, as the public feature files hold them: one in each zip.

They are followed by `pickle_machine`; a call of one of the known constructors only notes shape, type and bytes.

Array pickles: numpy/_core/multiarray.py (`_reconstruct`), numpy/_core/numeric.py (`_frombuffer`, protocol 5); their
modules are numpy.core.* before NumPy 2.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avs_dist.shards.pickle_machine import Name, PickleMachine, are, kind_of
from avs_dist.shards.schema import MAX_MEMBER_BYTES

_MAX_NDIM = 8
# what zipfile raises; RuntimeError: a password is wanted; OSError, OverflowError: a damaged offset leads out of it
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, OverflowError,
)  # fmt: skip
_DTYPE = re.compile("b1|[iu][1248]|f[248]")

ARRAY_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy.core.numeric", "_frombuffer"): "_frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "_frombuffer",
    # how protocols 0 to 2 write bytes, and that there are none
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
}


@dataclass
class DType:
    """Kind and size of the values, e.g. "f8"; then the order of their bytes."""

    text: str
    order: str | None = None


@dataclass
class Array:
    """An array as far as the pickle has told it."""

    shape: tuple[Any, ...] = ()
    dtype: DType | None = None
    order: str = "C"
    data: bytes | bytearray | str = b""


class ArrayMachine(PickleMachine):
    """Knows plain arrays: `run` gives an Array where the pickle is one."""

    known = ARRAY_NAMES

    def call(self, name: str, arguments: Any) -> Any:
        if name == "_reconstruct" and are(arguments, Name, tuple, (bytes, str)) and arguments[0].name == "ndarray":
            return Array()
        if name == "dtype" and are(arguments, str, int, int):
            if not _DTYPE.fullmatch(arguments[0]):
                raise ValueError(f"met values of type {arguments[0][:20]!r}")
            return DType(arguments[0])
        if name == "_frombuffer" and are(arguments, (bytes, bytearray), DType, tuple, str):
            data, dtype, shape, order = arguments
            return Array(shape, dtype, order, data)
        if name == "encode" and are(arguments, str, str) and arguments[1] == "latin1":
            return arguments[0].encode("latin-1")
        if name == "bytes" and are(arguments):
            return b""
        return super().call(name, arguments)

    def with_state(self, target: Any, state: Any) -> Any:
        if isinstance(target, DType) and isinstance(state, tuple) and are(state[:2], int, str):
            if any(value is not None for value in state[2:5]):
                raise ValueError("met values of a structured type")
            return DType(target.text, state[1])
        if isinstance(target, Array) and are(state, int, tuple, DType, int, (bytes, str)):
            _, shape, dtype, fortran_order, data = state
            return Array(shape, dtype, "F" if fortran_order else "C", data)
        return super().with_state(target, state)


def array_of(array: Any) -> np.ndarray:
    """The array that an Array stands for, after its claims have been checked against its bytes.

    Raises:
        ValueError: If it is something else, or they do not fit.
    """
    if not isinstance(array, Array) or array.dtype is None or array.dtype.order not in ("<", ">", "|"):
        raise ValueError(f"it is {kind_of(array)}")
    shape = array.shape
    if len(shape) > _MAX_NDIM or not all(type(side) is int and 0 <= side <= MAX_MEMBER_BYTES for side in shape):
        raise ValueError("its shape is none of an array within the limits")
    if array.order not in ("C", "F"):
        raise ValueError("its values are in an unknown order")
    data = array.data.encode("latin-1") if isinstance(array.data, str) else array.data
    dtype = np.dtype(array.dtype.order + array.dtype.text)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"it claims {dtype} {shape}, but has {len(data)} bytes")
    values = np.frombuffer(data, dtype)
    return values.reshape(shape, order="F" if array.order == "F" else "C").astype(dtype.newbyteorder("="), order="C")


def read_array_pickle(data: bytes) -> np.ndarray:
    """The array in a pickle of protocol 0 to 5, in memory of its own.

    Args:
        data: A pickle that is one array of bool, integer or float values and nothing else.

    Raises:
        ValueError: If it is anything else, named in the message, or damaged, or larger than MAX_MEMBER_BYTES.
    """
    try:
        if len(data) > MAX_MEMBER_BYTES:
            raise ValueError(f"{len(data)} bytes, the limit is {MAX_MEMBER_BYTES}")
        stream = io.BytesIO(data)
        array = ArrayMachine().run(stream)
        if stream.tell() != len(data):
            raise ValueError("something is left over")
        return array_of(array)
    except ValueError as error:
        raise ValueError(f"not the pickle of one plain array: {str(error)[:300]}") from error


def read_zip_array(path: Path) -> np.ndarray:
    """The array in the one file `*.pkl` of a zip archive; other members are not looked at.

    Raises:
        FileNotFoundError, PermissionError: If there is no such archive, or none that may be read.
        ValueError: If it is damaged, encrypted, packed by another method than deflate, does not hold exactly one such
            file, or one that is no plain array or larger than MAX_MEMBER_BYTES.
    """
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_MEMBER_BYTES}")
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if len(found) != 1:
                raise ValueError(f"{len(found)} files *.pkl, expected one")
            return read_array_pickle(unpacked(archive, found[0]))
    except (FileNotFoundError, PermissionError):
        raise
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_zip_array(path: Path, array: np.ndarray) -> None:
    """Write an array as the public feature files hold it; equal arrays give equal bytes."""
    member = zipfile.ZipInfo(f"{path.stem}.pkl")  # dated 1980
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, pickle.dumps(array, protocol=4), zipfile.ZIP_DEFLATED)


def unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of one file in an archive.

    Raises:
        ValueError: If it is packed by another method than deflate, or larger than MAX_MEMBER_BYTES.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r} is packed by method {info.compress_type}, expected deflate")
    if info.file_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{info.filename!r} has {info.file_size} bytes, the limit is {MAX_MEMBER_BYTES}")
    with archive.open(info) as file:
        return file.read(MAX_MEMBER_BYTES + 1)

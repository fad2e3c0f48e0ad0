"""Reading pickles of one plain array without unpickling, as the public feature files hold them: one in each zip.

A pickle is a program for a stack machine. The one of an array is short and calls only a few constructors of NumPy, so
it is followed here by a machine of our own: it knows the operations such a pickle needs, a name in it is no more than a
name, and a call of one of the known constructors only notes shape, type and bytes. Nothing is imported, called or
allocated on behalf of the file. Python's own Unpickler would take the memory that a few bytes of memo index claim, even
with its `find_class` overridden.

Array pickles: numpy/_core/multiarray.py (`_reconstruct`), numpy/_core/numeric.py (`_frombuffer`, protocol 5); their
modules are numpy.core.* before NumPy 2.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avs_dist.shards.schema import MAX_MEMBER_BYTES

# an array takes about 50 operations; more only serve to make readers work
_MAX_OPERATIONS = 500
_MAX_NDIM = 8
_DTYPE = re.compile("b1|[iu][1248]|f[248]")
_MARK = object()

_KNOWN = {
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
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINSTRING", "SHORT_BINSTRING"),  # bytes of Python 2, which genops gives as Latin-1
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLE_LENGTHS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Name:
    """A constructor that the pickle names."""

    name: str


@dataclass
class _DType:
    """Kind and size of the values, e.g. "f8"; then the order of their bytes."""

    text: str
    order: str | None = None


@dataclass
class _Array:
    """An array as far as the pickle has told it."""

    shape: tuple[Any, ...] = ()
    dtype: _DType | None = None
    order: str = "C"
    data: bytes | bytearray | str = b""


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
        return _finished(_result(data))
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
            return read_array_pickle(_unpacked(archive, found[0]))
    except (FileNotFoundError, PermissionError):
        raise
    # RuntimeError: a password is wanted; OSError: a damaged offset leads out of the file
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_zip_array(path: Path, array: np.ndarray) -> None:
    """Write an array as the public feature files hold it; equal arrays give equal bytes."""
    member = zipfile.ZipInfo(f"{path.stem}.pkl")  # dated 1980
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, pickle.dumps(array, protocol=4), zipfile.ZIP_DEFLATED)


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r} is packed by method {info.compress_type}, expected deflate")
    if info.file_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{info.filename!r} has {info.file_size} bytes, the limit is {MAX_MEMBER_BYTES}")
    with archive.open(info) as file:
        return file.read(MAX_MEMBER_BYTES + 1)


def _result(data: bytes) -> Any:
    """What the pickle leaves on the stack."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (operation, argument, position) in enumerate(pickletools.genops(data)):
        if count == _MAX_OPERATIONS:
            raise ValueError(f"more than {_MAX_OPERATIONS} operations")
        if operation.name == "STOP":
            if len(stack) != 1 or (position or 0) + 1 != len(data):
                raise ValueError("something is left over")
            break
        _follow(operation.name, argument, stack, memo)
    return stack.pop()


def _follow(operation: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One operation of the pickle machine.

    Raises:
        ValueError: If plain arrays do not need it, or not on what is there.
    """
    if operation in _LITERALS:
        stack.append(argument)
    elif operation in _CONSTANTS:
        stack.append(_CONSTANTS[operation])
    elif operation == "MARK":
        stack.append(_MARK)
    elif operation in _TUPLE_LENGTHS:
        stack.append(_popped(stack, _TUPLE_LENGTHS[operation]))
    elif operation == "TUPLE":
        marks = [i for i, value in enumerate(stack) if value is _MARK] or [len(stack)]
        items = _popped(stack, len(stack) - marks[-1] - 1)
        stack[-1] = items
    elif operation == "GLOBAL":
        stack.append(_named(*argument.split(" ", 1)))
    elif operation == "STACK_GLOBAL":
        stack.append(_named(*_popped(stack, 2)))
    elif operation == "REDUCE":
        stack.append(_called(*_popped(stack, 2)))
    elif operation == "BUILD":
        target, state = _popped(stack, 2)
        stack.append(_with_state(target, state))
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if operation == "MEMOIZE" else argument] = _top(stack)
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        if argument not in memo:
            raise ValueError("it recalls what it never noted")
        stack.append(memo[argument])
    elif operation not in ("PROTO", "FRAME"):
        raise ValueError(f"met the operation {operation}")


def _popped(stack: list[Any], count: int) -> tuple[Any, ...]:
    """The last `count` values, taken from the stack."""
    items = tuple(stack[len(stack) - count :]) if 0 <= count <= len(stack) else (_MARK,)
    if any(item is _MARK for item in items):
        raise ValueError("it takes more than it has put down")
    del stack[len(stack) - count :]
    return items


def _top(stack: list[Any]) -> Any:
    (value,) = _popped(stack, 1)
    stack.append(value)
    return value


def _named(module: Any, name: Any) -> _Name:
    if not _are((module, name), str, str):
        raise ValueError(f"met a name of {_kind((module, name))}")
    if (module, name) not in _KNOWN:
        raise ValueError(f"met {f'{module}.{name}'[:100]!r}")
    return _Name(_KNOWN[module, name])


def _called(function: Any, arguments: Any) -> Any:
    """What a call of a known constructor stands for."""
    name = function.name if isinstance(function, _Name) else None
    if name == "_reconstruct" and _are(arguments, _Name, tuple, (bytes, str)) and arguments[0].name == "ndarray":
        return _Array()
    if name == "dtype" and _are(arguments, str, int, int):
        if not _DTYPE.fullmatch(arguments[0]):
            raise ValueError(f"met values of type {arguments[0][:20]!r}")
        return _DType(arguments[0])
    if name == "_frombuffer" and _are(arguments, (bytes, bytearray), _DType, tuple, str):
        data, dtype, shape, order = arguments
        return _Array(shape, dtype, order, data)
    if name == "encode" and _are(arguments, str, str) and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    if name == "bytes" and _are(arguments):
        return b""
    raise ValueError(f"met a call of {name or _kind(function)} with {_kind(arguments)}")


def _with_state(target: Any, state: Any) -> _DType | _Array:
    """An array or a type, completed as its `__setstate__` would."""
    if isinstance(target, _DType) and isinstance(state, tuple) and _are(state[:2], int, str):
        if any(value is not None for value in state[2:5]):
            raise ValueError("met values of a structured type")
        return _DType(target.text, state[1])
    if isinstance(target, _Array) and _are(state, int, tuple, _DType, int, (bytes, str)):
        _, shape, dtype, fortran_order, data = state
        return _Array(shape, dtype, "F" if fortran_order else "C", data)
    raise ValueError(f"met a state {_kind(state)} for {_kind(target)}")


def _finished(array: Any) -> np.ndarray:
    """The array itself, after its claims have been checked against its bytes."""
    if not isinstance(array, _Array) or array.dtype is None or array.dtype.order not in ("<", ">", "|"):
        raise ValueError(f"it is {_kind(array)}")
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


def _are(values: Any, *kinds: type | tuple[type, ...]) -> bool:
    """Whether it is a tuple of values of these kinds."""
    if not isinstance(values, tuple) or len(values) != len(kinds):
        return False
    return all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))


def _kind(value: Any) -> str:
    """For messages; never shows contents, which may be endless."""
    if isinstance(value, tuple):
        return f"({', '.join(_kind(item) if not isinstance(item, tuple) else 'tuple' for item in value[:10])})"
    return value.name if isinstance(value, _Name) else type(value).__name__.lstrip("_")

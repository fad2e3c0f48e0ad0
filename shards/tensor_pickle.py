"""Reading a file of one plain tensor without unpickling, as the published log-mel files are: `pickle.dump(tensor)`.

In such a pickle the values are bytes that torch.save made of the tensor's storage; files that torch.save made of the
tensor itself are read too, and pickled arrays. Everything is followed by `pickle_machine`: a storage is a type, a
count and bytes, a tensor is a view of them. Nothing is imported, called or allocated on behalf of the file.

Formats: torch/_utils.py (`_rebuild_tensor_v2`), torch/storage.py (`_load_from_bytes`), torch/serialization.py
(`_legacy_save`: five pickles, then the storages one after the other; `_save`: a zip of data.pkl and data/KEY).
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avs_dist.shards.pickle_machine import Name, PickleMachine, are, kind_of
from avs_dist.shards.plain_pickle import ARRAY_NAMES, ZIP_ERRORS, ArrayMachine, array_of, unpacked
from avs_dist.shards.schema import MAX_MEMBER_BYTES

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_NDIM = 8
_STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2"}
_STORAGE_NAMES = {(module, name): name for module in ("torch", "torch.cuda") for name in _STORAGES}
_TENSOR_NAMES = {
    ("torch._utils", "_rebuild_tensor"): "_rebuild_tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "_rebuild_tensor_v2",
    ("torch.storage", "_load_from_bytes"): "_load_from_bytes",
    # its hooks, of which there are none
    ("collections", "OrderedDict"): "OrderedDict",
}


@dataclass
class _Storage:
    """Values in a row; `data` is None until they are found."""

    dtype: str
    count: int
    data: bytes | None = None


@dataclass
class _Tensor:
    """A tensor as the pickle tells it."""

    storage: _Storage
    offset: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


class _TorchMachine(PickleMachine):
    """Knows the pickles that torch.save writes: lists and dictionaries, and storages that stand elsewhere in the file.

    storage, key: The one storage that was named, and its key in the file.
    """

    known = _STORAGE_NAMES

    def __init__(self) -> None:
        super().__init__()
        self.storage: _Storage | None = None
        self.key = ""

    def step(self, operation: str, argument: Any) -> None:
        if operation in ("EMPTY_DICT", "EMPTY_LIST"):
            self.push({} if operation == "EMPTY_DICT" else [])
        elif operation in ("SETITEM", "SETITEMS"):
            items = self.popped(2) if operation == "SETITEM" else self.popped_to_mark()
            self._set_items(items)
        elif operation in ("APPEND", "APPENDS"):
            items = self.popped(1) if operation == "APPEND" else self.popped_to_mark()
            if not isinstance(self.top(), list):
                raise ValueError(f"met items for {kind_of(self.top())}")
            self.top().extend(items)
        elif operation == "BINPERSID":
            self.push(self._named_storage(self.popped(1)[0]))
        else:
            super().step(operation, argument)

    def _set_items(self, items: tuple[Any, ...]) -> None:
        # only texts as keys: the hash of nested tuples can take for ever
        if not isinstance(self.top(), dict) or not are(items[::2], *[str] * (len(items) // 2)):
            raise ValueError(f"met items for {kind_of(self.top())}")
        self.top().update(zip(items[::2], items[1::2], strict=True))

    def _named_storage(self, identity: Any) -> _Storage:
        # old files tell at the end whether it is a view of another storage
        if not isinstance(identity, tuple) or not are(identity[:5], str, Name, str, str, int) or any(identity[5:]):
            raise ValueError(f"met the persistent object {kind_of(identity)}")
        kind, name, key, _, count = identity[:5]
        if kind != "storage" or name.name not in _STORAGES or not 0 <= count <= MAX_MEMBER_BYTES:
            raise ValueError(f"met a persistent object of {name.name}")
        if self.storage is not None:
            raise ValueError("met a second storage")
        self.storage, self.key = _Storage(_STORAGES[name.name], count), key
        return self.storage


class _TensorMachine(_TorchMachine, ArrayMachine):
    """Knows tensors and plain arrays: `run` gives a _Tensor or an Array where the pickle is one."""

    known = ARRAY_NAMES | _STORAGE_NAMES | _TENSOR_NAMES

    def call(self, name: str, arguments: Any) -> Any:
        if name == "_load_from_bytes" and are(arguments, (bytes, str)):
            (data,) = arguments
            if self.storage is not None:
                raise ValueError("met a second storage")
            # a machine that knows no such call: files within files within files would take for ever
            inner = _TorchMachine()
            value = _torch_file(data.encode("latin-1") if isinstance(data, str) else data, inner)
            self.storage = inner.storage
            return value
        if name == "_rebuild_tensor" and are(arguments, _Storage, int, tuple, tuple):
            return _Tensor(*arguments)
        if (
            name == "_rebuild_tensor_v2"
            and are(arguments, _Storage, int, tuple, tuple, bool, dict)
            and not arguments[5]
        ):
            return _Tensor(*arguments[:4])
        if name == "OrderedDict" and (are(arguments) or arguments == ([],)):
            return {}
        return super().call(name, arguments)


def read_tensor(path: Path) -> np.ndarray:
    """The tensor or array in a file, in memory of its own.

    Args:
        path: A pickle of a tensor of float16, float32 or float64 values, of an array of any numeric type, or what
            torch.save made of such a tensor.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is anything else, or damaged, or larger than MAX_MEMBER_BYTES; names the file.
    """
    with path.open("rb") as file:
        data = file.read(MAX_MEMBER_BYTES + 1)
    try:
        if len(data) > MAX_MEMBER_BYTES:
            raise ValueError(f"more than {MAX_MEMBER_BYTES} bytes")
        value = _content(data)
        return _values(value) if isinstance(value, _Tensor) else array_of(value)
    except ValueError as error:
        raise ValueError(f"{path}: not the pickle of one plain tensor: {str(error)[:300]}") from error


def _content(data: bytes) -> Any:
    machine = _TensorMachine()
    if data.startswith(_ZIP_MAGIC):
        return _torch_file(data, machine)
    stream = io.BytesIO(data)
    value = machine.run(stream)
    if value == _MAGIC_NUMBER:
        return _torch_file(data, machine)
    if stream.tell() != len(data):
        raise ValueError("something is left over")
    return value


def _torch_file(data: bytes, machine: _TorchMachine) -> Any:
    """What a file of torch.save stands for; its storages have their data."""
    return _zipped_file(data, machine) if data.startswith(_ZIP_MAGIC) else _legacy_file(data, machine)


def _legacy_file(data: bytes, machine: _TorchMachine) -> Any:
    stream = io.BytesIO(data)
    magic, protocol, system = machine.run(stream), machine.run(stream), machine.run(stream)
    if (magic, protocol) != (_MAGIC_NUMBER, _PROTOCOL):
        raise ValueError("its bytes are no file of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its values are not in little-endian order")
    value, keys = machine.run(stream), machine.run(stream)
    if machine.storage is None or keys != [machine.key]:
        raise ValueError("its storage is not the one that it lists")
    header = stream.read(8)
    machine.storage.data = stream.read(machine.storage.count * np.dtype(machine.storage.dtype).itemsize)
    _check_count(machine.storage, struct.unpack("<q", header)[0] if len(header) == 8 else -1)
    if stream.tell() != len(data):
        raise ValueError("something is left over")
    return value


def _zipped_file(data: bytes, machine: _TorchMachine) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in members:
                raise ValueError("its bytes are no file of torch.save")
            if "byteorder" in members and unpacked(archive, members["byteorder"]) != b"little":
                raise ValueError("its values are not in little-endian order")
            pickled = unpacked(archive, members["data.pkl"])
            value = machine.run(io.BytesIO(pickled))
            if machine.storage is None or f"data/{machine.key}" not in members:
                raise ValueError("its storage is not in it")
            machine.storage.data = unpacked(archive, members[f"data/{machine.key}"])
            _check_count(machine.storage, machine.storage.count)
            return value
    except ZIP_ERRORS as error:
        raise ValueError(str(error)) from error


def _check_count(storage: _Storage, claimed: int) -> None:
    there = len(storage.data or b"")
    if claimed != storage.count or there != claimed * np.dtype(storage.dtype).itemsize:
        raise ValueError(f"a storage claims {storage.count} values, but has {there} bytes")


def _values(tensor: _Tensor) -> np.ndarray:
    """The values themselves, after the tensor's claims have been checked against its storage."""
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    sides = (*shape, *strides, tensor.offset)
    if (
        len(shape) > _MAX_NDIM
        or len(strides) != len(shape)
        or not all(type(side) is int and 0 <= side <= MAX_MEMBER_BYTES for side in sides)
    ):
        raise ValueError("its shape is none of a tensor within the limits")
    count = math.prod(shape)
    steps = sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if count else -1
    # the count also against strides of 0, which make any number of values of one
    if storage.data is None or count > storage.count or tensor.offset + steps >= storage.count:
        raise ValueError(f"it claims values {shape}, but has {storage.count}")
    dtype = np.dtype(storage.dtype)
    byte_strides = tuple(stride * dtype.itemsize for stride in strides)
    values = np.ndarray(shape, dtype, storage.data, tensor.offset * dtype.itemsize, byte_strides)
    return values.astype(dtype.newbyteorder("="), order="C")

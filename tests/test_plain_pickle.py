"""Pickles of plain arrays are read, all else is refused and nothing in it runs, is imported or takes memory."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avs_dist.shards.plain_pickle import read_array_pickle, read_zip_array, write_zip_array
from avs_dist.shards.schema import MAX_MEMBER_BYTES

RNG = np.random.default_rng(0)
ARRAYS = {
    "float64": RNG.standard_normal((10, 3, 4)),
    "float32": RNG.standard_normal((2, 3)).astype(np.float32),
    "float16": RNG.standard_normal(5).astype(np.float16),
    "int64": np.arange(-3, 3),
    "big endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "bytes": np.arange(250, 256, dtype=np.uint8),
    "bool": np.array([[True, False]]),
    "by columns": np.asfortranarray(RNG.standard_normal((3, 4))),
    "with gaps": RNG.standard_normal((8, 8))[::2, ::3],
    "empty": np.zeros((0, 3), np.float32),
    "one value": np.array(3.0),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back_from_every_protocol(name: str, protocol: int):
    array = read_array_pickle(pickle.dumps(ARRAYS[name], protocol=protocol))
    np.testing.assert_array_equal(array, ARRAYS[name], strict=False)
    assert array.dtype == ARRAYS[name].dtype.newbyteorder("=")
    assert array.shape == ARRAYS[name].shape
    assert array.flags.c_contiguous
    assert array.flags.writeable


def renamed(data: bytes, old: str, new: str) -> bytes:
    """A pickle of protocol 4 with other module names; its only frame has another length, too."""
    changed = data.replace(bytes([len(old)]) + old.encode(), bytes([len(new)]) + new.encode())
    assert changed != data
    return changed[:3] + struct.pack("<Q", len(changed) - 11) + changed[11:]


@pytest.mark.parametrize(("protocol", "module"), [(4, "multiarray"), (5, "numeric")])
def test_modules_of_both_numpy_versions(protocol: int, module: str):
    ours = pickle.dumps(ARRAYS["float64"], protocol=protocol)
    package = "numpy._core." if f"numpy._core.{module}".encode() in ours else "numpy.core."
    for other in ("numpy.core.", "numpy._core."):
        data = ours if other == package else renamed(ours, package + module, other + module)
        np.testing.assert_array_equal(read_array_pickle(data), ARRAYS["float64"])


def test_bytes_of_python_2():
    values = np.array([1.5, -2.0, 255.0])
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U" + bytes([24]) + values.tobytes() + b"tb."
    )
    np.testing.assert_array_equal(read_array_pickle(data), values)


class Called:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class OwnArray(np.ndarray):
    pass


NO_ARRAYS = {
    "a command": (Called(os.system, "touch ran"), "system'"),
    "code": (Called(eval, "open('ran', 'w')"), "builtin.*eval'"),
    "an import": (Called(__import__, "antigravity"), "__import__'"),
    "objects": (np.array([print], dtype=object), "values of type 'O8'"),
    "fields": (np.zeros(2, dtype=[("a", "f4")]), "values of type 'V4'"),
    "texts": (np.array(["a"]), "values of type 'U1'"),
    "complex values": (np.array([1j]), "values of type 'c16'"),
    "dates": (np.zeros(2, "datetime64[s]"), "values of type 'M8'"),
    "a masked array": (np.ma.masked_array([1, 2]), r"numpy\.ma\.core"),
    "a class of its own": (np.zeros(2).view(OwnArray), "OwnArray'"),
    "a scalar": (np.float64(3), r"multiarray\.scalar'"),
    "a list": ([np.zeros(3)], "the operation (EMPTY_)?LIST"),
    "a dictionary": ({"a": np.zeros(3)}, "the operation (EMPTY_)?DICT"),
    "an ordered dictionary": (OrderedDict(a=1), "collections'?.OrderedDict"),
    "a tuple": ((np.zeros(3),), r"it is \(Array\)"),
    "a number": (3, "it is int"),
    "a type": (np.ndarray, "it is ndarray"),
    "a type of values": (np.dtype("f4"), "it is DType"),
    "nothing": (None, "it is NoneType"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", NO_ARRAYS)
def test_all_else_is_named_and_does_not_run(name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    value, message = NO_ARRAYS[name]
    with pytest.raises(ValueError, match=f"not the pickle of one plain array: .*{message}"):
        read_array_pickle(pickle.dumps(value, protocol=protocol))
    assert not Path("ran").exists()
    assert "antigravity" not in sys.modules


PREFIX = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
F8 = b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
HUGE = b"\x8a\x09" + (2**64).to_bytes(9, "little")
CRAFTED = {
    "a shape that is not there": (PREFIX + b"(K\x01J\xff\xff\xff\x03\x85" + F8 + b"\x89U\x00tb.", "but has 0 bytes"),
    "a shape beyond all limits": (PREFIX + b"(K\x01" + HUGE + b"\x85" + F8 + b"\x89U\x00tb.", "within the limits"),
    "a negative shape": (
        PREFIX + b"(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86" + F8 + b"\x89U\x08" + b"a" * 8 + b"tb.",
        "the lim",
    ),
    "a shape of truth": (PREFIX + b"(K\x01\x88\x85" + F8 + b"\x89U\x08" + b"a" * 8 + b"tb.", "within the limits"),
    "a shape of texts": (PREFIX + b"(K\x01U\x01a\x85" + F8 + b"\x89U\x00tb.", "within the limits"),
    "nine dimensions": (
        PREFIX + b"(K\x01(" + b"K\x01" * 9 + b"t" + F8 + b"\x89U\x08" + b"a" * 8 + b"tb.",
        "within the l",
    ),
    "other bytes than claimed": (
        PREFIX + b"(K\x01K\x02\x85" + F8 + b"\x89U\x08" + b"a" * 8 + b"tb.",
        "but has 8 bytes",
    ),
    "no state": (PREFIX + b".", "it is Array"),
    "a type without an order": (
        PREFIX + b"(K\x01K\x00\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R\x89U\x00tb.",
        "it is Array",
    ),
    "fields in the state": (b"\x80\x02" + F8.replace(b"<NNN", b"<NU\x01a\x85N") + b".", "structured"),
    "two arrays": (b"\x80\x02K\x01K\x02.", "left over"),
    "bytes after the end": (pickle.dumps(np.zeros(3)) + b"cos\nsystem\n", "left over"),
    "a call of no name": (b"\x80\x02K\x01)R.", "met a call of int"),
    "a call of an array": (PREFIX + b")R.", "met a call of Array"),
    "a call of another class": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
        "met a call",
    ),
    "a state for a name": (b"\x80\x02cnumpy\nndarray\n)b.", "for ndarray"),
    "a state of the wrong kind": (PREFIX + b"U\x01ab.", "met a state str"),
    "a new object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "operation NEWOBJ"),
    "an old instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "a registered extension": (b"\x80\x02\x82\x01.", "operation EXT1"),
    "a persistent object": (b"\x80\x02Pa\n.", "operation PERSID"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "operation NEXT_BUFFER"),
    "a name of an array": (b"\x80\x04" + b"\x8c\x05numpy" + b"K\x01\x93.", "met a name of"),
    "a name of a bytearray": (b"\x80\x05" + b"\x96" + struct.pack("<Q", 1) + b"a" + b"\x8c\x01a\x93.", "met a name of"),
    "an empty stack": (b"\x80\x02\x85.", "more than it has put down"),
    "a mark as a value": (b"\x80\x02(\x85.", "more than it has put down"),
    "a tuple without a mark": (b"\x80\x02K\x01t.", "more than it has put down"),
    "an unknown memo": (b"\x80\x02h\x07.", "recalls"),
    "an unknown operation": (b"\x80\x02\xff.", "not the pickle"),
    "nothing at all": (b"", "not the pickle"),
    "no end": (b"\x80\x02K\x01", "not the pickle"),
    "other letters": (
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
        "met a call of encode",
    ),
    "a long name": (b"\x80\x02c" + b"a" * 5000 + b"\nb\n.", "met 'a{100}'$"),
    "many operations": (b"\x80\x02" + b"K\x01" * 600 + b".", "more than 500 operations"),
    "rows in an unknown order": (
        pickle.dumps(np.zeros((2, 2)), protocol=5).replace(b"\x8c\x01C", b"\x8c\x01K"),
        "in an unknown order",
    ),
    "a number of many digits": (b"I" + b"9" * 5000 + b"\n.", "not the pickle"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(name: str):
    data, message = CRAFTED[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_array_pickle(data)
    assert len(str(caught.value)) < 400


def nested_tuples(depth: int) -> bytes:
    """Each tuple holds the one before it twice: two to the power of `depth` when walked."""
    twice = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return b"\x80\x02K\x01" + twice


BOMBS = {
    "an index of the memo": b"\x80\x02K\x01r\xfe\xff\xff\x7f.",
    "a length that is not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"K\x01.",
    "nested tuples": nested_tuples(100) + b".",
    "nested tuples as arguments": b"\x80\x02cnumpy\ndtype\n" + nested_tuples(100)[2:] + b"R.",
    "a shape of nested tuples": PREFIX + b"(K\x01" + nested_tuples(100)[2:] + F8 + b"\x89U\x00tb.",
    "many operations": b"\x80\x02" + b"K\x01" * 10**6 + b".",
    "many bytes": b"\x80\x02" + b"K\x01" * (MAX_MEMBER_BYTES // 2) + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_time_nor_memory(name: str):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="not the pickle of one plain array") as caught:
        read_array_pickle(BOMBS[name])
    assert time.monotonic() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert len(str(caught.value)) < 400


def test_the_largest_array_within_the_limit_is_read():
    array = np.zeros(MAX_MEMBER_BYTES // 4 - 100, dtype=np.float32)
    assert read_array_pickle(pickle.dumps(array)).shape == array.shape
    with pytest.raises(ValueError, match=f"the limit is {MAX_MEMBER_BYTES}"):
        read_array_pickle(pickle.dumps(np.zeros(MAX_MEMBER_BYTES // 4, dtype=np.float32)))


@pytest.mark.parametrize("protocol", range(6))
def test_damaged_pickles_raise_nothing_but_value_errors(protocol: int):
    whole = pickle.dumps(ARRAYS["float32"], protocol=protocol)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match="not the pickle"):
            read_array_pickle(whole[:end])
    rng = np.random.default_rng(protocol)
    for _ in range(1500):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            assert read_array_pickle(bytes(data)).dtype.kind in "fiub"
        except ValueError:
            continue


def test_zip_of_one_array(tmp_path: Path):
    path = tmp_path / "clip.zip"
    write_zip_array(path, ARRAYS["float64"])
    np.testing.assert_array_equal(read_zip_array(path), ARRAYS["float64"])
    first = path.read_bytes()
    write_zip_array(path, ARRAYS["float64"])
    assert path.read_bytes() == first
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("note.txt", b"not looked at")
    np.testing.assert_array_equal(read_zip_array(path), ARRAYS["float64"])


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def patched(path: Path, at_local: int, at_central: int, value: bytes) -> Path:
    """Change a field in both headers of the only member."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[at_local : at_local + len(value)] = value
    data[central + at_central : central + at_central + len(value)] = value
    path.write_bytes(data)
    return path


def test_other_zips_are_refused(tmp_path: Path):
    path, array = tmp_path / "a.zip", pickle.dumps(ARRAYS["float64"])
    with pytest.raises(FileNotFoundError):
        read_zip_array(path)
    for content, message in (
        ({"a.pkl": array, "b.pkl": array}, "2 files"),
        ({"a.txt": array}, "0 files"),
        ({"a.pkl": pickle.dumps(Called(os.system, "touch ran"))}, "system'"),
    ):
        with pytest.raises(ValueError, match=f"{path}: .*{message}"):
            read_zip_array(zipped(path, content))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(ValueError, match=f"method {method}, expected deflate"):
            read_zip_array(zipped(path, {"a.pkl": array}, method))
    np.testing.assert_array_equal(read_zip_array(zipped(path, {"a.pkl": array}, zipfile.ZIP_STORED)), ARRAYS["float64"])
    with pytest.raises(ValueError, match=f"{path}: .*encrypted"):
        read_zip_array(patched(zipped(path, {"a.pkl": array}), 6, 8, b"\x01"))
    whole = zipped(path, {"a.pkl": array}).read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"{path}: "):
            read_zip_array(path)


def test_damaged_zips_raise_nothing_but_value_errors_with_their_path(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"a.pkl": pickle.dumps(ARRAYS["float32"])})
    whole = path.read_bytes()
    end = whole.index(b"PK\x05\x06")
    path.write_bytes(whole[: end + 16] + struct.pack("<I", end + 1000) + whole[end + 20 :])  # of the directory
    with pytest.raises(ValueError, match=f"{path}: "):
        read_zip_array(path)
    messages = []
    for at in range(len(whole)):
        for value in (0x00, 0x7F, 0xFF, whole[at] ^ 1):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                assert read_zip_array(path).dtype.kind in "fiub"
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > len(whole)
    assert all(message.startswith(f"{path}: ") for message in messages)


def test_a_zip_that_may_not_be_read_is_not_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = zipped(tmp_path / "a.zip", {"a.pkl": pickle.dumps(ARRAYS["float32"])})

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(zipfile, "ZipFile", refuse)  # file modes do not stop the superuser
    with pytest.raises(PermissionError, match=str(path)):
        read_zip_array(path)


def test_zip_bombs_are_refused(tmp_path: Path):
    bomb = zipped(tmp_path / "a.zip", {"a.pkl": bytes(MAX_MEMBER_BYTES + 1)})
    assert bomb.stat().st_size < 2**20
    with pytest.raises(ValueError, match=f"has {MAX_MEMBER_BYTES + 1} bytes, the limit"):
        read_zip_array(bomb)
    with pytest.raises(ValueError, match="CRC"):
        read_zip_array(patched(bomb, 22, 24, struct.pack("<I", 1000)))
    large = tmp_path / "large.zip"
    with large.open("wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)
    with pytest.raises(ValueError, match=f"large.zip: {MAX_MEMBER_BYTES + 1} bytes"):
        read_zip_array(large)

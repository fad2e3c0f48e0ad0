"""Files of one tensor are read as torch and pickle wrote them; all else is refused and takes no time or memory."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avs_dist.shards.schema import MAX_MEMBER_BYTES
from avs_dist.shards.tensor_pickle import read_tensor

MEL = torch.randn(5, 1, 96, 64, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "as published": MEL.clone().requires_grad_(),
    "computed": torch.ones(3).requires_grad_() * 2 + 1e-3,
    "float64": MEL[:2, :, :4].double(),
    "float16": MEL[:2, :, :4].half(),
    "a part": MEL[1:3, :, 5:7, ::9],
    "turned": MEL[:2, 0, :3].transpose(0, 2),
    "one value": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "empty at the end": torch.zeros(4)[4:],
}


def saved(value: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def read(folder: Path, data: bytes) -> np.ndarray:
    path = folder / "clip.pkl"
    path.write_bytes(data)
    return read_tensor(path)


@pytest.mark.parametrize("form", [*range(6), "torch.save", "torch.save before 1.6"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_from_every_form(name: str, form: int | str, tmp_path: Path):
    tensor = TENSORS[name]
    data = pickle.dumps(tensor, protocol=form) if isinstance(form, int) else saved(tensor, form == "torch.save")
    array = read(tmp_path, data)
    expected = tensor.detach().numpy()
    np.testing.assert_array_equal(array, expected)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.flags.c_contiguous
    assert array.flags.writeable


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_arrays_are_read_too(protocol: int, tmp_path: Path):
    np.testing.assert_array_equal(read(tmp_path, pickle.dumps(MEL.numpy(), protocol=protocol)), MEL.numpy())


class Called:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


TYPED = torch.arange(6.0)._typed_storage()


def tensor_of(data: bytes, shape: Any = (6,), strides: Any = (1,), offset: Any = 0, hooks: Any = None) -> Called:
    """What pickles as a tensor whose storage is the file `data`."""
    storage = Called(torch.storage._load_from_bytes, data)
    hooks = OrderedDict() if hooks is None else hooks
    return Called(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, hooks)


@pytest.mark.parametrize("zipped", [False, True])
def test_the_storage_within_may_be_of_either_format(zipped: bool, tmp_path: Path):
    for protocol in range(6):
        data = pickle.dumps(tensor_of(saved(TYPED, zipped), (2, 2), (3, 1), 1), protocol=protocol)
        np.testing.assert_array_equal(read(tmp_path, data), [[1, 2], [4, 5]])


def test_the_first_form_of_torch(tmp_path: Path):
    storage = Called(torch.storage._load_from_bytes, saved(TYPED, False))
    data = pickle.dumps(Called(torch._utils._rebuild_tensor, storage, 1, (2,), (2,)), protocol=2)
    np.testing.assert_array_equal(read(tmp_path, data), [1, 3])
    # the bytes of Python 2, and a tensor that was on a GPU
    text = pickle.dumps(saved(TYPED, False).replace(b"ctorch\nFloat", b"ctorch.cuda\nFloat"), protocol=3)
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor\n(ctorch.storage\n_load_from_bytes\nT" + text[3:]
    data = data[:-3] + b"\x85RK\x00K\x02\x85K\x01\x85tR."
    assert text[2:3] == b"B"
    np.testing.assert_array_equal(read(tmp_path, data), [0, 1])


RUN = Called(os.system, "touch ran")
REFUSED = {
    "a command": (RUN, "system'"),
    "a command for a tensor": (tensor_of(pickle.dumps(RUN)), "system'"),
    "a command in a storage": (tensor_of(saved(RUN, False)), "system'"),
    "a command in a zipped storage": (tensor_of(saved(RUN, True)), "system'"),
    "a command as a shape": (tensor_of(saved(TYPED, False), shape=(RUN,)), "system'"),
    "a command as a hook": (tensor_of(saved(TYPED, False), hooks=OrderedDict(a=RUN)), "system'"),
    "hooks": (tensor_of(saved(TYPED, False), hooks={"a": 1}), "met a call of _rebuild_tensor_v2"),
    "a tensor for a storage": (tensor_of(saved(torch.zeros(6), False)), "_rebuild_tensor_v2'"),
    "files within files": (tensor_of(saved(Called(torch.storage._load_from_bytes, b""), True)), "_load_from_bytes'"),
    "no file for a storage": (tensor_of(b"rubbish"), "more than it has put down"),
    "an array for a storage": (tensor_of(pickle.dumps(np.zeros(3))), "_reconstruct'"),
    "numbers for a storage": (tensor_of(pickle.dumps(3) * 3), "no file of torch.save"),
    "two storages": ((tensor_of(saved(TYPED, True)), tensor_of(saved(TYPED, True), (5,))), "second storage"),
    "whole numbers": (torch.arange(3), "LongStorage'"),
    "a parameter": (torch.nn.Parameter(torch.zeros(3)), "_rebuild_parameter'"),
    "a module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear'"),
    "a dictionary": ({"a": torch.zeros(3)}, "it is dict"),
    "a list": ([torch.zeros(3)], "it is list"),
    "a number": (3, "it is int"),
    "values more than there are": (tensor_of(saved(TYPED, False), (7,)), r"claims values \(7,\), but has 6"),
    "values of one by strides of 0": (tensor_of(saved(TYPED, False), (9, 2**20), (0, 0)), "claims values"),
    "values beyond the end": (tensor_of(saved(TYPED, False), (2,), (6,)), "claims values"),
    "values behind the end": (tensor_of(saved(TYPED, False), (1,), (1,), 6), "claims values"),
    "no values beyond the end": (tensor_of(saved(TYPED, False), (0,), (1,), 7), r"claims values \(0,\), but has 6"),
    "values before the start": (tensor_of(saved(TYPED, False), (2,), (-1,), 5), "within the limits"),
    "a negative shape": (tensor_of(saved(TYPED, False), (-2, -3), (1, 1)), "within the limits"),
    "a negative offset": (tensor_of(saved(TYPED, False), offset=-1), "within the limits"),
    "a shape of truth": (tensor_of(saved(TYPED, False), (True,)), "within the limits"),
    "a shape of texts": (tensor_of(saved(TYPED, False), ("a",)), "within the limits"),
    "fewer strides than sides": (tensor_of(saved(TYPED, False), (2, 2)), "within the limits"),
    "nine dimensions": (tensor_of(saved(TYPED, False), (1,) * 9, (1,) * 9), "within the limits"),
}


@pytest.mark.parametrize("form", [2, 4, 0, "torch.save", "torch.save before 1.6"])
@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_named_and_does_not_run(
    name: str, form: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    value, message = REFUSED[name]
    data = pickle.dumps(value, protocol=form) if isinstance(form, int) else saved(value, form == "torch.save")
    # a storage within a pickle within a file is refused for itself
    message = message if form in (2, 4) or value is RUN else ""
    with pytest.raises(ValueError, match=rf"clip\.pkl: not the pickle of one plain tensor: .*{message}"):
        read(tmp_path, data)
    assert not Path("ran").exists()


LEGACY = saved(TYPED, False)
TENSOR = pickle.dumps(torch.arange(6.0), protocol=2)
PERSISTENT = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00aX\x03\x00\x00\x00cpu"
HUGE = b"\x8a\x09" + (2**64).to_bytes(9, "little")
SYSTEM = LEGACY[: LEGACY.index(b"uu.") + 3]


def legacy(identity: bytes, rest: bytes = b"", keys: bytes = b"\x80\x02](X\x01\x00\x00\x00ae.") -> bytes:
    return SYSTEM + identity + keys + rest


VALUES = struct.pack("<q2f", 2, 1.0, 2.0)
CRAFTED = {
    "a claim of the storage": (legacy(PERSISTENT + b"K\x03NtQ.", VALUES), "claims 3 values, but has 8 bytes"),
    "a claim of the header": (legacy(PERSISTENT + b"K\x02NtQ.", struct.pack("<q2f", 3, 1, 2)), "claims 2 values"),
    "a huge claim": (legacy(PERSISTENT + b"J\xff\xff\xff\x7fNtQ.", VALUES), "met a persistent object"),
    "a claim beyond all limits": (legacy(PERSISTENT + HUGE + b"NtQ.", VALUES), "met a persistent object"),
    "a negative claim": (legacy(PERSISTENT + b"J\xff\xff\xff\xffNtQ.", VALUES), "met a persistent object"),
    "a large claim": (legacy(PERSISTENT + b"J\xff\xff\xff\x03NtQ.", VALUES), "claims 67108863 values"),
    "a view of another storage": (legacy(PERSISTENT + b"K\x02(K\x01ttQ.", VALUES), "met the persistent object"),
    "another kind": (legacy(PERSISTENT.replace(b"storage", b"modules") + b"K\x02NtQ.", VALUES), "persistent object"),
    "a text as an identity": (legacy(b"\x80\x02X\x01\x00\x00\x00aQ."), "met the persistent object str"),
    "a line as an identity": (legacy(b"\x80\x02Pa\n."), "met the operation PERSID"),
    "no name of a storage": (
        PERSISTENT.replace(b"ctorch\nFloatStorage", b"cnumpy\nndarray") + b"K\x02NtQ.",
        "persistent object of ndarray",
    ),
    "two named storages": (
        legacy(PERSISTENT + b"K\x02NtQ" + PERSISTENT[2:] + b"K\x02NtQ\x86.", VALUES),
        "met a second storage",
    ),
    "a storage that is nowhere": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n(" + PERSISTENT[2:] + b"K\x02NtQK\x00K\x02\x85K\x01\x85tR.",
        r"claims values \(2,\)",
    ),
    "no storage under no name": (legacy(b"\x80\x02K\x01.", VALUES, b"\x80\x02](X\x00\x00\x00\x00e."), "that it lists"),
    "other keys": (legacy(PERSISTENT + b"K\x02NtQ.", VALUES, b"\x80\x02](X\x01\x00\x00\x00be."), "that it lists"),
    "keys twice": (
        legacy(PERSISTENT + b"K\x02NtQ.", VALUES, b"\x80\x02](X\x01\x00\x00\x00aX\x01\x00\x00\x00ae."),
        "that it lists",
    ),
    "no storage": (legacy(b"\x80\x02K\x01.", VALUES), "that it lists"),
    "bytes after the storage": (legacy(PERSISTENT + b"K\x02NtQ.", VALUES + b"a"), "left over"),
    "the other order of bytes": (LEGACY.replace(b"q\x02\x88X", b"q\x02\x89X"), "not in little-endian order"),
    "another protocol": (LEGACY.replace(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03."), "no file of torch.save"),
    "items for no dictionary": (b"\x80\x02](K\x01K\x02u.", "met items for list"),
    "items for no list": (b"\x80\x02}(K\x01K\x02e.", "met items for dict"),
    "half an item": (b"\x80\x02}(K\x01u.", "met items for dict"),
    "a tuple as a key": (b"\x80\x02}(K\x01\x85K\x02u.", "met items for dict"),
    "bytes after the end": (TENSOR + b"cos\nsystem\n", "left over"),
    "an unknown memo": (b"\x80\x02h\x07.", "recalls"),
    "an old instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "an extension": (b"\x80\x02\x82\x01.", "operation EXT1"),
    "a call of bytes": (b"\x80\x03C\x01a)R.", "met a call of bytes"),
    "a name alone": (b"\x80\x02ctorch\nFloatStorage\n.", "it is FloatStorage"),
    "a storage alone": (LEGACY, "it is Storage"),
    "nothing": (b"", "exhausted"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_are_refused(name: str, tmp_path: Path):
    data, message = CRAFTED[name]
    with pytest.raises(ValueError, match=rf"clip\.pkl: not the pickle of one plain tensor: .*{message}") as caught:
        read(tmp_path, data)
    assert len(str(caught.value).split(": ", 1)[1]) < 400


def test_torch_reads_the_crafted_storage_where_all_fits():
    """So that the refusals above are those of what was changed."""
    data = legacy(PERSISTENT + b"K\x02NtQ.", VALUES)
    assert torch.load(io.BytesIO(data), weights_only=True).tolist() == [1.0, 2.0]


def rezipped(changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with other members; None takes one out."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.arange(6.0), True))) as old,
        zipfile.ZipFile(stream, "w", method) as new,
    ):
        for info in old.infolist():
            data = changes.get(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data, method)
    return stream.getvalue()


def test_zips_that_do_not_fit_are_refused(tmp_path: Path):
    np.testing.assert_array_equal(read(tmp_path, rezipped({})), np.arange(6))
    cases: tuple[tuple[dict[str, bytes | None], str], ...] = (
        ({"data/0": None}, "its storage is not in it"),
        ({"data.pkl": None}, "no file of torch.save"),
        ({"data/0": bytes(23)}, "claims 6 values, but has 23 bytes"),
        ({"byteorder": b"big"}, "little-endian"),
        ({"data.pkl": pickle.dumps(RUN)}, "system'"),
        ({"data/0": bytes(MAX_MEMBER_BYTES + 1)}, "the limit is"),
    )
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            read(tmp_path, rezipped(changes, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="packed by method 12"):
        read(tmp_path, rezipped({}, zipfile.ZIP_BZIP2))


def nested(depth: int) -> bytes:
    """Each tuple holds the one before it twice: two to the power of `depth` when walked."""
    return b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


BOMBS = {
    "an index of the memo": b"\x80\x02K\x01r\xfe\xff\xff\x7f.",
    "a length that is not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "nested tuples": b"\x80\x02" + nested(100) + b".",
    "nested tuples as a key": b"\x80\x02}" + nested(100) + b"K\x01s.",
    "nested tuples as an identity": b"\x80\x02" + nested(100) + b"Q.",
    "nested tuples as hooks": b"\x80\x02ccollections\nOrderedDict\n" + nested(100) + b"\x85R.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "many operations": b"\x80\x02" + b"K\x01" * 10**6 + b".",
    "a storage loaded many times": TENSOR[: TENSOR.index(b"K\x00K\x06\x85")] + b"h\x00h\x06\x85R" * 100 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_time_nor_memory(name: str, tmp_path: Path):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="not the pickle of one plain tensor") as caught:
        read(tmp_path, BOMBS[name])
    assert time.monotonic() - start < 5.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert len(str(caught.value)) < 500


def test_files_beyond_the_limit_are_not_read(tmp_path: Path):
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=rf"large\.pkl: .*more than {MAX_MEMBER_BYTES} bytes"):
        read_tensor(path)
    with pytest.raises(FileNotFoundError):
        read_tensor(tmp_path / "none.pkl")


@pytest.mark.parametrize("form", ["pickle", "torch.save", "torch.save before 1.6"])
def test_damaged_files_raise_nothing_but_value_errors(form: str, tmp_path: Path):
    tensor = torch.arange(6.0)
    whole = TENSOR if form == "pickle" else saved(tensor, form == "torch.save")
    for end in range(0, len(whole), 3):
        with pytest.raises(ValueError, match=r"clip\.pkl: "):
            read(tmp_path, whole[:end])
    rng = np.random.default_rng(0)
    for _ in range(1000):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            assert read(tmp_path, bytes(data)).dtype.kind in "fiub"
        except ValueError:
            continue

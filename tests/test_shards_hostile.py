"""Shards from strangers: every kind of malice and damage is a counted fault; nothing is executed or opened outside."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tampered_shards import Malicious, appended, rewrite, tar_members, with_members

from avs_dist.shards.faults import DamagedClipError
from avs_dist.shards.index import ShardIndex
from avs_dist.shards.members import encode_clip
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import Sample
from avs_dist.shards.write import ShardWriter

SIZE, SECONDS = 32, 2


def sample(name: str, seed: int = 0, **changes: Any) -> Sample:
    draw = np.random.default_rng(seed)
    values = {
        "frames_THWC": draw.integers(0, 256, (SECONDS, SIZE, SIZE, 3), dtype=np.uint8),
        "mel_TFM": draw.standard_normal((SECONDS, 96, 64), dtype=np.float32),
        "masks_THW": draw.integers(0, 2, (SECONDS, SIZE, SIZE), dtype=np.uint8),
        "labelled_T": np.ones(SECONDS, dtype=bool),
        "meta": {"sound": "ok"},
    }
    return Sample(name, **{**values, **changes})


def write_set(folder: Path, frame_format: str) -> ShardIndex:
    writer = ShardWriter(folder, "val", 0)
    for number in range(3):
        one = sample(f"val{number}", number)
        writer.add(one, encode_clip(one, frame_format))
    settings = {
        "source": "test", "source_rule": "-", "image_size": SIZE, "clip_seconds": SECONDS, "frame_format": frame_format
    }  # fmt: skip
    index = ShardIndex(folder, settings, (writer.close(),), ())
    index.save()
    return index


@pytest.fixture(params=["raw", "png"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", request.param)
    return tmp_path / "set"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", "raw")
    return tmp_path / "set"


def kind_of(folder: Path, change: Callable[[bytes], bytes]) -> str:
    """Kind of the fault of the first clip after the change; the other clips are as good as before."""
    reader = ClipReader(rewrite(folder, change), "val")
    assert [reader.sample(number).name for number in (1, 2)] == ["val1", "val2"]
    with pytest.raises(DamagedClipError) as error:
        reader.sample(0)
    assert error.value.damage.name == "val0"
    assert pickle.loads(pickle.dumps(error.value)).damage == error.value.damage  # on its way out of a loading process
    return error.value.damage.kind


def replaced(name: str, data: bytes) -> Callable[[bytes], bytes]:
    return with_members(lambda members: {**members, name: data})


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that unpack to a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth"])
def test_pickles_are_never_loaded(folder: Path, tmp_path: Path, suffix: str):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Malicious(marker))
    reader = ClipReader(rewrite(folder, lambda segment: appended(segment, f"val0.{suffix}", evil)), "val")
    assert reader.sample(0).name == "val0"
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # the payload works where someone unpickles it


def test_a_pickled_array_as_mel_is_refused(folder: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    array = npy(np.array([Malicious(marker)], dtype=object), allow_pickle=True)
    assert kind_of(folder, replaced("mel.npy", array)) == "array"
    assert not marker.exists()


STRANGE_MEMBERS = {
    "symbolic link": ({"kind": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "tar"),
    "hard link": ({"kind": tarfile.LNKTYPE, "linkname": "/etc/passwd"}, "tar"),
    "pipe": ({"kind": tarfile.FIFOTYPE}, "tar"),
    "device": ({"kind": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "tar"),
    "folder": ({"kind": tarfile.DIRTYPE}, "tar"),
    "sparse file": ({"kind": tarfile.GNUTYPE_SPARSE}, "tar"),
    "global pax header": ({"kind": tarfile.XGLTYPE, "data": b"19 path=/etc/passwd\n"}, "tar"),
    "pax size": ({"kind": tarfile.XHDTYPE, "data": b"20 size=10000000000\n"}, "tar"),
    "pax link": ({"kind": tarfile.XHDTYPE, "data": b"24 linkpath=/etc/passwd\n"}, "tar"),
    "long name of nothing": ({"kind": tarfile.XHDTYPE, "data": b"15 path=val0.x\n"}, "tar"),
    "claims 7 GiB": ({"size": 7 * 2**30}, "oversize"),
    "claims 10 GiB": ({"size": 10 * 2**30, "form": tarfile.GNU_FORMAT}, "oversize"),
    "claims 10 GiB in a pax header": ({"size": 10 * 2**30}, "tar"),
    "claims more than there is": ({"size": 10**6}, "tar"),
    "name stands twice": ({"name": "val0.json"}, "member"),
    "name of another clip": ({"name": "val1.json"}, "tar"),
    "no key": ({"name": "json"}, "tar"),
    "name that leads out": ({"name": "../val0.json"}, "tar"),
    "name that leads out behind the key": ({"name": "val0.../../../etc/x"}, "tar"),
    "absolute name": ({"name": "/etc/val0.json"}, "tar"),
    "name as a command": ({"name": "pipe:touch marker"}, "tar"),
}


@pytest.mark.parametrize("what", STRANGE_MEMBERS)
def test_strange_members_are_refused(raw: Path, what: str):
    fields, kind = STRANGE_MEMBERS[what]
    assert kind_of(raw, lambda segment: appended(segment, **{"name": "val0.extra", **fields})) == kind


STRANGE_BYTES = {
    "compressed": (lambda segment: zlib.compress(segment), "tar"),
    "rubbish": (lambda segment: b"x" * len(segment), "tar"),
    "half a block": (lambda segment: segment + b"\0" * 100, "tar"),
    "end of archive in the middle": (lambda segment: segment + b"\0" * 1024, "tar"),
    "size in words": (lambda segment: segment[:124] + b"twelve\0\0\0\0\0\0" + segment[136:], "tar"),
    "no magic": (lambda segment: segment[:257] + b"gnu\0\0" + segment[262:], "tar"),
    "a long name of a wrong length": (
        lambda segment: appended(appended(segment, "x", b"99 path=val0.x\n", tarfile.XHDTYPE), "z"),
        "tar",
    ),
    "two long names": (
        lambda segment: (
            appended(segment, "x", b"15 path=val0.x\n", tarfile.XHDTYPE)
            + appended(b"", "x", b"15 path=val0.y\n", tarfile.XHDTYPE)
            + appended(b"", "z")
        ),
        "tar",
    ),
    "another clip": (lambda segment: segment.replace(b"val0.", b"vali."), "tar"),
}


@pytest.mark.parametrize("what", STRANGE_BYTES)
def test_strange_bytes_are_refused(raw: Path, what: str):
    change, kind = STRANGE_BYTES[what]
    assert kind_of(raw, change) == kind


RAW_MEMBERS: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "no frames": (lambda m: {k: v for k, v in m.items() if k != "frames.npy"}, "member"),
    "no mel": (lambda m: {k: v for k, v in m.items() if k != "mel.npy"}, "member"),
    "no facts": (lambda m: {k: v for k, v in m.items() if k != "json"}, "member"),
    "NaN in mel": (lambda m: {**m, "mel.npy": npy(np.full((SECONDS, 96, 64), np.nan, np.float32))}, "not_finite"),
    "infinite mel": (lambda m: {**m, "mel.npy": npy(np.full((SECONDS, 96, 64), np.inf, np.float32))}, "not_finite"),
    "mel of another length": (lambda m: {**m, "mel.npy": npy(np.zeros((SECONDS + 1, 96, 64), np.float32))}, "array"),
    "a mel that is none": (lambda m: {**m, "mel.npy": npy(np.full((SECONDS, 96, 64), 3e38, np.float32))}, "array"),
    "mel in float64": (lambda m: {**m, "mel.npy": npy(np.zeros((SECONDS, 96, 64)))}, "array"),
    "mel that claims 8 GiB": (
        lambda m: {**m, "mel.npy": m["mel.npy"].replace(b"(2, 96, 64), }     ", b"(2, 1024, 1048576)}")}, "array",
    ),
    "masks of another size": (
        lambda m: {**m, "masks.npy": npy(np.zeros((SECONDS, SIZE // 2, SIZE), np.uint8))}, "mask",
    ),
    "a class that does not exist": (
        lambda m: {**m, "masks.npy": npy(np.full((SECONDS, SIZE, SIZE), 7, np.uint8))}, "mask",
    ),
    "frames of another size": (
        lambda m: {
            **m,
            "frames.npy": npy(np.zeros((SECONDS, 16, 16, 3), np.uint8)),
            "masks.npy": npy(np.zeros((SECONDS, 16, 16), np.uint8)),
        },
        "picture",
    ),
    "another schema version": (
        lambda m: {**m, "json": m["json"].replace(b'"schema_version": 1', b'"schema_version": 99')}, "schema",
    ),
    "another name": (lambda m: {**m, "json": m["json"].replace(b'"val0"', b'"val1"')}, "schema"),
    "no JSON": (lambda m: {**m, "json": b"{"}, "schema"),
    "deep JSON": (lambda m: {**m, "json": b"[" * 100_000}, "schema"),
    "a million seconds": (lambda m: {**m, "json": m["json"].replace(b'"seconds": 2', b'"seconds": 1000000')}, "schema"),
    "a format that does not exist": (lambda m: {**m, "json": m["json"].replace(b'"raw"', b'"exe"')}, "schema"),
}  # fmt: skip


def test_a_clip_of_another_length_is_refused(raw: Path):
    """It would make a batch of any length."""
    shorter = sample("val0")
    shorter = replace(
        shorter,
        **{name: getattr(shorter, name)[:1] for name in ("frames_THWC", "mel_TFM", "masks_THW", "labelled_T")},
    )
    assert kind_of(raw, lambda _: encode_clip(shorter)) == "schema"


@pytest.mark.parametrize("what", RAW_MEMBERS)
def test_damaged_members_are_counted_by_kind(raw: Path, what: str):
    change, kind = RAW_MEMBERS[what]
    assert kind_of(raw, with_members(change)) == kind


PICTURES = {
    "a bomb above the limit": (png_that_claims(60_000, 60_000), "oversize"),
    "a bomb below the limit": (png_that_claims(8_000, 8_000), None),
    "no picture": (b"rubbish", "picture"),
    "another mode": (png(SIZE, SIZE, "L"), "picture"),
    "another size": (png(SIZE, SIZE * 2), "picture"),
    "a cut picture": (png(SIZE, SIZE)[:60], "picture"),
}


@pytest.mark.parametrize("what", PICTURES)
def test_damaged_pictures_are_counted_by_kind(tmp_path: Path, what: str):
    data, kind = PICTURES[what]
    write_set(tmp_path, "png")
    assert kind_of(tmp_path, replaced("frame1.png", data)) == (kind or "picture")


def test_a_cut_shard_and_flipped_bits(folder: Path):
    index = ShardIndex.load(folder)
    shard = index.split("val")[0]
    content = (folder / shard.name).read_bytes()
    flipped = bytearray(content)
    flipped[shard.clips[1].offset + 600] ^= 16
    (folder / shard.name).write_bytes(flipped[: shard.clips[2].offset + 1000])
    reader, kinds = ClipReader(index, "val"), []
    for number in range(3):
        try:
            reader.sample(number)
        except DamagedClipError as error:
            kinds.append((number, error.damage.kind))
    assert kinds == [(1, "checksum"), (2, "truncated")]
    (folder / shard.name).unlink()
    with pytest.raises(DamagedClipError) as error:
        reader.sample(0)
    assert error.value.damage.kind == "unreadable"


def test_long_names_are_read_and_their_records_are_not_believed(tmp_path: Path):
    """Keys over 100 bytes stand in a pax record, the only one that is accepted."""
    long = "long-" * 30
    writer = ShardWriter(tmp_path, "val", 0)
    writer.add(sample(long), encode_clip(sample(long)))
    index = ShardIndex(tmp_path, {"image_size": SIZE, "clip_seconds": SECONDS}, (writer.close(),), ())
    index.save()
    assert ClipReader(index, "val").sample(0).name == long
    for before, after in ((b"path=long-", b"path=/ong-"), (b"path=", b"mtime"), (b" path=", b"9path=")):
        changed = rewrite(tmp_path, lambda segment, b=before, a=after: segment.replace(b, a, 1))
        with pytest.raises(DamagedClipError) as error:
            ClipReader(changed, "val").sample(0)
        assert error.value.damage.kind == "tar"
        rewrite(tmp_path, lambda segment, b=before, a=after: segment.replace(a, b, 1))


def test_names_cannot_write_on_the_terminal(tmp_path: Path):
    name = "x\n\x1b[2Javs-dist train: all is well"
    writer = ShardWriter(tmp_path, "val", 0)
    writer.add(sample(name), encode_clip(sample(name)))
    index = ShardIndex(tmp_path, {"image_size": SIZE, "clip_seconds": SECONDS}, (writer.close(),), ())
    index.save()
    with pytest.raises(DamagedClipError) as error:
        ClipReader(rewrite(tmp_path, lambda segment: segment[:-512]), "val").sample(0)
    assert str(error.value).isprintable()
    assert error.value.damage.name == name


def test_members_read_as_tarfile_reads_them(raw: Path):
    index = ShardIndex.load(raw)
    clip = index.split("val")[0].clips[0]
    data = (raw / index.split("val")[0].name).read_bytes()[: clip.length]
    ours = ClipReader(index, "val").members(0)
    assert {f"val0.{name}": bytes(content) for name, content in ours.items()} == tar_members(data)


def test_clips_that_readers_refuse_are_not_written():
    """40 s of 2600 x 2600, of memory that is never touched."""
    frames = np.broadcast_to(np.uint8(0), (40, 2600, 2600, 3))
    mel, masks = np.zeros((40, 96, 64), np.float32), np.broadcast_to(np.uint8(0), (40, 2600, 2600))
    with pytest.raises(ValueError, match="take more than 536870912 bytes"):
        encode_clip(Sample("a", frames, mel, masks, np.zeros(40, bool)), "jpeg")

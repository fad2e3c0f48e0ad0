"""Frames and masks in every format: what comes back, what old shards look like, and each fault with its kind."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from feature_files import members_of
from PIL import Image

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.members import FRAME_FORMATS, Sound, decode_clip, decode_facts, decode_sound, encode_clip
from avs_dist.shards.schema import Sample
from avs_dist.shards.segment import encode_npy

PICTURES = ("png", "webp", "jpeg")
STORED = ("raw", *PICTURES)


def clip(labelled: tuple[int, ...] = (0, 2), side: int = 24) -> Sample:
    """3 s of noise with masks of class indices."""
    noise = np.random.default_rng(0)
    labelled_T = np.isin(np.arange(3), labelled)
    masks_THW = noise.integers(0, 71, (3, side, side), dtype=np.uint8) * labelled_T[:, None, None]
    frames_THWC = noise.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    mel_TFM = noise.standard_normal((3, 96, 64), dtype=np.float32)
    return Sample("a.b", frames_THWC, mel_TFM, masks_THW, labelled_T, {"sound": "ok", "fps": 25.0})


def encoded(frame_format: str, sample: Sample | None = None) -> dict[str, memoryview]:
    """Members as the reader of shards gives them: views of writable memory."""
    members = members_of(encode_clip(sample or clip(), frame_format))
    return {name: memoryview(bytearray(data)) for name, data in members.items()}


@pytest.mark.parametrize("frame_format", STORED)
@pytest.mark.parametrize("labelled", [(), (0,), (0, 2), (0, 1, 2)])
def test_every_format_comes_back(frame_format: str, labelled: tuple[int, ...]):
    sample = clip(labelled)
    found = decode_clip(encoded(frame_format, sample))
    assert (found.name, found.meta) == (sample.name, sample.meta)
    if frame_format != "jpeg":
        np.testing.assert_array_equal(found.frames_THWC, sample.frames_THWC, strict=True)
    np.testing.assert_array_equal(found.masks_THW, sample.masks_THW, strict=True)
    np.testing.assert_array_equal(found.labelled_T, sample.labelled_T, strict=True)
    np.testing.assert_array_equal(found.mel_TFM, sample.mel_TFM, strict=True)
    assert found.audio_TD is None
    assert encode_clip(sample, frame_format) == encode_clip(sample, frame_format)


def test_members_are_those_of_the_layout():
    frames = {"raw": {"frames.npy", "masks.npy"}}
    for form, suffix in (("png", "png"), ("webp", "webp"), ("jpeg", "jpg")):
        frames[form] = {f"frame{t}.{suffix}" for t in range(3)} | {"mask0.png", "mask2.png"}
    for form, names in frames.items():
        assert set(encoded(form)) == names | {"json", "mel.npy"}
    assert np.load(io.BytesIO(encoded("raw")["masks.npy"]), allow_pickle=False).shape == (2, 24, 24)
    assert "masks.npy" not in encoded("raw", clip(labelled=()))


def test_raw_frames_are_a_view_where_memory_may_be_written():
    members = encoded("raw")
    found = decode_clip(members)
    assert np.shares_memory(found.frames_THWC, np.frombuffer(members["frames.npy"], np.uint8))
    assert found.frames_THWC.flags.writeable
    copied = decode_clip({name: bytes(data) for name, data in members.items()})
    assert copied.frames_THWC.flags.writeable
    assert copied.mel_TFM.flags.writeable


def test_shards_of_earlier_versions_are_read():
    """PNG or JPEG frames, PNG masks, a json without a schema version."""
    for form in ("png", "jpeg"):
        members = encoded(form)
        facts = json.loads(bytes(members["json"]))
        assert facts.pop("schema_version") == 1
        found = decode_clip({**members, "json": json.dumps(facts).encode()})
        np.testing.assert_array_equal(found.masks_THW, clip().masks_THW)


def test_stored_embeddings_and_other_sound():
    audio_TD = np.ones((3, 128), np.float32)
    members = encoded("raw", replace(clip(), audio_TD=audio_TD))
    np.testing.assert_array_equal(decode_sound(members, 3).audio_TD, audio_TD, strict=True)
    np.testing.assert_array_equal(decode_clip(members).audio_TD, audio_TD, strict=True)
    other = Sound(np.zeros((3, 96, 64), np.float32), 2 * audio_TD)
    found = decode_clip({**members, "mel.npy": b"unread", "audio.npy": b"unread"}, other)
    assert (found.mel_TFM is other.mel_TFM, found.audio_TD is other.audio_TD) == (True, True)
    with pytest.raises(ValueError, match=r"clip a\.b: audio_TD is \(3, 7\)"):
        encode_clip(replace(clip(), audio_TD=np.ones((3, 7), np.float32)))


def picture(mode: str = "RGB", side: int = 24, picture_format: str = "PNG", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(data, picture_format, **options)
    return data.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """The first bytes of a picture, whose header claims another size; no pixels follow."""
    if data[:4] == b"\x89PNG":
        header = data[:16] + struct.pack(">II", width, height) + data[24:29]
        return header + struct.pack(">I", zlib.crc32(header[12:])) + data[33:60]
    if data[:4] == b"RIFF":
        return data[:21] + struct.pack("<I", (width - 1) | (height - 1) << 14) + data[25:30]
    start, pixels = data.index(b"\xff\xc0") + 5, data.index(b"\xff\xda") + 14
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 : pixels]


def with_facts(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        members["json"] = json.dumps({**json.loads(bytes(members["json"])), **changes}).encode()

    return change


def with_member(name: str, data: bytes) -> Callable[[dict[str, Any]], None]:
    return lambda members: members.update({name: data})


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda members: members.pop(name)


def array(name: str, *shape: int, dtype: Any = np.uint8, fill: float = 0) -> Callable[[dict[str, Any]], None]:
    return with_member(name, encode_npy(np.full(shape, fill, dtype)))


NAN, INF = float("nan"), float("inf")
FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str, str]] = [
    *((form, without("mel.npy"), "member", "mel.npy is missing") for form in STORED),
    ("raw", without("json"), "member", "json is missing"),
    ("raw", without("frames.npy"), "member", "frames.npy is missing"),
    ("raw", without("masks.npy"), "member", "masks.npy is missing"),
    ("png", without("frame1.png"), "member", "frame1.png is missing"),
    ("webp", without("mask2.png"), "member", "mask2.png is missing"),
    ("raw", with_member("json", b"{"), "schema", "json: "),
    ("raw", with_member("json", b"\xff"), "schema", "json: "),
    ("raw", with_member("json", b"[" * 10**5), "schema", "nested too deeply"),
    ("raw", with_member("json", b" " * (2**20 + 1)), "oversize", "json has 1048577 bytes"),
    ("raw", with_facts(schema_version=2), "schema", "schema version 2, this version reads 1"),
    ("raw", with_facts(schema_version=True), "schema", "schema version True"),
    ("raw", with_facts(name=None), "schema", "'name'"),
    ("raw", with_facts(seconds=10**9), "schema", "1 to 3600, got 1000000000"),
    ("raw", with_facts(seconds=True), "schema", "got True"),
    ("raw", with_facts(labelled=[3]), "schema", r"different seconds of 0\.\.2, got \[3\]"),
    ("raw", with_facts(labelled=[-1]), "schema", r"got \[-1\]"),
    ("raw", with_facts(labelled=[0, 0]), "schema", r"got \[0, 0\]"),
    ("raw", with_facts(labelled=["0"]), "schema", "got"),
    ("raw", with_facts(labelled=3), "schema", "got 3"),
    ("raw", with_facts(frame_format="gif"), "schema", "'frame_format' must be one of .*, got 'gif'"),
    ("raw", with_facts(frame_format=["raw"]), "schema", "'frame_format' must be one of"),
    ("raw", array("frames.npy", 2, 24, 24, 3), "array", r"expected uint8 \(3, height, width, 3\)"),
    ("raw", array("frames.npy", 3, 24, 24, 4), "array", "expected uint8"),
    ("raw", array("frames.npy", 3, 24, 24), "array", "expected uint8"),
    ("raw", array("frames.npy", 3, 0, 24, 3), "array", "expected uint8"),
    ("raw", array("frames.npy", 3, 24, 24, 3, dtype=np.int16), "array", "expected uint8"),
    ("raw", array("masks.npy", 3, 24, 24), "array", r"expected uint8 \(2, 24, 24\)"),
    ("raw", array("masks.npy", 2, 24, 24, dtype=np.int64), "array", "expected uint8"),
    ("raw", array("masks.npy", 2, 12, 24), "mask", r"masks.npy is \(2, 12, 24\)"),
    ("raw", array("mel.npy", 3, 96, 63, dtype=np.float32), "array", r"expected float32 \(3, 96, 64\)"),
    ("raw", array("mel.npy", 3, 96, 64, dtype=np.float64), "array", "expected float32"),
    ("raw", array("mel.npy", 3, 96, 64, dtype=np.float32, fill=NAN), "not_finite", "mel.npy holds infinite"),
    ("raw", array("audio.npy", 3, 128, dtype=np.float32, fill=INF), "not_finite", "audio.npy holds infinite"),
    ("raw", array("audio.npy", 3, 64, dtype=np.float32), "array", r"expected float32 \(3, 128\)"),
    ("raw", array("text.npy", 2, 8, dtype=np.float32, fill=NAN), "not_finite", "text.npy holds infinite"),
    ("raw", array("text.npy", 8, dtype=np.float32), "array", r"expected finite float32 \[words, values\]"),
    ("raw", with_member("mel.npy", b"rubbish"), "array", "mel.npy: "),
    ("png", with_member("mask0.png", picture("L", 12)), "mask", "mask0.png is 12 x 12, the frames are 24 x 24"),
    ("png", with_member("mask0.png", picture("RGB")), "picture", "mask0.png has mode RGB, expected L"),
    ("png", with_member("mask0.png", picture("L", picture_format="JPEG")), "picture", "mask0.png: not a png"),
]
GOOD = {
    "png": picture(),
    "webp": picture(picture_format="WEBP", lossless=True),
    "jpeg": picture(picture_format="JPEG"),
}
for form, suffix in (("png", "png"), ("webp", "webp"), ("jpeg", "jpg")):
    name, other = f"frame1.{suffix}", "JPEG" if form != "jpeg" else "PNG"
    lossless = {"lossless": True} if form == "webp" else {}
    FAULTS += [
        (form, with_member(name, b""), "picture", name),
        (form, with_member(name, b"rubbish" * 20), "picture", name),
        (form, with_member(name, GOOD[form][:400]), "picture", name),
        (form, with_member(name, picture(picture_format=other)), "picture", name),
        (form, with_member(name, picture("RGB", 12, form, **lossless)), "picture", f"{name} is 12 x 12, the first"),
        (form, with_member(name, claiming(GOOD[form], 9000, 8000)), "oversize", f"{name}: 9000 x 8000 pixels"),
    ]
FAULTS += [
    ("jpeg", with_member("frame1.jpg", picture("L", picture_format="JPEG")), "picture", "has mode L, expected RGB"),
    ("png", with_member("frame1.png", picture("P")), "picture", "has mode P, expected RGB"),
    ("webp", with_member("frame1.webp", picture(picture_format="WEBP")), "picture", "not a lossless webp"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_has_its_kind_and_names_the_member(number: int):
    frame_format, change, kind, message = FAULTS[number]
    members: dict[str, Any] = dict(encoded(frame_format))
    decode_clip(members)
    change(members)
    with pytest.raises(ClipFault, match=message) as caught:
        decode_clip(members)
    assert caught.value.kind == kind
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("frame_format", ["png", "jpeg"])
def test_frames_that_are_too_large_together_are_refused_by_the_first(frame_format: str):
    """Each is just below MAX_PIXELS; only the header of the first is there."""
    suffix = {"jpeg": "jpg"}.get(frame_format, frame_format)
    first = claiming(GOOD[frame_format], 8000, 8000)
    facts = json.dumps({"name": "a", "seconds": 3, "frame_format": frame_format}).encode()
    with pytest.raises(ClipFault, match=r"frames of \(3, 8000, 8000, 3\) take more") as caught:
        decode_clip({"json": facts, f"frame0.{suffix}": first})
    assert caught.value.kind == "oversize"


@pytest.mark.parametrize("frame_format", PICTURES)
def test_flipped_bytes_give_faults_and_nothing_else(frame_format: str):
    noise = np.random.default_rng(7)
    members: dict[str, Any] = dict(encoded(frame_format))
    name = next(name for name in members if name.startswith("frame1"))
    whole, refused = bytes(members[name]), 0
    for _ in range(200):
        harmed = bytearray(whole[: noise.integers(1, len(whole) + 1)] if noise.random() < 0.2 else whole)
        for at in noise.integers(0, min(len(harmed), 90), 3):
            harmed[at] = noise.integers(256)
        try:
            decode_clip({**members, name: harmed})
        except ClipFault:
            refused += 1
    assert refused > 20


def test_the_list_of_formats():
    assert FRAME_FORMATS == ("raw", "png", "webp", "jpeg", "video")
    with pytest.raises(ClipFault, match="'labelled'"):
        decode_facts({"json": b'{"name": "a", "seconds": 1, "labelled": [1], "frame_format": "raw"}'})

"""The tar members of one clip, both ways: Sample -> bytes of a tar segment, and members -> Sample.

The layout is written down in README.md, key by key. Nothing here depends on the clock, the user or the machine, so
that equal samples give equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import numpy as np
from PIL import Image

from avs_dist.shards.images import open_image
from avs_dist.shards.schema import MAX_MEMBER_BYTES, MEL_BANDS, MEL_FRAMES, Sample, key_of

FRAME_FORMATS = ("png", "jpeg")
_BLOCK = 512


def encode_clip(sample: Sample, frame_format: str = "png") -> bytes:
    """Bytes of the tar segment that holds one clip (headers, data, padding; no end-of-archive blocks).

    Raises:
        ValueError: If the arrays disagree in shape, or a member is larger than readers accept.
    """
    _check_shapes(sample)
    key, seconds = key_of(sample.name), len(sample.frames_THWC)
    facts = {**sample.meta, "name": sample.name, "seconds": seconds}
    facts["labelled"] = [t for t in range(seconds) if sample.labelled_T[t]]
    facts["frame_format"] = frame_format
    members = {"json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()}
    for t in range(seconds):
        members[f"frame{t}.{_suffix(frame_format)}"] = _encode_image(sample.frames_THWC[t], frame_format)
    for t in facts["labelled"]:
        members[f"mask{t}.png"] = _encode_image(sample.masks_THW[t], "png")
    array = io.BytesIO()
    np.save(array, np.ascontiguousarray(sample.mel_TFM, dtype=np.float32), allow_pickle=False)
    members["mel.npy"] = array.getvalue()
    return b"".join(_tar_member(f"{key}.{name}", data) for name, data in sorted(members.items()))


def decode_clip(members: dict[str, bytes], mel_TFM: np.ndarray | None = None) -> Sample:
    """Sample from its members (names without the key); `mel_TFM` replaces the stored sound.

    Raises:
        ValueError: If a member is missing, damaged, too large or of another shape than the rest.
    """
    facts = decode_facts(members)
    seconds, suffix = facts["seconds"], _suffix(facts["frame_format"])
    frames_THWC = np.stack([_decode_image(members, f"frame{t}.{suffix}", "RGB") for t in range(seconds)])
    masks_THW = np.zeros(frames_THWC.shape[:3], dtype=np.uint8)
    labelled_T = np.zeros(seconds, dtype=bool)
    for t in facts["labelled"]:
        mask_HW = _decode_image(members, f"mask{t}.png", "L")
        if mask_HW.shape != masks_THW.shape[1:]:
            raise ValueError(f"mask{t}.png is {mask_HW.shape}, the frames are {masks_THW.shape[1:]}")
        masks_THW[t], labelled_T[t] = mask_HW, True
    mel = decode_mel(members, seconds) if mel_TFM is None else mel_TFM
    meta = {k: v for k, v in facts.items() if k not in ("name", "seconds", "labelled", "frame_format")}
    return Sample(facts["name"], frames_THWC, mel, masks_THW, labelled_T, meta)


def decode_facts(members: dict[str, bytes]) -> dict[str, Any]:
    """The clip's json member, checked for what the decoder relies on."""
    facts = json.loads(_member(members, "json"))
    seconds = facts.get("seconds")
    if not isinstance(seconds, int) or not 1 <= seconds <= 3600:
        raise ValueError(f"json: 'seconds' must be a whole number from 1 to 3600, got {seconds!r}")
    if not all(isinstance(t, int) and 0 <= t < seconds for t in facts.get("labelled", [])):
        raise ValueError(f"json: 'labelled' names seconds outside 0..{seconds - 1}: {facts['labelled']}")
    if facts.get("frame_format") not in FRAME_FORMATS:
        raise ValueError(f"json: 'frame_format' must be one of {FRAME_FORMATS}, got {facts.get('frame_format')!r}")
    return {"labelled": [], **facts}


def decode_mel(members: dict[str, bytes], seconds: int) -> np.ndarray:
    """float32 [seconds,96,64]."""
    mel = np.load(io.BytesIO(_member(members, "mel.npy")), allow_pickle=False)
    if mel.dtype != np.float32 or mel.shape != (seconds, MEL_FRAMES, MEL_BANDS):
        raise ValueError(f"mel.npy is {mel.dtype} {mel.shape}, expected float32 {(seconds, MEL_FRAMES, MEL_BANDS)}")
    return mel


def _check_shapes(sample: Sample) -> None:
    seconds, height, width = sample.frames_THWC.shape[:3]
    expected = {
        "frames_THWC": (sample.frames_THWC, (seconds, height, width, 3)),
        "masks_THW": (sample.masks_THW, (seconds, height, width)),
        "labelled_T": (sample.labelled_T, (seconds,)),
        "mel_TFM": (sample.mel_TFM, (seconds, MEL_FRAMES, MEL_BANDS)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"clip {sample.name}: {name} is {array.shape}, expected {shape}")


def _suffix(frame_format: str) -> str:
    return "jpg" if frame_format == "jpeg" else frame_format


def _encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    data = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    if image_format == "jpeg":
        image.save(data, "JPEG", quality=95, subsampling=0)
    else:
        image.save(data, "PNG", compress_level=6)
    return data.getvalue()


def _decode_image(members: dict[str, bytes], name: str, mode: str) -> np.ndarray:
    image = open_image(io.BytesIO(_member(members, name)), name)
    if image.format not in ("PNG", "JPEG") or image.mode != mode:
        raise ValueError(f"{name} is {image.format} of mode {image.mode}, expected mode {mode}")
    return np.array(image)


def _member(members: dict[str, bytes], name: str) -> bytes:
    if name not in members:
        raise ValueError(f"member {name} is missing")
    return members[name]


def _tar_member(name: str, data: bytes) -> bytes:
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name} has {len(data)} bytes, readers accept {MAX_MEMBER_BYTES}")
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, empty user names
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + data + b"\0" * (-len(data) % _BLOCK)

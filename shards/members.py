"""The members of one clip of frames, both ways: Sample -> bytes of a tar segment, and members -> Sample.

The layout is written down in README.md, key by key.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from avs_dist.shards import segment
from avs_dist.shards.images import open_image
from avs_dist.shards.schema import MEL_BANDS, MEL_FRAMES, Sample
from avs_dist.shards.segment import decode_npy, encode_facts, encode_npy, member, tar_segment

FRAME_FORMATS = ("png", "jpeg")
TEXT_MEMBER = "text.npy"


def encode_clip(sample: Sample, frame_format: str = "png") -> bytes:
    """Bytes of the tar segment that holds one clip (headers, data, padding; no end-of-archive blocks).

    Raises:
        ValueError: If the arrays disagree in shape, or a member is larger than readers accept.
    """
    _check_shapes(sample)
    seconds = sample.seconds
    facts = {**sample.meta, "name": sample.name, "seconds": seconds}
    facts["labelled"] = [t for t in range(seconds) if sample.labelled_T[t]]
    facts["frame_format"] = frame_format
    members = {"json": encode_facts(facts)}
    for t in range(seconds):
        members[f"frame{t}.{_suffix(frame_format)}"] = _encode_image(sample.frames_THWC[t], frame_format)
    for t in facts["labelled"]:
        members[f"mask{t}.png"] = _encode_image(sample.masks_THW[t], "png")
    members["mel.npy"] = encode_npy(sample.mel_TFM.astype(np.float32, copy=False))
    if sample.text_WE is not None:
        members[TEXT_MEMBER] = encode_npy(sample.text_WE.astype(np.float32, copy=False))
    return tar_segment(sample.name, members)


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
    return Sample(facts["name"], frames_THWC, mel, masks_THW, labelled_T, meta, _decode_text(members))


def decode_facts(members: dict[str, bytes]) -> dict[str, Any]:
    """The clip's json member, checked for what the decoder relies on."""
    facts = segment.decode_facts(members)
    seconds = facts["seconds"]
    if not all(isinstance(t, int) and 0 <= t < seconds for t in facts.get("labelled", [])):
        raise ValueError(f"json: 'labelled' names seconds outside 0..{seconds - 1}: {facts['labelled']}")
    if facts.get("frame_format") not in FRAME_FORMATS:
        raise ValueError(f"json: 'frame_format' must be one of {FRAME_FORMATS}, got {facts.get('frame_format')!r}")
    return {"labelled": [], **facts}


def decode_mel(members: dict[str, bytes], seconds: int) -> np.ndarray:
    """float32 [seconds,96,64]."""
    mel = decode_npy(members, "mel.npy")
    if mel.dtype != np.float32 or mel.shape != (seconds, MEL_FRAMES, MEL_BANDS):
        raise ValueError(f"mel.npy is {mel.dtype} {mel.shape}, expected float32 {(seconds, MEL_FRAMES, MEL_BANDS)}")
    return mel


def _decode_text(members: dict[str, bytes]) -> np.ndarray | None:
    """float32 [W,E] of a clip with a prompt."""
    if TEXT_MEMBER not in members:
        return None
    text_WE = decode_npy(members, TEXT_MEMBER)
    if text_WE.dtype != np.float32 or text_WE.ndim != 2 or not text_WE.size or not np.isfinite(text_WE).all():
        raise ValueError(f"{TEXT_MEMBER} is {text_WE.dtype} {text_WE.shape}, expected finite float32 [words, values]")
    return text_WE


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
    image = open_image(io.BytesIO(member(members, name)), name)
    if image.format not in ("PNG", "JPEG") or image.mode != mode:
        raise ValueError(f"{name} is {image.format} of mode {image.mode}, expected mode {mode}")
    return np.array(image)

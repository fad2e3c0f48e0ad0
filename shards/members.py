"""The members of one clip of frames, both ways: Sample -> bytes of a tar segment, and members -> Sample.

The layout is written down in README.md, key by key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from avs_dist.shards import segment
from avs_dist.shards.faults import ClipFault
from avs_dist.shards.frames import (
    PICTURES,
    RAW,
    check_clip_bytes,
    decode_frames,
    decode_masks,
    encode_frames,
    encode_masks,
)
from avs_dist.shards.schema import ENCODED_CHANNELS, MEL_BANDS, MEL_FRAMES, Sample
from avs_dist.shards.segment import Members, decode_npy, encode_facts, encode_npy, finite, tar_segment
from avs_dist.shards.video_member import VIDEO, StoredVideo, check_stored_video
from avs_dist.shards.workers import MediaWorker

FRAME_FORMATS = (RAW, *PICTURES, VIDEO)
TEXT_MEMBER = "text.npy"
MEL_MEMBER, AUDIO_MEMBER = "mel.npy", "audio.npy"
_OURS = ("name", "seconds", "labelled", "frame_format", VIDEO)


class Sound(NamedTuple):
    """Sound of a clip of T seconds.

    mel_TFM:  float32 [T,96,64], VGGish log-mel examples.
    audio_TD: float32 [T,128], stored output of a frozen audio encoder, or None.
    """

    mel_TFM: np.ndarray
    audio_TD: np.ndarray | None


def encode_clip(sample: Sample, frame_format: str = RAW, video: StoredVideo | None = None) -> bytes:
    """Bytes of the tar segment that holds one clip (headers, data, padding; no end-of-archive blocks).

    Args:
        frame_format: One of FRAME_FORMATS.
        video: What is stored in place of the frames, for "video": it must decode to them.

    Raises:
        ValueError: If the arrays disagree in shape, or a member is larger than readers accept.
    """
    _check_shapes(sample)
    check_clip_bytes(sample.frames_THWC.shape)
    facts: dict[str, Any] = {**sample.meta, "name": sample.name, "seconds": sample.seconds}
    facts["labelled"] = np.flatnonzero(sample.labelled_T).tolist()
    facts["frame_format"] = frame_format
    if frame_format == VIDEO:
        if video is None:
            raise ValueError(f"clip {sample.name}: frames stored as video need the video")
        facts[VIDEO] = video.facts
        members = {video.member: video.data}
    else:
        members = encode_frames(sample.frames_THWC, frame_format)
    members |= encode_masks(sample.masks_THW, facts["labelled"], frame_format)
    members["json"] = encode_facts(facts)
    arrays = {MEL_MEMBER: sample.mel_TFM, AUDIO_MEMBER: sample.audio_TD, TEXT_MEMBER: sample.text_WE}
    members |= {name: encode_npy(a.astype(np.float32, copy=False)) for name, a in arrays.items() if a is not None}
    return tar_segment(sample.name, members)


def decode_clip(members: Members, sound: Sound | None = None, media: MediaWorker | None = None) -> Sample:
    """Sample from its members (names without the key).

    Arrays are views of the members where these are writable memory.

    Args:
        sound: Replaces the stored one.
        media: Decodes frames that are stored as video.

    Raises:
        ClipFault: If a member is missing, damaged, too large or of another shape than the rest.
        ValueError: If the frames are stored as video and there is no `media`.
    """
    facts = decode_facts(members)
    seconds, frame_format = facts["seconds"], facts["frame_format"]
    if frame_format != VIDEO:
        frames_THWC = decode_frames(members, seconds, frame_format)
    elif media is not None:
        stored = StoredVideo.of(facts[VIDEO], members)
        frames_THWC = media.decode_member(stored)
    else:
        raise ValueError(f"clip {facts['name']} holds a video: it takes a MediaWorker to decode it")
    shape_THW = (seconds, frames_THWC.shape[1], frames_THWC.shape[2])
    masks_THW = decode_masks(members, facts["labelled"], shape_THW, frame_format)
    labelled_T = np.zeros(seconds, dtype=bool)
    labelled_T[facts["labelled"]] = True
    sound = sound or decode_sound(members, seconds)
    meta = {k: v for k, v in facts.items() if k not in _OURS}
    return Sample(
        name=facts["name"],
        frames_THWC=frames_THWC,
        mel_TFM=sound.mel_TFM,
        masks_THW=masks_THW,
        labelled_T=labelled_T,
        meta=meta,
        text_WE=_decode_text(members),
        audio_TD=sound.audio_TD,
    )


def decode_facts(members: Members) -> dict[str, Any]:
    """The clip's json member, checked for what the decoder relies on.

    Raises:
        ClipFault: If it is missing or unusable.
    """
    facts = segment.decode_facts(members)
    seconds, labelled = facts["seconds"], facts.setdefault("labelled", [])
    in_range = isinstance(labelled, list) and all(type(t) is int and 0 <= t < seconds for t in labelled)
    if not in_range or len({*labelled}) < len(labelled):
        message = f"json: 'labelled' must list different seconds of 0..{seconds - 1}, got {labelled!r:.80}"
        raise ClipFault("schema", message)
    if facts.get("frame_format") not in FRAME_FORMATS:
        message = f"json: 'frame_format' must be one of {FRAME_FORMATS}, got {facts.get('frame_format')!r:.80}"
        raise ClipFault("schema", message)
    if facts["frame_format"] == VIDEO:
        check_stored_video(facts.get(VIDEO), seconds)
    return facts


def decode_sound(members: Members, seconds: int) -> Sound:
    """The sound of a clip of so many seconds.

    Raises:
        ClipFault: If a member is missing, damaged, of another shape, or not finite.
    """
    mel_TFM = _decode_floats(members, MEL_MEMBER, (seconds, MEL_FRAMES, MEL_BANDS))
    if AUDIO_MEMBER not in members:
        return Sound(mel_TFM, None)
    return Sound(mel_TFM, _decode_floats(members, AUDIO_MEMBER, (seconds, ENCODED_CHANNELS)))


def _decode_floats(members: Members, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = decode_npy(members, name)
    if array.dtype != np.float32 or array.shape != shape:
        raise ClipFault("array", f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
    return finite(array, name)


def _decode_text(members: Members) -> np.ndarray | None:
    """float32 [W,E] of a clip with a prompt."""
    if TEXT_MEMBER not in members:
        return None
    text_WE = decode_npy(members, TEXT_MEMBER)
    if text_WE.dtype != np.float32 or text_WE.ndim != 2 or not text_WE.size:
        message = f"{TEXT_MEMBER} is {text_WE.dtype} {text_WE.shape}, expected finite float32 [words, values]"
        raise ClipFault("array", message)
    return finite(text_WE, TEXT_MEMBER)


def _check_shapes(sample: Sample) -> None:
    seconds, height, width = sample.frames_THWC.shape[:3]
    expected = {
        "frames_THWC": (sample.frames_THWC, (seconds, height, width, 3)),
        "masks_THW": (sample.masks_THW, (seconds, height, width)),
        "labelled_T": (sample.labelled_T, (seconds,)),
        "mel_TFM": (sample.mel_TFM, (seconds, MEL_FRAMES, MEL_BANDS)),
        "audio_TD": (sample.audio_TD, (seconds, ENCODED_CHANNELS)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"clip {sample.name}: {name} is {array.shape}, expected {shape}")

"""What an index.json must keep to before anything in it is believed; the file may come from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.palette import MAX_CLASSES
from avs_dist.shards.schema import (
    AUDIO_ENCODER,
    CLIPS,
    ENCODED_CHANNELS,
    FEATURE_NDIM,
    FEATURES,
    MAX_CLIP_BYTES,
    MAX_CLIP_SECONDS,
    MAX_IMAGE_SIZE,
    FeatureSample,
    Sample,
    key_of,
)

if TYPE_CHECKING:  # index imports this file
    from avs_dist.shards.index import ClipEntry, ShardEntry

_SHA256 = re.compile("[0-9a-f]{64}")
_SOUNDS = ("ok", "silent", "none")
_OF_SKIPPED = ("name", "split", "path", "reason")
# far above ln of what the loudest sound of 16 bits gives
MAX_LOG_MEL = 100.0


def check_shard(data: dict[str, Any]) -> None:
    """Name, size and checksum of one entry of the list of shards.

    Raises:
        ValueError: If the name could lead out of the folder, or something has another type than it should.
    """
    name = data["name"]
    if not name.endswith(".tar") or Path(name).name != name or "\0" in name:
        raise ValueError(f"shard name {name!r:.200} is not a plain file name ending in .tar")
    if data["count"] != len(data["clips"]):
        raise ValueError(f"shard {name}: count is {data['count']}, but {len(data['clips'])} clips are listed")
    if not isinstance(data["split"], str) or not data["split"].isprintable() or not _whole(data["bytes"]):
        raise ValueError(f"shard {name}: 'split' must be a printable text and 'bytes' a number from 0 on")
    if not isinstance(data["sha256"], str) or not _SHA256.fullmatch(data["sha256"]):
        raise ValueError(f"shard {name}: 'sha256' must be 64 hexadecimal digits, got {data['sha256']!r:.80}")


def check_clip(shard: dict[str, Any], clip: ClipEntry) -> None:
    """One entry of the list of clips.

    Raises:
        ValueError: If its key is not that of its name, it lies outside the shard, or something has another type.
    """
    where = f"shard {shard['name']}: clip {clip.key!r:.200}"
    if not isinstance(clip.name, str) or clip.key != key_of(clip.name):
        raise ValueError(f"{where}: expected the key of the name {clip.name!r:.200}")
    if not all(map(_whole, (clip.offset, clip.length, clip.crc32, clip.seconds, clip.labelled))):
        raise ValueError(f"{where}: offset, length, crc32, seconds and labelled must be numbers from 0 on")
    if not 0 < clip.length <= MAX_CLIP_BYTES or clip.offset + clip.length > shard["bytes"]:
        raise ValueError(f"{where} lies outside the file or is too large")
    if not 1 <= clip.seconds <= MAX_CLIP_SECONDS or clip.sound not in _SOUNDS:
        raise ValueError(f"{where}: {clip.seconds} s with sound {clip.sound!r:.80} cannot be")


def check_shards(shards: Sequence[ShardEntry], clip_seconds: int) -> None:
    """The list as a whole.

    Raises:
        ValueError: If a shard is listed twice, a key stands twice in a split, or a clip is longer than it may be.
    """
    for shard in shards:
        for clip in shard.clips:
            if clip.seconds > clip_seconds:
                long = f"clip {clip.key!r:.200} has {clip.seconds} s"
                raise ValueError(f"shard {shard.name}: {long}, settings.clip_seconds is {clip_seconds}")
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        raise ValueError(f"shard {_twice(names)} is listed twice")
    keys = [(shard.split, clip.key) for shard in shards for clip in shard.clips]
    if len(set(keys)) != len(keys):
        raise ValueError("key {1} stands twice in split {0}".format(*_twice(keys)))


def check_sample(settings: dict[str, Any], entry: ClipEntry, sample: Sample | FeatureSample) -> None:
    """A decoded clip against what the index promises, so that clips of a batch fit together.

    Raises:
        ClipFault: naming the difference.
    """
    if sample.name != entry.name or sample.seconds != entry.seconds:
        told = f"{entry.name!r:.200} of {entry.seconds} s"
        raise ClipFault("schema", f"holds clip {sample.name!r:.200} of {sample.seconds} s, the index says {told}")
    if isinstance(sample, FeatureSample):
        _check_features(settings, sample)
        return
    size = (settings["image_size"],) * 2
    if sample.frames_THWC.shape[1:3] != size:
        raise ClipFault("picture", f"the frames are {sample.frames_THWC.shape[1:3]}, the index says {size}")
    num_classes, highest = len(settings.get("classes", ("silent", "sounding"))), int(sample.masks_THW.max())
    if highest >= num_classes:
        raise ClipFault("mask", f"a mask holds class {highest}, there are {num_classes} from 0 on")
    loudest = float(np.abs(sample.mel_TFM).max())
    if loudest > MAX_LOG_MEL:
        raise ClipFault("array", f"mel.npy reaches {loudest:g}, no log-mel has more than {MAX_LOG_MEL:g}")
    _check_text(settings, sample)
    if AUDIO_ENCODER in settings and sample.audio_TD is None:
        raise ClipFault("member", "member audio.npy is missing, the index promises the output of an audio encoder")


def _check_text(settings: dict[str, Any], sample: Sample) -> None:
    if "prompts" not in settings:
        return
    if sample.text_WE is None:
        raise ClipFault("member", "member text.npy is missing, the index promises prompts")
    channels = settings.get("word_channels", sample.text_WE.shape[1])  # older shards do not tell it
    if sample.text_WE.shape[1] != channels:
        raise ClipFault("array", f"words have {sample.text_WE.shape[1]} numbers, the index says {channels}")


def _check_features(settings: dict[str, Any], sample: FeatureSample) -> None:
    shapes = {name: array.shape[1:] for name, array in sample.features.items()}
    told = {name: tuple(shape) for name, shape in settings["feature_shapes"].items()}
    if shapes != {name: told.get(name) for name in shapes}:  # a clip may lack a modality
        raise ClipFault("array", f"shapes {shapes}, the index says {told}")
    for name, array in sample.features.items():
        if array.dtype != settings["feature_dtype"]:
            raise ClipFault("array", f"{name} is {array.dtype}, the index says {settings['feature_dtype']}")
    for labels_TK in sample.labels.values():
        if labels_TK.shape[1] != len(settings["events"]):
            message = f"labels of {labels_TK.shape[1]} events, the index names {len(settings['events'])}"
            raise ClipFault("array", message)


def check_settings(settings: dict[str, Any]) -> None:
    """Of what readers rely on; features need more than clips."""
    if not _whole(settings["clip_seconds"]) or not 1 <= settings["clip_seconds"] <= MAX_CLIP_SECONDS:
        given = f"{settings['clip_seconds']!r:.80}"
        raise ValueError(f"settings.clip_seconds must be a number from 1 to {MAX_CLIP_SECONDS}, got {given}")
    kind = settings.get("kind", CLIPS)
    if kind == FEATURES:
        _check_events(settings)
        _check_feature_shapes(settings["feature_shapes"])
        if settings["feature_dtype"] not in ("float16", "float32"):
            raise ValueError(f"settings.feature_dtype is {settings['feature_dtype']!r:.80}, not float16 or float32")
    elif kind != CLIPS:
        raise ValueError(f"settings.kind must be '{CLIPS}' or '{FEATURES}', got {kind!r}")
    else:
        _check_image_size(settings)
        _check_audio_encoder(settings)
    _check_classes(settings)


def _check_events(settings: dict[str, Any]) -> None:
    names = settings["events"]
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not 1 <= len(set(names)) == len(names):
        raise ValueError(f"settings.events must list one or more different names, got {names!r:.200}")
    if "classes" in settings:
        raise ValueError("settings.classes are for masks, features have settings.events")


def _check_feature_shapes(shapes: Any) -> None:
    """One shape for each modality: whole numbers from 1 on, as many as the modality has without its time."""
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        if not whole or len(shape) + 1 != FEATURE_NDIM.get(name):
            raise ValueError(f"settings.feature_shapes: {name}: {shape!r:.200} is not the shape of a second's features")


def _check_classes(settings: dict[str, Any]) -> None:
    """Several names, each once, where the settings name classes at all."""
    names = settings.get("classes", ["background", "object"])
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not 2 <= len(set(names)) == len(names) <= MAX_CLASSES:
        raise ValueError(f"settings.classes must list 2 to {MAX_CLASSES} different names, got {names!r:.200}")


def _check_image_size(settings: dict[str, Any]) -> None:
    size = settings["image_size"]
    if not _whole(size) or not 1 <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"settings.image_size must be a number from 1 to {MAX_IMAGE_SIZE}, got {size!r:.80}")


def _check_audio_encoder(settings: dict[str, Any]) -> None:
    """Where clips come with the output of a frozen audio encoder: which one, and what it makes of silence."""
    encoder = settings.get(AUDIO_ENCODER)
    if encoder is None:
        return
    with np.errstate(over="ignore"):  # infinite then
        silence_D = np.asarray(encoder["silence"], dtype=np.float32)
    if silence_D.shape != (ENCODED_CHANNELS,) or not np.isfinite(silence_D).all():
        raise ValueError(f"settings.{AUDIO_ENCODER}.silence must be {ENCODED_CHANNELS} finite numbers")
    if not all(isinstance(encoder[name], str) for name in ("kind", "weights_sha256")):
        raise ValueError(f"settings.{AUDIO_ENCODER} must name kind and weights_sha256")


def _whole(value: Any) -> bool:
    """A number from 0 on; true is none."""
    return type(value) is int and value >= 0


def _twice(values: Sequence[Any]) -> Any:
    """The first value that stands twice."""
    seen: set[Any] = set()
    return next(value for value in values if value in seen or seen.add(value))  # type: ignore[func-returns-value]


def check_skipped(skipped: Any) -> None:
    """What the build left out: texts for people.

    Raises:
        ValueError: If it is no list of objects with name, split, path and reason.
    """
    named = isinstance(skipped, list) and all(isinstance(clip, dict) for clip in skipped)
    if not named or not all(isinstance(clip[name], str) for clip in skipped for name in _OF_SKIPPED):
        raise ValueError(f"skipped must list objects with the texts {', '.join(_OF_SKIPPED)}")

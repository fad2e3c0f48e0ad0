"""The members of one clip of features, both ways: FeatureSample -> bytes of a tar segment, and members -> sample.

The layout is written down in README.md, key by key.
"""

from __future__ import annotations

import numpy as np

from avs_dist.shards.faults import ClipFault
from avs_dist.shards.schema import FEATURE_NDIM, FEATURES, LABELLED, MAX_CLIP_SECONDS, FeatureSample
from avs_dist.shards.segment import Members, decode_facts, decode_npy, encode_facts, encode_npy, finite, tar_segment

DTYPES = ("float16", "float32")
_OURS = ("name", "kind", "seconds")


def encode_features(sample: FeatureSample) -> bytes:
    """Bytes of the tar segment that holds one clip (headers, data, padding; no end-of-archive blocks).

    Raises:
        ValueError: If an array has the wrong type or shape, is not finite, or is larger than readers accept.
    """
    try:
        _check(sample)
    except ValueError as error:
        raise ValueError(f"clip {sample.name}: {error}") from error
    facts = {**sample.meta, "name": sample.name, "kind": FEATURES, "seconds": sample.seconds}
    members = {"json": encode_facts(facts)}
    members |= {f"{name}.npy": encode_npy(array) for name, array in sample.features.items()}
    members |= {f"labels_{name}.npy": encode_npy(array) for name, array in sample.labels.items()}
    return tar_segment(sample.name, members)


def decode_features(members: Members) -> FeatureSample:
    """FeatureSample from its members (names without the key).

    Raises:
        ClipFault: If a member is missing, damaged, not finite or of another shape than the rest.
    """
    facts = decode_facts(members)
    if facts.get("kind") != FEATURES:
        raise ClipFault("schema", f"json: 'kind' must be '{FEATURES}', got {facts.get('kind')!r:.80}")
    features = {name: decode_npy(members, f"{name}.npy") for name in FEATURE_NDIM if f"{name}.npy" in members}
    labels = {name: decode_npy(members, f"labels_{name}.npy") for name in LABELLED if f"labels_{name}.npy" in members}
    meta = {k: v for k, v in facts.items() if k not in _OURS}
    sample = FeatureSample(facts["name"], features, labels, meta)
    _check(sample)
    if sample.seconds != facts["seconds"]:
        raise ClipFault("schema", f"the features have {sample.seconds} s, json says {facts['seconds']}")
    return sample


def _check(sample: FeatureSample) -> None:
    """Everything that `FeatureSample` promises."""
    unknown = {*sample.features} - {*FEATURE_NDIM} | {*sample.labels} - {*LABELLED}
    if unknown:
        raise ClipFault("array", f"unknown modality {', '.join(sorted(unknown))}; known: {', '.join(FEATURE_NDIM)}")
    if not 1 <= sample.seconds <= MAX_CLIP_SECONDS:
        raise ClipFault("array", f"visual and audio features have {sample.seconds} s, expected 1 to {MAX_CLIP_SECONDS}")
    for name, array in sample.features.items():
        if str(array.dtype) not in DTYPES or array.ndim != FEATURE_NDIM[name] or not array.size:
            kinds = " or ".join(DTYPES)
            raise ClipFault(
                "array", f"{name} is {array.dtype} {array.shape}, expected {kinds} of {FEATURE_NDIM[name]} sides"
            )
        finite(array, name)
    for name, labels_TK in sample.labels.items():
        seconds = len(sample.features.get(name, ()))
        if labels_TK.dtype != np.uint8 or labels_TK.ndim != 2 or len(labels_TK) != seconds or not labels_TK.size:
            raise ClipFault(
                "array",
                f"labels_{name} is {labels_TK.dtype} {labels_TK.shape}, expected uint8 [{seconds}, events], "
                f"one row for each second of {name}",
            )
        if labels_TK.max() > 1:
            raise ClipFault("array", f"labels_{name} holds {labels_TK.max()}, expected 0 and 1")
    if len({labels_TK.shape[1] for labels_TK in sample.labels.values()}) > 1:
        raise ClipFault("array", "labels_visual and labels_audio tell different numbers of events")

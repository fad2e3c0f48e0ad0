"""Copies of shards in which each clip also has the output of a frozen audio encoder for its log-mel.

Training then reads what the encoder would say, and the encoder has nothing to do. It comes from outside: nothing here
knows a model.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from avs_dist.shards.faults import ClipFault, DamagedClipError
from avs_dist.shards.index import ClipEntry, ShardEntry, ShardIndex
from avs_dist.shards.members import AUDIO_MEMBER, decode_sound
from avs_dist.shards.read import ClipReader
from avs_dist.shards.records import Records, empty_record, locked
from avs_dist.shards.schema import AUDIO_ENCODER, CLIPS, MEL_BANDS, MEL_FRAMES, SILENT_LOG_MEL
from avs_dist.shards.segment import encode_npy, tar_segment
from avs_dist.shards.write import ShardWriter


@dataclass(frozen=True)
class AudioEncoder:
    """A frozen encoder of single seconds.

    kind:           its name in the configs.
    weights_sha256: tells its weights.
    encode:         mel_NFM float32 [N,96,64] -> float32 [N,128].
    """

    kind: str
    weights_sha256: str
    encode: Callable[[np.ndarray], np.ndarray]


class _Heard(NamedTuple):
    """A clip as it is stored, and its log-mel."""

    entry: ClipEntry
    members: dict[str, Any]
    mel_TFM: np.ndarray


def embed(
    index: ShardIndex,
    out: Path,
    encoder: AudioEncoder,
    *,
    batch: int = 32,
    max_skipped: float = 0.01,
    progress: bool = True,
) -> ShardIndex:
    """Write a copy of the shards with the member `{key}.audio.npy`, or finish one that was interrupted.

    All other members stay as they are, byte for byte. A damaged clip is left out and listed in `skipped`.

    Args:
        batch: Clips that are encoded at a time.
        max_skipped: Largest share of damaged clips.

    Raises:
        ValueError: If the shards hold features, or `out` something else, or another build is running there.
        RuntimeError: If more clips are damaged than `max_skipped` allows.
    """
    if index.kind != CLIPS:
        raise ValueError(f"{index.place} holds {index.kind}, not clips whose log-mel could be encoded")
    silence_D = encoder.encode(np.full((1, MEL_FRAMES, MEL_BANDS), SILENT_LOG_MEL, dtype=np.float32))[0]
    if not np.isfinite(silence_D).all():
        raise ValueError(f"{encoder.kind} gives NaN or infinite values for silence: its weights are damaged")
    facts = {"kind": encoder.kind, "weights_sha256": encoder.weights_sha256}
    settings = {k: v for k, v in index.settings.items() if k != AUDIO_ENCODER}
    settings["embedded_from"] = {**facts, "shards_sha256": _sha256_of_all(index)}
    total = sum(len(shard.clips) for shard in index.shards)
    with locked(out):
        records = Records(out, settings, max_skipped)
        finished = records.finished_index()
        if finished is not None:
            return finished
        with tqdm(total=total, desc="embed", unit="clip", disable=not progress) as bar:
            for split in index.splits:
                _embed_split(index, split, out, records, encoder, batch, bar)
                records.check_skipped(total)
        stored = {AUDIO_ENCODER: {**facts, "silence": silence_D.tolist()}}
        return records.finish(stored, skipped_before=index.skipped)


def _sha256_of_all(index: ShardIndex) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in index.shards).encode()).hexdigest()


def _embed_split(
    index: ShardIndex, split: str, out: Path, records: Records, encoder: AudioEncoder, batch: int, bar: tqdm
) -> None:
    """The shards of a split behind those of an earlier run, one for one."""
    reader, first = ClipReader(index, split), 0
    finished = len(records.take_up(split))
    for number, shard in enumerate(index.split(split)):
        if number < finished:
            bar.update(len(shard.clips))
        else:
            writer = ShardWriter(out, split, number)
            try:
                record = _embed_shard(reader, first, shard, writer, encoder, batch, bar)
            except BaseException:
                writer.abort()
                raise
            records.add(split, number, record)
        first += len(shard.clips)
    reader.close()


def _embed_shard(
    reader: ClipReader,
    first: int,
    shard: ShardEntry,
    writer: ShardWriter,
    encoder: AudioEncoder,
    batch: int,
    bar: tqdm,
) -> dict[str, Any]:
    """The record of the shard; `first` is the id of its first clip."""
    record = empty_record()
    for start in range(0, len(shard.clips), batch):
        heard = []
        for clip, entry in enumerate(shard.clips[start : start + batch], start=first + start):
            try:
                members = reader.members(clip)
                heard.append(_Heard(entry, members, decode_sound(members, entry.seconds).mel_TFM))
            except (DamagedClipError, ClipFault) as error:
                skipped = {"name": entry.name, "split": shard.split, "path": shard.name, "reason": str(error)}
                record["skipped"].append(skipped)
                bar.write(f"skipped {entry.name}: {error}", file=sys.stderr)
            record["taken"] += 1
            bar.update()
        _append(writer, heard, encoder)
    if len(record["skipped"]) < record["taken"]:
        record["shard"] = writer.close().to_dict()
    else:
        writer.abort()
    return record


def _append(writer: ShardWriter, heard: Sequence[_Heard], encoder: AudioEncoder) -> None:
    """Write clips with their sound encoded."""
    if not heard:
        return
    audio_ND = encoder.encode(np.concatenate([clip.mel_TFM for clip in heard]))
    ends = np.cumsum([len(clip.mel_TFM) for clip in heard])
    for clip, audio_TD in zip(heard, np.split(audio_ND, ends[:-1]), strict=True):
        members = {**clip.members, AUDIO_MEMBER: encode_npy(audio_TD)}
        writer.append(clip.entry, tar_segment(clip.entry.name, members))

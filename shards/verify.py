"""Checking a folder of shards against its index, and describing it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from textwrap import wrap

from tqdm import tqdm

from avs_dist.shards.faults import DamagedClipError, printable
from avs_dist.shards.files import opened_plain, sha256_of
from avs_dist.shards.index import ShardEntry, ShardIndex
from avs_dist.shards.read import ClipReader
from avs_dist.shards.schema import FEATURES


def verify(index: ShardIndex, progress: bool = True) -> list[str]:
    """Problems of the shards, each with shard and, for a clip, offset; empty when all is well.

    Checks size and SHA-256 of each shard, that the clips follow each other without a gap, and decodes every member of
    every clip as training does.

    Raises:
        ValueError: If the shards are at a URL, where reading checks them.
    """
    if not isinstance(index.directory, Path):
        raise ValueError(f"{index.place}: only shards on this machine can be verified; fetched ones always are")
    problems: list[str] = []
    total = sum(len(shard.clips) for shard in index.shards)
    with tqdm(total=total, desc="verify", unit="clip", disable=not progress) as bar:
        for split in index.splits:
            first, reader = 0, ClipReader(index, split)
            for shard in index.split(split):
                problems += _verify_file(index.directory / shard.name, shard)
                problems += _verify_clips(reader, shard, first, bar)
                first += len(shard.clips)
            reader.close()
    return problems


def _verify_file(path: Path, shard: ShardEntry) -> list[str]:
    try:
        with opened_plain(path) as file:
            size = os.fstat(file).st_size
    except OSError as error:
        return [f"shard {path}: cannot be read as a plain file: {error.strerror or error}"]
    problems = [] if size == shard.bytes else [f"shard {path}: {size} bytes, the index says {shard.bytes}"]
    if sha256_of(path) != shard.sha256:
        problems.append(f"shard {path}: the SHA-256 does not match the index")
    end = 0
    for clip in shard.clips:
        if clip.offset != end:
            problems.append(f"shard {path}, offset {clip.offset}, clip {clip.key}: expected at offset {end}")
        end = clip.offset + clip.length
    return problems


def _verify_clips(reader: ClipReader, shard: ShardEntry, first: int, bar: tqdm) -> list[str]:
    problems: list[str] = []
    for i, clip in enumerate(shard.clips):
        bar.update()
        try:
            sample = reader.sample(first + i)
        except DamagedClipError as error:
            problems.append(str(error))
            continue
        there, told = (sample.labelled_seconds, sample.sound), (clip.labelled, clip.sound)
        if there != told:
            where = f"shard {shard.name}, offset {clip.offset}, clip {clip.key}"
            problems.append(f"{where}: {there[0]} labelled seconds and sound {there[1]}, the index says {told}")
    return problems


def describe(index: ShardIndex) -> str:
    """A table that a person reads: splits, clips, seconds, sound, labels, sizes, source, classes or events, skipped."""
    settings = index.settings
    lines = [
        f"{index.place}: {settings.get('source', 'unknown source')}, {_content(index)}, "
        f"clips of at most {settings['clip_seconds']} s",
        f"rule: {settings.get('source_rule', 'not told')}",
        "",
        f"{'split':<8}{'shards':>7}{'clips':>8}{'seconds':>9}{'labelled':>10}"
        f"{'sound ok':>10}{'silent':>8}{'none':>6}{'MB':>10}",
    ]
    for split in index.splits:
        shards = index.split(split)
        clips = [clip for shard in shards for clip in shard.clips]
        sound = Counter(clip.sound for clip in clips)
        lines.append(
            f"{split:<8}{len(shards):>7}{len(clips):>8}{sum(c.seconds for c in clips):>9}"
            f"{sum(c.labelled for c in clips):>10}{sound['ok']:>10}{sound['silent']:>8}{sound['none']:>6}"
            f"{sum(s.bytes for s in shards) / 1e6:>10.1f}"
        )
    for kind, names in (("classes", index.classes), ("events", index.events)):
        if names:
            named = f"{len(names)} {kind}, from 0: {', '.join(names)}"
            lines += ["", *wrap(named, 118, break_long_words=False, break_on_hyphens=False)]
    lines += ["", f"skipped: {len(index.skipped)}"]
    told = (f"{clip['split']}/{clip['name']} ({clip['path']}): {clip['reason']}" for clip in index.skipped)
    lines += [f"  {printable(line)}" for line in told]
    return "\n".join(lines)


def _content(index: ShardIndex) -> str:
    """What a second of a clip is."""
    if index.kind == FEATURES:
        shapes = (f"{name} {'x'.join(map(str, shape))}" for name, shape in index.feature_shapes.items())
        return f"features {', '.join(shapes)} {index.settings['feature_dtype']}"
    return f"frames {index.image_size} x {index.image_size} {index.settings.get('frame_format', '')}"

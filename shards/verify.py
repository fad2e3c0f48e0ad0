"""Checking a folder of shards against its index, and describing it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import wrap

from tqdm import tqdm

from avs_dist.shards.files import sha256_of
from avs_dist.shards.index import ShardEntry, ShardIndex
from avs_dist.shards.read import ClipReader, DamagedClipError
from avs_dist.shards.schema import FEATURES, FeatureSample, Sample


def verify(index: ShardIndex, progress: bool = True) -> list[str]:
    """Problems of the shards, each with shard and, for a clip, offset; empty when all is well.

    Checks size and SHA-256 of each shard, that the clips follow each other without a gap, that their keys are unique,
    decodes every member of every clip, and sees that no mask holds more classes than there are, and that features and
    their labels have the shapes of the index.
    """
    problems: list[str] = []
    total = sum(len(shard.clips) for shard in index.shards)
    with tqdm(total=total, desc="verify", unit="clip", disable=not progress) as bar:
        for split in index.splits:
            shards = index.split(split)
            counts = Counter(clip.key for shard in shards for clip in shard.clips)
            problems += [f"split {split}: key {key} stands {n} times" for key, n in counts.items() if n > 1]
            first = 0
            reader = ClipReader(index, split)
            for shard in shards:
                problems += _verify_file(index.directory / shard.name, shard)
                problems += _verify_clips(index, reader, shard, first, bar)
                first += len(shard.clips)
    return problems


def _verify_file(path: Path, shard: ShardEntry) -> list[str]:
    if not path.is_file():
        return [f"shard {path}: the file is missing"]
    size = path.stat().st_size
    problems = [] if size == shard.bytes else [f"shard {path}: {size} bytes, the index says {shard.bytes}"]
    if sha256_of(path) != shard.sha256:
        problems.append(f"shard {path}: the SHA-256 does not match the index")
    end = 0
    for clip in shard.clips:
        if clip.offset != end:
            problems.append(f"shard {path}, offset {clip.offset}, clip {clip.key}: expected at offset {end}")
        end = clip.offset + clip.length
    return problems


def _verify_clips(index: ShardIndex, reader: ClipReader, shard: ShardEntry, first: int, bar: tqdm) -> list[str]:
    problems: list[str] = []
    for i, clip in enumerate(shard.clips):
        bar.update()
        try:
            sample = next(reader.samples([first + i]))
        except DamagedClipError as error:
            problems.append(str(error))
            continue
        where = f"shard {shard.name}, offset {clip.offset}, clip {clip.key}"
        facts = (sample.name, sample.seconds, sample.labelled_seconds, sample.sound)
        if facts != (clip.name, clip.seconds, clip.labelled, clip.sound):
            problems.append(f"{where}: holds {facts}, the index differs")
        differs = _features_differ if index.kind == FEATURES else _masks_differ
        problems += [f"{where}: {problem}" for problem in differs(index, sample)]
    return problems


def _masks_differ(index: ShardIndex, sample: Sample) -> list[str]:
    """What the masks of a clip hold against the index."""
    num_classes, highest = len(index.classes or ("silent", "sounding")), int(sample.masks_THW.max())
    if highest >= num_classes:
        return [f"a mask holds class {highest}, there are {num_classes} from 0 on"]
    return []


def _features_differ(index: ShardIndex, sample: FeatureSample) -> list[str]:
    """What the features and labels of a clip hold against the index."""
    shapes = {name: array.shape[1:] for name, array in sample.features.items()}
    problems = [] if shapes == index.feature_shapes else [f"shapes {shapes}, the index says {index.feature_shapes}"]
    num_events = {labels_TK.shape[1] for labels_TK in sample.labels.values()}
    if num_events - {len(index.events)}:
        problems.append(f"labels of {max(num_events)} events, the index names {len(index.events)}")
    return problems


def describe(index: ShardIndex) -> str:
    """A table that a person reads: splits, clips, seconds, sound, labels, sizes, source, classes or events, skipped."""
    settings = index.settings
    lines = [
        f"{index.directory}: {settings['source']}, {_content(index)}, clips of at most {settings['clip_seconds']} s",
        f"rule: {settings['source_rule']}",
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
    lines += [f"  {clip['split']}/{clip['name']} ({clip['path']}): {clip['reason']}" for clip in index.skipped]
    return "\n".join(lines)


def _content(index: ShardIndex) -> str:
    """What a second of a clip is."""
    if index.kind == FEATURES:
        shapes = (f"{name} {'x'.join(map(str, shape))}" for name, shape in index.feature_shapes.items())
        return f"features {', '.join(shapes)} {index.settings['feature_dtype']}"
    return f"frames {index.image_size} x {index.image_size} {index.settings['frame_format']}"

"""Builds of clips of frames: AVSBench, AVSS, VGGSound, any media files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from avs_dist.shards.build_config import SENTENCE, BuildConfig
from avs_dist.shards.files import sha256_of
from avs_dist.shards.make import make_sample
from avs_dist.shards.members import encode_clip
from avs_dist.shards.pool import DecodePool
from avs_dist.shards.recipe import Recipe, file_size, relative, shared_settings
from avs_dist.shards.schema import Sample
from avs_dist.shards.sources import ClipJob, avsbench, avss, vggsound, videos
from avs_dist.shards.sources.metadata import read_prompts
from avs_dist.shards.text import WordVectors
from avs_dist.shards.video_member import VIDEO
from avs_dist.shards.workers import ClipError, MediaWorker, VideoFacts

_SHOWN_ABSENT = 20


def clip_recipe(config: BuildConfig, pool: DecodePool) -> Recipe:
    """Recipe of a source of clips.

    Raises:
        FileNotFoundError, ValueError: If the source is not as published; see its `list_clips`.
    """
    listed = list_jobs(config, pool)
    jobs = [job for job in listed if config.source != "vggsound" or job.video]
    absent = _absent(config, listed) if len(jobs) < len(listed) else {}
    prompts = _prompts(config, jobs)
    vectors = WordVectors.load(config.word_vectors) if prompts else None

    def make(job: ClipJob, worker: MediaWorker) -> tuple[Sample, bytes]:
        sample, video = make_sample(job, worker, config.size, config.frames == VIDEO)
        if vectors:
            prompt = prompts[job.meta["category"]]
            sample = replace(sample, text_WE=vectors.of(prompt), meta={**sample.meta, "prompt": prompt})
        return sample, encode_clip(sample, config.frames, video)

    settings = {
        **shared_settings(config, [_line(job, config.root) for job in jobs]),
        "image_size": config.size,
        "frame_format": config.frames,
        "decode_video": config.decode_video,
        **({"stored_mel": True} if config.stored_mel else {}),
        **absent,
    }
    if config.source == "avss":
        settings["classes"] = list(avss.read_classes(config.root))
    if vectors:
        settings |= {"prompts": _source_of_prompts(config), "word_vectors": vectors.name, "word_channels": vectors.dim}
    return Recipe(jobs, make, settings)


def list_jobs(config: BuildConfig, pool: DecodePool) -> list[ClipJob]:
    """The clips of the source in the order of the shards; those of vggsound that are not there have no video.

    Raises:
        FileNotFoundError, ValueError: See the `list_clips` of the source.
    """
    if config.source == "videos":
        return videos.list_clips(config.root, config.longest_s, lambda paths: list(pool.map(_probe, paths)))
    if config.source == "avss":
        return avss.list_clips(config.root, config.longest_s)
    if config.source == "vggsound":
        return vggsound.list_clips(config.root, config.longest_s)
    layout = avsbench.LAYOUTS[config.source]
    return avsbench.list_clips(layout, config.root, config.longest_s, config.decode_video, config.stored_mel)


def _absent(config: BuildConfig, listed: list[ClipJob]) -> dict[str, Any]:
    """Settings that tell which listed videos are not there; of videos on the web many have gone, which is no fault."""
    names = [job.name for job in listed if not job.video]
    first = ", ".join(names[:5])
    if len(names) == len(listed):
        raise FileNotFoundError(f"--root {config.root}: none of the {len(names)} listed videos is below it ({first})")
    print(f"{len(names)} of {len(listed)} listed videos are not there and left out: {first} ...", file=sys.stderr)
    return {"absent": {"clips": len(names), "first": names[:_SHOWN_ABSENT]}}


def _probe(path: Path, worker: MediaWorker) -> VideoFacts | str:
    try:
        return worker.probe(path)
    except ClipError as error:
        return str(error)


def _line(job: ClipJob, root: Path) -> str:
    return f"{job.split}\t{job.name}\t{job.start_s}\t{relative(job.path, root)}\t{file_size(job.path)}"


def _prompts(config: BuildConfig, jobs: list[ClipJob]) -> dict[str, str]:
    """Prompt of each category; none where the build has none."""
    if config.prompts is None:
        return {}
    categories = tuple(dict.fromkeys(job.meta["category"] for job in jobs))
    if config.prompts == SENTENCE:
        return {category: f"the sound of a {category.replace('_', ' ')}" for category in categories}
    return read_prompts(Path(config.prompts), categories)


def _source_of_prompts(config: BuildConfig) -> Any:
    return SENTENCE if config.prompts == SENTENCE else sha256_of(Path(config.prompts or ""))

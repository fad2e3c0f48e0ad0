"""Builds of clips of frames: AVSBench, AVSS, any media files."""

from __future__ import annotations

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
from avs_dist.shards.sources import ClipJob, avsbench, avss, videos
from avs_dist.shards.sources.metadata import read_prompts
from avs_dist.shards.text import WordVectors
from avs_dist.shards.video_member import VIDEO
from avs_dist.shards.workers import ClipError, MediaWorker, VideoFacts


def clip_recipe(config: BuildConfig, pool: DecodePool) -> Recipe:
    """Recipe of a source of clips.

    Raises:
        FileNotFoundError, ValueError: If the source is not as published; see its `list_clips`.
    """
    jobs = _list_jobs(config, pool)
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
    }
    if config.source == "avss":
        settings["classes"] = list(avss.read_classes(config.root))
    if vectors:
        settings |= {"prompts": _source_of_prompts(config), "word_vectors": vectors.name}
    return Recipe(jobs, make, settings)


def _list_jobs(config: BuildConfig, pool: DecodePool) -> list[ClipJob]:
    """The clips of the source in the order of the shards."""
    if config.source == "videos":
        return videos.list_clips(config.root, config.longest_s, lambda paths: list(pool.map(_probe, paths)))
    if config.source == "avss":
        return avss.list_clips(config.root, config.longest_s)
    layout = avsbench.S4 if config.source == "avsbench-s4" else avsbench.MS3
    return avsbench.list_clips(layout, config.root, config.longest_s, config.decode_video)


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

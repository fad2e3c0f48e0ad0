"""Builds of stored features: VGGSound-AVEL, AVE, AVVP, lists by category."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from avs_dist.shards.build_config import BuildConfig
from avs_dist.shards.feature_members import encode_features
from avs_dist.shards.files import sha256_of
from avs_dist.shards.recipe import Recipe, file_size, relative, shared_settings
from avs_dist.shards.schema import FEATURES, FeatureSample
from avs_dist.shards.sources import FeatureJob, FeatureSource, ave, avvp, feature_list, vggsound_avel
from avs_dist.shards.text import WordVectors
from avs_dist.shards.workers import MediaWorker

_SOURCES: dict[str, Callable[[Path, int], FeatureSource]] = {
    "vggsound-avel": vggsound_avel.list_clips,
    "ave": ave.list_clips,
    "avvp": avvp.list_clips,
    "feature-list": feature_list.list_clips,
}

Shapes = dict[str, tuple[int, ...]]


def feature_recipe(config: BuildConfig) -> Recipe:
    """Recipe of a source of features; the first clip that can be read gives the shapes that all must have.

    Raises:
        FileNotFoundError, ValueError: If the source is not as published; see its `list_clips`.
        ValueError: If a clip is in two splits, or there are word vectors and no prompts.
    """
    source = list_features(config)
    _check_splits(source.jobs, config.root)
    prompted = any("prompt" in job.meta for job in source.jobs)
    if config.word_vectors is not None and not prompted:
        prompts = f"only vggsound-avel with its {vggsound_avel.PROMPTS} has them"
        raise ValueError(f"--word-vectors: --source {config.source} in {config.root} has no prompts ({prompts})")
    vectors = WordVectors.load(config.word_vectors) if prompted else None
    shapes = _first_shapes(source.jobs, vectors, config.features)

    def make(job: FeatureJob, _: MediaWorker) -> tuple[FeatureSample, bytes]:
        sample = make_features(job, vectors, config.features)
        if _shapes(sample) != shapes:
            raise ValueError(f"{job.path}: features of shapes {_shapes(sample)}, the first clip has {shapes}")
        return sample, encode_features(sample)

    lines = [_line(job, config.root) for job in source.jobs] + [sha256_of(path) for path in source.tables]
    settings = {
        **shared_settings(config, lines),
        "clips": len(source.jobs),
        "kind": FEATURES,
        "events": list(source.events),
        "feature_shapes": {name: list(shape) for name, shape in shapes.items()},
        "feature_dtype": config.features,
    }
    if vectors:
        settings["word_vectors"] = vectors.name
    return Recipe(source.jobs, make, settings)


def list_features(config: BuildConfig) -> FeatureSource:
    """What the source of `config` lists.

    Raises:
        FileNotFoundError, ValueError: See its `list_clips`.
    """
    return _SOURCES[config.source](config.root, config.longest_s)


def make_features(job: FeatureJob, vectors: WordVectors | None, dtype: str) -> FeatureSample:
    """Read one clip.

    Raises:
        ValueError, OSError: If it cannot be read, or its values do not fit in the type.
    """
    features, labels = job.read()
    if vectors:
        features = {**features, "text": vectors.of(job.meta["prompt"])}
    features = {name: _cast(array, name, dtype) for name, array in features.items()}
    return FeatureSample(job.name, features, labels, job.meta)


def _check_splits(jobs: list[FeatureJob], root: Path) -> None:
    splits: dict[str, str] = {}
    for job in jobs:
        if splits.setdefault(job.name, job.split) != job.split:
            raise ValueError(
                f"--root {root}: clip {job.name} is in {splits[job.name]} and in {job.split}; "
                "a clip must be in one split, or test scores are those of training clips"
            )


def _cast(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """The values as `dtype`, all of them finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"{name} features hold infinite values or NaN")
    highest = float(np.abs(array).max())
    if highest > float(np.finfo(dtype).max):
        raise ValueError(f"{name} features reach {highest:g}, more than {dtype} holds: build with --features float32")
    return array.astype(dtype)


def _first_shapes(jobs: list[FeatureJob], vectors: WordVectors | None, dtype: str) -> Shapes:
    """Shapes of the first clip that can be read."""
    reason = "no clip is listed"
    for job in jobs:
        try:
            return _shapes(make_features(job, vectors, dtype))
        except (ValueError, OSError) as error:
            reason = str(error)
    raise ValueError(f"no usable clip: {reason}")


def _shapes(sample: FeatureSample) -> Shapes:
    """Of one second, or one word, by modality."""
    return {name: array.shape[1:] for name, array in sample.features.items()}


def _line(job: FeatureJob, root: Path) -> str:
    files = "\t".join(f"{relative(path, root)}\t{file_size(path)}" for path in job.files)
    return f"{job.split}\t{job.name}\t{files}\t{json.dumps(job.meta, sort_keys=True)}"

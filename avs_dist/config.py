"""Frozen dataclasses: the single source of truth for every setting of a run.

YAML files and dotted command-line overrides are read into them by `launch/`; the DeepSpeed dict is derived from them
in `engine.py`; the resolved config is saved beside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{key}={value}: must be at least {least}")


@dataclass(frozen=True)
class DataConfig:
    """Where the clips come from.

    Args:
        shards: Folder with index.json and the tar shards (`avs-dist shards build`).
        train_split: Split used for training.
        eval_split: Split used for the evaluations during training.
        workers: Decoding processes per rank (0 decodes in the training process).
        shuffle_window: Clips that are mixed at a time, counted over consecutive (shuffled) shards.
    """

    shards: str = "shards"
    train_split: str = "train"
    eval_split: str = "val"
    workers: int = 2
    shuffle_window: int = 4096

    def __post_init__(self) -> None:
        _at_least("data.workers", self.workers, 0)
        _at_least("data.shuffle_window", self.shuffle_window, 1)


@dataclass(frozen=True)
class BackboneConfig:
    """Visual backbone, any timm model that supports features_only.

    Args:
        name: timm model name; the papers use pvt_v2_b5 and resnet50.
        weights: "none", "hub" (ImageNet weights through timm), or a local .safetensors/.pth file.
    """

    name: str = "pvt_v2_b5"
    weights: str = "none"


@dataclass(frozen=True)
class AudioConfig:
    """Audio encoder: one vector of 128 numbers for each second.

    Args:
        kind: "vggish" (frozen, needs weights) or "logmel_cnn" (small, trained from scratch).
        weights: Local VGGish weights file (.safetensors or .pth state dict).
    """

    kind: Literal["vggish", "logmel_cnn"] = "vggish"
    weights: str | None = None


@dataclass(frozen=True)
class NeckConfig:
    """Channel reduction after each backbone stage.

    Args:
        kind: "dilated" (TPAVI paper: sum of four dilated 3x3 convolutions) or "one_layer" (one 3x3 convolution).
        channels: Output channels of every stage (TPAVI paper: 256).
    """

    kind: Literal["dilated", "one_layer"] = "dilated"
    channels: int = 256


@dataclass(frozen=True)
class TPAVIConfig:
    """Temporal pixel-wise audio-visual interaction.

    Args:
        stages: Backbone stages that carry a TPAVI block (0 is the finest); empty = no audio at all.
        time_aligned: Learn a T x T mixing of the scores, so that a pixel knows its own second (ours).
        key: Attend to audio (paper: va), to visual tokens (vv), or the mean of both.
        implementation: "auto" (the fastest there is: Triton on a GPU, torch elsewhere), or one of the same result:
            "triton", "rank_t" (the same form in torch), "literal" (the published N x N formula).
        l2_normalise: Normalise tokens and audio over the channels first, as ECMVAE does.
    """

    stages: tuple[int, ...] = (0, 1, 2, 3)
    time_aligned: bool = False
    key: Literal["audio", "visual", "both"] = "audio"
    implementation: Literal["auto", "triton", "rank_t", "literal"] = "auto"
    l2_normalise: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        system: Which published system to build.
        compat: "paper", or "published_code" to reproduce where the public code departs from it.
    """

    system: Literal["tpavi"] = "tpavi"
    compat: Literal["paper", "published_code"] = "paper"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    tpavi: TPAVIConfig = field(default_factory=TPAVIConfig)


@dataclass(frozen=True)
class LossConfig:
    """Weights and variants of the losses.

    Args:
        avm: Audio-visual matching loss (TPAVI paper eq. 6 and its published variants), or "none".
        avm_weight: Its weight (published: 0.5).
        avm_stages: Stages it is applied to.
    """

    avm: Literal["none", "s4_cosine", "ms3_kl", "ms3_euclidean", "visual_visual", "avss_kl"] = "none"
    avm_weight: float = 0.5
    avm_stages: tuple[int, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule.

    Args:
        name: "adam" (published) or "adamw".
        lr: Peak learning rate (published: 1e-4).
        weight_decay: Decoupled for adamw, L2 for adam.
        warmup_steps: Linear warm-up from 0.
        schedule: After warm-up: "constant" (published) or "cosine" to 0 at train.max_steps.
        clip_norm: Global gradient norm limit; 0 = none.
    """

    name: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps", "clip_norm"):
            _at_least(f"optim.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed settings; the DeepSpeed dict is derived from these.

    Args:
        zero_stage: ZeRO stage: 0 none, 1 optimiser states, 2 + gradients, 3 + parameters are sharded over ranks.
        precision: Arithmetic of the network: fp32 or bf16 (losses stay in fp32).
        grad_accumulation: Micro-batches summed before a step; train.global_batch is split over them and the ranks.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_accumulation: int = 1

    def __post_init__(self) -> None:
        _at_least("engine.grad_accumulation", self.grad_accumulation, 1)


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_steps: Optimiser steps of the run.
        global_batch: Clips per optimiser step, over all ranks and micro-batches.
        out_dir: Checkpoints, TensorBoard logs and metrics.jsonl go here.
        eval_every: Steps between evaluations (and checkpoints); 0 = only at the end.
        log_every: Steps between log lines.
        resume: Continue from the last checkpoint in out_dir.
    """

    max_steps: int = 1000
    global_batch: int = 4
    out_dir: str = "runs/run"
    eval_every: int = 0
    log_every: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch", "log_every"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.eval_every", self.eval_every, 0)


@dataclass(frozen=True)
class Config:
    """One run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of lists, numbers and strings (JSON and YAML safe)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """Stable short hash of a config or of its `to_dict`: the same in every process and on every machine."""
    values = config if isinstance(config, dict) else to_dict(config)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`.

    Raises:
        ValueError: unknown key or wrong type, naming it.
    """
    return _build(Config, values, "")


def _build(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config: {path or 'top level'} must be a mapping, got {type(values).__name__}")
    types = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}{key}"
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            raise ValueError(f"config: unknown key '{where}'" + (f" (did you mean {path}{near[0]}?)" if near else ""))
        if dataclasses.is_dataclass(types[key]):
            value = _build(types[key], value, f"{where}.")
        elif typing.get_origin(types[key]) is tuple:
            value = tuple(value)
        kwargs[key] = value
    return cls(**kwargs)

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

from avs_dist.data_config import DataConfig
from avs_dist.model_config import (
    AudioConfig,
    BackboneConfig,
    CodebookConfig,
    DecoderConfig,
    DiffusionConfig,
    LatentConfig,
    ModelConfig,
    NeckConfig,
    QueryConfig,
    TPAVIConfig,
    UnicodeConfig,
    at_least,
    share,
)

__all__ = [  # those of the network are settings of a run like the others
    "AudioConfig",
    "BackboneConfig",
    "CodebookConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "DiffusionConfig",
    "DiffusionLossConfig",
    "EngineConfig",
    "LatentConfig",
    "LatentLossConfig",
    "LossConfig",
    "ModelConfig",
    "NeckConfig",
    "OptimConfig",
    "QueryConfig",
    "TPAVIConfig",
    "TrainConfig",
    "UnicodeConfig",
    "UnicodeLossConfig",
    "config_hash",
    "flat",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True)
class LatentLossConfig:
    """What ECMVAE asks of its codes; the names in brackets are those of the paper.

    Args:
        divergence: Between posterior and prior of the shared code: Jensen-Shannon ("js", eq. 5, or "js_geometric",
            with the geometric mean of the two as dynamic prior), or "kl" (Table 4).
        draws: Samples of each distribution that estimate "js".
        beta: Weight of all divergences (beta).
        posterior_share: Weight of the masks painted from posterior codes, and of beta; the rest is for masks from
            prior codes (alpha_1, eq. 8).
        orthogonality: Weight of L_diff (lambda_1, eq. 9).
        information: Weight of L_sic (lambda_2, eq. 12).
        information_posterior_share: Share of the posterior codes in L_sic and L_diff (alpha_2).
        standardise: Take L_diff and L_sic of codes with zero mean and unit variance over the global batch, L_diff as
            their squared correlations (ours); as printed, both reward codes that shrink to nothing.
    """

    divergence: Literal["js", "js_geometric", "kl"] = "js"
    draws: int = 8
    beta: float = 0.1
    posterior_share: float = 0.5
    orthogonality: float = 0.001
    information: float = 0.01
    information_posterior_share: float = 0.5
    standardise: bool = False

    def __post_init__(self) -> None:
        at_least("loss.latent.draws", self.draws, 1)
        for name in ("beta", "orthogonality", "information"):
            at_least(f"loss.latent.{name}", getattr(self, name), 0)
        for name in ("posterior_share", "information_posterior_share"):
            share(f"loss.latent.{name}", getattr(self, name))


@dataclass(frozen=True)
class DiffusionLossConfig:
    """What latent diffusion asks of its codes; the names in brackets are those of the paper.

    Args:
        denoising: Weight of L_diffusion (lambda_1, eq. 8 and 12).
        contrastive: Weight of L_contrastive (lambda_2, eq. 11 and 12); 0 = without (Table V). It compares the clips of
            all ranks, not those of other micro-batches: engine.grad_accumulation changes it.
        temperature: Of the contrastive loss (tau).
        trains: What the contrastive loss trains: the "condition" encoder alone (first version of the paper, eq. 10),
            or "both" encoders (second version).
        symmetric: Also tell the condition of a code among all, not only the code of a condition (ours).
    """

    denoising: float = 1.0
    contrastive: float = 0.1
    temperature: float = 1.0
    trains: Literal["condition", "both"] = "both"
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name in ("denoising", "contrastive"):
            at_least(f"loss.diffusion.{name}", getattr(self, name), 0)
        if self.temperature <= 0:
            raise ValueError(f"loss.diffusion.temperature={self.temperature}: must be positive")


@dataclass(frozen=True)
class UnicodeLossConfig:
    """What Uni-Code asks of its semantic vectors; the names in brackets are those of the paper.

    Args:
        reconstruction: Weight of L_recon (eq. 3).
        commitment: Weight of L_commit (beta, eq. 8).
        club: Weight of the information that semantic and specific vectors share (L_MI, eq. 5); 0 = without.
        club_estimate: Compare with all clips ("variational", eq. 5), or each with one other ("sampled").
        club_input: What takes the place of the semantic vector: itself (paper), or its code ("quantised", public code).
        club_steps: Steps of the network of eq. 4 on each batch, before the main step (public code: 5).
        club_lr: Learning rate of these steps.
        cpc: Weight of Cross-CPC (L_cpc, eq. 6); 0 = without. Negatives are the clips of all ranks.
        cpc_self: Weight of predicting the own modality, relative to Cross-CPC (public code: 0.1).
        align: What else pulls the modalities together: code matching (CMCM, L_cmcm), or, for the baselines of Table 1,
            "margin" (S-MiT), "contrast" (MST, with shared_encoder), "transport" (CODIS), "cross_reconstruction"
            (TURN); or "none".
        align_weight: Its weight (paper: 1, public code: 0.5).
    """

    reconstruction: float = 1.0
    commitment: float = 0.25
    club: float = 1.0
    club_estimate: Literal["variational", "sampled"] = "variational"
    club_input: Literal["semantic", "quantised"] = "semantic"
    club_steps: int = 5
    club_lr: float = 1e-3
    cpc: float = 1.0
    cpc_self: float = 0.0
    align: Literal["code_matching", "margin", "contrast", "transport", "cross_reconstruction", "none"] = "code_matching"
    align_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("reconstruction", "commitment", "club", "club_lr", "cpc", "cpc_self", "align_weight"):
            at_least(f"loss.unicode.{name}", getattr(self, name), 0)
        at_least("loss.unicode.club_steps", self.club_steps, 1)


@dataclass(frozen=True)
class LossConfig:
    """Weights and variants of the losses.

    Args:
        segmentation: "bce" (TPAVI paper), "structure": BCE weighted near edges plus weighted IoU (ECMVAE paper),
            "dice" (AVSegFormer), or, for several classes, "cross_entropy" (AVSS).
        mix: Weight of the mixing loss of the transformer decoder (AVSegFormer: 0.1).
        avm: Audio-visual matching loss (TPAVI paper eq. 6 and its published variants), or "none".
        avm_weight: Its weight (published: 0.5).
        avm_stages: Stages it is applied to.
        avm_normalise: L2-normalise what the AVM loss compares (flag norm_fea of the public codes).
    """

    segmentation: Literal["bce", "structure", "dice", "cross_entropy"] = "bce"
    mix: float = 0.1
    avm: Literal["none", "s4_cosine", "ms3_kl", "ms3_euclidean", "visual_visual", "avss_kl"] = "none"
    avm_weight: float = 0.5
    avm_stages: tuple[int, ...] = (0, 1, 2, 3)
    avm_normalise: bool = False
    latent: LatentLossConfig = field(default_factory=LatentLossConfig)
    diffusion: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    unicode: UnicodeLossConfig = field(default_factory=UnicodeLossConfig)

    def __post_init__(self) -> None:
        at_least("loss.mix", self.mix, 0)


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
            at_least(f"optim.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed settings; the DeepSpeed dict is derived from these.

    Args:
        zero_stage: ZeRO stage: 0 none, 1 optimiser states, 2 + gradients, 3 + parameters are sharded over ranks.
        precision: Arithmetic of the network: fp32 or bf16 (losses stay in fp32, and so do the optimiser's weights and
            moments and the sums of gradients; ZeRO 0 adds the micro-batches of a rank up in bf16).
        grad_accumulation: Micro-batches summed before a step; train.global_batch is split over them and the ranks.
        timeout_s: Longest time that a rank waits for its next batch. It waits 1.25 times as long for other ranks, and
            is 1.5 times as long in a step, an evaluation batch or a save; then the run ends and says who did or waited
            for what. 0 = torch's limits for other ranks, none else.
        offload: "optimizer" keeps masters and moments in the memory of the host, and updates the weights there; for
            ZeRO 1 to 3.
        activation_checkpointing: Keep no activations inside the blocks of the backbone, but compute them again in the
            backward pass: less memory, a second forward pass of the backbone, the same numbers.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_accumulation: int = 1
    timeout_s: float = 600.0
    offload: Literal["none", "optimizer"] = "none"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        at_least("engine.grad_accumulation", self.grad_accumulation, 1)
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"engine.offload={self.offload} needs engine.zero_stage 1, 2 or 3")
        at_least("engine.timeout_s", self.timeout_s, 0)


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_steps: Optimiser steps of the run.
        global_batch: Clips per optimiser step, over all ranks and micro-batches.
        out_dir: Checkpoints, TensorBoard logs and metrics.jsonl go here.
        eval_every: Steps between evaluations (and checkpoints); 0 = only at the end.
        save_every: Steps between checkpoints beside those of evaluations; 0 = none.
        save_async: Write checkpoints while the training goes on; takes host memory for a copy of the state.
        keep_last: Checkpoints that are kept, beside the best.
        log_every: Steps between log lines.
        resume: Continue from the last checkpoint in out_dir.
        init_from: Start from the weights of this checkpoint or run of the same model (MS3 from S4).
        fork_from: Go on from all that this checkpoint or run of the same model and data has (optimiser, step, place in
            the data) with the settings given here.
        max_nonfinite: Steps in a row whose loss or gradient may be NaN or infinite: all ranks skip such a step as if it
            had not been; with more the run stops.
    """

    max_steps: int = 1000
    global_batch: int = 4
    out_dir: str = "runs/run"
    eval_every: int = 0
    save_every: int = 0
    save_async: bool = False
    keep_last: int = 2
    log_every: int = 10
    resume: bool = False
    init_from: str | None = None
    fork_from: str | None = None
    max_nonfinite: int = 10

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch", "log_every", "keep_last"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("eval_every", "save_every", "max_nonfinite"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if self.init_from and self.fork_from:
            raise ValueError("train.init_from and train.fork_from are two different starts: give one of them")


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
        at_least("seed", self.seed, 0)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of lists, numbers and strings (JSON and YAML safe)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a nested dict by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return found


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

"""Checkpoints of small systems that were never trained."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from avs_dist.config import AudioConfig, BackboneConfig, Config, DataConfig, ModelConfig, NeckConfig
from avs_dist.saving import seal
from avs_dist.systems import build_system


def small_model(**options: object) -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig(name="resnet10t"),
        neck=NeckConfig(kind="one_layer", channels=32),
        audio=AudioConfig(kind="logmel_cnn"),
        **options,  # type: ignore[arg-type]
    )


def write_checkpoint(folder: Path, model: ModelConfig, shards: Path | str = "shards") -> Path:
    """A checkpoint for frames of 64 x 64."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(model=model, data=DataConfig(shards=str(shards), workers=0))
    torch.manual_seed(0)
    weights = build_system(config, load_pretrained=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    seal(folder, config, step=0, image_size=64, metrics={})
    return folder

"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch

from avs_dist.config import OptimConfig
from avs_dist.systems.base import System


def build_optimizer(system: System, config: OptimConfig) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(system.parameter_groups(), lr=config.lr, weight_decay=config.weight_decay)


def lr_factor(step: int, max_steps: int, config: OptimConfig) -> float:
    """Factor on the peak learning rate at `step` (from 0): linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

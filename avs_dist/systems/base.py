"""The System protocol: all that the trainer, the evaluation and the prediction know of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip


@dataclass(frozen=True)
class Prediction:
    """Output of a system: mask logits [B,T,H,W] (float32) at the size of the input frames."""

    logits_BTHW: Tensor

    @property
    def probabilities_BTHW(self) -> Tensor:
        return self.logits_BTHW.sigmoid()


class System(nn.Module, ABC):
    """A complete trainable system, assembled from modules in its constructor from a typed config."""

    @abstractmethod
    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """Weighted loss terms (scalars, float32); the trainer sums them."""

    @abstractmethod
    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch, without gradient."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups; parameters without gradient (frozen encoders) are left out."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, method: Literal["loss_terms", "predict"], *args: Any) -> Any:
        """Run a method through __call__, where DeepSpeed's hooks gather sharded parameters."""
        return getattr(self, method)(*args)

"""The System protocol: all that the trainer, the evaluation and the prediction know of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.modules.backbone import Backbone
from avs_dist.modules.recompute import recompute_blocks

Query = Literal["audio", "text"]

OBSERVED = "observed/"  # prefix of what is logged and is no loss


@dataclass(frozen=True)
class Prediction:
    """Output of a system, at the size of the input frames.

    logits_BTHW:        mask logits (float32); those of the mean probability where several masks were drawn.
                        With several classes: log odds that the pixel is not background.
    variance_BTHW:      variance of the probability over the masks drawn; None where the system draws none.
    class_logits_BTKHW: logits of K classes, the first is the background; None where there is only sounding or silent.
    """

    logits_BTHW: Tensor
    variance_BTHW: Tensor | None = None
    class_logits_BTKHW: Tensor | None = None

    @property
    def probabilities_BTHW(self) -> Tensor:
        return self.logits_BTHW.sigmoid()


@dataclass(frozen=True)
class LatentCodes:
    """Distributions of the codes of a batch, by the name of the code; each [B,T,L], zero where there is no frame."""

    prior: dict[str, Gaussian | Mixture]
    posterior: dict[str, Gaussian | Mixture]  # empty where the system has none


@dataclass(frozen=True)
class Encoded:
    """One modality of a batch in the codebook; zero where there is no step.

    semantic_BTD:   before quantisation.
    quantised_BTD:  the code of each step.
    indices_BT:     which code, int64; -1 where there is no step.
    valid_BT:       which steps exist.
    """

    semantic_BTD: Tensor
    quantised_BTD: Tensor
    indices_BT: Tensor
    valid_BT: Tensor


class System(nn.Module, ABC):
    """A complete trainable system, assembled from modules in its constructor from a typed config."""

    num_samples: int | None = None  # masks that a prediction averages, of a system that draws several
    query: Query | None = None  # what asks in a prediction, of a system that answers queries

    def __init__(self) -> None:
        super().__init__()
        self._observed: dict[str, Tensor] = {}

    def observe(self, name: str, value: Tensor) -> None:
        """Have a number of the last `loss_terms` logged beside the losses, as a mean over ranks; it trains nothing."""
        self._observed[f"{OBSERVED}{name}"] = value.detach()

    def take_observed(self) -> dict[str, Tensor]:
        """What was observed since the last call."""
        observed, self._observed = self._observed, {}
        return observed

    @abstractmethod
    def loss_terms(self, clip: Any, step: int) -> dict[str, Tensor]:
        """Weighted loss terms (scalars, float32) of a batch; the trainer sums them."""

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch, without gradient.

        Raises:
            ValueError: the system paints no masks.
        """
        raise ValueError(f"{type(self).__name__} paints no masks: measure its codes with `avs-dist downstream`")

    def latents(self, clip: Clip) -> LatentCodes | None:
        """Latent codes of a batch in eval mode, without gradient; None for a system that has none."""
        return None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradient; the mode is put back."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups; parameters without gradient (frozen encoders) are left out."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def recompute_activations(self) -> list[nn.Module]:
        """Have the blocks of the backbones that learn keep no activations (engine.activation_checkpointing).

        Returns:
            The blocks.

        Raises:
            ValueError: there are none.
        """
        backbones = [module for module in self.modules() if isinstance(module, Backbone)]
        learning = [backbone for backbone in backbones if any(p.requires_grad for p in backbone.parameters())]
        blocks = [block for backbone in learning for block in recompute_blocks(backbone)]
        if not blocks:
            raise ValueError(
                f"engine.activation_checkpointing: {type(self).__name__} has no backbone made of blocks; leave it off"
            )
        return blocks

    def forward(self, method: Literal["loss_terms", "predict", "latents", "encode"], *args: Any) -> Any:
        """Run a method through __call__, where DeepSpeed's hooks gather sharded parameters."""
        return getattr(self, method)(*args)

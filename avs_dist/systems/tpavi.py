"""The TPAVI baseline ("Audio-Visual Segmentation"): backbone -> neck -> TPAVI at chosen stages -> decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.systems.base import Prediction, System
from avs_dist.systems.generator import Generator, Masks, Seen, see_and_hear
from avs_dist.systems.matching import check_matching, matching_terms
from avs_dist.systems.segmentation import check_segmentation, segmentation_terms
from avs_dist.systems.trunk import Trunk


class TPAVISystem(System):
    """Mask logits of every second from its frame and the sound of all seconds.

    Frames that do not exist (`valid_BT`) are not computed at all; their logits are zero.

    Raises:
        ValueError: stages outside 0..3, an AVM loss at a stage without audio, or a loss for another number of classes.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        check_segmentation(config)
        self.config = config
        self.trunk = Trunk(config.model, load_pretrained)
        self.generator = Generator(config.model, self.trunk)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """The segmentation loss under its name, "mix" of the transformer decoder, and "avm" where configured; `step`
        has no influence but on stochastic depth."""
        seen, masks = self._paint(clip, ClipDraws(self.config.seed, step, clip.key))
        matching = matching_terms(self.config, clip, masks, self.trunk, seen)
        return segmentation_terms(self.config, clip, masks) | matching

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch in eval mode, without gradient; deterministic, `generator` is not used."""
        with self.evaluating():
            _, masks = self._paint(clip)
            return Prediction(masks.logits_BTHW, class_logits_BTKHW=masks.class_logits_BTKHW)

    def _paint(self, clip: Clip, draws: ClipDraws | None = None) -> tuple[Seen, Masks]:
        seen = see_and_hear(self.trunk, clip, draws)
        return seen, self.generator.paint(self.trunk, seen, self.generator.prepare(self.trunk, seen))

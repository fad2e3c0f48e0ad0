"""Segmentation of what a query means (Uni-Code, section 5.1, AVS-S4): the TPAVI network hears codes in place of sound.

Sound and words have the same codes, so a network that was trained with queries of one kind answers those of the other
(A2T: trained with audio, asked in text; T2A the other way round).
"""

from __future__ import annotations

import torch
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.systems.base import Prediction, Query, System
from avs_dist.systems.generator import Generator, Masks, Seen
from avs_dist.systems.matching import check_matching, matching_terms
from avs_dist.systems.query_encoder import QueryEncoder
from avs_dist.systems.segmentation import check_segmentation, segmentation_terms
from avs_dist.systems.trunk import Existing, Trunk


class QuerySystem(System):
    """Mask logits of every second from its frame and the codes of a query; these come from a frozen encoder.

    model.query.modality asks in training, and at first in `predict`; see `set_query`.

    Raises:
        ValueError, FileNotFoundError: those of `TPAVISystem` and `QueryEncoder`; nothing listens to the query.
    """

    query: Query

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        check_segmentation(config)
        self.config = config
        self.query = config.model.query.modality
        self.trunk = Trunk(config.model, load_pretrained, query_channels=config.model.unicode.dim)
        if not self.trunk.heard_channels:
            raise ValueError(
                f"model.tpavi.stages={list(config.model.tpavi.stages)}, model.tpavi.key={config.model.tpavi.key}: "
                "nothing listens to the query; name stages, and audio or both as key"
            )
        self.generator = Generator(config.model, self.trunk)
        self.encoder = QueryEncoder(config, load_pretrained)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """The segmentation loss under its name, "mix" of the transformer decoder, and "avm" where configured; `step`
        has no influence but on stochastic depth."""
        draws = ClipDraws(self.config.seed, step, clip.key)
        seen, masks = self._paint(clip, self.config.model.query.modality, draws)
        matching = matching_terms(self.config, clip, masks, self.trunk, seen)
        return segmentation_terms(self.config, clip, masks) | matching

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch in eval mode, without gradient; deterministic, `generator` is not used.

        Raises:
            ValueError: text asks, and clips have none.
        """
        with self.evaluating():
            _, masks = self._paint(clip, self.query)
            return Prediction(masks.logits_BTHW, class_logits_BTKHW=masks.class_logits_BTKHW)

    def _paint(self, clip: Clip, query: Query, draws: ClipDraws | None = None) -> tuple[Seen, Masks]:
        codes_BTD = self.encoder(clip, query)
        exist = Existing(clip.valid_BT)
        seen = Seen(exist, exist.select(clip.normalised_BTCHW), self.trunk.see(clip, exist, draws), codes_BTD)
        return seen, self.generator.paint(self.trunk, seen, self.generator.prepare(self.trunk, seen))


def set_query(system: System, query: Query) -> None:
    """Have `query` ask in the predictions of `system`.

    Raises:
        ValueError: it answers no queries.
    """
    if system.query is None:
        raise ValueError(f"query {query}: {type(system).__name__} answers no queries; train with model.system=query")
    system.query = query

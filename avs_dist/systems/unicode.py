"""Uni-Code: one codebook for picture, sound and text ("Achieving Cross Modal Generalization with Multimodal Unified
Representation"), its ablations, and the methods that the paper compares it with; all are settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avs_dist import world
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.modules.codebook import CodebookOutput, MultiModalCodebook
from avs_dist.modules.conditional_gaussian import ConditionalGaussian
from avs_dist.modules.cross_cpc import CrossPredictor
from avs_dist.modules.modality import ModalityNetwork, Specific, build_modality
from avs_dist.modules.sequence_encoders import TemporalEncoder
from avs_dist.sequences import Sequences
from avs_dist.systems.alignment import alignment_loss
from avs_dist.systems.base import Encoded, System
from avs_dist.systems.disentangling import club_loss, cpc_loss
from avs_dist.systems.unicode_inputs import Input, build_inputs
from avs_dist.world import counted_mean


class Heard(NamedTuple):
    """What the encoders make of a batch, by modality."""

    inputs: dict[str, Input]
    valid: dict[str, Tensor]  # bool [B,T]
    semantic: dict[str, Tensor]  # [B,T,D]
    specific: dict[str, Specific]


class UnicodeSystem(System):
    """Semantic vectors of every second of each modality, their codes, and the losses that make the codes agree.

    The codebook, and the networks of CLUB, learn in `loss_terms` in training mode, beside the optimiser. All draws
    depend on seed, step and clip alone.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        unicode, losses = config.model.unicode, config.loss.unicode
        self.modalities: tuple[str, ...] = unicode.modalities
        self.inputs = build_inputs(config.model, load_pretrained)
        self.networks = nn.ModuleDict(
            {
                modality: build_modality(
                    modality,
                    self.inputs.feature_shapes[modality],
                    unicode,
                    target_channels=self.inputs.target_shapes[modality][-1],
                    summarise=losses.club > 0,
                )
                for modality in self.modalities
            }
        )
        self.projections = nn.ModuleDict(
            {m: nn.Linear(self._network(m).semantic_channels, unicode.dim) for m in self.modalities}
        )
        names = ("shared",) if unicode.shared_encoder else self.modalities
        self.encoders = nn.ModuleDict(
            {n: TemporalEncoder(None, unicode.dim, unicode.layers, unicode.heads, unicode.dropout) for n in names}
        )
        codebook = unicode.codebook
        self.codebook = MultiModalCodebook(
            codebook.num_codes,
            unicode.dim,
            codebook.decay,
            modalities=self.modalities,
            update=codebook.update,
            teacher=codebook.teacher,
            beta=losses.commitment,
            cross_commitment=codebook.cross_commitment,
            reset_after=codebook.reset_after,
            reset_rule=codebook.reset_rule,
            reduce=world.all_reduce_sum,
            seed=config.seed,
        )
        if losses.club > 0:
            self.club = nn.ModuleDict(
                {
                    m: ConditionalGaussian(unicode.dim, self._network(m).summary_channels, learning_rate=losses.club_lr)
                    for m in self.modalities
                }
            )
        if losses.cpc > 0:
            self.predictor = CrossPredictor(
                self.modalities, unicode.dim, unicode.predict_steps, unicode.context_layers, own=losses.cpc_self > 0
            )

    def loss_terms(self, clip: Sequences, step: int) -> dict[str, Tensor]:
        """ "reconstruction", "commitment", "club", "cpc" and "align", those that have a weight (section 4.4)."""
        losses = self.config.loss.unicode
        heard = self._hear(clip, self.modalities, step)
        coded = self.codebook(heard.semantic, heard.valid)
        terms = {
            "reconstruction": losses.reconstruction * self._reconstruction(heard, coded.quantised),
            "commitment": self._sum(coded.commitment, heard.valid),
        }
        if losses.club > 0:
            known = heard.semantic if losses.club_input == "semantic" else coded.quantised
            summaries = {m: heard.specific[m].summary_BTS for m in self.modalities}
            found = club_loss(self.config, self.club, known, summaries, heard.valid, step, learn=self.training)
            terms["club"] = losses.club * found.information
            self.observe("club_log_likelihood", found.log_likelihood)
        if losses.cpc > 0:
            terms["cpc"] = losses.cpc * cpc_loss(self.config, self.predictor, heard.semantic, heard.valid, step)
        if losses.align_weight > 0 and losses.align != "none":
            terms["align"] = losses.align_weight * self._alignment(heard, coded)
        self._observe_codes(coded, heard.valid)
        return {name: term.float() for name, term in terms.items()}

    def encode(self, clip: Sequences) -> dict[str, Encoded]:
        """Codes of the modalities that a batch holds, in eval mode, without gradient and without any collective."""
        with self.evaluating():
            heard = self._hear(clip, [m for m in self.modalities if m in clip.inputs], specific=False)
            coded = self.codebook(heard.semantic, heard.valid)
            return {
                m: Encoded(z_BTD.float(), coded.quantised[m].float(), coded.indices[m], heard.valid[m])
                for m, z_BTD in heard.semantic.items()
            }

    def _hear(
        self, clip: Sequences, modalities: Sequence[str], step: int | None = None, specific: bool = True
    ) -> Heard:
        inputs, semantic, private = {}, {}, {}
        for m in modalities:
            valid_BT = clip.valid[m]
            inputs[m] = self.inputs(m, clip)
            features_BTF = self._network(m).semantic_features(inputs[m].features, valid_BT)
            encoder = self.encoders["shared" if self.config.model.unicode.shared_encoder else m]
            semantic[m] = encoder(self.projections[m](features_BTF), valid_BT, self._draws(clip, m, step))
            if specific:
                private[m] = self._network(m).specific(inputs[m].features, valid_BT)
        return Heard(inputs, {m: clip.valid[m] for m in modalities}, semantic, private)

    def _draws(self, clip: Sequences, modality: str, step: int | None) -> Tensor | None:
        if step is None or self.config.model.unicode.dropout == 0:
            return None
        numbers_B = ClipDraws(self.config.seed, step, clip.key).numbers(f"dropout/{modality}")
        return numbers_B.to(clip.valid[modality].device, non_blocking=True)

    def _reconstruction(self, heard: Heard, quantised: Mapping[str, Tensor]) -> Tensor:
        """Sum over the modalities of the squared error, a mean over the numbers of a second (eq. 3)."""
        errors = {m: self._error(heard, m, quantised[m]) for m in self.modalities}
        return self._sum(errors, heard.valid)

    def _error(self, heard: Heard, modality: str, quantised_BTD: Tensor) -> Tensor:
        rebuilt = self._network(modality).decode(quantised_BTD, heard.specific[modality].features)
        return (rebuilt.float() - heard.inputs[modality].target.float()).square().flatten(2).mean(2)

    def _alignment(self, heard: Heard, coded: CodebookOutput) -> Tensor:
        align = self.config.loss.unicode.align
        if align != "cross_reconstruction":
            assert align != "none"
            return alignment_loss(align, heard.semantic, heard.valid, coded.codes_LD)
        # TURN: what is specific to a modality is joined with the codes of the others
        pairs = list(permutations(self.modalities, 2))
        each = [
            counted_mean(
                self._error(heard, own, coded.quantised[other]).flatten(),
                (heard.valid[own] & heard.valid[other]).flatten(),
            )
            for own, other in pairs
        ]
        return torch.stack(each).sum() / (len(self.modalities) - 1)

    def _sum(self, value: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        """Sum over the modalities of the mean over the seconds that exist, on all ranks."""
        each = [counted_mean(value[m].flatten(), valid[m].flatten()) for m in self.modalities]
        return torch.stack(each).sum()

    def _observe_codes(self, coded: CodebookOutput, valid: Mapping[str, Tensor]) -> None:
        """How often the first two modalities choose the same code in the same second."""
        first, second = self.modalities[:2]
        same_BT = (coded.indices[first] == coded.indices[second]).float()
        self.observe("agreement", counted_mean(same_BT.flatten(), (valid[first] & valid[second]).flatten()))

    def _network(self, modality: str) -> ModalityNetwork:
        network = self.networks[modality]
        assert isinstance(network, ModalityNetwork)
        return network

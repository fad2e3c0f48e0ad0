"""The TPAVI baseline ("Audio-Visual Segmentation"): backbone -> neck -> TPAVI at chosen stages -> decoder."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.losses.segmentation import SEGMENTATION
from avs_dist.modules.decoder import build_decoder
from avs_dist.systems.base import Prediction, System
from avs_dist.systems.matching import check_matching, labelled, matching_loss
from avs_dist.systems.trunk import Existing, Trunk, build_necks
from avs_dist.world import global_mean


class _Forward(NamedTuple):
    logits_BTHW: Tensor
    features: list[Tensor]  # of each stage, [B,T,C,h,w], after TPAVI
    audio_BTD: Tensor | None


class TPAVISystem(System):
    """Mask logits of every second from its frame and the sound of all seconds.

    Frames that do not exist (`valid_BT`) are not computed at all; their logits are zero.

    Raises:
        ValueError: stages outside 0..3, or an AVM loss at a stage without audio.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        self.config = config
        model = config.model
        self.trunk = Trunk(model, load_pretrained)
        self.necks = build_necks(model, self.trunk.backbone.channels)
        self.decoder = build_decoder(model.decoder.kind, model.neck.channels, num_classes=1, compat=model.compat)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """The segmentation loss under its name, and "avm" where configured; `step` has no influence."""
        out, loss = self._forward(clip), self.config.loss
        segmentation = SEGMENTATION[loss.segmentation](out.logits_BTHW, clip.masks_BTHW, labelled(clip))
        terms: dict[str, Tensor] = {loss.segmentation: global_mean(*segmentation)}
        if loss.avm != "none":
            features = self.decoder.seen_by_losses(out.features)
            audio = partial(self.trunk.project_audio, out.audio_BTD)
            matching = matching_loss(self.config, clip, out.logits_BTHW, features, audio)
            terms["avm"] = loss.avm_weight * matching
        return terms

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch in eval mode, without gradient; deterministic, `generator` is not used."""
        with self.evaluating():
            return Prediction(self._forward(clip).logits_BTHW)

    def _forward(self, clip: Clip) -> _Forward:
        exist = Existing(clip.valid_BT)
        audio_BTD = self.trunk.hear(clip, exist)
        features = [
            self.trunk.interact(stage, neck(maps_NCHW), audio_BTD, exist)
            for stage, (neck, maps_NCHW) in enumerate(zip(self.necks, self.trunk.see(clip, exist), strict=True))
        ]
        height, width = clip.frames_BTCHW.shape[-2:]
        logits_NCHW = self.decoder([exist.select_maps(f) for f in features], (height, width))
        return _Forward(exist.restore(logits_NCHW[:, 0].float()), features, audio_BTD)

"""The TPAVI baseline ("Audio-Visual Segmentation"): backbone -> neck -> TPAVI at chosen stages -> decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.losses import alignment
from avs_dist.losses.segmentation import binary_cross_entropy
from avs_dist.modules.audio import AUDIO_CHANNELS, build_audio_encoder
from avs_dist.modules.backbone import Backbone
from avs_dist.modules.decoder import Decoder
from avs_dist.modules.neck import build_neck
from avs_dist.modules.tpavi import TPAVI
from avs_dist.systems.base import Prediction, System
from avs_dist.world import gather_rows, global_mean, world_size


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
        model = config.model
        _check(config)
        self.loss, self.compat = config.loss, model.compat
        self.audio_encoder = None  # where nothing listens, as every parameter must get a gradient
        if model.tpavi.stages and model.tpavi.key != "visual":
            self.audio_encoder = build_audio_encoder(model.audio.kind, model.audio.weights, load_pretrained)
        self.backbone = Backbone(model.backbone.name, model.backbone.weights if load_pretrained else "none")
        channels = model.neck.channels
        self.necks = nn.ModuleList(build_neck(model.neck.kind, c, channels) for c in self.backbone.channels)
        self.blocks = nn.ModuleDict(
            {
                str(stage): TPAVI(
                    channels,
                    AUDIO_CHANNELS,
                    time_aligned=model.tpavi.time_aligned,
                    key=model.tpavi.key,
                    implementation=model.tpavi.implementation,
                    l2_normalise=model.tpavi.l2_normalise,
                )
                for stage in sorted(model.tpavi.stages)
            }
        )
        self.decoder = Decoder(channels, num_classes=1, compat=model.compat)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """ "bce", and "avm" where configured; `step` has no influence."""
        out = self._forward(clip)
        terms = {"bce": global_mean(*binary_cross_entropy(out.logits_BTHW, clip.masks_BTHW, _counted(clip)))}
        if self.loss.avm != "none":
            terms["avm"] = self.loss.avm_weight * self._matching_loss(clip, out)
        return terms

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Masks of a batch in eval mode, without gradient; deterministic, `generator` is not used."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return Prediction(self._forward(clip).logits_BTHW)
        finally:
            self.train(training)

    def _forward(self, clip: Clip) -> _Forward:
        batch, frames, _, height, width = clip.frames_BTCHW.shape
        exist = _Existing(clip.valid_BT)
        visual = self.backbone(exist.select(clip.frames_BTCHW))
        audio_BTD = None
        if self.audio_encoder is not None:
            audio_BTD = exist.restore(self.audio_encoder(exist.select(clip.mel_BTFM)))
        features = []
        for stage, (neck, x_NCHW) in enumerate(zip(self.necks, visual, strict=True)):
            x_BTCHW = exist.restore_maps(neck(x_NCHW))
            if str(stage) in self.blocks:
                x_BTCHW = self.blocks[str(stage)](x_BTCHW, audio_BTD, exist.valid_BT)
            features.append(x_BTCHW)
        logits_NCHW = self.decoder([exist.select_maps(f) for f in features], (height, width))
        logits_BTHW = exist.restore(logits_NCHW[:, 0].float())
        return _Forward(logits_BTHW, features, audio_BTD)

    def _matching_loss(self, clip: Clip, out: _Forward) -> Tensor:
        """Mean of the AVM loss over stages and frames (published code: sum over frames for the KL variants)."""
        counted_BT = _counted(clip) if self.loss.avm == "avss_kl" else clip.valid_BT
        features = self.decoder.seen_by_losses(out.features)
        summed = self.compat == "published_code" and self.loss.avm in alignment.SUMMED_IN_PUBLISHED_CODE
        total = out.logits_BTHW.new_zeros(())
        for stage in self.loss.avm_stages:
            block = self.blocks[str(stage)]
            assert isinstance(block, TPAVI)
            assert out.audio_BTD is not None
            audio_BTC = block.project_audio(out.audio_BTD).float()
            if self.loss.avm == "visual_visual":
                stage_total, count = _visual_visual(out.logits_BTHW, features[stage], audio_BTC, counted_BT)
            else:
                loss_BT = alignment.AUDIO_VISUAL[self.loss.avm](out.logits_BTHW, features[stage], audio_BTC)
                stage_total, count = (loss_BT * counted_BT).sum(), counted_BT.sum()
            # the engine averages gradients over ranks: times world_size is the sum over all ranks
            total = total + (stage_total * world_size() if summed else global_mean(stage_total, count))
        return total / len(self.loss.avm_stages)


class _Existing:
    """Packs the frames that exist into one batch and puts results back in their place."""

    def __init__(self, valid_BT: Tensor) -> None:
        self.shape = valid_BT.shape
        self.valid_BT = None if bool(valid_BT.all()) else valid_BT

    def select(self, value_BTx: Tensor) -> Tensor:
        return value_BTx.flatten(0, 1) if self.valid_BT is None else value_BTx[self.valid_BT]

    def restore(self, value_Nx: Tensor) -> Tensor:
        if self.valid_BT is None:
            return value_Nx.unflatten(0, self.shape)
        out = value_Nx.new_zeros(*self.shape, *value_Nx.shape[1:])
        out[self.valid_BT] = value_Nx
        return out

    def select_maps(self, maps_BTCHW: Tensor) -> Tensor:
        return self.select(maps_BTCHW.permute(0, 1, 3, 4, 2)).permute(0, 3, 1, 2)

    def restore_maps(self, maps_NCHW: Tensor) -> Tensor:
        """Keeps C contiguous, which `restore` of the bare map would not."""
        return self.restore(maps_NCHW.permute(0, 2, 3, 1)).permute(0, 1, 4, 2, 3)


def _counted(clip: Clip) -> Tensor:
    return clip.labelled_BT & clip.valid_BT


def _visual_visual(
    logits_BTHW: Tensor, features_BTCHW: Tensor, audio_BTC: Tensor, counted_BT: Tensor
) -> tuple[Tensor, Tensor]:
    visual_MC = alignment.soft_masked_mean(logits_BTHW, features_BTCHW)[counted_BT]
    audio_MC = audio_BTC[counted_BT]
    all_visual_NC, first = gather_rows(visual_MC)
    all_audio_NC, _ = gather_rows(audio_MC.detach())
    loss_M = alignment.visual_visual(visual_MC, audio_MC, first, all_visual_NC, all_audio_NC)
    return loss_M.sum(), counted_BT.sum()


def _check(config: Config) -> None:
    model, loss = config.model, config.loss
    for key, stages in (("model.tpavi.stages", model.tpavi.stages), ("loss.avm_stages", loss.avm_stages)):
        if not set(stages) <= set(range(4)):
            raise ValueError(f"{key}: stages are 0 (finest) to 3, got {list(stages)}")
    if loss.avm == "none":
        return
    if not loss.avm_stages:
        raise ValueError(f"loss.avm_stages: loss.avm={loss.avm} needs at least one stage")
    if model.tpavi.key == "visual" or not set(loss.avm_stages) <= set(model.tpavi.stages):
        raise ValueError(
            f"loss.avm={loss.avm} compares with the audio of a TPAVI block: loss.avm_stages {list(loss.avm_stages)} "
            f"must be among model.tpavi.stages {list(model.tpavi.stages)}, and model.tpavi.key audio or both"
        )

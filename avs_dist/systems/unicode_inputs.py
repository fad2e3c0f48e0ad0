"""Where Uni-Code's features come from: stored ones as they are, or frames and log-mel through encoders that learn."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.clip import require_normalised
from avs_dist.config import ModelConfig
from avs_dist.modules.audio import AUDIO_CHANNELS, build_audio_encoder
from avs_dist.modules.backbone import Backbone
from avs_dist.sequences import Sequences
from avs_dist.systems.trunk import Existing

CELL = 4  # coarse pixels per side of a position of the map: 4 x 4 x 3 numbers stand for it
COARSE_MEL = (8, 16)  # of the 96 x 64 of a log-mel example: 128 numbers, as many as VGGish gives


class Input(NamedTuple):
    """One modality of a batch.

    features: what the networks get: [B,T,C], or [B,T,h,w,C] of a picture.
    target:   what is reconstructed.
    """

    features: Tensor
    target: Tensor


class Features(nn.Module):
    """Stored features, which are reconstructed as they are (published)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.feature_shapes = model.unicode.shapes
        self.target_shapes = self.feature_shapes

    def forward(self, modality: str, batch: Sequences) -> Input:
        return Input(batch.inputs[modality], batch.inputs[modality])


class Media(nn.Module):
    """Frames through model.backbone and log-mel through model.audio; words stay the vectors they are.

    A reconstruction of features that are trained along could be had for nothing, by features that are constant. So the
    target is a coarse copy of the frame, `CELL` x `CELL` pixels for each position of the map, or of the log-mel.
    """

    def __init__(self, model: ModelConfig, load_pretrained: bool) -> None:
        super().__init__()
        height, width, _ = model.unicode.visual_shape
        self.map_size = (height, width)
        self.feature_shapes: dict[str, tuple[int, ...]] = {}
        self.target_shapes: dict[str, tuple[int, ...]] = {}
        # only what is used: ZeRO wants a gradient for every parameter
        if "visual" in model.unicode.modalities:
            self.backbone = Backbone(model.backbone.name, model.backbone.weights if load_pretrained else "none")
            self.feature_shapes["visual"] = (height, width, self.backbone.channels[-1])
            self.target_shapes["visual"] = (height, width, 3 * CELL * CELL)
        if "audio" in model.unicode.modalities:
            self.audio_encoder = build_audio_encoder(model.audio.kind, model.audio.weights, load_pretrained)
            self.feature_shapes["audio"] = (AUDIO_CHANNELS,)
            self.target_shapes["audio"] = (COARSE_MEL[0] * COARSE_MEL[1],)
        if "text" in model.unicode.modalities:
            self.feature_shapes["text"] = self.target_shapes["text"] = (model.unicode.text_channels,)

    def forward(self, modality: str, batch: Sequences) -> Input:
        value, exist = batch.inputs[modality], Existing(batch.valid[modality])
        if modality == "text":
            return Input(value, value)
        if modality == "audio":
            mel_NFM = exist.select(value)
            coarse_ND = F.adaptive_avg_pool2d((mel_NFM + 2.0) / 2.0, COARSE_MEL).flatten(1)
            heard_BTD = batch.audio_BTD  # a stored one saves the encoder the work
            if heard_BTD is None:
                heard_BTD = exist.restore(self.audio_encoder(mel_NFM))
            return Input(heard_BTD, exist.restore(coarse_ND))
        frames_NCHW = exist.select(require_normalised(value))
        map_NCHW = F.adaptive_avg_pool2d(self.backbone(frames_NCHW)[-1], self.map_size)
        height, width = self.map_size
        coarse_NCHW = F.adaptive_avg_pool2d(frames_NCHW, (CELL * height, CELL * width))
        coarse_NhwC = F.pixel_unshuffle(coarse_NCHW, CELL).permute(0, 2, 3, 1)
        return Input(exist.restore(map_NCHW.permute(0, 2, 3, 1)), exist.restore(coarse_NhwC))


def build_inputs(model: ModelConfig, load_pretrained: bool) -> Features | Media:
    """What model.unicode.inputs names."""
    return Media(model, load_pretrained) if model.unicode.inputs == "media" else Features(model)

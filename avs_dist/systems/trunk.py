"""What the segmentation systems share before their decoder: audio encoder, backbone, and TPAVI at chosen stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import ModelConfig
from avs_dist.draws import ClipDraws
from avs_dist.modules.audio import AUDIO_CHANNELS, build_audio_encoder
from avs_dist.modules.backbone import Backbone
from avs_dist.modules.neck import build_neck
from avs_dist.modules.tpavi import TPAVI

NUM_STAGES = 4
PLACES = 1 << 20  # more than any backbone has places of stochastic depth


class Existing:
    """Packs the frames that exist into one batch of N, and puts results back in their place [B,T,...]."""

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


class Trunk(nn.Module):
    """Audio encoder, backbone and the TPAVI blocks; frames that do not exist (`valid_BT`) are not computed.

    Args:
        query_channels: D of the vectors that a system brings in place of the sound; there is no audio encoder then.

    Attributes:
        heard_channels: of the vector of a second that TPAVI and the decoder get; 0 where nothing listens.

    Raises:
        ValueError: model.tpavi.stages outside 0..3.
    """

    def __init__(self, model: ModelConfig, load_pretrained: bool, query_channels: int | None = None) -> None:
        super().__init__()
        if not set(model.tpavi.stages) <= set(range(NUM_STAGES)):
            raise ValueError(f"model.tpavi.stages: stages are 0 (finest) to 3, got {list(model.tpavi.stages)}")
        listens = (model.tpavi.stages and model.tpavi.key != "visual") or model.decoder.kind == "transformer"
        channels = AUDIO_CHANNELS if query_channels is None else query_channels
        self.heard_channels = channels if listens else 0
        self.audio_encoder = None  # where nothing listens, as every parameter must get a gradient
        if listens and query_channels is None:
            self.audio_encoder = build_audio_encoder(model.audio.kind, model.audio.weights, load_pretrained)
        self.backbone = Backbone(model.backbone.name, model.backbone.weights if load_pretrained else "none")
        self.blocks = nn.ModuleDict(
            {
                str(stage): TPAVI(
                    model.neck.channels,
                    channels,
                    time_aligned=model.tpavi.time_aligned,
                    key=model.tpavi.key,
                    implementation=model.tpavi.implementation,
                    l2_normalise=model.tpavi.l2_normalise,
                    align_audio=model.tpavi.align_audio,
                )
                for stage in sorted(model.tpavi.stages)
            }
        )

    def see(self, clip: Clip, exist: Existing, draws: ClipDraws | None = None) -> list[Tensor]:
        """Feature maps of the four stages [N,C_s,h,w]; `draws` for a backbone with stochastic depth, in training."""
        frames_BTCHW = clip.normalised_BTCHW
        draws_N = None
        if draws is not None:
            numbers_B1 = draws.numbers("backbone")[:, None].to(frames_BTCHW.device, non_blocking=True)
            frame_T = torch.arange(frames_BTCHW.shape[1], device=frames_BTCHW.device)
            draws_N = exist.select(numbers_B1 + frame_T * PLACES)
        return self.backbone(exist.select(frames_BTCHW), draws_N)

    def hear(self, clip: Clip, exist: Existing) -> Tensor | None:
        """One vector a second [B,T,128]; None where nothing listens. A stored one saves the encoder the work."""
        if self.audio_encoder is None:
            return None
        if clip.audio_BTD is not None:
            return clip.audio_BTD
        return exist.restore(self.audio_encoder(exist.select(clip.mel_BTFM)))

    def interact(self, stage: int, tokens_NCHW: Tensor, audio_BTD: Tensor | None, exist: Existing) -> Tensor:
        """Tokens of one stage after its TPAVI block, if it has one: [B,T,C,h,w], C contiguous."""
        x_BTCHW = exist.restore_maps(tokens_NCHW)
        if str(stage) in self.blocks:
            return self.blocks[str(stage)](x_BTCHW, audio_BTD, exist.valid_BT)
        return x_BTCHW

    def project_audio(self, audio_BTD: Tensor | None, stage: int) -> Tensor:
        """Audio in the channels of the tokens, as the TPAVI block of the stage hears it: float32 [B,T,C]."""
        block = self.blocks[str(stage)]
        assert isinstance(block, TPAVI)
        assert audio_BTD is not None
        return block.project_audio(audio_BTD).float()


def build_necks(model: ModelConfig, in_channels: Sequence[int]) -> nn.ModuleList:
    """One neck for each stage of the backbone."""
    return nn.ModuleList(build_neck(model.neck.kind, channels, model.neck.channels) for channels in in_channels)

"""The audio transformer decoder, after "AVSegFormer: Audio-Visual Segmentation with Transformer" (Gao et al.).

Plain attention takes the place of the paper's deformable attention. Where the paper leaves a choice, the simplest form
is taken, and said where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.config import DecoderConfig
from avs_dist.modules.attention import Attention, DecoderLayer, EncoderLayer, FeedForward, sine_positions
from avs_dist.modules.mask_decoder import MaskDecoder, Painting, Skips
from avs_dist.modules.weights import channels_last

NUM_LEVELS = 3  # stages that become tokens: strides 8, 16, 32


class PixelEncoder(nn.Module):
    """Tokens of the three coarser stages attend to each other; the level of a token is learnt, its place is a sine."""

    def __init__(self, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.randn(NUM_LEVELS, channels))
        self.layers = nn.ModuleList(EncoderLayer(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Stages [N,C,h,w], finest first -> their tokens [N,P,C] in that order, and positions [P,C]."""
        x_NPC = torch.cat([tokens(stage) for stage in stages], 1)
        places = [sine_positions((s.shape[-2], s.shape[-1]), s.shape[1], s) for s in stages]
        positions_PC = torch.cat([place + level for place, level in zip(places, self.levels, strict=True)])
        for layer in self.layers:
            x_NPC = layer(x_NPC, positions_PC)
        return self.norm(x_NPC), positions_PC


class QueryGenerator(nn.Module):
    """Learnable queries, plus what they hear (audio queries); without audio the learnable ones alone.

    The paper has cross attention to the audio. A frame has one audio vector, so the softmax has one term, and every
    query gets the value of that vector: that projection is all there is to learn of the attention. The paper's initial
    queries are taken to be the learnable ones, and one layer of it is enough.
    """

    def __init__(self, queries: int, channels: int, audio_channels: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, channels))
        self.value = nn.Linear(audio_channels, channels) if audio_channels else None
        self.feed_forward = FeedForward(channels) if audio_channels else None

    def forward(self, num_frames: int, audio_ND: Tensor | None) -> Tensor:
        """Queries of each frame [N,Q,C]."""
        if self.value is None or self.feed_forward is None:
            return self.queries.expand(num_frames, -1, -1)
        heard_NQC = self.queries + self.value(audio_ND)[:, None]
        return self.queries + heard_NQC + self.feed_forward(heard_NQC)


class QueryDecoder(nn.Module):
    """Queries that have looked at the tokens of the picture."""

    def __init__(self, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries_NQC: Tensor, tokens_NPC: Tensor, positions_PC: Tensor) -> Tensor:
        for layer in self.layers:
            queries_NQC = layer(queries_NQC, tokens_NPC + positions_PC, tokens_NPC)
        return self.norm(queries_NQC)


class ChannelMixer(nn.Module):
    """Channel attention: F + F * w, where w [C] is what the audio gets by attention to the pixels of F.

    A 1x1 convolution predicts from the mixed features which pixels sound, for the mixing loss.
    """

    def __init__(self, channels: int, heads: int, audio_channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels, heads, audio_channels)
        self.sounding = nn.Conv2d(channels, 1, 1)

    def forward(self, mask_NCHW: Tensor, audio_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed features [N,C,h,w], and logits of "something sounds here" [N,h,w]."""
        pixels_NPC = tokens(mask_NCHW)
        weight_NC = self.attention(audio_ND[:, None], pixels_NPC, pixels_NPC)[:, 0]
        mixed_NCHW = mask_NCHW + mask_NCHW * weight_NC[:, :, None, None]
        return mixed_NCHW, self.sounding(mixed_NCHW)[:, 0]


class MaskHead(nn.Module):
    """Products of queries and mask features -> a small MLP over the queries -> added to the features -> classes.

    The products are divided by sqrt(C), so that they start of order one; the MLP has one hidden layer of C.
    """

    def __init__(self, queries: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(queries, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.classes = nn.Conv2d(channels, num_classes, 1)

    def forward(self, mask_NCHW: Tensor, queries_NQC: Tensor) -> Tensor:
        """Logits [N,classes,h,w] at the size of the mask features."""
        scaled_NQC = queries_NQC * queries_NQC.shape[-1] ** -0.5
        maps_NQHW = torch.einsum("nqc,nchw->nqhw", scaled_NQC, mask_NCHW)
        return self.classes(mask_NCHW + self.mlp(maps_NQHW))


class TransformerMaskDecoder(MaskDecoder):
    """Queries that have heard the sound look at the picture, and paint the masks.

    Frames are independent of each other. The mask features are the encoded stride-8 stage, enlarged, plus the stride-4
    stage, with no convolution between.

    Args:
        config: queries, layers (of the encoder, and of the decoder) and heads.
        channels: C of all stages.
        num_classes: output channels: 1 for sounding / silent, or the number of classes.
        audio_channels: D of the audio vectors; 0 where nothing listens: then there is neither mixing nor its loss.

    Raises:
        ValueError: channels that are not divisible by the heads, or not by 4.
    """

    def __init__(self, config: DecoderConfig, channels: int, num_classes: int = 1, audio_channels: int = 0) -> None:
        super().__init__()
        if channels % config.heads or channels % 4:
            raise ValueError(
                f"model.neck.channels={channels}: the transformer decoder needs a multiple of 4, and of "
                f"model.decoder.heads={config.heads}"
            )
        self.encoder = PixelEncoder(channels, config.layers, config.heads)
        self.generator = QueryGenerator(config.queries, channels, audio_channels)
        self.decoder = QueryDecoder(channels, config.layers, config.heads)
        self.mixer = ChannelMixer(channels, config.heads, audio_channels) if audio_channels else None
        self.head = MaskHead(config.queries, channels, num_classes)
        channels_last(self)

    def skips(self, features: Sequence[Tensor], audio_ND: Tensor | None = None) -> Skips:
        """The three finer stages as they are, the sound, and the queries that have heard it.

        Raises:
            ValueError: no audio for a decoder that listens.
        """
        if self.mixer is not None and audio_ND is None:
            raise ValueError("a transformer decoder with audio_channels > 0 needs audio_ND, got None")
        return Skips(list(features[:3]), audio_ND, self.generator(features[0].shape[0], audio_ND))

    def paint(self, coarsest_NCHW: Tensor, skips: Skips, size: tuple[int, int]) -> Painting:
        finest_NCHW, *coarser = skips.maps
        tokens_NPC, positions_PC = self.encoder([*coarser, coarsest_NCHW])
        queries_NQC = self.decoder(skips.queries_NQC, tokens_NPC, positions_PC)
        height, width = coarser[0].shape[-2:]
        encoded_NCHW = tokens_NPC[:, : height * width].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        mask_NCHW = finest_NCHW + enlarge(encoded_NCHW, (finest_NCHW.shape[-2], finest_NCHW.shape[-1]))
        mix_NHW = None
        if self.mixer is not None:
            mask_NCHW, mix_NHW = self.mixer(mask_NCHW, skips.audio_ND)
        return Painting(enlarge(self.head(mask_NCHW, queries_NQC), size), mix_NHW)


def tokens(x_NCHW: Tensor) -> Tensor:
    """The pixels row by row [N,H W,C]; of a channels-last picture nothing is copied."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def enlarge(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x_NCHW, size, mode="bilinear", align_corners=False)

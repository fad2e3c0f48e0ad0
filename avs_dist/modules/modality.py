"""The networks of each modality of Uni-Code, behind one interface.

Features x of B clips and T seconds (of text: words) have the shape [B,T,C] (sound, text) or [B,T,h,w,C] (picture); they
come with valid_BT, bool: where a token exists. Valid tokens come first, and padding is zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from avs_dist.model_config import UnicodeConfig
from avs_dist.modules.sequence_decoders import MapDecoder, VectorDecoder
from avs_dist.modules.sequence_encoders import BidirectionalLSTM, VisualAttention, zero_padding
from avs_dist.modules.specific_encoders import MapEncoder, map_padding


class Specific(NamedTuple):
    """What is specific to a modality (paper: z-bar); zero at padding."""

    features: Tensor  # for `ModalityNetwork.decode`: [B,T,S] (sound, text) or [B,T,h',w',S] (picture)
    summary_BTS: Tensor  # what CLUB compares with the semantic features


class ModalityNetwork(nn.Module, ABC):
    """All of a modality but its temporal encoder, which modalities may share.

    A subclass keeps its parameters in sub-modules: ZeRO-3 gathers those of a module that is called, and nobody calls
    the network itself.

    Attributes:
        semantic_channels: F of `semantic_features`.
        summary_channels: S of `Specific.summary_BTS`.
    """

    semantic_channels: int
    summary_channels: int

    @abstractmethod
    def semantic_features(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        """Input of the temporal encoder [B,T,F]; zero at padding."""

    @abstractmethod
    def specific(self, x: Tensor, valid_BT: Tensor) -> Specific:
        """What is specific to the modality."""

    @abstractmethod
    def decode(self, quantised_BTD: Tensor, specific_features: Tensor) -> Tensor:
        """Reconstruction of x (eq. 3), with as many channels as asked for; at padding it is not to be counted.

        Args:
            quantised_BTD: the code of each token [B,T,D], in any precision.
            specific_features: `Specific.features` of x.
        """


class SequenceNetwork(ModalityNetwork):
    """Sound: what is specific is one layer, and the features themselves go to the temporal encoder.

    Args:
        channels: C of the features.
        dim: D of the code.
        specific: S, numbers of what is specific.
        target_channels: of the reconstruction; None: C.
    """

    def __init__(self, channels: int, dim: int, specific: int, target_channels: int | None = None) -> None:
        super().__init__()
        self.semantic_channels, self.summary_channels = channels, specific
        self.specific_encoder = nn.Sequential(nn.Linear(channels, specific), nn.ReLU())
        self.decoder = VectorDecoder(target_channels or channels, dim, specific)

    def semantic_features(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        return x

    def specific(self, x: Tensor, valid_BT: Tensor) -> Specific:
        features_BTS = zero_padding(self.specific_encoder(x), valid_BT)
        return Specific(features_BTS, features_BTS)

    def decode(self, quantised_BTD: Tensor, specific_features: Tensor) -> Tensor:
        return self.decoder(quantised_BTD.to(specific_features.dtype), specific_features)


class TextNetwork(SequenceNetwork):
    """Text: words are read in both directions first.

    What is specific comes from the word vectors, and these are reconstructed (eq. 3). In the public code all of that is
    done to the output of the LSTM, which is trained along: a target that moves.
    """

    def __init__(self, channels: int, dim: int, specific: int, target_channels: int | None = None) -> None:
        super().__init__(channels, dim, specific, target_channels)
        self.semantic_channels = dim
        self.reader = BidirectionalLSTM(channels, dim)

    def semantic_features(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        return self.reader(x, valid_BT)


class VisualNetwork(ModalityNetwork):
    """Picture: maps of each second, of any size (see `map_padding`); the summary is their mean through two layers.

    Args:
        channels: C of the maps.
        dim: D of the code.
        specific_channels: S, of the maps of what is specific; a multiple of 4. The summary has a quarter.
        map_size: (h, w).
        target_channels: of the reconstruction; None: C.
        summarise: make the summary; without it nothing would train its layers, and it is all zero.

    Raises:
        ValueError: S is no multiple of 4.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        specific_channels: int,
        map_size: tuple[int, int],
        target_channels: int | None = None,
        summarise: bool = True,
    ) -> None:
        super().__init__()
        half, quarter = specific_channels // 2, specific_channels // 4
        if specific_channels % 4:
            raise ValueError(f"model.unicode.visual_specific={specific_channels}: must be a multiple of 4")
        self.semantic_channels, self.summary_channels = channels, quarter
        padding = map_padding(map_size)
        self.attention = VisualAttention(channels)
        self.specific_encoder = MapEncoder(channels, specific_channels, padding)
        self.summary: nn.Sequential | None = None
        if summarise:
            self.summary = nn.Sequential(nn.Linear(specific_channels, half), nn.ReLU(), nn.Linear(half, quarter))
        self.decoder = MapDecoder(target_channels or channels, dim, specific_channels, padding)

    def semantic_features(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        return self.attention(x)

    def specific(self, x: Tensor, valid_BT: Tensor) -> Specific:
        features_BTHWS = self.specific_encoder(x)
        mean_BTS = features_BTHWS.mean((2, 3))
        summary_BTS = mean_BTS.new_zeros(*valid_BT.shape, self.summary_channels)
        if self.summary is not None:
            summary_BTS = zero_padding(self.summary(mean_BTS), valid_BT)
        return Specific(zero_padding(features_BTHWS, valid_BT), summary_BTS)

    def decode(self, quantised_BTD: Tensor, specific_features: Tensor) -> Tensor:
        return self.decoder(quantised_BTD.to(specific_features.dtype), specific_features)


def build_modality(
    kind: str,
    feature_shape: tuple[int, ...],
    config: UnicodeConfig,
    *,
    target_channels: int | None = None,
    summarise: bool = True,
) -> ModalityNetwork:
    """The network of a modality.

    Args:
        kind: "audio", "visual" or "text".
        feature_shape: of each token: (h, w, C) of the picture, (C,) else.
        config: model.unicode.
        target_channels: of the reconstruction; None: those of the features.
        summarise: whether CLUB needs what is specific.

    Raises:
        ValueError: the features have another number of axes, or a size of the config does not divide.
    """
    expected = {"audio": "(C,)", "text": "(C,)", "visual": "(h, w, C)"}
    if kind not in expected:
        raise ValueError(f"model.unicode.modalities: there is no '{kind}', only {', '.join(expected)}")
    if len(feature_shape) != (3 if kind == "visual" else 1):
        raise ValueError(
            f"the {kind} features have the shape {feature_shape}: must be {expected[kind]}, of each second or word"
        )
    if kind == "visual":
        height, width, channels = feature_shape
        sizes = (channels, config.dim, config.visual_specific, (height, width))
        return VisualNetwork(*sizes, target_channels, summarise)
    network = TextNetwork if kind == "text" else SequenceNetwork
    return network(feature_shape[0], config.dim, config.specific, target_channels)

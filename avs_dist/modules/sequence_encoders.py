"""Semantic encoders of Uni-Code (paper: section 4.1, Phi): what all modalities have in common in each second.

The layers are those of the public code; the paper does not give them. Sequences x_BTC come with valid_BT, bool: where a
token exists. Valid tokens come first, padding is zero and stays zero, and a clip does not notice how much of it there
is. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avs_dist.modules.attention import FEED_FORWARD, Attention
from avs_dist.modules.dropout import ClipDropout

PLACES = 4  # of dropout in a layer
SQUEEZE = 8  # channels per hidden channel of the channel gate
LEAST_SQUEEZED = 8  # with only a few hidden channels their ReLU might shut the gate for all inputs


def zero_padding(x_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """`x_BT` [B,T,...] with zeros where no token exists."""
    return x_BT.masked_fill(~valid_BT.view(*valid_BT.shape, *[1] * (x_BT.dim() - 2)), 0.0)


class TemporalEncoder(nn.Module):
    """Linear, then transformer layers over the seconds of a clip, without positions.

    Args:
        in_channels: C of the input; None: the input has `dim` channels already, and there is no linear layer.
        dim: D of the output; divisible by `heads`.
        layers: of the transformer.
        heads: of its attention.
        dropout: of its attention weights, of the hidden channels, and of what is added to the residual stream.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(self, in_channels: int | None, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"model.unicode.dim={dim}: must be a multiple of model.unicode.heads={heads}")
        self.project = None if in_channels is None else nn.Linear(in_channels, dim)
        self.layers = nn.ModuleList(PostNormLayer(dim, heads, dropout) for _ in range(layers))

    def forward(self, x_BTC: Tensor, valid_BT: Tensor, draws_B: Tensor | None = None) -> Tensor:
        """[B,T,C] -> [B,T,D].

        Args:
            draws_B: see `ClipDropout`.
        """
        x_BTD = x_BTC if self.project is None else self.project(x_BTC)
        for number, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, valid_BT, None if draws_B is None else draws_B + number * PLACES)
        return zero_padding(x_BTD, valid_BT)


class PostNormLayer(nn.Module):
    """Encoder layer of "Attention Is All You Need": self-attention and feed-forward, each added and then normalised.

    There is also dropout of the attention weights and of the hidden channels, as in torch's own layer.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        hidden = FEED_FORWARD * channels
        self.attention = Attention(channels, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), ClipDropout(dropout, 2), nn.Linear(hidden, channels)
        )
        self.norm = nn.LayerNorm(channels)
        self.heard_dropout, self.formed_dropout = ClipDropout(dropout, 1), ClipDropout(dropout, 3)

    def forward(self, x_NPC: Tensor, valid_NP: Tensor, draws_N: Tensor | None = None) -> Tensor:
        heard_NPC = self.attention(x_NPC, x_NPC, x_NPC, valid_NP, draws_N)
        x_NPC = self.attention_norm(x_NPC + self.heard_dropout(heard_NPC, draws_N))
        widen, relu, dropout, narrow = self.feed_forward
        formed_NPC = narrow(dropout(relu(widen(x_NPC)), draws_N))
        return self.norm(x_NPC + self.formed_dropout(formed_NPC, draws_N))


class VisualAttention(nn.Module):
    """One vector for each map: channels are gated by squeeze and excitation, positions are weighed by attention.

    With x the map, m its mean over positions and x' = x (1 + gate(m)), position p gets the score
    tanh(w . (relu(W x'_p) * relu(V m))), and the output is the mean of x' weighted by the softmax over positions. The
    public code takes that softmax over an axis of size one: all weights are 1, the output is the sum of x' over the
    positions, and the attention never learns.

    Args:
        channels: C of the maps and of the output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed, width = max(channels // SQUEEZE, LEAST_SQUEEZED), max(channels // 2, 1)
        self.gate = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )
        self.position = nn.Sequential(nn.Linear(channels, width), nn.ReLU())
        self.average = nn.Sequential(nn.Linear(channels, width), nn.ReLU())
        self.score = nn.Sequential(nn.Linear(width, 1), nn.Tanh())

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """[B,T,h,w,C] of any h and w -> [B,T,C]; a map of zeros gives zeros."""
        x_BTPC = x_BTHWC.flatten(2, 3)
        mean_BT1C = x_BTPC.mean(2, keepdim=True)
        gated_BTPC = x_BTPC * (1.0 + self.gate(mean_BT1C))
        score_BTP1 = self.score(self.position(gated_BTPC) * self.average(mean_BT1C))
        return (score_BTP1.softmax(2) * gated_BTPC).sum(2)


class BidirectionalLSTM(nn.Module):
    """Layers of two LSTMs each, one of which reads from the last valid token to the first.

    Equal to torch's bidirectional LSTM of packed sequences, which wait for the lengths on the host. Here the valid
    tokens are reversed in place, so that padding comes last in both directions.

    Args:
        in_channels: C of the input.
        dim: D of the output, half of it of each direction; even.
        layers: of the network.

    Raises:
        ValueError: `dim` is odd.
    """

    def __init__(self, in_channels: int, dim: int, layers: int = 2) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"model.unicode.dim={dim}: must be even, each direction of the text's LSTM has half of it")
        channels = [in_channels, *[dim] * (layers - 1)]
        self.ahead = nn.ModuleList(nn.LSTM(c, dim // 2, batch_first=True) for c in channels)
        self.back = nn.ModuleList(nn.LSTM(c, dim // 2, batch_first=True) for c in channels)

    def forward(self, x_BTC: Tensor, valid_BT: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,D]."""
        order_BT1 = _reversal(valid_BT)[..., None]
        for ahead, back in zip(self.ahead, self.back, strict=True):
            reversed_BTC = x_BTC.gather(1, order_BT1.expand_as(x_BTC))
            ahead_BTH, back_BTH = ahead(x_BTC)[0], back(reversed_BTC)[0]
            x_BTC = torch.cat([ahead_BTH, back_BTH.gather(1, order_BT1.expand_as(back_BTH))], 2)
        return zero_padding(x_BTC, valid_BT)


def _reversal(valid_BT: Tensor) -> Tensor:
    """Index of the token that takes each place, int64 [B,T]; padding stays. Its own inverse."""
    place_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    return torch.where(valid_BT, valid_BT.sum(1, keepdim=True) - 1 - place_T, place_T)

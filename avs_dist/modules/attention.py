"""Attention, and transformer layers normalised before each part (they need no warm-up) and without dropout.

torch's own layers read the weights of their sub-modules without calling these, while ZeRO-3 gathers the weights of what
is called; and in evaluation they take another, fused way.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avs_dist.modules.dropout import ClipDropout

FEED_FORWARD = 4  # hidden channels per channel
TEMPERATURE = 10000.0


class Attention(nn.Module):
    """Multi-head attention: softmax(q k' / sqrt(C / heads)) v, then a projection ("Attention Is All You Need").

    The keys have no bias: it would cancel out in the softmax, and never get a gradient.

    Args:
        channels: C of keys, values and output; divisible by `heads`.
        query_channels: of the queries (None: C).
        dropout: of the attention weights, in training.
    """

    def __init__(self, channels: int, heads: int, query_channels: int | None = None, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = ClipDropout(dropout)
        self.query = nn.Linear(query_channels or channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(
        self,
        query_NQD: Tensor,
        key_NPC: Tensor,
        value_NPC: Tensor,
        valid_NP: Tensor | None = None,
        draws_N: Tensor | None = None,
    ) -> Tensor:
        """What each query gets of the values: [N,Q,C].

        Args:
            valid_NP: bool, the keys that count (None: all). Where none does, all do: the softmax needs one.
            draws_N: see `ClipDropout`.
        """
        mask_N11P = None
        if valid_NP is not None:
            mask_N11P = (valid_NP | ~valid_NP.any(1, keepdim=True))[:, None, None]
        query, key, value = map(self._split, (self.query(query_NQD), self.key(key_NPC), self.value(value_NPC)))
        if self.dropout.active:  # inside of torch's attention a process would draw for itself
            score_NHQP = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if mask_N11P is not None:
                score_NHQP = score_NHQP.masked_fill(~mask_N11P, -math.inf)
            heard = self.dropout(score_NHQP.softmax(-1), draws_N) @ value
        else:
            heard = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_N11P)
        return self.out(heard.transpose(1, 2).flatten(2))

    def _split(self, x_NPC: Tensor) -> Tensor:
        return x_NPC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear, of normalised tokens."""

    def __init__(self, channels: int) -> None:
        hidden = FEED_FORWARD * channels
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


class EncoderLayer(nn.Module):
    """Every token attends to all tokens of its frame; positions are added to queries and keys (as in DETR)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.feed_forward = FeedForward(channels)

    def forward(self, x_NPC: Tensor, positions_PC: Tensor) -> Tensor:
        value_NPC = self.norm(x_NPC)
        key_NPC = value_NPC + positions_PC
        x_NPC = x_NPC + self.attention(key_NPC, key_NPC, value_NPC)
        return x_NPC + self.feed_forward(x_NPC)


class DecoderLayer(nn.Module):
    """Every query attends to all queries of its frame, then to the keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.cross_norm = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, heads)
        self.feed_forward = FeedForward(channels)

    def forward(self, queries_NQC: Tensor, key_NPC: Tensor, value_NPC: Tensor) -> Tensor:
        normed_NQC = self.norm(queries_NQC)
        queries_NQC = queries_NQC + self.attention(normed_NQC, normed_NQC, normed_NQC)
        queries_NQC = queries_NQC + self.cross_attention(self.cross_norm(queries_NQC), key_NPC, value_NPC)
        return queries_NQC + self.feed_forward(queries_NQC)


def sine_positions(size: tuple[int, int], channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the height and width of each pixel's centre, [H W,C] in dtype and device of `like`.

    A picture of any size is 2 pi high and wide, so stages of different strides agree (DETR); C is divisible by 4.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 could not tell neighbours apart
    quarter = channels // 4
    frequency = TEMPERATURE ** (-torch.arange(quarter, dtype=dtype, device=like.device) / quarter)
    waves = []
    for length in size:
        place = (torch.arange(length, dtype=dtype, device=like.device) + 0.5) * (2.0 * math.pi / length)
        angle = place[:, None] * frequency
        waves.append(torch.cat([angle.sin(), angle.cos()], 1))
    rows, columns = waves
    grid = [rows[:, None].expand(-1, size[1], -1), columns[None].expand(size[0], -1, -1)]
    return torch.cat(grid, 2).flatten(0, 1).to(like.dtype)

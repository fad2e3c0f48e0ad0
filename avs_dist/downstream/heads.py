"""Heads on frozen codes, linear as in the public code of Uni-Code: whatever transfers, the codes have brought it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALPHA = 0.1  # published start of the exponents


class ClipHead(nn.Module):
    """Which event a clip shows: linear, maximum over the seconds that exist, linear.

    Args:
        dim: D of the codes and of the hidden layer.
        num_events: K.
    """

    def __init__(self, dim: int, num_events: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.classify = nn.Linear(dim, num_events)

    def forward(self, code_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        """Logits [B,K]; every clip must have a second."""
        hidden_BTD = self.hidden(code_BTD).masked_fill(~valid_BT[..., None], float("-inf"))
        return self.classify(hidden_BTD.amax(1))


class SecondHead(nn.Module):
    """Which events happen in each second, the background last: linear, linear.

    Args:
        dim: D of the codes and of the hidden layer.
        num_events: K, without the background.
    """

    def __init__(self, dim: int, num_events: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.classify = nn.Linear(dim, num_events + 1)
        # exponents of `exp_log_loss`, trained with the head
        self.alpha_K = nn.Parameter(torch.full((num_events + 1,), ALPHA))

    def forward(self, code_BTD: Tensor) -> Tensor:
        """Logits [B,T,K+1]."""
        return self.classify(self.hidden(code_BTD))

"""Predictors of Cross-CPC: from what a modality has shown so far to what others will show (Uni-Code, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from torch import Tensor, nn


class CrossPredictor(nn.Module):
    """An LSTM for each modality sums up its first seconds; linear maps predict the K seconds after these (eq. 6).

    Each ordered pair of modalities has its own map W_k for each step, without bias.

    Args:
        modalities: their names.
        dim: D of the semantic features and of the context.
        steps: K.
        layers: of each LSTM (paper: 1, public code: 2).
        own: Modalities predict themselves, too (public code).
    """

    def __init__(self, modalities: Sequence[str], dim: int, steps: int, layers: int, own: bool) -> None:
        super().__init__()
        self.steps = steps
        self.pairs = [(a, b) for a, b in product(modalities, repeat=2) if own or a != b]
        self.contexts = nn.ModuleDict({m: nn.LSTM(dim, dim, layers, batch_first=True) for m in modalities})
        self.predictors = nn.ModuleDict({_name(p): nn.Linear(dim, steps * dim, bias=False) for p in self.pairs})

    def forward(self, z: Mapping[str, Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """Predictions [K,B,D] of each (source, target) of `pairs`; row k (from 0) is for z[target][b, seen_b + k].

        Args:
            z: continuous semantic features of each modality [B,T,D].
            seen: int64 [B] of each pair, the seconds of each clip that are seen, from 1 to T.
        """
        # over all seconds at once: what the LSTM says of the first ones does not depend on the later
        context = {modality: lstm(z[modality])[0] for modality, lstm in self.contexts.items()}
        predictions = []
        for pair, seen_B in zip(self.pairs, seen, strict=True):
            context_BTD = context[pair[0]]
            last_B1D = (seen_B - 1)[:, None, None].expand(-1, 1, context_BTD.shape[2])
            predicted_BE = self.predictors[_name(pair)](context_BTD.gather(1, last_B1D)[:, 0])
            predictions.append(predicted_BE.unflatten(1, (self.steps, -1)).movedim(1, 0))
        # a list: DeepSpeed's hooks of ZeRO-3 look into dicts, and want strings for keys
        return predictions


def _name(pair: tuple[str, str]) -> str:
    return "_to_".join(pair)

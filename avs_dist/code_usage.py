"""Which codes of a shared codebook the modalities choose, and how many they share (Uni-Code, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from avs_dist import world

SHARED = "shared"
PARTLY_SHARED = "partly shared"


@dataclass(frozen=True)
class CodeUse:
    """Tokens of each modality that chose each code.

    counts_ML: int64 on the CPU, in the order of `modalities`.
    same, compared: of all seconds and pairs of modalities in which both have a token, those with the same code.
    """

    modalities: tuple[str, ...]
    counts_ML: Tensor
    same: int
    compared: int

    @property
    def used_L(self) -> Tensor:
        """Bool: codes that any modality chose."""
        return self.counts_ML.sum(0) > 0

    @property
    def used(self) -> float:
        """Share of the codes that any modality chose."""
        return self.used_L.double().mean().item()

    @property
    def shares_ML(self) -> Tensor:
        """float64: the part of each code's tokens that is of each modality; 0 for a code that is not used."""
        return self.counts_ML.double() / self.counts_ML.sum(0).clamp_min(1)

    @property
    def classes(self) -> dict[str, Tensor]:
        """Bool [L] of each class of Fig. 4; every used code is in one of them.

        "mostly NAME": more than 80 % of its tokens are of that modality; "shared": at least 20 % are of each. Of three
        modalities two may leave the third less than that: "partly shared".
        """
        total_L = self.counts_ML.sum(0)
        mostly_ML = 5 * self.counts_ML > 4 * total_L
        shared_L = (5 * self.counts_ML >= total_L).all(0) & self.used_L
        found = {f"mostly {name}": mostly_ML[m] for m, name in enumerate(self.modalities)}
        found[SHARED] = shared_L
        if len(self.modalities) > 2:
            found[PARTLY_SHARED] = self.used_L & ~shared_L & ~mostly_ML.any(0)
        return found

    @property
    def perplexity(self) -> dict[str, float]:
        """exp(entropy) of the codes of each modality: as many equally used codes say as much; 0 without tokens."""
        p_ML = self.counts_ML.double() / self.counts_ML.sum(1, keepdim=True).clamp_min(1)
        entropy_M = torch.special.entr(p_ML).sum(1)
        seen_M = self.counts_ML.sum(1) > 0
        return dict(zip(self.modalities, (entropy_M.exp() * seen_M).tolist(), strict=True))

    @property
    def agreement(self) -> float:
        """Share of the seconds at which two modalities have the same code, over all their pairs; NaN without any."""
        return self.same / self.compared if self.compared else math.nan

    def scalars(self) -> dict[str, float]:
        """`codes/used` of all codes; of the used ones `codes/shared`, `codes/mostly_audio` and so on;
        `codes/agreement`, where there is any second to compare; `perplexity/audio` and so on.
        """
        used = int(self.used_L.sum())
        values = {"codes/used": self.used}
        for name, of_L in self.classes.items():
            values[f"codes/{name.replace(' ', '_')}"] = int(of_L.sum()) / used
        if self.compared:
            values["codes/agreement"] = self.agreement
        return values | {f"perplexity/{name}": value for name, value in self.perplexity.items()}


class CodeUsage:
    """Accumulates the codes of tokens and counts them over everything seen, by all ranks together.

    Args:
        num_codes: L.
        modalities: two names or more, in the order of the counts.
    """

    def __init__(self, num_codes: int, modalities: Sequence[str]) -> None:
        self.num_codes, self.modalities = num_codes, tuple(modalities)
        self._counts_ML = torch.zeros(len(self.modalities), num_codes, dtype=torch.int64)
        self._pairs_2 = torch.zeros(2, dtype=torch.int64)

    def update(self, indices: Mapping[str, Tensor]) -> None:
        """Count tokens, without waiting for the device; modalities that are not given have none.

        Args:
            indices: integers [B,T], below L; -1 = no token. The same places of all modalities are the same second.

        Raises:
            ValueError: a modality that is not counted, or shapes differ.
        """
        if unknown := sorted(set(indices) - set(self.modalities)):
            raise ValueError(f"code usage: expected modalities {list(self.modalities)}, got {unknown} as well")
        if len({value.shape for value in indices.values()}) > 1:
            shapes = {name: list(value.shape) for name, value in indices.items()}
            raise ValueError(f"code usage: codes of the same seconds must have one shape, got {shapes}")
        for name, index in indices.items():
            self._counts_ML, self._pairs_2 = self._counts_ML.to(index.device), self._pairs_2.to(index.device)
            there_N = (index >= 0).flatten()
            code_N = index.flatten().long().clamp_min(0)
            self._counts_ML[self.modalities.index(name)].scatter_add_(0, code_N, there_N.long())
        for one, other in combinations(indices.values(), 2):
            both_BT = (one >= 0) & (other >= 0)
            self._pairs_2 += torch.stack([(both_BT & (one == other)).sum(), both_BT.sum()])

    def compute(self) -> CodeUse:
        """Counts over all ranks; every rank must call it and gets the same.

        Raises:
            ValueError: no token was counted.
        """
        # as plain numbers: a rank that saw nothing does not know the device of the others
        ranks = world.gather_objects((self._counts_ML.tolist(), self._pairs_2.tolist()))
        counts_ML = torch.stack([torch.tensor(counts) for counts, _ in ranks]).sum(0)
        if not bool(counts_ML.any()):
            raise ValueError("no tokens were counted: there is no use of codes to measure")
        same, compared = (sum(pairs[place] for _, pairs in ranks) for place in range(2))
        return CodeUse(self.modalities, counts_ML, same, compared)

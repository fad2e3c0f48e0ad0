"""Random numbers of each clip that depend on the seed, the step and the clip's name alone.

So they are the same for any batch, rank, number of ranks and padding, and a resumed run repeats them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PREDICTION = -1  # the step of draws that belong to no step


class ClipDraws:
    """Independent numbers for every clip and purpose.

    Args:
        seed: of the run.
        step: optimiser step, or another number that tells occasions apart.
        keys: names of the B clips.
    """

    def __init__(self, seed: int, step: int, keys: Sequence[str]) -> None:
        self._occasion = f"{seed}/{step}"
        self._keys = keys

    @classmethod
    def for_prediction(cls, seed: int, keys: Sequence[str], generator: torch.Generator | None = None) -> ClipDraws:
        """Draws outside of training; a generator draws another seed, without it the same clip gets the same again."""
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return cls(seed, PREDICTION, keys)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal float32 [B, *shape] on the CPU; the first rows do not depend on how many there are."""
        return self._stack([g.standard_normal(shape, dtype=np.float32) for g in self._generators(purpose)])

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform float32 in [0,1), [B, *shape] on the CPU; the first rows do not depend on how many there are."""
        return self._stack([g.random(shape, dtype=np.float32) for g in self._generators(purpose)])

    def numbers(self, purpose: str) -> Tensor:
        """One random number of each clip, int64 [B] on the CPU, for draws on another device."""
        low = [self._key(name, purpose) & (2**63 - 1) for name in self._keys]
        return torch.tensor(low, dtype=torch.int64)

    def _stack(self, values: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(values))

    def _generators(self, purpose: str) -> list[np.random.Generator]:
        return [np.random.Generator(np.random.Philox(key=self._key(name, purpose))) for name in self._keys]

    def _key(self, name: str, purpose: str) -> int:
        text = f"{self._occasion}/{purpose}/{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")

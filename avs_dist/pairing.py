"""How well the codes of one modality tell which clip of another they belong to, without any label."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024


def pairing_score(one_ND: Tensor, other_ND: Tensor) -> float:
    """Share of the other clips that are further from a clip's vector than its own counterpart is, from 0 to 1.

    0.5 is chance: the codes of the two modalities have nothing to do with each other. It is the area under the ROC
    curve of each clip as a query, averaged; equal distances count half, so that constant vectors give 0.5.

    Args:
        one_ND, other_ND: a vector of each of N clips in two modalities.

    Raises:
        ValueError: fewer than two clips.
    """
    count = len(one_ND)
    if count < 2:
        raise ValueError(f"the pairing score compares clips: needs at least 2, got {count}")
    one_ND, other_ND = one_ND.double(), other_ND.double()
    total = one_ND.new_zeros(())
    for start in range(0, count, CHUNK):
        distance_MN = torch.cdist(one_ND[start : start + CHUNK], other_ND, compute_mode="donot_use_mm_for_euclid_dist")
        own_M1 = distance_MN.diagonal(start)[:, None]
        total += (distance_MN > own_M1).sum() + 0.5 * ((distance_MN == own_M1).sum() - len(own_M1))
    return (total / (count * (count - 1))).item()


def mean_code(quantised_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean code, or other vector, of the steps of each clip that exist, [B,D]; zero where a clip has none."""
    return (quantised_BTD * valid_BT[..., None]).sum(1) / valid_BT.sum(1, keepdim=True).clamp_min(1)

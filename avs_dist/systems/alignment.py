"""What pulls the modalities of a clip together: code matching, and the methods that Uni-Code is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

from torch import Tensor

from avs_dist.losses.cross_modal import (
    adaptive_margin,
    code_matching,
    code_posterior,
    swapped_prediction,
    transport_plan,
)
from avs_dist.losses.information import cosine_scores, info_nce
from avs_dist.pairing import mean_code
from avs_dist.world import all_reduce_sum, counted_mean, gather_candidates, gather_flags

TEMPERATURE = 0.07  # of CLIP


def alignment_loss(
    kind: Literal["code_matching", "margin", "contrast", "transport"],
    semantic: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    codes_LD: Tensor,
) -> Tensor:
    """Sum over pairs of modalities of the mean over the clips of all ranks that have both.

    Args:
        kind: "code_matching" (CMCM), "margin" (S-MiT), "contrast" (MST) or "transport" (CODIS).
        semantic: [B,T,D] of each modality.
        codes_LD: the codebook.
    """
    if kind == "code_matching":
        clips = {m: code_posterior(z_BTD.float(), codes_LD, valid[m]) for m, z_BTD in semantic.items()}
    else:
        clips = {m: mean_code(z_BTD.float(), valid[m]) for m, z_BTD in semantic.items()}
    total = codes_LD.new_zeros(())
    for one, other in combinations(semantic, 2):
        counted_B = valid[one].any(1) & valid[other].any(1)
        if kind == "transport":
            loss_B = _transport(clips[one], clips[other], codes_LD, counted_B)
        elif kind == "code_matching":
            loss_B = code_matching(clips[one], *gather_candidates(clips[other]), counted_N=gather_flags(counted_B))
        else:
            pair, there_N = (clips[one], clips[other]), gather_flags(counted_B)
            loss_B = (_compare(kind, *pair, there_N) + _compare(kind, *pair[::-1], there_N)) / 2
        total = total + counted_mean(loss_B, counted_B)
    return total


def _compare(kind: str, anchor_BD: Tensor, partner_BD: Tensor, there_N: Tensor) -> Tensor:
    all_ND, own_B = gather_candidates(partner_BD)
    if kind == "margin":
        return adaptive_margin(anchor_BD @ all_ND.T, own_B, counted_N=there_N)
    scores_BN = cosine_scores(anchor_BD, all_ND)
    return info_nce(scores_BN, own_B, temperature=TEMPERATURE, excluded_MN=(~there_N).expand_as(scores_BN))


def _transport(one_BD: Tensor, other_BD: Tensor, codes_LD: Tensor, counted_B: Tensor) -> Tensor:
    """Each modality predicts which codes the other's clips are carried to (CODIS)."""
    scores = [cosine_scores(x_BD, codes_LD) for x_BD in (one_BD, other_BD)]
    plans = [transport_plan(scores_BL.detach(), counted_N=counted_B, reduce=all_reduce_sum) for scores_BL in scores]
    return (swapped_prediction(scores[0], plans[1]) + swapped_prediction(scores[1], plans[0])) / 2

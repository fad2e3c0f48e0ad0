"""What pulls the modalities of a clip together: code matching, and the methods that Uni-Code is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from avs_dist.losses.cross_modal import (
    adaptive_margin,
    code_matching,
    code_posterior,
    swapped_prediction,
    transport_plan,
)
from avs_dist.losses.information import cosine_scores, info_nce
from avs_dist.world import all_reduce_sum, counted_mean, gather_rows

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
        clips = {m: _mean(z_BTD.float(), valid[m]) for m, z_BTD in semantic.items()}
    total = codes_LD.new_zeros(())
    for one, other in combinations(semantic, 2):
        counted_B = valid[one].any(1) & valid[other].any(1)
        there_N = gather_rows(counted_B.float(), equal=True)[0] > 0.5
        if kind == "transport":
            loss_B = _transport(clips[one], clips[other], codes_LD, counted_B)
        elif kind == "code_matching":
            all_NL, own_B = _gathered(clips[other])
            loss_B = code_matching(clips[one], all_NL, own_B, counted_N=there_N)
        else:
            pair = (clips[one], clips[other])
            loss_B = (_compare(kind, *pair, there_N) + _compare(kind, *pair[::-1], there_N)) / 2
        total = total + counted_mean(loss_B, counted_B)
    return total


def _compare(kind: str, anchor_BD: Tensor, partner_BD: Tensor, there_N: Tensor) -> Tensor:
    all_ND, own_B = _gathered(partner_BD)
    if kind == "margin":
        return adaptive_margin(anchor_BD @ all_ND.T, own_B, counted_N=there_N)
    scores_BN = cosine_scores(anchor_BD, all_ND)
    return info_nce(scores_BN, own_B, temperature=TEMPERATURE, excluded_MN=(~there_N).expand_as(scores_BN))


def _transport(one_BD: Tensor, other_BD: Tensor, codes_LD: Tensor, counted_B: Tensor) -> Tensor:
    """Each modality predicts which codes the other's clips are carried to (CODIS)."""
    scores = [cosine_scores(x_BD, codes_LD) for x_BD in (one_BD, other_BD)]
    plans = [transport_plan(scores_BL.detach(), counted_N=counted_B, reduce=all_reduce_sum) for scores_BL in scores]
    return (swapped_prediction(scores[0], plans[1]) + swapped_prediction(scores[1], plans[0])) / 2


def _gathered(value_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all ranks, and which of them are this rank's."""
    all_NC, first = gather_rows(value_BC, equal=True)
    return all_NC, torch.arange(first, first + len(value_BC), device=value_BC.device)


def _mean(z_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the seconds that exist."""
    return (z_BTD * valid_BT[..., None]).sum(1) / valid_BT.sum(1, keepdim=True).clamp_min(1)

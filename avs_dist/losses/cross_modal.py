"""Losses that pull the codes of two modalities together, for the baselines of Uni-Code (Table 1).

Each is the loss of the M clips of this rank in one direction. What they are compared with may be gathered from all
ranks (N clips, with gradient); `positive_M` is then the index of a clip among all. All are computed in float32 or
better. TURN (cross reconstruction) and MST (contrast of a shared encoder) need no loss of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from avs_dist.losses.information import info_nce
from avs_dist.precision import at_least_float32

LOG_EPS = 1e-10  # published: keeps the logarithm of a code that is never near finite
MIN_SQUARED_DISTANCE = 1e-6  # the square root has no gradient at 0, and rounding may give less than 0


def code_posterior(z_NTD: Tensor, codes_LD: Tensor, valid_NT: Tensor) -> Tensor:
    """Mean over the valid seconds of softmax(-|z - e_l|) over the codes l, [N,L] (CMCM, Liu et al. 2021).

    Args:
        z_NTD: vectors before quantisation.
        codes_LD: codebook.
        valid_NT: bool, seconds that exist. A clip without any gets zeros.
    """
    z_NTD, codes_LD = at_least_float32(z_NTD), at_least_float32(codes_LD)
    products_NTL = z_NTD @ codes_LD.to(z_NTD.dtype).T
    squared_NTL = z_NTD.square().sum(-1, keepdim=True) - 2.0 * products_NTL + codes_LD.square().sum(-1)
    posterior_NTL = (-squared_NTL.clamp_min(MIN_SQUARED_DISTANCE).sqrt()).softmax(-1)
    total_NL = posterior_NTL.masked_fill(~valid_NT[..., None], 0.0).sum(1)
    return total_NL / valid_NT.sum(1, keepdim=True).clamp_min(1)


def code_matching(own_ML: Tensor, other_NL: Tensor, positive_M: Tensor, *, counted_N: Tensor | None = None) -> Tensor:
    """-log(exp(S_ii) / sum_j exp(S_ij)) with S_ij = P_i log P'_j + P'_j log P_i, [M] (L_cmcm, Liu et al. 2021).

    The public code of Uni-Code shifts S so that no term of the denominator is below 1 and adds 1e-5 to it; the
    log-softmax here needs neither. It also takes P'_i log P_j for the second term, of clip i and not j in the other
    modality; here S is that of Liu et al., of the pair (i, j).

    Args:
        own_ML: `code_posterior` P of this rank's clips in one modality.
        other_NL: that of the other modality, P', of the clips of all ranks.
        counted_N: bool, clips that may be negatives; None for all.
    """
    own_ML, other_NL = at_least_float32(own_ML), at_least_float32(other_NL)
    scores_MN = own_ML @ (other_NL + LOG_EPS).log().T + (own_ML + LOG_EPS).log() @ other_NL.T
    return info_nce(scores_MN, positive_M, excluded_MN=_excluded(counted_N, scores_MN))


def adaptive_margin(
    scores_MN: Tensor, positive_M: Tensor, alpha: float = 0.5, *, counted_N: Tensor | None = None
) -> Tensor:
    """Softmax loss with a margin on the positive score, [M] (S-MiT: adaptive mean margin, Monfort et al. 2021, eq. 3).

    -log(exp(S_ii - m_i) / (exp(S_ii - m_i) + sum_{j != i} exp(S_ij))), m_i = alpha (S_ii - mean_{j != i} S_ij): the
    further the pair is ahead, the more is asked of it. The margin passes gradient, as in public code of the loss.

    Args:
        scores_MN: dot products of each of M anchors with each of N candidates.
        alpha: how much of the lead the margin takes (paper: 0.5).
        counted_N: bool, candidates that may be negatives; None for all.
    """
    scores_MN = at_least_float32(scores_MN)
    positive_M1 = positive_M[:, None]
    own_M1 = scores_MN.gather(1, positive_M1)
    other_MN = torch.ones_like(scores_MN) if counted_N is None else counted_N.to(scores_MN.dtype).expand_as(scores_MN)
    other_MN = other_MN.scatter(1, positive_M1, 0.0)
    others_M1 = (scores_MN * other_MN).sum(1, keepdim=True) / other_MN.sum(1, keepdim=True).clamp_min(1.0)
    shifted_MN = scores_MN.scatter_add(1, positive_M1, -alpha * (own_M1 - others_M1))
    return info_nce(shifted_MN, positive_M, excluded_MN=_excluded(counted_N, scores_MN))


def _excluded(counted_N: Tensor | None, scores_MN: Tensor) -> Tensor | None:
    return None if counted_N is None else (~counted_N).expand_as(scores_MN)


@torch.no_grad()
def transport_plan(
    scores_NL: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    counted_N: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Codes of each row by entropic optimal transport, balanced over the codes; [N,L], rows sum to 1, no gradient.

    Sinkhorn in log space (CODIS, Duan et al. 2022; Cuturi 2013): exp(scores / epsilon), scaled in turn so that every
    code gets the same share of the counted rows of all ranks, and every row sums to 1.

    Args:
        scores_NL: of each row with each code; of cosines the default epsilon makes a clear choice.
        epsilon: weight of the entropy; smaller is nearer to a hard choice.
        iterations: of both scalings; the last is that of the rows.
        counted_N: bool, rows that take a share; None for all. The others are 0.
        reduce: sums a tensor over all ranks; on one rank the identity.

    Raises:
        ValueError: epsilon is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon is {epsilon}: must be positive")
    # float64: the sum over all ranks is of exponentials, which no rank can shift by the largest of another
    log_plan_NL = (scores_NL.double() / epsilon).log_softmax(1)
    weight_N1 = log_plan_NL.new_ones(len(scores_NL), 1) if counted_N is None else counted_N[:, None].double()
    for _ in range(iterations):
        taken_L = reduce((weight_N1 * log_plan_NL.exp()).sum(0))
        # how large the equal shares are does not matter: the rows are scaled next
        log_plan_NL = (log_plan_NL - taken_L.clamp_min(torch.finfo(torch.float64).tiny).log()).log_softmax(1)
    return (weight_N1 * log_plan_NL.exp()).to(at_least_float32(scores_NL).dtype)


def swapped_prediction(scores_ML: Tensor, plan_ML: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross entropy of softmax(scores / temperature) from the other modality's plan, [M] (CODIS, Duan et al. 2022).

    Args:
        scores_ML: of the clips of one modality with the codes.
        plan_ML: `transport_plan` of the same clips in the other modality.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: must be positive")
    return -(plan_ML * (at_least_float32(scores_ML) / temperature).log_softmax(1)).sum(1)

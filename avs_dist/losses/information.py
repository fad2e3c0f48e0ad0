"""Bounds of the mutual information of codes, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from avs_dist.gaussian import Gaussian
from avs_dist.precision import at_least_float32


def barber_agakov(target: Tensor, predicted: Gaussian, entropy: float | Tensor = 0.0) -> Tensor:
    """log q(target | source) + H(target), [...]; its mean is a lower bound of I(target; source) (ECMVAE, eq. 11).

    The log-variance is part of the density: without it the bound would not hold. ECMVAE takes the entropy for a
    constant. Then the value is no bound any more where the target is trained too: it grows without end as the target
    shrinks (`loss.latent.standardise` takes that way out).

    Args:
        target: [...,L].
        predicted: q(target | source), [...,L].
        entropy: differential entropy of the target.
    """
    return predicted.log_prob(target) + entropy


def club(
    predicted: Gaussian,
    target_NTD: Tensor,
    *,
    counted_NT: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """log q(y_it | x_it) - mean over all clips j of log q(y_jt | x_it), [N,T] (vCLUB in time, Uni-Code, eq. 5).

    The mean over the counted entries is the estimate, and where q is the true conditional an upper bound of I(x; y)
    (Cheng et al. 2020, "CLUB"): then it is the information plus KL(p(x) p(y) || p(x, y)), for Gaussians twice the
    information or more. log q is a square in y, so that mean and variance of y_jt over j tell the mean over j: with
    c = y_it - mean and d = (mean of q) - mean, an entry is the sum over D of (c d + (variance - c^2) / 2) / sigma^2.

    Args:
        predicted: q(y | x), [N,T,D].
        target_NTD: y; gets gradient as the target of its own entry and as the comparison of all others.
        counted_NT: bool, entries that take part; the others are 0. None for all.
        reduce: sums a tensor over all ranks, with gradient; on one rank the identity.
    """
    mean_NTD, log_var_NTD, target_NTD = (at_least_float32(each) for each in (*predicted, target_NTD))
    counted_NT1 = target_NTD.new_ones(*target_NTD.shape[:2], 1)
    if counted_NT is not None:
        absent_NT1 = ~counted_NT[..., None]
        mean_NTD, log_var_NTD, target_NTD = (
            each.masked_fill(absent_NT1, 0.0) for each in (mean_NTD, log_var_NTD, target_NTD)
        )
        counted_NT1 = counted_NT1.masked_fill(absent_NT1, 0.0)
    clips_T1 = reduce(counted_NT1.sum(0)).clamp_min(1.0)
    centre_TD = reduce(target_NTD.sum(0)) / clips_T1
    # in two passes: the mean square less the square of the mean would lose a variance that is small beside the mean
    centred_NTD = (target_NTD - centre_TD) * counted_NT1
    variance_TD = reduce(centred_NTD.square().sum(0)) / clips_T1
    difference_NTD = centred_NTD * (mean_NTD - centre_TD) + 0.5 * (variance_TD - centred_NTD.square())
    return (counted_NT1 * difference_NTD * (-log_var_NTD).exp()).sum(-1)


def club_sampled(predicted: Gaussian, target_NTD: Tensor, other_NTD: Tensor) -> Tensor:
    """log q(y_it | x_it) - log q(y_jt | x_it) with one other clip j for each i, [N,T] (CLUB, section 3.3).

    The mean over i equals that of `club` in expectation, with more variance. The public code of Uni-Code takes the mean
    over time of the squared error and of the log-variance, each by itself, before it divides.

    Args:
        predicted: q(y | x), [N,T,D].
        target_NTD: y of the same clip.
        other_NTD: y of another clip, such as that of a permutation of the clips of all ranks.
    """
    return predicted.log_prob(target_NTD) - predicted.log_prob(other_NTD)


def info_nce(
    scores_MN: Tensor, positive_M: Tensor, *, temperature: float = 1.0, excluded_MN: Tensor | None = None
) -> Tensor:
    """-log of the softmax probability of the positive among all candidates, [M] (contrastive diffusion AVS, eq. 11).

    log N minus its mean is a lower bound of the mutual information of anchors and candidates, at most log N. The paper
    prints the temperature so that it cancels (f / tau over a sum of f / tau); here it divides the scores, as usual.

    Args:
        scores_MN: of each of M anchors with each of N candidates, such as `cosine_scores`.
        positive_M: index of the candidate that belongs to the anchor.
        excluded_MN: bool, candidates that are no negatives of an anchor; the positive always takes part.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: must be positive")
    logits_MN = scores_MN / temperature
    if excluded_MN is not None:
        excluded_MN = excluded_MN.scatter(1, positive_M[:, None], False)
        logits_MN = logits_MN.masked_fill(excluded_MN, float("-inf"))
    return F.cross_entropy(logits_MN, positive_M, reduction="none")


def cpc(prediction_MD: Tensor, candidates_ND: Tensor, positive_M: Tensor, *, counted_N: Tensor | None = None) -> Tensor:
    """InfoNCE of the dot products of W_k c_t with the vectors k steps later, [M] (Uni-Code, eq. 6, for one k).

    The positive stands in the denominator too, as in the public code; the set Z_b of the paper leaves this open.

    Args:
        prediction_MD: W_k c_t of one modality.
        candidates_ND: the vector at t + k of the other modality (Cross-CPC) or of the same, of the clips of all ranks.
        positive_M: index of the candidate of the anchor's own clip.
        counted_N: bool, candidates that may be negatives; None for all.
    """
    scores_MN = at_least_float32(prediction_MD) @ at_least_float32(candidates_ND).T
    excluded_MN = None if counted_N is None else (~counted_N).expand_as(scores_MN)
    return info_nce(scores_MN, positive_M, excluded_MN=excluded_MN)


def cosine_scores(anchor_MD: Tensor, candidate_ND: Tensor) -> Tensor:
    """Cosine of each anchor with each candidate, [M,N]; 0 with a vector of zeros."""
    return F.normalize(anchor_MD, dim=1) @ F.normalize(candidate_ND, dim=1).T

"""Bounds of the mutual information of codes, in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from avs_dist.gaussian import Gaussian


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


def cosine_scores(anchor_MD: Tensor, candidate_ND: Tensor) -> Tensor:
    """Cosine of each anchor with each candidate, [M,N]; 0 with a vector of zeros."""
    return F.normalize(anchor_MD, dim=1) @ F.normalize(candidate_ND, dim=1).T

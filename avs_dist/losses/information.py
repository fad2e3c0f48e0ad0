"""Bounds of the mutual information of codes, in nats."""

from __future__ import annotations

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

"""Divergences between distributions of latent codes, and the orthogonality of codes (ECMVAE, sections 3.1 to 3.3).

q is the posterior, p the prior. Distributions are over the last dimension L; [...] is any leading shape, mostly frames.
All results are in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from avs_dist.gaussian import Gaussian, Mixture, product

VARIANCE_EPS = 1e-6  # a dead dimension stays dead


def kl_per_dimension(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of each dimension, [...,L]."""
    log_ratio = q.log_var - p.log_var
    distance = (q.mean - p.mean).square() * (-p.log_var).exp()
    # expm1, as exp(x) - 1 - x would lose what is left of it near 0
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p), [...]."""
    return kl_per_dimension(q, p).sum(-1)


def weighted_kl(q: Mixture, p: Mixture) -> Tensor:
    """Mean over the experts of KL(q_k || p_k), [...]: an upper bound of KL(q || p) (eq. 4, equal weights).

    Raises:
        ValueError: another number of experts in q than in p.
    """
    if len(q.experts) != len(p.experts):
        raise ValueError(f"weighted_kl pairs the experts: got {len(q.experts)} in q and {len(p.experts)} in p")
    pairs = zip(q.experts, p.experts, strict=True)
    return torch.stack([gaussian_kl(q_k, p_k) for q_k, p_k in pairs]).mean(0)


def js_divergence(
    q: Gaussian | Mixture,
    p: Gaussian | Mixture,
    noise_q: Tensor,
    noise_p: Tensor,
    choice_q: Tensor | None = None,
    choice_p: Tensor | None = None,
) -> Tensor:
    """Monte Carlo estimate of the Jensen-Shannon divergence with m = (q + p) / 2 (eq. 5), [...].

    Half of the samples come from q and half from p, so together from m; both densities are taken at every sample x.
    With w = q(x) / (q(x) + p(x)) and H its binary entropy, JS = E_m[ln 2 - H(w)]. So each sample gives a number from 0
    to ln 2, which is 0 where q = p; the mean and its gradient (through the samples and the densities) are unbiased.

    Args:
        noise_q, noise_p: standard normal [S,...,L].
        choice_q, choice_p: uniform in [0,1) [S,...]; for mixtures only.

    Raises:
        ValueError: a mixture without choice.
    """
    of_q = _distinguishability(q, p, q.sample(noise_q, choice_q))
    of_p = _distinguishability(q, p, p.sample(noise_p, choice_p))
    return 0.5 * (of_q + of_p).mean(0)


def geometric_js(q: Gaussian, p: Gaussian) -> Tensor:
    """Half of KL(q || g) + KL(p || g), g the normalised geometric mean of q and p, [...]; not bounded by ln 2.

    g takes the place of m = (q + p) / 2, which has no closed form (Nielsen 2019, "On the Jensen-Shannon symmetrization
    of distances relying on abstract means").
    """
    # the square root of a Gaussian has twice its variance
    mean = product([Gaussian(each.mean, each.log_var + math.log(2.0)) for each in (q, p)])
    return 0.5 * (gaussian_kl(q, mean) + gaussian_kl(p, mean))


def orthogonality(codes: Sequence[Tensor], valid_BT: Tensor) -> Tensor:
    """Sum over the pairs of codes of ||a^T b||_F^2 for each clip (L_diff, eq. 9), [B]; 0 for orthogonal codes.

    Args:
        codes: [B,T,L] each; a^T b is L x L.
        valid_BT: bool, frames that exist; the others have no part.

    Raises:
        ValueError: fewer than two codes.
    """
    if len(codes) < 2:
        raise ValueError(f"orthogonality compares pairs of codes: needs at least 2, got {len(codes)}")
    present = [code_BTL.masked_fill(~valid_BT[..., None], 0.0) for code_BTL in codes]
    products = [a_BTL.mT @ b_BTL for a_BTL, b_BTL in itertools.combinations(present, 2)]
    return torch.stack(products).square().sum((0, 2, 3))


def standardised(code_NL: Tensor, reduce: Callable[[Tensor], Tensor], counted_N: Tensor | None = None) -> Tensor:
    """The code with zero mean and unit variance over the N frames of all ranks (ours).

    Args:
        reduce: sums a tensor over all ranks, with gradient; on one rank the identity.
        counted_N: bool, frames that mean and variance are taken over; None for all.
    """
    weight_N1 = code_NL.new_ones(len(code_NL), 1) if counted_N is None else counted_N[:, None].to(code_NL.dtype)
    frames = reduce(weight_N1.sum()).clamp_min(1.0)
    centred_NL = code_NL - reduce((weight_N1 * code_NL).sum(0)) / frames
    variance_L = reduce((weight_N1 * centred_NL.square()).sum(0)) / frames
    return centred_NL * torch.rsqrt(variance_L + VARIANCE_EPS)


def correlation(codes: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over the pairs of standardised codes [N,L] of their squared correlations; a scalar, the same on every rank.

    Ours, in the place of eq. 9: that has its minimum where all codes are zero, this one where they are uncorrelated.
    """
    frames = reduce(codes[0].new_tensor(float(len(codes[0])))).clamp_min(1.0)
    products = reduce(torch.stack([a_NL.mT @ b_NL for a_NL, b_NL in itertools.combinations(codes, 2)]))
    return (products / frames).square().sum()


def _distinguishability(q: Gaussian | Mixture, p: Gaussian | Mixture, value: Tensor) -> Tensor:
    """ln 2 - H(w) of each value [S,...,L], w the probability that it comes from q rather than from p; [S,...]."""
    # H(w) = softplus(-r) + r sigmoid(-r), r = |log(q / p)|: no overflow at any r
    ratio = (q.log_prob(value) - p.log_prob(value)).abs()
    # ln 2 - softplus(-r), exact where r is small
    rest = -torch.log1p(0.5 * torch.expm1(-ratio))
    return (rest - ratio * torch.sigmoid(-ratio)).clamp_min(0.0)

"""What the public ECMVAE code computes, where it departs from the paper.

Each function says what is different; the paper's forms are in `latent`, `information` and `segmentation`. Codes and
distributions have the shape [...,L], the losses of each frame [...].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.gaussian import LOG_TWO_PI, Gaussian
from avs_dist.losses import latent
from avs_dist.losses.segmentation import counted_frames, edge_weight, weighted_iou_loss

LABEL_SMOOTHING = 0.001


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p), [...], where exp(log_var) is taken for the standard deviation.

    The samples have the standard deviation exp(log_var / 2), so this is not the KL of what is sampled.
    """
    return latent.gaussian_kl(Gaussian(q.mean, 2.0 * q.log_var), Gaussian(p.mean, 2.0 * p.log_var))


def js_divergence(q: Gaussian, p: Gaussian, noise_q: Tensor, noise_p: Tensor) -> Tensor:
    """Instead of the Jensen-Shannon divergence: the densities of q and p compared at different points, [...].

    One sample each, the density of q at that of q and of p at that of p; every dimension on its own. Not zero for
    q = p, not bounded, and no gradient passes through the samples.

    Args:
        noise_q, noise_p: standard normal [...,L].
    """
    log_q, log_p = _log_density(q, noise_q), _log_density(p, noise_p)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
    each = log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)
    return 0.5 * each.sum(-1)


def difference(
    shared_BTL: Tensor, specific: Sequence[Tensor], valid_BT: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum over the specific codes [B,T,L] of the mean squared entry of shared^T specific; a scalar.

    Departs from eq. 9: the frames of the whole global batch make one matrix, whose columns get zero mean and whose
    rows are divided by their norm (which passes no gradient); mean instead of sum; no pair of specific codes.

    Args:
        valid_BT: bool, frames that exist; the others have no part.
        reduce: sums a tensor over all ranks, with gradient; on one rank the identity.

    Returns:
        The loss of the global batch, the same on every rank.
    """
    rows_KML = torch.stack([code_BTL[valid_BT] for code_BTL in (shared_BTL, *specific)])
    frames = reduce(valid_BT.sum().to(rows_KML.dtype))
    centred_KML = rows_KML - reduce(rows_KML.sum(1, keepdim=True)) / frames
    unit_KML = centred_KML / (centred_KML.detach().norm(dim=2, keepdim=True) + 1e-6)
    products = reduce(unit_KML[0].mT @ unit_KML[1:])
    return products.square().mean((1, 2)).sum()


def log_likelihood(target: Tensor, predicted: Gaussian) -> Tensor:
    """Instead of log q(target | source): its squared error alone, [...].

    Without the log-variance nothing keeps the variance from growing, and this is no bound of the information.
    """
    return -0.5 * ((target - predicted.mean).square() * (-predicted.log_var).exp()).sum(-1)


def structure_loss(logits_BTHW: Tensor, masks_BTHW: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The structure loss whose binary cross entropy is not weighted; arguments and results as in `segmentation`.

    The cross entropy is averaged before it meets the weights, which then cancel; its targets are smoothed. The IoU
    loss is weighted, and its targets are not smoothed.
    """
    logits_NHW, mask_NHW = counted_frames(logits_BTHW, masks_BTHW, counted_BT)
    smooth_NHW = (1.0 - LABEL_SMOOTHING) * mask_NHW + 0.5 * LABEL_SMOOTHING
    # all frames have as many pixels: the sum of their means is the mean over all pixels, times the frames
    bce_N = F.binary_cross_entropy_with_logits(logits_NHW, smooth_NHW, reduction="none").mean((1, 2))
    loss_N = bce_N + weighted_iou_loss(logits_NHW, mask_NHW, edge_weight(mask_NHW))
    return loss_N.sum(), counted_BT.sum().to(loss_N.dtype)


def _log_density(of: Gaussian, noise: Tensor) -> Tensor:
    """log density of each dimension [...,L] at a sample that passes no gradient."""
    value = of.sample(noise).detach()
    return -0.5 * ((value - of.mean).square() * (-of.log_var).exp() + of.log_var + LOG_TWO_PI)

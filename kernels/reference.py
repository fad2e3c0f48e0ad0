"""Literal formulas of the hot spots: slow, obvious, and what every fast implementation is tested against.

Shape letters: B clips, T frames, P = h*w positions of a frame, N = T*P tokens of a clip, C channels, K = C/2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels.moments import Moments, Reduce, merge_ranks

EPS = 1e-5  # of both normalisations, as published


class TPAVIWeights(NamedTuple):
    """Parameters of one TPAVI block; 1x1x1 convolutions are matrices [out, in]."""

    theta_KC: Tensor
    theta_bias_K: Tensor
    phi_KC: Tensor
    phi_bias_K: Tensor
    g_KC: Tensor
    g_bias_K: Tensor
    out_CK: Tensor
    out_bias_C: Tensor
    bn_weight_C: Tensor
    bn_bias_C: Tensor
    ln_weight_C: Tensor
    ln_bias_C: Tensor


class Running(NamedTuple):
    """Running statistics of the batch normalisation, used in eval mode."""

    mean_C: Tensor
    var_C: Tensor


def mixing_matrix(like: Tensor, alignment: Tensor | None, valid_BT: Tensor | None) -> Tensor:
    """R_BTT[b, t0, t]: how much a token of frame t0 takes from frame t.

    Published: 1/T everywhere. Time-aligned: 1/T + alignment[t0 - t + len(alignment)//2], learnable and relative, so
    that it holds for any T. Frames that do not exist neither give nor take, and T counts those that exist.

    Args:
        like: [B,T,...], gives sizes, dtype and device.

    Raises:
        ValueError: more frames than the alignment vector covers.
    """
    batch, frames = like.shape[:2]
    if valid_BT is None:
        mixing_BTT = like.new_full((batch, frames, frames), 1.0 / frames)
    else:
        valid_BT = valid_BT.to(like.dtype)
        mixing_BTT = (1.0 / valid_BT.sum(1).clamp_min(1.0))[:, None, None].expand(-1, frames, frames)
    if alignment is not None:
        centre = len(alignment) // 2
        if frames > centre + 1:
            raise ValueError(f"time-aligned TPAVI covers {centre + 1} frames, got {frames}; cut the clip into windows")
        step_T = torch.arange(frames, device=like.device)
        mixing_BTT = mixing_BTT + alignment.to(like.dtype)[step_T[:, None] - step_T[None, :] + centre]
    if valid_BT is not None:
        mixing_BTT = mixing_BTT * valid_BT[:, :, None] * valid_BT[:, None, :]
    return mixing_BTT


def tpavi(
    x_BTPC: Tensor,
    key_BTPC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None = None,
    valid_BT: Tensor | None = None,
    running: Running | None = None,
    reduce_moments: Reduce | None = None,
) -> tuple[Tensor, Moments | None]:
    """TPAVI exactly as published (TPAVI paper, eq. 1-3): N x N scores, no softmax, divided by N.

        y = (theta(x) phi(key)^T / N) g(x),   out = LayerNorm(BatchNorm(W_z y) + x)

    theta and g act on the visual tokens, phi on the key: the aligned audio feature of each frame, repeated over its
    positions, or (visual-visual) the visual tokens themselves. With `alignment` the score of tokens i and j is
    weighted by R[t(i), t(j)] / P instead of 1 / N, see `mixing_matrix`.

    Args:
        x_BTPC: visual tokens.
        key_BTPC: audio feature of each frame in the C channels (any P that broadcasts), or x_BTPC itself.
        alignment: learnable offsets of the time-aligned block, or None.
        valid_BT: frames that exist, or None for all: others are no key, are not counted by the batch
            normalisation, and their output is zero.
        running: running statistics (eval mode), or None to normalise with the moments of the batch.
        reduce_moments: sums a tensor over all ranks with gradient, so that the batch is the global batch.

    Returns:
        out_BTPC, and the moments of the batch (None in eval mode).
    """
    batch, frames, positions, channels = x_BTPC.shape
    tokens = frames * positions
    x_BNC = x_BTPC.reshape(batch, tokens, channels)
    key_BNC = key_BTPC.expand(x_BTPC.shape).reshape(batch, tokens, channels)
    theta_BNK = F.linear(x_BNC, weights.theta_KC, weights.theta_bias_K)
    phi_BNK = F.linear(key_BNC, weights.phi_KC, weights.phi_bias_K)
    g_BNK = F.linear(x_BNC, weights.g_KC, weights.g_bias_K)
    scores_BNN = theta_BNK @ phi_BNK.transpose(1, 2)
    if alignment is None and valid_BT is None:
        scores_BNN = scores_BNN / tokens
    else:
        mixing_BTT = mixing_matrix(x_BTPC, alignment, valid_BT)
        mixing_BNN = mixing_BTT.repeat_interleave(positions, 1).repeat_interleave(positions, 2)
        scores_BNN = scores_BNN * mixing_BNN / positions
    z_BNC = F.linear(scores_BNN @ g_BNK, weights.out_CK, weights.out_bias_C)
    z_BNC, moments = batch_norm(z_BNC, weights, valid_BT, running, reduce_moments)
    out_BNC = F.layer_norm(z_BNC + x_BNC, [channels], weights.ln_weight_C, weights.ln_bias_C, EPS)
    out_BTPC = out_BNC.reshape(x_BTPC.shape)
    if valid_BT is not None:
        out_BTPC = out_BTPC * valid_BT[:, :, None, None].to(out_BTPC.dtype)
    return out_BTPC, moments


def batch_norm(
    z_BNC: Tensor,
    weights: TPAVIWeights,
    valid_BT: Tensor | None,
    running: Running | None,
    reduce_moments: Reduce | None,
) -> tuple[Tensor, Moments | None]:
    """Batch normalisation over the tokens of existing frames of all clips and ranks."""
    moments = None
    if running is None:
        if valid_BT is None:
            counted_MC = z_BNC.reshape(-1, z_BNC.shape[-1])
        else:
            counted_MC = z_BNC[valid_BT.repeat_interleave(z_BNC.shape[1] // valid_BT.shape[1], 1)]
        var_C, mean_C = torch.var_mean(counted_MC, 0, correction=0)
        moments = merge_ranks(Moments(mean_C.new_tensor(float(len(counted_MC))), mean_C, var_C), reduce_moments)
        mean_C, var_C = moments.mean_C, moments.var_C
    else:
        mean_C, var_C = running
    scale_C = weights.bn_weight_C * torch.rsqrt(var_C + EPS)
    return (z_BNC - mean_C) * scale_C + weights.bn_bias_C, moments

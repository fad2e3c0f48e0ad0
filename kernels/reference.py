"""Literal formulas of the hot spots: slow, obvious, and what every fast implementation is tested against.

Shape letters: B clips, T frames, P = h*w positions of a frame, N = T*P tokens of a clip, C channels, K = C/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels.moments import Moments, Reduce, merge_ranks

EPS = 1e-5  # of both normalisations, as published
L2_EPS = 1e-6  # of the L2-normalised variant, as published


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
    l2_normalise: bool = False,
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
        l2_normalise: normalise tokens and key first, and add the normalised tokens (ECMVAE's variant).

    Returns:
        out_BTPC, and the moments of the batch (None in eval mode).
    """
    if l2_normalise:
        x_BTPC, key_BTPC = l2_normalised(x_BTPC), l2_normalised(key_BTPC)
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


def l2_normalised(x: Tensor) -> Tensor:
    """x / sqrt(sum of squares over the last dimension + 1e-6), as ECMVAE's TPAVI does with its inputs."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


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


class CodebookState(NamedTuple):
    """A codebook that moves by exponential averages; a code is sum / count but for smoothing and clones."""

    codes_LD: Tensor  # float32, as all but idle
    count_L: Tensor  # averaged number of tokens of each code (N of eq. 7)
    sum_LD: Tensor  # averaged sum of these tokens (o of eq. 7)
    idle_ML: Tensor  # int32 or int64: batches since each modality last chose each code


class Observed(NamedTuple):
    """Tokens of one modality in this step."""

    tokens_ND: Tensor
    teachers_ND: Tensor | None  # what the other modalities say at each token, in the type of the tokens (r of eq. 7)
    indices_N: Tensor  # int64: the code of each token; tokens of an index outside [0, L) are left out


def codebook_assign(
    tokens_ND: Tensor, codes_LD: Tensor, valid_N: Tensor | None = None
) -> tuple[list[int], list[float], int]:
    """Nearest code of each token, token by token: indices, squared distances and the number of bad tokens.

    The lowest index wins a tie. A token with a NaN or an infinity is bad: index -1, distance NaN. A token that is not
    valid has index -1 and distance 0 and is not bad whatever it holds.
    """
    indices, distances, num_bad = [], [], 0
    for position, token_D in enumerate(tokens_ND):
        if valid_N is not None and not valid_N[position]:
            indices.append(-1)
            distances.append(0.0)
        elif not token_D.isfinite().all():
            indices.append(-1)
            distances.append(float("nan"))
            num_bad += 1
        else:
            distance_L = ((token_D - codes_LD) ** 2).sum(1).tolist()
            distances.append(min(distance_L))
            indices.append(distance_L.index(distances[-1]))
    return indices, distances, num_bad


def codebook_update(
    state: CodebookState,
    observed: Sequence[Observed],
    decay: float,
    smoothing_eps: float,
    reset_after: int | None,
    permutation_L: Tensor | None,
    reset_rule: str,
    noise: float,
) -> CodebookState:
    """One step of the multi-modal moving average (CMG, section 4.3, eq. 7), token by token and code by code.

        N <- g N + (1 - g) sum_m n_m,    o <- g o + (1 - g) sum_m sum_j (z_mj + r_mj) / 2,    e = o / smoothed(N)

    smoothed(N) = (N + eps) / (sum N + L eps) * sum N. Where a component of the teacher r is not finite, z stands alone.

    Reset, "all" (paper): a code lives if every modality chose it in the last `reset_after` batches; "any" (public
    code): if one did. The j-th dead code becomes a clone of the j-th live code in the order of the permutation, and so
    on round the live codes: code of the donor plus noise, count 1, sum equal to the code, idle 0. Without live codes
    nothing is reset.
    """
    codes_LD, count_L, sum_LD, idle_ML = (value.clone() for value in state)
    num_codes, dims = codes_LD.shape
    chosen_ML = torch.zeros(len(observed), num_codes, dtype=codes_LD.dtype)
    batch_LD = torch.zeros_like(codes_LD)
    for modality, (tokens_ND, teachers_ND, indices_N) in enumerate(observed):
        for position, code in enumerate(indices_N.tolist()):
            if not 0 <= code < num_codes:
                continue
            value_D = tokens_ND[position].to(codes_LD.dtype)
            if teachers_ND is not None:
                teacher_D = teachers_ND[position].to(codes_LD.dtype)
                value_D = torch.where(teacher_D.isfinite(), (value_D + teacher_D) / 2, value_D)
            chosen_ML[modality, code] += 1
            batch_LD[code] += value_D
    for code in range(num_codes):
        count_L[code] = decay * count_L[code] + (1 - decay) * chosen_ML[:, code].sum()
        sum_LD[code] = decay * sum_LD[code] + (1 - decay) * batch_LD[code]
        for modality in range(len(observed)):
            idle_ML[modality, code] = 0 if chosen_ML[modality, code] > 0 else idle_ML[modality, code] + 1
    total = count_L.sum()
    for code in range(num_codes):
        smoothed = (count_L[code] + smoothing_eps) / (total + num_codes * smoothing_eps) * total
        if smoothed > 0:
            codes_LD[code] = sum_LD[code] / smoothed
    if reset_after is not None and permutation_L is not None:
        oldest = max if reset_rule == "all" else min
        dead = [code for code in range(num_codes) if oldest(idle_ML[:, code].tolist()) >= reset_after]
        donors = [code for code in permutation_L.tolist() if code not in dead]
        for place, code in enumerate(dead if donors else []):
            step_D = noise * clone_noise(permutation_L[code : code + 1], dims)[0].to(codes_LD.dtype)
            codes_LD[code] = codes_LD[donors[place % len(donors)]] + step_D
            count_L[code], sum_LD[code], idle_ML[:, code] = 1, codes_LD[code], 0
    return CodebookState(codes_LD, count_L, sum_LD, idle_ML)


def clone_noise(seed_C: Tensor, dims: int) -> Tensor:
    """Float32 numbers [C,dims], uniform in [-1, 1] and fixed by seed and dimension: equal on all ranks and devices.

    A mixed seed times a mixed dimension, modulo 2^32 as a signed number, over 2^31.
    """
    dim_D = torch.arange(dims, device=seed_C.device)
    factor_C, factor_D = (
        (((x ^ (x >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF) | 1).int()
        for x in ((seed_C * 0x27D4EB2F + 0x165667B1) & 0x7FFFFFFF, (dim_D * 0x297A2D39 + 0x3C6EF372) & 0x7FFFFFFF)
    )
    return (factor_C[:, None] * factor_D).float() * 2.0**-31


class DenoiserWeights(NamedTuple):
    """A denoiser of L fully connected layers (Diffusion AVS, section 3.2) whose input is latent and condition.

    The output of layer l is LeakyReLU(W_l a + b_l), of the last layer W_l a + b_l; the first layer adds the embedding
    of the step before its activation. With `skips` the layers before the middle are an encoder and those after it a
    decoder: the input of layer L-1-j is the output of layer L-2-j plus that of layer j, for j < (L-1) // 2.
    """

    matrices: tuple[Tensor, ...]  # [out, in] each; the first takes D + E inputs, the last gives D outputs
    biases: tuple[Tensor, ...]  # [out] each
    step_SH: Tensor  # one row per denoising step, as wide as the first layer's output
    skips: bool = False
    slope: float = 0.01  # of LeakyReLU


class DDIMSteps(NamedTuple):
    """Cumulative products of alpha in sampling order, the noisiest step first."""

    alpha_S: Tensor  # at each step
    alpha_next_S: Tensor  # at the step it goes to; the last goes to 1 or to the final alpha of the schedule


def skip_pairs(num_layers: int) -> list[tuple[int, int]]:
    """(j, L-1-j): the output of the one is added to the input of the other; neighbours have no link to skip."""
    return [(j, num_layers - 1 - j) for j in range((num_layers - 1) // 2)]


def denoise(latent_D: Tensor, condition_E: Tensor, step: int, weights: DenoiserWeights) -> Tensor:
    """Output of the denoiser for one row, neuron by neuron."""
    givers = {taker: giver for giver, taker in skip_pairs(len(weights.matrices))} if weights.skips else {}
    outputs: list[Tensor] = []
    value = torch.cat([latent_D, condition_E])
    for layer, (matrix, bias) in enumerate(zip(weights.matrices, weights.biases, strict=True)):
        if layer in givers:
            value = value + outputs[givers[layer]]
        value = torch.stack([(matrix[neuron] * value).sum() + bias[neuron] for neuron in range(len(matrix))])
        if layer == 0:
            value = value + weights.step_SH[step]
        if layer < len(weights.matrices) - 1:
            value = torch.where(value > 0, value, weights.slope * value)
        outputs.append(value)
    return value


def ddim_sample(
    noise_BD: Tensor,
    condition_BE: Tensor,
    weights: DenoiserWeights,
    steps: DDIMSteps,
    prediction: str,
    eta: float,
    step_noise_SBD: Tensor | None,
    clip: float | None,
) -> Tensor:
    """Denoising diffusion implicit models (DDIM, eq. 12 and 16), row by row, in the type of the inputs.

        eps:  x0 = (z - sqrt(1-a) eps) / sqrt(a)                v:  x0 = sqrt(a) z - sqrt(1-a) v
        x0:   eps = (z - sqrt(a) x0) / sqrt(1-a)                    eps = sqrt(a) v + sqrt(1-a) z
        sigma = eta sqrt((1-a') / (1-a)) sqrt(1 - a/a')
        z' = sqrt(a') clamp(x0, -clip, clip) + sqrt(1 - a' - sigma^2) eps + sigma noise

    eps stays that of the unclamped x0.
    """
    rows = []
    for row in range(len(noise_BD)):
        z_D = noise_BD[row]
        for step, (a, a_next) in enumerate(zip(steps.alpha_S, steps.alpha_next_S, strict=True)):
            output_D = denoise(z_D, condition_BE[row], step, weights)
            if prediction == "eps":
                eps_D = output_D
                x0_D = (z_D - (1 - a).sqrt() * eps_D) / a.sqrt()
            elif prediction == "v":
                x0_D = a.sqrt() * z_D - (1 - a).sqrt() * output_D
                eps_D = a.sqrt() * output_D + (1 - a).sqrt() * z_D
            else:
                x0_D = output_D
                eps_D = (z_D - a.sqrt() * x0_D) / (1 - a).sqrt()
            if clip is not None:
                x0_D = x0_D.clamp(-clip, clip)
            sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
            z_D = a_next.sqrt() * x0_D + (1 - a_next - sigma**2).sqrt() * eps_D
            if step_noise_SBD is not None:
                z_D = z_D + sigma * step_noise_SBD[step, row]
        rows.append(z_D)
    return torch.stack(rows)

"""TPAVI in rank-T form: the published N x N block, exactly, with a few passes over the visual tokens.

The audio key is the same for all positions of a frame and there is no softmax, so the N x N score matrix has rank T:

    u_t  = W_theta^T phi_t                   c_t = b_theta . phi_t            phi_t = W_phi a_t + b_phi
    q_it = R[t(i), t] (x_i . u_t + c_t)      mixed scores [N, T]
    v_t  = W_z (W_g mean_P(x_t) + b_g)       W_z y_i + b_z = sum_t q_it v_t + b_z
    out  = LayerNorm(BatchNorm(.) + x)

The moments that the batch normalisation needs are those of q (T x T), so BatchNorm costs no pass over the tokens and
synchronising it over ranks costs one collective of 2C + 1 numbers. Forward reads x twice and writes out once;
backward recomputes the sum before LayerNorm instead of storing it. Stored for backward beyond x: q, two numbers a
token, and O(B T^2 C). Shape letters as in reference.py, and F = B*T frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avs_dist.kernels import runtime, tpavi_passes
from avs_dist.kernels.moments import Moments, Reduce, merge_groups, merge_ranks
from avs_dist.kernels.reference import EPS, Running, TPAVIWeights, batch_norm, l2_normalised, mixing_matrix
from avs_dist.kernels.tpavi_triton import TPAVIFunction

MAX_FRAMES, MAX_CHANNELS = 32, 512  # of the kernels


def tpavi(
    x_BTPC: Tensor,
    audio_BTC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None = None,
    valid_BT: Tensor | None = None,
    running: Running | None = None,
    reduce_moments: Reduce | None = None,
    l2_normalise: bool = False,
) -> tuple[Tensor, Moments | None]:
    """Audio-visual TPAVI; same result, arguments and returns as `reference.tpavi` with the audio repeated as key.

    Runs on Triton or torch as `runtime` decides; on torch also where the kernels do not reach (more than 32 frames or
    512 channels). bfloat16 and float16 tokens are computed with in float32 and returned in their own type, under
    autocast too; float64 stays float64. Tokens and gradients may have any strides.

    Raises:
        ValueError: sizes, types or devices do not fit.
    """
    form = tpavi_triton if runtime.use_triton("tpavi", x_BTPC, wins=_within_kernels(x_BTPC)) else tpavi_torch
    return form(x_BTPC, audio_BTC, weights, alignment, valid_BT, running, reduce_moments, l2_normalise)


@torch.compiler.disable  # the kernels are compiled already; a graph break costs less than tracing their launches
def tpavi_triton(
    x_BTPC: Tensor,
    audio_BTC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None = None,
    valid_BT: Tensor | None = None,
    running: Running | None = None,
    reduce_moments: Reduce | None = None,
    l2_normalise: bool = False,
) -> tuple[Tensor, Moments | None]:
    """`tpavi` on Triton, see tpavi_triton.py.

    Raises:
        ValueError: as `tpavi`; more than 32 frames or 512 channels; tensors not on a GPU, while kernels are compiled.
    """
    _check(x_BTPC, audio_BTC, weights, alignment, valid_BT, running)
    if not _within_kernels(x_BTPC):
        raise ValueError(
            f"tpavi: the kernels take up to {MAX_FRAMES} frames and {MAX_CHANNELS} channels, got x_BTPC "
            f"{list(x_BTPC.shape)}; AVS_KERNELS=torch has no such limit"
        )
    runtime.require_triton("tpavi", x_BTPC)
    with runtime.no_autocast(x_BTPC):
        return _on_triton(x_BTPC, audio_BTC, weights, alignment, valid_BT, running, reduce_moments, l2_normalise)


def _on_triton(
    x_BTPC: Tensor,
    audio_BTC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None,
    valid_BT: Tensor | None,
    running: Running | None,
    reduce_moments: Reduce | None,
    l2_normalise: bool,
) -> tuple[Tensor, Moments | None]:
    w, audio_BTC = _prepare(x_BTPC, audio_BTC, weights, l2_normalise)
    valid_BT = None if valid_BT is None else valid_BT.contiguous()
    mixing_BTT = mixing_matrix(audio_BTC, alignment, valid_BT).contiguous()
    u_BTC, c_BT = _audio_side(audio_BTC, w)
    running_C: tuple[Tensor | None, ...] = (None, None)
    if running is not None:
        running_C = tuple(value.to(u_BTC.dtype).contiguous() for value in running)
    matrices = (w.g_KC, w.g_bias_K, w.out_CK, w.out_bias_C)
    norms = (w.bn_weight_C, w.bn_bias_C, w.ln_weight_C, w.ln_bias_C)
    rest = (*running_C, valid_BT, l2_normalise, reduce_moments)
    out_BTPC, count, mean_C, var_C = TPAVIFunction.apply(x_BTPC, u_BTC, c_BT, mixing_BTT, *matrices, *norms, *rest)
    if running is not None:
        return out_BTPC, None
    return out_BTPC, Moments(count, mean_C + w.out_bias_C.detach(), var_C)


def tpavi_torch(
    x_BTPC: Tensor,
    audio_BTC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None = None,
    valid_BT: Tensor | None = None,
    running: Running | None = None,
    reduce_moments: Reduce | None = None,
    l2_normalise: bool = False,
) -> tuple[Tensor, Moments | None]:
    """`tpavi` in torch operations.

    Raises:
        ValueError: as `tpavi`.
    """
    _check(x_BTPC, audio_BTC, weights, alignment, valid_BT, running)
    with runtime.no_autocast(x_BTPC):
        return _on_torch(x_BTPC, audio_BTC, weights, alignment, valid_BT, running, reduce_moments, l2_normalise)


def _on_torch(
    x_BTPC: Tensor,
    audio_BTC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None,
    valid_BT: Tensor | None,
    running: Running | None,
    reduce_moments: Reduce | None,
    l2_normalise: bool,
) -> tuple[Tensor, Moments | None]:
    w, audio_BTC = _prepare(x_BTPC, audio_BTC, weights, l2_normalise)
    if l2_normalise:
        x_BTPC = l2_normalised(x_BTPC.to(audio_BTC.dtype)).to(x_BTPC.dtype)
    batch, frames, positions, channels = x_BTPC.shape
    mixing_BTT = mixing_matrix(audio_BTC, alignment, valid_BT)
    u_BTC, c_BT = _audio_side(audio_BTC, w)
    u_BTTC = mixing_BTT[..., None] * u_BTC[:, None]
    c_BTT = mixing_BTT * c_BT[:, None]
    x_FPC, scores_FPT, mean_FC = tpavi_passes.read(x_BTPC.reshape(-1, positions, channels), u_BTTC.flatten(0, 1))
    q_FPT = scores_FPT + c_BTT.flatten(0, 1)[:, None]

    v_BTC = F.linear(F.linear(mean_FC.view(batch, frames, channels), w.g_KC, w.g_bias_K), w.out_CK)
    if running is None:
        unbiased = merge_ranks(_batch_moments(q_FPT, v_BTC, valid_BT), reduce_moments)
        moments = Moments(*(value.detach() for value in (*unbiased,)))
        moments = moments._replace(mean_C=moments.mean_C + w.out_bias_C.detach())
        # b_z cancels: its gradient is zero, not rounding noise that Adam would blow up to whole steps, and it stays in
        # the graph, since every parameter must get a gradient
        offset_C, var_C = 0.0 * w.out_bias_C - unbiased.mean_C, unbiased.var_C
    else:
        moments = None
        offset_C, var_C = w.out_bias_C - running.mean_C.to(u_BTC.dtype), running.var_C.to(u_BTC.dtype)
    scale_C = w.bn_weight_C * torch.rsqrt(var_C + EPS)
    shift_C = w.bn_bias_C + offset_C * scale_C

    v_FTC = (v_BTC * scale_C)[:, None].expand(batch, frames, frames, channels).flatten(0, 1)
    out_FPC = tpavi_passes.write(x_FPC, q_FPT, v_FTC, shift_C, w.ln_weight_C, w.ln_bias_C)
    return _masked(out_FPC.view(x_BTPC.shape), valid_BT), moments


def tpavi_visual(
    x_BTPC: Tensor,
    weights: TPAVIWeights,
    alignment: Tensor | None = None,
    valid_BT: Tensor | None = None,
    running: Running | None = None,
    reduce_moments: Reduce | None = None,
    l2_normalise: bool = False,
) -> tuple[Tensor, Moments | None]:
    """Visual-visual TPAVI (the key is x itself): linear attention, O(N K^2); equals `reference.tpavi(x, x, ...)`."""
    _check(x_BTPC, None, weights, alignment, valid_BT, running)
    dtype = _accumulation_type(x_BTPC)
    w = _cast(weights, dtype)
    x = x_BTPC.to(dtype)
    if l2_normalise:
        x = l2_normalised(x)
    mixing_BTT = mixing_matrix(x, alignment, valid_BT)
    y_BTPK = linear_attention(
        F.linear(x, w.theta_KC, w.theta_bias_K),
        F.linear(x, w.phi_KC, w.phi_bias_K),
        F.linear(x, w.g_KC, w.g_bias_K),
        mixing_BTT,
    )
    z_BNC = F.linear(y_BTPK, w.out_CK, w.out_bias_C).flatten(1, 2)
    running = running and Running(running.mean_C.to(dtype), running.var_C.to(dtype))
    z_BNC, moments = batch_norm(z_BNC, w, valid_BT, running, reduce_moments)
    out = F.layer_norm(z_BNC.view(x.shape) + x, [x.shape[-1]], w.ln_weight_C, w.ln_bias_C, EPS)
    return _masked(out.to(x_BTPC.dtype), valid_BT), moments


def linear_attention(query_BTPK: Tensor, key_BTPK: Tensor, value_BTPK: Tensor, mixing_BTT: Tensor) -> Tensor:
    """y_i = sum_j (R[t(i), t(j)] / P) (query_i . key_j) value_j [B,T,P,K], by associativity: no N x N matrix."""
    state_BTKK = key_BTPK.transpose(2, 3) @ value_BTPK / key_BTPK.shape[2]
    mixed_BTKK = (mixing_BTT @ state_BTKK.flatten(2)).view(state_BTKK.shape)
    return query_BTPK @ mixed_BTKK


def _within_kernels(x_BTPC: Tensor) -> bool:
    return x_BTPC.ndim == 4 and x_BTPC.shape[1] <= MAX_FRAMES and x_BTPC.shape[3] <= MAX_CHANNELS


def _check(
    x_BTPC: Tensor,
    audio_BTC: Tensor | None,
    weights: TPAVIWeights,
    alignment: Tensor | None,
    valid_BT: Tensor | None,
    running: Running | None,
) -> None:
    floats, device = (*runtime.FLOATS, torch.float64), x_BTPC.device

    def fits(name: str, value: Tensor, *shape: int | None, dtypes: tuple[torch.dtype, ...] = floats) -> None:
        runtime.check("tpavi", name, value, shape, dtypes, device)

    fits("x_BTPC", x_BTPC, None, None, None, None)
    if x_BTPC.numel() == 0:
        raise ValueError(
            f"tpavi: x_BTPC must have at least one clip, frame, position and channel, got {list(x_BTPC.shape)}"
        )
    batch, frames, _, channels = x_BTPC.shape
    sizes = {"K": len(weights.g_bias_K), "C": channels}
    if audio_BTC is not None:
        fits("audio_BTC", audio_BTC, batch, frames, channels)
    for name, value in weights._asdict().items():
        fits(name, value, *(sizes[letter] for letter in name.rpartition("_")[2]))
    if valid_BT is not None:
        fits("valid_BT", valid_BT, batch, frames, dtypes=(torch.bool,))
    for name, value in () if running is None else running._asdict().items():
        fits(f"running.{name}", value, channels)
    if alignment is not None:
        fits("alignment", alignment, None)
        if len(alignment) % 2 == 0:
            raise ValueError(f"tpavi: alignment must have odd length, 2 T - 1 for up to T frames, got {len(alignment)}")


def _prepare(
    x_BTPC: Tensor, audio_BTC: Tensor, weights: TPAVIWeights, l2_normalise: bool
) -> tuple[TPAVIWeights, Tensor]:
    """Weights and audio in the accumulation type; the audio normalised, if the variant asks for it."""
    dtype = _accumulation_type(x_BTPC)
    audio_BTC = audio_BTC.to(dtype)
    return _cast(weights, dtype), l2_normalised(audio_BTC) if l2_normalise else audio_BTC


def _cast(weights: TPAVIWeights, dtype: torch.dtype) -> TPAVIWeights:
    """Weights of the given type, contiguous; one conversion, as twelve launches would take longer than the work."""
    if all(value.dtype == dtype for value in weights):
        return TPAVIWeights(*(value.contiguous() for value in weights))
    flat = torch.cat([value.reshape(-1) for value in weights]).to(dtype)
    parts = flat.split([value.numel() for value in weights])
    return TPAVIWeights(*(part.view(value.shape) for part, value in zip(parts, weights, strict=True)))


def _audio_side(audio_BTC: Tensor, w: TPAVIWeights) -> tuple[Tensor, Tensor]:
    """u_BTC and c_BT: the score of token x_i and second t is x_i . u_t + c_t."""
    phi_BTK = F.linear(audio_BTC, w.phi_KC, w.phi_bias_K)
    return phi_BTK @ w.theta_KC, phi_BTK @ w.theta_bias_K


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _masked(out_BTPC: Tensor, valid_BT: Tensor | None) -> Tensor:
    return out_BTPC if valid_BT is None else out_BTPC * valid_BT[:, :, None, None].to(out_BTPC.dtype)


def _batch_moments(q_FPT: Tensor, v_BTC: Tensor, valid_BT: Tensor | None) -> Moments:
    """Moments of sum_t q_it v_t over the tokens of existing frames, from the centred moments of q."""
    batch, frames, _ = v_BTC.shape
    q_BNT = q_FPT.view(batch, -1, frames)
    tokens = q_BNT.shape[1]
    if valid_BT is None:
        count_B = q_BNT.new_full((batch,), float(tokens))
    else:
        count_B = valid_BT.sum(1).to(q_BNT.dtype) * (tokens // frames)
    scale_B11 = (1.0 / count_B.clamp_min(1.0))[:, None, None]
    mean_B1T = q_BNT.sum(1, keepdim=True) * scale_B11  # q is zero in frames that do not exist
    centred_BNT = q_BNT - mean_B1T
    if valid_BT is not None:
        centred_BNT = centred_BNT * valid_BT.repeat_interleave(tokens // frames, 1)[..., None].to(q_BNT.dtype)
    covariance_BTT = centred_BNT.transpose(1, 2) @ centred_BNT * scale_B11
    mean_BC = (mean_B1T @ v_BTC)[:, 0]
    var_BC = ((covariance_BTT @ v_BTC) * v_BTC).sum(1).clamp_min(0.0)
    return merge_groups(count_B, mean_BC, var_BC)

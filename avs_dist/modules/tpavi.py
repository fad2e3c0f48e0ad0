"""Temporal pixel-wise audio-visual interaction, the block of the TPAVI paper (eq. 1-3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from avs_dist.kernels import reference, runtime
from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels.moments import Moments, update_running
from avs_dist.kernels.reference import Running, TPAVIWeights
from avs_dist.modules.norm import RunningStatistics
from avs_dist.world import all_reduce_sum, world_size

MAX_FRAMES = 32
MOMENTUM = 0.1

# our parameter -> name in published checkpoints (there 1x1x1 convolutions of shape [out, in, 1, 1, 1])
PUBLISHED_NAMES = {
    "align.weight": "align_channel.weight",
    "align.bias": "align_channel.bias",
    "theta_weight": "theta.weight",
    "theta_bias": "theta.bias",
    "phi_weight": "phi.weight",
    "phi_bias": "phi.bias",
    "g_weight": "g.weight",
    "g_bias": "g.bias",
    "out_weight": "W_z.0.weight",
    "out_bias": "W_z.0.bias",
    "bn_weight": "W_z.1.weight",
    "bn_bias": "W_z.1.bias",
    "running_mean": "W_z.1.running_mean",
    "running_var": "W_z.1.running_var",
    "num_batches_tracked": "W_z.1.num_batches_tracked",
    "ln_weight": "norm_layer.weight",
    "ln_bias": "norm_layer.bias",
}


class TPAVI(RunningStatistics, nn.Module):
    """out = LayerNorm(BatchNorm(W_z y) + x), y = scores(theta(x), phi(key)) g(x); x -> [B,T,C,H,W] of the same size.

    The weights are parameters of this module and not of sub-modules, because all implementations use them directly
    and ZeRO-3 gathers a parameter only for the forward of the module that owns it. At initialisation the scale of the
    batch normalisation is zero, so the block is LayerNorm(x), as published; with `time_aligned` it is one.

    Args:
        channels: C of the visual tokens.
        audio_channels: D of the audio vectors.
        time_aligned: weight the score of a pixel of second t0 with the sound of second t by a learnable function of
            t0 - t, added to the published 1/T (up to 32 frames; one at t0 = t at initialisation).
        key: "audio" (published va), "visual" (vv), or "both": the mean of the two outputs, with the same weights.
        implementation: the rank-T form on "triton" (GPU) or as torch operations, "rank_t"; the N x N formula
            "literal"; "auto" takes the fastest there is, see AVS_KERNELS in kernels/runtime.py.
        l2_normalise: normalise tokens and audio over the channels first, and add the normalised tokens (ECMVAE).
        align_audio: project the audio to the channels of the tokens; false: take it as it is (public ECMVAE code).

    Raises:
        ValueError: an odd number of channels, or audio of other channels that is not projected.
    """

    def __init__(
        self,
        channels: int,
        audio_channels: int,
        time_aligned: bool = False,
        key: Literal["audio", "visual", "both"] = "audio",
        implementation: Literal["auto", "triton", "rank_t", "literal"] = "auto",
        l2_normalise: bool = False,
        align_audio: bool = True,
    ) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"TPAVI halves its channels inside, so their number must be even, got {channels}")
        self.key = key
        self.l2_normalise = l2_normalise
        self._requested = implementation
        inner = channels // 2
        self.align = _alignment(audio_channels, channels, align_audio) if key != "visual" else None
        self.theta_weight, self.theta_bias = _projection(channels, inner)
        self.phi_weight, self.phi_bias = _projection(channels, inner)
        self.g_weight, self.g_bias = _projection(channels, inner)
        self.out_weight, self.out_bias = _projection(inner, channels)
        # time-aligned blocks listen from the first step on; from zero the sound would first have to grow audible, which
        # costs a run from scratch some hundred steps
        self.bn_weight = nn.Parameter(torch.full((channels,), 1.0 if time_aligned else 0.0))
        self.bn_bias = nn.Parameter(torch.zeros(channels))
        self.ln_weight = nn.Parameter(torch.ones(channels))
        self.ln_bias = nn.Parameter(torch.zeros(channels))
        self.alignment = None
        if time_aligned:
            own_second = torch.zeros(2 * MAX_FRAMES - 1)
            own_second[MAX_FRAMES - 1] = 1.0
            self.alignment = nn.Parameter(own_second)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def implementation(self) -> str:
        """What runs where the parameters are: triton, rank_t or literal."""
        if self._requested != "auto":
            return self._requested
        return "triton" if self.key != "visual" and runtime.use_triton("tpavi", self.ln_weight) else "rank_t"

    def project_audio(self, audio_BTD: Tensor) -> Tensor:
        """Audio in the channels of the visual tokens [B,T,C]: the phi input, and the audio side of the AVM losses.

        Without `align_audio` this is the audio itself.

        Raises:
            ValueError: key = "visual", which has no audio.
        """
        if self.align is None:
            raise ValueError("TPAVI with key=visual has no audio projection")
        return self.align(audio_BTD)

    def forward(self, x_BTCHW: Tensor, audio_BTD: Tensor | None = None, valid_BT: Tensor | None = None) -> Tensor:
        """Visual tokens that have heard the audio.

        Args:
            x_BTCHW: visual tokens, best with C contiguous (channels last): then nothing is copied.
            audio_BTD: one audio vector a second; not needed with key = "visual".
            valid_BT: frames that exist (None: all). Others have no influence and come out as zero.

        Returns:
            [B,T,C,H,W] with C contiguous.
        """
        batch, frames, channels, height, width = x_BTCHW.shape
        x_BTPC = x_BTCHW.permute(0, 1, 3, 4, 2).reshape(batch, frames, height * width, channels)
        if self.key != "audio":
            out_BTPC = visual_BTPC = self._attend(x_BTPC, None, valid_BT)
        if self.key != "visual":
            if audio_BTD is None:
                raise ValueError(f"TPAVI with key={self.key} needs audio_BTD")
            out_BTPC = self._attend(x_BTPC, self.project_audio(audio_BTD), valid_BT)
        if self.key == "both":
            out_BTPC = (visual_BTPC + out_BTPC) / 2
        return out_BTPC.view(batch, frames, height, width, channels).permute(0, 1, 4, 2, 3)

    def _attend(self, x_BTPC: Tensor, audio_BTC: Tensor | None, valid_BT: Tensor | None) -> Tensor:
        weights = self._weights()
        running = None if self.training else Running(self.running_mean, self.running_var)
        reduce = all_reduce_sum if world_size() > 1 else None
        rest = (weights, self.alignment, valid_BT, running, reduce, self.l2_normalise)
        if self._requested == "literal":
            key_BTPC = x_BTPC if audio_BTC is None else audio_BTC[:, :, None]
            out_BTPC, moments = reference.tpavi(x_BTPC, key_BTPC, *rest)
        elif audio_BTC is None:
            out_BTPC, moments = rank_t.tpavi_visual(x_BTPC, *rest)
        else:
            forms = {"auto": rank_t.tpavi, "triton": rank_t.tpavi_triton, "rank_t": rank_t.tpavi_torch}
            out_BTPC, moments = forms[self._requested](x_BTPC, audio_BTC, *rest)
        if moments is not None:
            self._track(moments)
        return out_BTPC

    def _track(self, moments: Moments) -> None:
        update_running(self.running_mean, self.running_var, moments, MOMENTUM)
        self.num_batches_tracked += 1

    def _weights(self) -> TPAVIWeights:
        return TPAVIWeights(
            theta_KC=self.theta_weight,
            theta_bias_K=self.theta_bias,
            phi_KC=self.phi_weight,
            phi_bias_K=self.phi_bias,
            g_KC=self.g_weight,
            g_bias_K=self.g_bias,
            out_CK=self.out_weight,
            out_bias_C=self.out_bias,
            bn_weight_C=self.bn_weight,
            bn_bias_C=self.bn_bias,
            ln_weight_C=self.ln_weight,
            ln_bias_C=self.ln_bias,
        )


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of one published TPAVI block (prefix removed) -> state dict of `TPAVI`.

    A missing audio bias (the AVSS model has none) becomes zero; of a missing projection (ECMVAE has none) nothing is
    given, as a block without `align_audio` needs nothing.

    Raises:
        ValueError: keys are missing from the published state.
    """
    projected = any(name.startswith("align_channel.") for name in state)
    out = {}
    for ours, published in PUBLISHED_NAMES.items():
        if published in state:
            value = state[published]
            out[ours] = value.flatten(1) if value.ndim == 5 else value
        elif ours.startswith("align.") and not projected:
            continue
        elif ours == "align.bias":
            out[ours] = torch.zeros(state["align_channel.weight"].shape[0])
        else:
            raise ValueError(f"published TPAVI state has no '{published}'; found: {', '.join(sorted(state))}")
    return out


def _alignment(audio_channels: int, channels: int, align_audio: bool) -> nn.Module:
    if align_audio:
        return nn.Linear(audio_channels, channels)
    if audio_channels != channels:
        raise ValueError(
            f"TPAVI with align_audio=false takes the audio as it is: it has {audio_channels} channels, the tokens have "
            f"{channels}; they must be equal (set model.neck.channels={audio_channels} or align_audio=true)"
        )
    return nn.Identity()


def _projection(fan_in: int, fan_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [out, in] and bias [out] of a 1x1x1 convolution, initialised as torch's layers are."""
    layer = nn.Linear(fan_in, fan_out)
    return nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())

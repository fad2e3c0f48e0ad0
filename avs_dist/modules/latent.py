"""Latent encoders of ECMVAE, the way of its codes into the feature maps, and the heads of its information bound.

Every encoder serves prior and posterior alike: the posterior gets the mask as one more channel of the picture. All
work frame by frame (N frames) and on any size of frames. The stacks are those of the public code (paper: section 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avs_dist.gaussian import Gaussian
from avs_dist.modules.norm import WorldBatchNorm2d
from avs_dist.modules.weights import channels_last
from avs_dist.precision import at_least_float32

POOLED = 7  # edge of the last map of five halvings of 224 pixels, the published size
FUSED_PICTURE_CHANNELS = 32
# standard deviations from 0.007 to 150: a wild frame of an early step cannot overflow the exponentials of the
# divergences, and a code that is certain keeps a density
MAX_LOG_VAR = 10.0


class ConvStack(nn.Module):
    """4x4 convolutions of stride 2, each with batch normalisation and LeakyReLU, pooled to 7x7 and flattened.

    At 224x224 and five widths the map is 7x7 already and the pooling changes nothing, as published. The published
    convolutions have biases as well; the batch normalisation after them takes these out again, so here are none.

    Args:
        in_channels: C.
        widths: output channels of each convolution.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False),
                WorldBatchNorm2d(width),
                nn.LeakyReLU(0.01),
            ]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(POOLED)
        self.smallest = 2 ** len(widths)
        self.out_features = channels * POOLED**2
        channels_last(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,widths[-1]*49].

        Raises:
            ValueError: H or W is smaller than 2 to the number of convolutions (32 for the encoders here).
        """
        height, width = x_NCHW.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(f"the latent encoders need frames of {self.smallest} pixels or more, got {height}x{width}")
        return self.pool(self.layers(x_NCHW)).flatten(1)


class GaussianHead(nn.Module):
    """Two parallel linear layers, for mean and log-variance: [N,D] -> Gaussian [N,L], in float32 or better."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(in_features, dim)
        self.log_var = nn.Linear(in_features, dim)

    def forward(self, features_ND: Tensor) -> Gaussian:
        return _bounded(self.mean(features_ND), self.log_var(features_ND))


class VisualEncoder(nn.Module):
    """Gaussian of s_v from the picture (prior: 3 channels; posterior: 4, the mask is the last).

    Args:
        in_channels: C of the picture.
        dim: L, numbers in the code.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, (16, 32, 64, 128, 128))
        self.head = GaussianHead(self.stack.out_features, dim)

    def forward(self, x_NCHW: Tensor) -> Gaussian:
        """[N,C,H,W] -> [N,L]."""
        return self.head(self.stack(x_NCHW))


class AudioEncoder(nn.Module):
    """Gaussian of s_a from the sound (prior).

    Args:
        audio_channels: D of the audio vectors.
        dim: L, numbers in the code.
    """

    def __init__(self, audio_channels: int, dim: int) -> None:
        super().__init__()
        self.head = GaussianHead(audio_channels, dim)

    def forward(self, audio_ND: Tensor) -> Gaussian:
        """[N,D] -> [N,L]."""
        return self.head(audio_ND)


class FusedEncoder(nn.Module):
    """Gaussian of a code from picture and sound: c (prior: 3 channels; posterior: 4), s_a of the posterior (mask: 1).

    Args:
        in_channels: C of the picture, the mask, or both.
        audio_channels: D of the audio vectors.
        dim: L, numbers in the code.
    """

    def __init__(self, in_channels: int, audio_channels: int, dim: int) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, (16, 32, 64, 64, 64))
        self.squeeze = nn.Linear(self.stack.out_features, FUSED_PICTURE_CHANNELS)
        self.head = GaussianHead(FUSED_PICTURE_CHANNELS + audio_channels, dim)

    def forward(self, x_NCHW: Tensor, audio_ND: Tensor) -> Gaussian:
        """[N,C,H,W] and [N,D] -> [N,L]."""
        return self.head(torch.cat([self.squeeze(self.stack(x_NCHW)), audio_ND], 1))


class Injection(nn.Module):
    """Codes into feature maps: tiled over all positions, concatenated, and mixed by a 1x1 convolution.

    Args:
        channels: C of the maps.
        code_channels: K, numbers of all codes together.
    """

    def __init__(self, channels: int, code_channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels + code_channels, channels, 1)
        channels_last(self)

    def forward(self, x_NCHW: Tensor, codes_NK: Tensor, noise_NKP: Tensor | None = None) -> Tensor:
        """Maps that carry the codes.

        Args:
            x_NCHW: feature maps [N,C,h,w].
            codes_NK: codes of each frame, in any precision.
            noise_NKP: added to the tiled codes [N,K,h,w] ("sampling" in Fig. 1); None as in the public code.

        Returns:
            [N,C,h,w] in the precision of x, channels last.
        """
        codes_NKHW = codes_NK[:, :, None, None].expand(-1, -1, *x_NCHW.shape[-2:])
        if noise_NKP is not None:
            codes_NKHW = codes_NKHW + noise_NKP
        return self.mix(torch.cat([x_NCHW, codes_NKHW.to(x_NCHW.dtype)], 1))


class InformationHead(nn.Module):
    """q(other code | code), a Gaussian: mean and log-variance each by Linear, Tanh, Linear (paper, section 3.4).

    The paper does not give the width between the layers; it is that of the codes.

    Args:
        dim: numbers in each of the two codes.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))
        self.log_var = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))

    def forward(self, code_NL: Tensor) -> Gaussian:
        """[N,L], in any precision -> Gaussian [N,L] of the other code, in float32 or better."""
        code_NL = _as_weights(code_NL, self.mean)
        return _bounded(self.mean(code_NL), self.log_var(code_NL))


class PublishedInformationHead(nn.Module):
    """The same in the public code: one Linear and Tanh for mean, log-variance and the target, all in fewer numbers.

    Args:
        dim: numbers in each of the two codes.
        inner: numbers of the space in which they are compared.
    """

    def __init__(self, dim: int, inner: int = 6) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(dim, inner), nn.Tanh())
        self.log_var = nn.Sequential(nn.Linear(dim, inner), nn.Tanh())
        self.target = nn.Sequential(nn.Linear(dim, inner), nn.Tanh())

    def forward(self, source_NL: Tensor, target_NL: Tensor) -> tuple[Gaussian, Tensor]:
        """Both [N,L], in any precision -> (Gaussian, target), [N,inner] each, in float32 or better."""
        source_NL, target_NL = _as_weights(source_NL, self.mean), _as_weights(target_NL, self.target)
        mean, log_var = at_least_float32(self.mean(source_NL)), at_least_float32(self.log_var(source_NL))
        return Gaussian(mean, log_var), at_least_float32(self.target(target_NL))


def _bounded(mean: Tensor, log_var: Tensor) -> Gaussian:
    """x / sqrt(1 + (x / bound)^2), which is x while it is small; beyond the bound there still is a gradient, so that
    nothing is caught there."""
    log_var = at_least_float32(log_var)
    return Gaussian(at_least_float32(mean), log_var * torch.rsqrt(1.0 + (log_var / MAX_LOG_VAR).square()))


def _as_weights(code_NL: Tensor, layers: nn.Sequential) -> Tensor:
    """Codes are sampled in float32; the layers may be bfloat16."""
    linear = layers[0]
    assert isinstance(linear, nn.Linear)
    return code_NL.to(linear.weight.dtype)

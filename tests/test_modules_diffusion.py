"""Encoders of latent diffusion and the expansion of its code against literal formulas, at any size and precision."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avs_dist.modules.denoiser import Denoiser
from avs_dist.modules.diffusion_latent import ConditionEncoder, LatentExpansion, MaskEncoder
from avs_dist.modules.latent import Injection

AUDIO, D, HIDDEN = 128, 6, 10
KINDS = ("audio_visual", "audio", "visual", "none")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def literal_stack(stack: nn.Module, x: Tensor) -> Tensor:
    """Five convolutions normalised by the batch, and windows of the last map averaged to 7x7."""
    state = stack.state_dict()
    for index in range(0, 15, 3):
        x = F.conv2d(x, state[f"layers.{index}.weight"], stride=2, padding=1)
        x = F.batch_norm(x, None, None, *(state[f"layers.{index + 1}.{n}"] for n in ("weight", "bias")), training=True)
        x = torch.where(x > 0, x, 0.01 * x)
    return F.adaptive_avg_pool2d(x, 7).flatten(1)


def literal_layers(layers: nn.Module, x: Tensor) -> Tensor:
    state = layers.state_dict()
    inner = x @ state["first.weight"].T + state["first.bias"]
    return torch.where(inner > 0, inner, 0.01 * inner) @ state["last.weight"].T + state["last.bias"]


def literal_encoder(encoder: MaskEncoder, x: Tensor) -> Tensor:
    return literal_layers(encoder.code, literal_stack(encoder.stack, x))


def inputs(dtype: torch.dtype = torch.float32, channels: int = 3, size: tuple[int, int] = (64, 96)) -> list[Tensor]:
    return [torch.randn(3, channels, *size, dtype=dtype), torch.randn(3, AUDIO, dtype=dtype)]


@pytest.mark.parametrize("channels", [1, 71])
def test_mask_encoder_equals_its_formula(channels):
    encoder = MaskEncoder(channels, D, HIDDEN).double()
    assert [m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)] == [16, 32, 64, 64, 64]
    mask_NCHW = torch.rand(3, channels, 64, 96, dtype=torch.float64)
    got = encoder(mask_NCHW)
    assert got.shape == (3, D)
    torch.testing.assert_close(got, literal_encoder(encoder, mask_NCHW))


@pytest.mark.parametrize("kind", KINDS)
def test_condition_encoder_equals_its_formula(kind):
    encoder = ConditionEncoder(kind, AUDIO, D, HIDDEN).double()
    frames_NCHW, audio_NA = inputs(torch.float64)
    branches = []
    if kind in ("audio_visual", "visual"):
        branches.append(literal_encoder(encoder.visual, frames_NCHW))
    if kind in ("audio_visual", "audio"):
        branches.append(literal_layers(encoder.audio, audio_NA))
    want = torch.cat([frames_NCHW.new_zeros(3, 0), *branches], 1)
    if kind == "audio_visual":
        want = literal_layers(encoder.fuse, want)
    got = encoder(frames_NCHW, audio_NA)
    assert got.shape == (3, encoder.out_features) == (3, 0 if kind == "none" else D)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_hear_and_see_what_their_kind_says(kind):
    encoder = ConditionEncoder(kind, AUDIO, D, HIDDEN)
    frames_NCHW, audio_NA = (value.requires_grad_() for value in inputs())
    condition_ND = encoder(frames_NCHW, audio_NA)
    if kind != "none":
        condition_ND.square().sum().backward()
    assert (frames_NCHW.grad is not None) == (kind in ("audio_visual", "visual"))
    assert (audio_NA.grad is not None) == (kind in ("audio_visual", "audio"))
    if kind in ("audio_visual", "audio"):
        with pytest.raises(ValueError, match="hears the audio, got none"):
            encoder(frames_NCHW, None)
    else:
        assert torch.equal(encoder(frames_NCHW, None), condition_ND)


def test_unknown_condition_and_small_frames_are_refused():
    with pytest.raises(ValueError, match="model.diffusion.condition=text: must be one of audio_visual, audio"):
        ConditionEncoder("text", AUDIO, D, HIDDEN)
    with pytest.raises(ValueError, match="32 pixels or more, got 31x64"):
        MaskEncoder(1, D, HIDDEN)(torch.zeros(1, 1, 31, 64))


@pytest.mark.parametrize("with_noise", [False, True])
def test_expansion_equals_its_formula_position_by_position(with_noise):
    channels, height, width = 4, 3, 5
    expansion = LatentExpansion(channels, D).double()
    x_NCHW = torch.randn(2, channels, height, width, dtype=torch.float64)
    code_NK = torch.randn(2, D, dtype=torch.float64)
    noise_NKP = torch.randn(2, D, height, width, dtype=torch.float64) if with_noise else None
    got = expansion(x_NCHW, code_NK, noise_NKP)
    assert got.is_contiguous(memory_format=torch.channels_last)

    def at(values: Tensor, conv: nn.Conv2d, i: int, j: int) -> Tensor:
        total = conv.bias.clone()
        for di in range(3):
            for dj in range(3):
                y, x = i + di - 1, j + dj - 1
                if 0 <= y < height and 0 <= x < width:
                    total = total + conv.weight[:, :, di, dj] @ values[:, y, x]
        return total

    cells = [(i, j) for i in range(height) for j in range(width)]
    for n in range(2):
        tiled = torch.zeros(D, height, width, dtype=torch.float64)
        both = torch.cat([x_NCHW[n], torch.zeros(channels, height, width, dtype=torch.float64)])
        for i, j in cells:
            tiled[:, i, j] = code_NK[n] if noise_NKP is None else code_NK[n] + noise_NKP[n, :, i, j]
        for i, j in cells:
            both[channels:, i, j] = at(tiled, expansion.expand, i, j)
        for i, j in cells:
            torch.testing.assert_close(got[n, :, i, j], at(both, expansion.mix, i, j))


def test_expansion_and_injection_of_ecmvae_are_called_alike():
    assert [p.default for p in inspect.signature(LatentExpansion.forward).parameters.values()] == [
        p.default for p in inspect.signature(Injection.forward).parameters.values()
    ]
    x, codes, noise = torch.randn(2, 8, 3, 4), torch.randn(2, D), torch.randn(2, D, 3, 4)
    for module in (Injection(8, D), LatentExpansion(8, D)):
        plain, noisy = module(x, codes), module(x, codes, noise)
        assert plain.shape == noisy.shape == x.shape
        assert (plain - noisy).abs().max() > 0.01


def modules(dtype: torch.dtype) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    frames, audio = inputs(dtype)
    code = torch.randn(3, D, dtype=torch.promote_types(dtype, torch.float32))  # latents are float32 at least
    cases: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "mask": (MaskEncoder(3, D, HIDDEN), (frames,)),
        "expansion": (LatentExpansion(3, D), (frames, code)),
    }
    for kind in KINDS:
        # the sound of a frozen encoder may come in another precision
        cases[kind] = (ConditionEncoder(kind, AUDIO, D, HIDDEN), (frames, audio.float()))
    return {name: (module.to(dtype), given) for name, (module, given) in cases.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_reaches_every_parameter_and_codes_come_in_float32_at_least(dtype):
    for name, (module, given) in modules(dtype).items():
        out = module(*given)
        assert out.dtype == (dtype if name == "expansion" else torch.promote_types(dtype, torch.float32)), name
        if name == "none":
            assert count(module) == 0
            continue
        out.square().sum().backward()
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name} {key}"
            assert parameter.grad.abs().max() > 1e-5, f"{name} {key}"


def test_bfloat16_is_close_to_float32():
    for name, (module, given) in modules(torch.float32).items():
        low = copy.deepcopy(module).bfloat16()
        want, got = module(*given), low(given[0].bfloat16(), *given[1:])
        if name != "none":
            assert (got.float() - want).abs().max() < 0.05 * max(1.0, want.abs().max().item()), name


def test_parameters_of_the_four_parts_are_four_million():
    """The paper: about 4 M together."""
    stack = sum(16 * a * b + 2 * b for a, b in ((1, 16), (16, 32), (32, 64), (64, 64), (64, 64)))
    mask = stack + 3136 * 256 + 256 + 256 * 24 + 24
    parts = (
        MaskEncoder(1, 24, 256),
        ConditionEncoder("audio_visual", AUDIO, 24, 256),
        Denoiser(24, 24, (512,) * 7),
        LatentExpansion(128, 24),
    )
    counts = [count(part) for part in parts]
    assert counts[0] == mask
    audio, fuse = 128 * 256 + 256 + 256 * 24 + 24, 48 * 256 + 256 + 256 * 24 + 24
    assert counts[1] == mask + 2 * 16 * 16 + audio + fuse  # two more channels of the picture
    step = 64 * 64 + 64 + 64 * 512 + 512
    assert counts[2] == 48 * 512 + 6 * 512 * 512 + 512 * 24 + 7 * 512 + 24 + step
    assert counts[3] == 9 * 24 * 128 + 128 + 9 * 256 * 128 + 128
    assert sum(counts) == 3_996_024

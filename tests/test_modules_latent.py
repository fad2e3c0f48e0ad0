"""Latent encoders, injection and information heads against literal formulas, at any size and precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avs_dist.gaussian import Gaussian
from avs_dist.modules.latent import (
    MAX_LOG_VAR,
    AudioEncoder,
    ConvStack,
    FusedEncoder,
    InformationHead,
    Injection,
    PublishedInformationHead,
    VisualEncoder,
)
from avs_dist.modules.norm import WorldBatchNorm2d

AUDIO, L = 128, 16
SIZES = [(32, 32), (47, 63), (64, 64), (72, 100), (224, 224), (256, 240)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(module: nn.Module) -> nn.Module:
    """In float64, with random scales, shifts and running statistics of the batch normalisations."""
    for part in module.modules():
        if isinstance(part, WorldBatchNorm2d):
            for value in (part.weight, part.running_var):
                nn.init.uniform_(value, 0.5, 2.0)
            for value in (part.bias, part.running_mean):
                nn.init.normal_(value, 0.0, 0.3)
    return module.double()


def literal_stack(state: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """The five convolutions and the pooling, each cell of which is the mean of a window written out as a loop."""
    for index in range(0, 15, 3):
        x = F.conv2d(x, state[f"layers.{index}.weight"], stride=2, padding=1)
        norm = {key: state[f"layers.{index + 1}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias")}
        mean, var = (state[f"layers.{index + 1}.running_{key}"].view(1, -1, 1, 1) for key in ("mean", "var"))
        if training:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        x = torch.where(x > 0, x, 0.01 * x)
    out = x.new_zeros(*x.shape[:2], 7, 7)
    height, width = x.shape[-2:]
    for i in range(7):
        for j in range(7):
            rows = slice(i * height // 7, math.ceil((i + 1) * height / 7))
            columns = slice(j * width // 7, math.ceil((j + 1) * width / 7))
            out[..., i, j] = x[..., rows, columns].mean((2, 3))
    return out.reshape(len(x), -1)


def inside(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v.clone() for k, v in module.state_dict().items() if k.startswith(prefix)}


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def assert_gaussian(got: Gaussian, mean: Tensor, log_var: Tensor, bounded: bool = True) -> None:
    assert isinstance(got, Gaussian)
    torch.testing.assert_close(got.mean, mean)
    torch.testing.assert_close(got.log_var, log_var / (1 + (log_var / 10) ** 2).sqrt() if bounded else log_var)


def test_parameters_are_those_of_the_published_encoders():
    """At 224 x 224 the map is 7 x 7; batch normalisations have two numbers a channel, convolutions no bias."""

    def stack(first: int, *widths: int) -> int:
        total = 0
        for before, width in zip((first, *widths), widths, strict=False):
            total += before * width * 16 + 2 * width
        return total

    visual = 3 * 16 * 16 + 16 * 32 * 16 + 32 * 64 * 16 + 64 * 128 * 16 + 128 * 128 * 16 + 2 * (16 + 32 + 64 + 128 + 128)
    assert stack(3, 16, 32, 64, 128, 128) == visual
    assert count(VisualEncoder(3, L)) == visual + 2 * (6272 * 16 + 16)
    assert count(VisualEncoder(4, L)) - count(VisualEncoder(3, L)) == 16 * 16
    assert count(AudioEncoder(AUDIO, L)) == 2 * (128 * 16 + 16)
    for channels in (1, 3, 4):
        fused = stack(channels, 16, 32, 64, 64, 64) + 3136 * 32 + 32 + 2 * (160 * 16 + 16)
        assert count(FusedEncoder(channels, AUDIO, L)) == fused
    assert count(InformationHead(L)) == 4 * (16 * 16 + 16)
    assert count(PublishedInformationHead(L)) == 3 * (16 * 6 + 6)
    assert count(Injection(128, 32)) == 160 * 128 + 128


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoders_take_any_size(size):
    x, mask, audio = torch.randn(2, 4, *size), torch.rand(2, 1, *size), torch.randn(2, AUDIO)
    for code in (VisualEncoder(4, L)(x), FusedEncoder(4, AUDIO, L)(x, audio), FusedEncoder(1, AUDIO, L)(mask, audio)):
        for value in code:
            assert value.shape == (2, L)
            assert value.isfinite().all()


def test_frames_too_small_for_five_halvings_are_refused():
    with pytest.raises(ValueError, match="32 pixels or more, got 48x31"):
        VisualEncoder(3, L)(torch.randn(2, 3, 48, 31))


def test_pooling_is_the_identity_at_the_published_size():
    stack = ConvStack(3, (16, 32, 64, 128, 128)).eval()
    x = torch.randn(1, 3, 224, 224)
    maps = stack.layers(x)
    assert maps.shape == (1, 128, 7, 7)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(stack(x), maps.flatten(1))


@pytest.mark.parametrize("size", [(32, 40), (72, 100), (224, 260)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_visual_encoder_equals_its_formula(size, training):
    encoder = make(VisualEncoder(4, L)).train(training)
    assert [m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)] == [16, 32, 64, 128, 128]
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    features = literal_stack(inside(encoder, "stack."), x, training)
    state = inside(encoder, "head.")
    assert_gaussian(encoder(x), linear(state, "mean", features), linear(state, "log_var", features))


@pytest.mark.parametrize("training", [True, False])
def test_fused_encoder_equals_its_formula(training):
    encoder = make(FusedEncoder(1, AUDIO, L)).train(training)
    assert [m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)] == [16, 32, 64, 64, 64]
    x, audio = torch.rand(3, 1, 64, 96, dtype=torch.float64), torch.randn(3, AUDIO, dtype=torch.float64)
    squeezed = linear(inside(encoder, ""), "squeeze", literal_stack(inside(encoder, "stack."), x, training))
    both = torch.cat([squeezed, audio], 1)
    state = inside(encoder, "head.")
    assert_gaussian(encoder(x, audio), linear(state, "mean", both), linear(state, "log_var", both))


def test_audio_encoder_equals_its_formula():
    encoder = make(AudioEncoder(AUDIO, L))
    audio = torch.randn(3, AUDIO, dtype=torch.float64)
    state = inside(encoder, "head.")
    assert_gaussian(encoder(audio), linear(state, "mean", audio), linear(state, "log_var", audio))


def test_information_head_equals_its_formula():
    head = make(InformationHead(L))
    code = torch.randn(3, L, dtype=torch.float64)
    state = inside(head, "")
    mean, log_var = (linear(state, f"{n}.2", torch.tanh(linear(state, f"{n}.0", code))) for n in ("mean", "log_var"))
    assert_gaussian(head(code), mean, log_var)


def test_published_information_head_equals_its_formula():
    head = make(PublishedInformationHead(L))
    source, other = torch.randn(2, 3, L, dtype=torch.float64)
    state = inside(head, "")
    predicted, target = head(source, other)
    mean, log_var = (torch.tanh(linear(state, f"{n}.0", source)) for n in ("mean", "log_var"))
    assert_gaussian(predicted, mean, log_var, bounded=False)
    torch.testing.assert_close(target, torch.tanh(linear(state, "target.0", other)))
    assert target.shape == (3, 6)


@pytest.mark.parametrize("with_noise", [False, True])
def test_injection_mixes_every_position_with_the_codes(with_noise):
    injection = Injection(5, 4).double()
    x, codes = torch.randn(2, 5, 3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    noise = torch.randn(2, 4, 3, 2, dtype=torch.float64) if with_noise else None
    out = injection(x, codes, noise)
    weight = injection.mix.weight[:, :, 0, 0]
    for n in range(2):
        for i in range(3):
            for j in range(2):
                here = codes[n] if noise is None else codes[n] + noise[n, :, i, j]
                want = weight @ torch.cat([x[n, :, i, j], here]) + injection.mix.bias
                torch.testing.assert_close(out[n, :, i, j], want)
    assert out.is_contiguous(memory_format=torch.channels_last)


def losses(dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every module with the sum of squares of what it gives."""
    torch.manual_seed(4)
    x, audio = torch.randn(2, 3, 64, 96, dtype=dtype), torch.randn(2, AUDIO, dtype=dtype)
    codes = torch.randn(2, 2, L, dtype=torch.promote_types(dtype, torch.float32))
    modules = {
        "visual": (VisualEncoder(3, L), lambda m: m(x)),
        "audio": (AudioEncoder(AUDIO, L), lambda m: m(audio)),
        "fused": (FusedEncoder(3, AUDIO, L), lambda m: m(x, audio)),
        "information": (InformationHead(L), lambda m: m(codes[0])),
        "published": (PublishedInformationHead(L), lambda m: (*m(*codes)[0], m(*codes)[1])),
        "injection": (Injection(3, L), lambda m: (m(x, codes[0]),)),
    }
    out = {}
    for name, (module, call) in modules.items():
        module.to(dtype)
        values = call(module)
        assert all(v.dtype == (dtype if name == "injection" else codes.dtype) for v in values), name
        out[name] = module, sum(v.square().sum() for v in values)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_reaches_every_parameter_and_codes_come_in_float32_at_least(dtype):
    for name, (module, loss) in losses(dtype).items():
        loss.backward()
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name} {key}"
            # no gradient of rounding errors alone, such as that of a bias before a batch normalisation
            assert parameter.grad.abs().max() > 1e-4, f"{name} {key}"


def test_gradient_reaches_codes_and_both_sides_of_the_information_bound():
    source, target = torch.randn(2, 3, L, dtype=torch.float64)
    for head in (make(InformationHead(L)), make(PublishedInformationHead(L))):
        both = (source.requires_grad_(),) if isinstance(head, InformationHead) else (source, target.requires_grad_())
        assert torch.autograd.gradcheck(lambda *codes, h=head: tuple(flat(h(*codes))), both)
    x, noise = torch.randn(3, 2, 2, 3, dtype=torch.float64), torch.randn(3, L, 2, 3, dtype=torch.float64)
    injection = Injection(2, L).double()
    assert torch.autograd.gradcheck(lambda *v: injection(*v), [v.requires_grad_() for v in (x, source, noise)])


def flat(values: tuple) -> list[Tensor]:
    return [v for value in values for v in (flat(value) if isinstance(value, tuple) else [value])]


def test_bfloat16_is_close_to_float32():
    x, audio, codes = torch.randn(4, 3, 64, 96), torch.randn(4, AUDIO), torch.randn(4, L)
    cases = [
        (FusedEncoder(3, AUDIO, L), (x, audio)),
        (VisualEncoder(3, L), (x,)),
        (InformationHead(L), (codes,)),
        (Injection(3, L), (x, codes, torch.randn(4, L, 64, 96))),
    ]
    for module, inputs in cases:
        low = copy.deepcopy(module).bfloat16()
        # codes and noise are sampled in float32 and stay so
        low_inputs = [v if v is codes or v.shape[1] == L else v.bfloat16() for v in inputs]
        want, got = module(*inputs), low(*low_inputs)
        for w, g in zip(*(flat(v) if isinstance(v, tuple) else [v] for v in (want, got)), strict=True):
            assert (g.float() - w).abs().max() < 0.03 * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_variance_is_bounded_with_a_way_back_and_the_mean_is_not(sign):
    for module in (AudioEncoder(AUDIO, L), InformationHead(L)):
        for name, parameter in module.named_parameters():
            nn.init.constant_(parameter, sign * 50 if name.endswith("bias") else 0.0)
        code = module(torch.ones(2, AUDIO if isinstance(module, AudioEncoder) else L))
        torch.testing.assert_close(code.log_var, torch.full((2, L), sign * MAX_LOG_VAR), rtol=0.03, atol=0.0)
        assert code.log_var.abs().max() <= MAX_LOG_VAR
        assert torch.equal(code.mean, torch.full((2, L), sign * 50.0))
        code.log_var.sum().backward()
        bias = [p for name, p in module.named_parameters() if "log_var" in name and name.endswith("bias")][-1]
        assert bias.grad.min() > 1e-3
    assert MAX_LOG_VAR == 10


def test_small_log_variances_are_as_the_layer_gives_them():
    encoder = AudioEncoder(AUDIO, L)
    sound_ND = 0.1 * torch.randn(3, AUDIO)
    raw_NL = F.linear(sound_ND, encoder.head.log_var.weight, encoder.head.log_var.bias)
    torch.testing.assert_close(encoder(sound_ND).log_var, raw_NL / (1 + raw_NL**2 / 100).sqrt())
    assert (encoder(sound_ND).log_var - raw_NL).abs().max() < 0.01

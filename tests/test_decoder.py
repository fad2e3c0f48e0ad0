"""The necks and decoders: values, sizes, and one coarsest stage or several on the same finer stages."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avs_dist.config import DecoderConfig
from avs_dist.modules.decoder import Decoder, MaskDecoder, NearestDecoder, ResidualConvUnit, build_decoder
from avs_dist.modules.neck import build_neck
from avs_dist.modules.norm import WorldBatchNorm2d

C = 16


def make_decoder(kind: str, classes: int = 1) -> MaskDecoder:
    """In float64; the scales, shifts and running statistics of batch normalisations are random."""
    decoder = build_decoder(DecoderConfig(kind), C, classes).double()
    for module in decoder.modules():
        if isinstance(module, WorldBatchNorm2d):
            randomise(module)
    return decoder


def randomise(norm: WorldBatchNorm2d) -> None:
    for value in (norm.weight, norm.running_var):
        nn.init.uniform_(value, 0.5, 2.0)
    for value in (norm.bias, norm.running_mean):
        nn.init.normal_(value)


def make_features(frames: int, size: tuple[int, int]) -> list[Tensor]:
    """Four stages of frames of `size`, finest first, channels last."""
    sizes = [tuple(-(-edge // stride) for edge in size) for stride in (4, 8, 16, 32)]
    features = [torch.randn(frames, C, *s, dtype=torch.float64) for s in sizes]
    return [f.to(memory_format=torch.channels_last) for f in features]


def normalised(x: Tensor, norm: WorldBatchNorm2d, training: bool) -> Tensor:
    """Batch normalisation from its formula."""
    mean, var = norm.running_mean, norm.running_var
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * norm.weight.view(shape) + norm.bias.view(shape)


def test_dilated_neck_is_the_sum_of_four_convolutions():
    neck = build_neck("dilated", 3, 5)
    x = torch.randn(2, 3, 20, 24)
    want = sum(
        F.conv2d(x, b.weight, b.bias, padding=d, dilation=d) for b, d in zip(neck.branches, (3, 6, 12, 18), strict=True)
    )
    torch.testing.assert_close(neck(x), want, atol=1e-5, rtol=1e-4)
    weights = torch.cat([b.weight.flatten() for b in build_neck("dilated", 64, 64).branches])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)


def test_one_layer_neck_is_a_3x3_convolution():
    neck = build_neck("one_layer", 3, 5)
    x = torch.randn(2, 3, 20, 24)
    assert sum(p.numel() for p in neck.parameters()) == 3 * 5 * 9 + 5
    torch.testing.assert_close(neck(x), F.conv2d(x, neck.weight, neck.bias, padding=1))


@pytest.mark.parametrize("training", [True, False])
def test_three_layer_neck_equals_its_formula(training):
    neck = build_neck("three_layer", 3, 5).double().train(training)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert sum(p.numel() for p in neck.parameters()) == 3 * 5 + 5 * 5 * 9 * 2 + 3 * 2 * 5
    want = x
    for index, padding in ((0, 0), (2, 1), (4, 1)):
        assert isinstance(neck[index + 1], WorldBatchNorm2d)
        randomise(neck[index + 1])
        want = normalised(F.conv2d(want, neck[index].weight, padding=padding), neck[index + 1], training)
    torch.testing.assert_close(neck(x), want)
    assert want.min() < 0, "no activation at the end"


def test_residual_unit_with_and_without_the_in_place_relu():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 5)
    paper = ResidualConvUnit(4, rectified_skip=False)
    code = ResidualConvUnit(4, rectified_skip=True)
    code.load_state_dict(paper.state_dict())
    in_place = x.clone()  # what the public code does
    branch = nn.ReLU(inplace=True)(in_place)
    branch = paper.conv2(F.relu(paper.conv1(branch)))
    torch.testing.assert_close(code(x), branch + in_place)
    torch.testing.assert_close(paper(x), branch + x)
    kept = x.clone()
    code(x)
    assert torch.equal(x, kept), "the caller's tensor must not change"


@pytest.mark.parametrize("size", [(64, 64), (90, 77), (33, 130)])
@pytest.mark.parametrize("classes", [1, 71])
@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_decoder_takes_any_size(size, classes, kind):
    decoder = make_decoder(kind, classes)
    logits, mix = decoder(make_features(2, size), size)
    assert mix is None
    assert logits.shape == (2, classes, *size)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())


def test_decoder_equals_the_published_order_of_operations():
    decoder = Decoder(C)
    features = [torch.randn(1, C, s, s) for s in (16, 8, 4, 2)]

    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    path = double(decoder.stages[0].unit(features[3]))
    for stage, skip in zip(decoder.stages[1:], features[2::-1], strict=True):
        path = double(stage.unit(path + stage.skip_unit(skip)))
    path = F.interpolate(decoder.head_in(path), scale_factor=2, mode="bilinear", align_corners=False)
    want = decoder.head_out(F.relu(decoder.head_mid(path)))
    torch.testing.assert_close(decoder(features, (64, 64)).logits_NKHW, want, atol=1e-5, rtol=1e-4)


def test_decoder_keeps_the_parameters_of_its_checkpoints():
    names = [f"stages.{i}.{unit}.conv{j}" for i in range(4) for unit in ("skip_unit", "unit") for j in (1, 2)]
    names = [n for n in names if not n.startswith("stages.0.skip_unit")] + ["head_in", "head_mid", "head_out"]
    state = Decoder(256).state_dict()
    assert list(state) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert state["head_mid.weight"].shape == (32, 128, 3, 3)


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_small_decoders_keep_enough_channels_before_their_last_relu(kind):
    assert build_decoder(DecoderConfig(kind), 128).head_mid.out_channels == {"bilinear": 16, "nearest": 32}[kind]
    assert build_decoder(DecoderConfig(kind), 16).head_mid.out_channels == 16


def tiled(x: Tensor) -> Tensor:
    """Doubling as the public code does it: every pixel four times."""
    n, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("odd", [False, True])
def test_nearest_decoder_equals_its_formula(training, odd):
    """Towards stages of odd size the path is doubled, and its last row or column left out."""
    decoder = make_decoder("nearest").train(training)
    edges = [(17, 25), (9, 13), (5, 7), (3, 4)] if odd else [(16, 24), (8, 12), (4, 6), (2, 3)]
    features = [torch.randn(2, C, *edge, dtype=torch.float64) for edge in edges]

    def unit(module: nn.Module, x: Tensor) -> Tensor:
        hidden = F.relu(normalised(F.conv2d(x, module.conv1.weight, padding=1), module.bn1, training))
        return x + F.relu(normalised(F.conv2d(hidden, module.conv2.weight, padding=1), module.bn2, training))

    path = tiled(unit(decoder.stages[0].unit, features[3]))
    for stage, skip in zip(decoder.stages[1:], features[2::-1], strict=True):
        path = path[..., : skip.shape[-2], : skip.shape[-1]]
        path = tiled(unit(stage.unit, path + unit(stage.skip_unit, skip)))
    path = tiled(decoder.head_in(path))
    want = decoder.head_out(F.relu(decoder.head_mid(path)))
    torch.testing.assert_close(decoder(features, (4 * edges[0][0], 4 * edges[0][1])).logits_NKHW, want)


def test_nearest_decoder_has_the_published_number_of_parameters():
    units = 7 * (2 * 128 * 128 * 9 + 2 * 2 * 128)  # two a stage, but none for the skip of the coarsest
    head = 128 * 64 * 9 + 64 + 64 * 32 * 9 + 32 + 32 + 1
    assert sum(p.numel() for p in NearestDecoder(128).parameters()) == units + head


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(64, 64), (72, 100)])
def test_painting_on_skips_is_the_whole_decoder(kind, size):
    decoder = make_decoder(kind).float()
    features = [f.float() for f in make_features(2, size)]
    whole, _ = copy.deepcopy(decoder)(features, size)
    for given in (features, features[:3]):
        parts = copy.deepcopy(decoder)
        assert torch.equal(parts.paint(features[3], parts.skips(given), size).logits_NKHW, whole)


@pytest.mark.parametrize(("kind", "training"), [("bilinear", True), ("bilinear", False), ("nearest", False)])
def test_samples_on_shared_skips_equal_separate_calls(kind, training):
    """Values and gradients of several coarsest stages."""
    samples, frames, size = 3, 2, (72, 100)
    decoder = make_decoder(kind, 2).train(training)
    *fine, coarsest = make_features(frames, size)
    coarse = [torch.randn_like(coarsest).requires_grad_() for _ in range(samples)]
    wanted = [*[f.requires_grad_() for f in fine], *coarse, *decoder.parameters()]

    def outcome(logits: Tensor) -> Sequence[Tensor]:
        weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        return logits, *torch.autograd.grad((logits * weight).sin().sum(), wanted)

    skips = decoder.skips(fine)
    got = outcome(torch.cat([decoder.paint(c, skips, size).logits_NKHW for c in coarse]))
    want = outcome(torch.cat([decoder([*fine, c], size).logits_NKHW for c in coarse]))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(got[0][:frames], got[0][frames : 2 * frames])


@pytest.mark.parametrize(
    ("kind", "compat"),
    [("bilinear", "paper"), ("nearest", "paper"), ("nearest", "published_code"), ("transformer", "published_code")],
)
def test_losses_see_the_features_as_they_are(kind, compat):
    decoder = build_decoder(DecoderConfig(kind), C, compat=compat)
    features = make_features(1, (64, 64))
    assert all(torch.equal(a, b) for a, b in zip(decoder.seen_by_losses(features), features, strict=True))


def test_losses_see_what_the_in_place_relu_leaves():
    decoder = build_decoder(DecoderConfig(), C, compat="published_code")
    features = make_features(1, (64, 64))
    assert all(torch.equal(a, b.clamp_min(0)) for a, b in zip(decoder.seen_by_losses(features), features, strict=True))
    assert all(m.rectified_skip for m in decoder.modules() if isinstance(m, ResidualConvUnit))


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_decoder_runs_in_bfloat16(kind):
    decoder = make_decoder(kind).float()
    features = [f.float() for f in make_features(2, (64, 96))]
    want = copy.deepcopy(decoder).eval()(features, (64, 96)).logits_NKHW
    got = decoder.bfloat16().eval()([f.bfloat16() for f in features], (64, 96)).logits_NKHW
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()

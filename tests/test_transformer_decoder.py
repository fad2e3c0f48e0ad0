"""The transformer decoder against its formulas, and what systems and ZeRO ask of a decoder."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avs_dist.config import DecoderConfig
from avs_dist.losses.segmentation import binary_cross_entropy, mixing_loss
from avs_dist.modules.attention import Attention, sine_positions
from avs_dist.modules.decoder import MaskDecoder, build_decoder
from avs_dist.modules.transformer_decoder import TransformerMaskDecoder

C, D, QUERIES, HEADS = 16, 10, 5, 4


def make_decoder(classes: int = 1, audio_channels: int = D, layers: int = 2) -> TransformerMaskDecoder:
    """In float64; no scale, shift or bias is one or zero."""
    config = DecoderConfig("transformer", QUERIES, layers, HEADS)
    decoder = build_decoder(config, C, classes, audio_channels=audio_channels).double()
    assert isinstance(decoder, TransformerMaskDecoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


def make_inputs(frames: int, size: tuple[int, int], channels: int = C) -> tuple[list[Tensor], Tensor]:
    """Four stages of frames of `size`, finest first, channels last; and the sound of each frame."""
    sizes = [tuple(-(-edge // stride) for edge in size) for stride in (4, 8, 16, 32)]
    features = [torch.randn(frames, channels, *s, dtype=torch.float64) for s in sizes]
    return [f.to(memory_format=torch.channels_last) for f in features], torch.randn(frames, D, dtype=torch.float64)


def attend(module: Attention, query_QD: Tensor, key_PC: Tensor, value_PC: Tensor) -> Tensor:
    """Attention of one frame, head by head and query by query."""
    query, key, value = module.query(query_QD), key_PC @ module.key.weight.T, module.value(value_PC)
    width, rows = C // HEADS, []
    for q in query:
        heads = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            scores = (key[:, part] @ q[part] / math.sqrt(width)).exp()
            heads.append((scores[:, None] * value[:, part]).sum(0) / scores.sum())
        rows.append(torch.cat(heads))
    return module.out(torch.stack(rows))


def feed_forward(module: nn.Sequential, x: Tensor) -> Tensor:
    norm, first, _, second = module
    return second(first(norm(x)).clamp_min(0))


def positions(height: int, width: int) -> Tensor:
    """The sines of every pixel, row by row."""
    rows = []
    for y in range(height):
        for x in range(width):
            row = []
            for place in ((y + 0.5) / height, (x + 0.5) / width):
                angles = [2 * math.pi * place / 10000 ** (4 * i / C) for i in range(C // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def literal(decoder: TransformerMaskDecoder, stages: list[Tensor], audio_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """One frame: stages [C,h,w] -> class logits and mixing logits at stride 4."""
    x = torch.cat([s.flatten(1).T for s in stages[1:]])
    place = torch.cat(
        [positions(*s.shape[1:]) + level for s, level in zip(stages[1:], decoder.encoder.levels, strict=True)]
    )
    for layer in decoder.encoder.layers:
        value = layer.norm(x)
        x = x + attend(layer.attention, value + place, value + place, value)
        x = x + feed_forward(layer.feed_forward, x)
    x = decoder.encoder.norm(x)

    queries = decoder.generator.queries
    if audio_D is not None:
        heard = queries + decoder.generator.value(audio_D)
        queries = queries + heard + feed_forward(decoder.generator.feed_forward, heard)
    for layer in decoder.decoder.layers:
        normed = layer.norm(queries)
        queries = queries + attend(layer.attention, normed, normed, normed)
        queries = queries + attend(layer.cross_attention, layer.cross_norm(queries), x + place, x)
        queries = queries + feed_forward(layer.feed_forward, queries)
    queries = decoder.decoder.norm(queries)

    height, width = stages[1].shape[1:]
    encoded = x[: height * width].T.reshape(1, C, height, width)
    mask = stages[0] + F.interpolate(encoded, stages[0].shape[1:], mode="bilinear")[0]
    mix = None
    if audio_D is not None:
        pixels = mask.flatten(1).T
        weight = attend(decoder.mixer.attention, audio_D[None], pixels, pixels)[0]
        mask = mask * (1 + weight[:, None, None])
        mix = decoder.mixer.sounding(mask)[0]
    maps = torch.stack([(q[:, None, None] * mask).sum(0) / math.sqrt(C) for q in queries])
    first, _, second = decoder.head.mlp
    return decoder.head.classes(mask + second(first(maps).clamp_min(0))), mix


@pytest.mark.parametrize("listens", [True, False])
def test_decoder_equals_its_formulas(listens):
    size = (36, 44)  # stages of odd sizes
    decoder = make_decoder(3, D if listens else 0)
    features, audio_ND = make_inputs(2, size)
    logits, mix = decoder(features, size, audio_ND)  # a deaf one does not look at the audio
    assert (mix is not None) == listens
    for n in range(2):
        want, want_mix = literal(decoder, [f[n] for f in features], audio_ND[n] if listens else None)
        torch.testing.assert_close(logits[n], F.interpolate(want[None], size, mode="bilinear")[0])
        if listens:
            torch.testing.assert_close(mix[n], want_mix)


def test_attention_is_that_of_torch():
    ours, theirs = Attention(C, HEADS).double(), nn.MultiheadAttention(C, HEADS, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.randn(C).double(), ours.value.bias]))
    theirs.out_proj = ours.out
    query, key, value = (torch.randn(2, n, C, dtype=torch.float64) for n in (3, 7, 7))
    # a bias of the keys, random here, makes no difference
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_positions_are_sines_that_agree_between_strides():
    like = torch.zeros(1, dtype=torch.float64)
    fine, coarse = sine_positions((6, 10), C, like), sine_positions((2, 2), C, like)
    torch.testing.assert_close(fine, positions(6, 10))
    fine, coarse = fine.view(6, 10, C), coarse.view(2, 2, C)
    torch.testing.assert_close(fine[1, 2], coarse[0, 0])  # the same place in the picture
    torch.testing.assert_close(fine[4, 7], coarse[1, 1])
    assert sine_positions((2, 3), C, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(64, 64), (90, 77), (33, 130), (224, 160)])
@pytest.mark.parametrize("classes", [1, 71])
@pytest.mark.parametrize("audio_channels", [D, 0])
def test_any_size_gives_every_parameter_a_gradient(size, classes, audio_channels):
    decoder = make_decoder(classes, audio_channels, layers=1)
    features, audio_ND = make_inputs(2, size)
    logits, mix = decoder(features, size, audio_ND if audio_channels else None)
    assert logits.shape == (2, classes, *size)
    assert torch.isfinite(logits).all()
    total = logits.square().sum()
    if audio_channels:
        assert mix.shape == (2, *features[0].shape[-2:])
        total = total + mix.square().sum()
    total.backward()
    silent = [n for n, p in decoder.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert not silent


def test_a_deaf_decoder_has_no_parameters_for_the_sound():
    listens, deaf = (sum(p.numel() for p in make_decoder(audio_channels=n, layers=1).parameters()) for n in (D, 0))
    generator = (D * C + C) + 2 * C + (4 * C * C + 4 * C) + (4 * C * C + C)
    mixer = (D * C + C) + C * C + 2 * (C * C + C) + (C + 1)
    assert listens - deaf == generator + mixer


@pytest.mark.parametrize("training", [True, False])
def test_frames_are_independent_of_each_other(training):
    size = (64, 48)
    decoder = make_decoder(2).train(training)
    features, audio_ND = make_inputs(3, size)
    together = decoder(features, size, audio_ND)
    again = copy.deepcopy(decoder).train(not training)(features, size, audio_ND)
    assert torch.equal(together.logits_NKHW, again.logits_NKHW)
    for n in range(3):
        alone = decoder([f[n : n + 1] for f in features], size, audio_ND[n : n + 1])
        torch.testing.assert_close(alone.logits_NKHW[0], together.logits_NKHW[n])
        torch.testing.assert_close(alone.mix_NHW[0], together.mix_NHW[n])


def test_painting_on_shared_skips_equals_separate_calls():
    """Values and gradients of several coarsest stages."""
    size = (72, 56)
    decoder = make_decoder(2)
    (*fine, coarsest), audio_ND = make_inputs(2, size)
    coarse = [torch.randn_like(coarsest).requires_grad_() for _ in range(3)]
    wanted = [*[f.requires_grad_() for f in fine], audio_ND.requires_grad_(), *coarse, *decoder.parameters()]
    skips = decoder.skips(fine, audio_ND)
    paintings = {
        "shared": [decoder.paint(c, skips, size) for c in coarse],
        "separate": [decoder([*fine, c], size, audio_ND) for c in coarse],
    }
    outcomes = {}
    for name, painted in paintings.items():
        values = torch.cat([torch.cat([p.logits_NKHW.flatten(), p.mix_NHW.flatten()]) for p in painted])
        weight = torch.linspace(-1, 1, values.numel(), dtype=torch.float64)
        outcomes[name] = [values, *torch.autograd.grad((values * weight).sin().sum(), wanted)]
    for got, want in zip(*outcomes.values(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    first, second, _ = paintings["shared"]
    assert not torch.allclose(first.logits_NKHW, second.logits_NKHW)


def shard_parameters(decoder: MaskDecoder) -> None:
    """As ZeRO-3 does: a module has its own parameters while it is called, and nobody has any otherwise."""
    for module in decoder.modules():
        own = {name: p.data for name, p in module.named_parameters(recurse=False)}

        def gather(module: nn.Module, *_: object, own: dict[str, Tensor] = own) -> None:
            for name, value in own.items():
                getattr(module, name).data = value

        def release(module: nn.Module, *_: object, own: dict[str, Tensor] = own) -> None:
            for name in own:
                getattr(module, name).data = torch.empty(0, dtype=torch.float64)

        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["bilinear", "nearest", "transformer"])
def test_sharded_parameters_suffice_though_nobody_calls_the_decoder(kind, training):
    size = (64, 64)
    decoder = build_decoder(DecoderConfig(kind, QUERIES, 1, HEADS), C, audio_channels=D).double().train(training)
    features, audio_ND = make_inputs(2, size)
    with torch.no_grad():
        want = copy.deepcopy(decoder)(features, size, audio_ND).logits_NKHW
        shard_parameters(decoder)
        got = decoder.paint(features[3], decoder.skips(features, audio_ND), size).logits_NKHW
    assert torch.equal(got, want)


def test_decoder_runs_in_bfloat16():
    size = (64, 96)
    decoder = make_decoder(2).float()
    features, audio_ND = make_inputs(2, size)
    want = decoder([f.float() for f in features], size, audio_ND.float())
    half = copy.deepcopy(decoder).bfloat16()
    got = half([f.bfloat16() for f in features], size, audio_ND.bfloat16())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.float() - w).abs().max() < 0.05 * w.abs().max()
    got.logits_NKHW.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for n, p in half.named_parameters() if not n.startswith("mixer.sounding"))


def test_a_small_decoder_learns_from_scratch_which_object_sounds():
    """Both frames of a pair show the same two objects, one in each half; the sound says which of them is meant."""
    size, channels = (32, 48), 32
    decoder = build_decoder(DecoderConfig("transformer", 8, 1, 4), channels, audio_channels=D)
    noise, audio_ND = make_inputs(4, size, channels)
    left, right = torch.randn(2, channels, 1, 1)
    features = []
    for stage in noise:
        is_left = torch.arange(stage.shape[-1]) + 0.5 < stage.shape[-1] / 2
        features.append(0.5 * stage[[0, 0, 1, 1]].float() + torch.where(is_left, left, right))
    audio_ND = audio_ND[[0, 1, 0, 1]].float()
    masks = torch.zeros(1, 4, *size)
    masks[0, ::2, :, :24] = masks[0, 1::2, :, 24:] = 1
    counted = torch.ones(1, 4, dtype=torch.bool)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(50):
        painting = decoder(features, size, audio_ND)
        total, count = binary_cross_entropy(painting.logits_NKHW[:, 0][None], masks, counted)
        mix, _ = mixing_loss(painting.mix_NHW[None], masks, counted)
        optimiser.zero_grad()
        ((total + 0.1 * mix) / count).backward()
        optimiser.step()
    on, truth = painting.logits_NKHW[:, 0] > 0, masks[0] > 0
    iou = (on & truth).sum((1, 2)) / (on | truth).sum((1, 2))
    assert iou.min() > 0.9


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"model\.neck\.channels=20.*model\.decoder\.heads=8"):
        build_decoder(DecoderConfig("transformer", heads=8), 20)
    with pytest.raises(ValueError, match=r"model\.neck\.channels=18.*multiple of 4"):
        build_decoder(DecoderConfig("transformer", heads=3), 18)
    with pytest.raises(ValueError, match="needs audio_ND"):
        make_decoder().skips(make_inputs(1, (64, 64))[0])

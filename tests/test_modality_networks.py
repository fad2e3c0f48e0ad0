"""The networks of each modality against literal formulas, and as the system trains them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_sequence_encoders import scattered
from test_transformer_decoder import shard_parameters
from torch import Tensor, nn

from avs_dist.model_config import UnicodeConfig
from avs_dist.modules.modality import ModalityNetwork, SequenceNetwork, TextNetwork, VisualNetwork, build_modality
from avs_dist.modules.sequence_encoders import TemporalEncoder
from avs_dist.modules.specific_encoders import ResidualBlock, map_padding

CONFIG = UnicodeConfig(modalities=("audio", "visual", "text"), dim=16, specific=12, visual_specific=32)
SHAPES = {"audio": (10,), "text": (14,), "visual": (7, 7, 24)}
NETWORKS = {"audio": SequenceNetwork, "text": TextNetwork, "visual": VisualNetwork}
MAPS = [(7, 7), (3, 3), (1, 2), (8, 5), (4, 9)]
LENGTHS = (4, 1, 3)


def make(kind: str, shape: tuple[int, ...] | None = None) -> tuple[ModalityNetwork, Tensor, Tensor]:
    """The network, features and valid_BT, in float64; one second of padding more than needed."""
    shape = shape or SHAPES[kind]
    network = scattered(build_modality(kind, shape, CONFIG))
    valid_BT = torch.arange(max(LENGTHS) + 1) < torch.tensor(LENGTHS)[:, None]
    x = torch.randn(*valid_BT.shape, *shape, dtype=torch.float64)
    return network, x * valid_BT.view(*valid_BT.shape, *[1] * len(shape)), valid_BT


def make_code(valid_BT: Tensor) -> Tensor:
    return torch.randn(*valid_BT.shape, CONFIG.dim, dtype=torch.float64)


def outputs(network: ModalityNetwork, x: Tensor, valid: Tensor, code: Tensor) -> list[Tensor]:
    """Semantic features, what is specific, its summary, and the reconstruction."""
    specific = network.specific(x, valid)
    return [network.semantic_features(x, valid), *specific, network.decode(code, specific.features)]


def convolve(layer: nn.Conv2d, x_CHW: Tensor) -> Tensor:
    """Cross-correlation, position by position."""
    (up, left), edge = layer.padding, layer.kernel_size[0]
    padded = nn.functional.pad(x_CHW, (left, left, up, up))
    height, width = padded.shape[1] - edge + 1, padded.shape[2] - edge + 1
    out = torch.stack(
        [
            torch.stack(
                [(layer.weight * padded[:, y : y + edge, x : x + edge]).sum((1, 2, 3)) for x in range(width)], -1
            )
            for y in range(height)
        ],
        1,
    )
    return out if layer.bias is None else out + layer.bias[:, None, None]


def spread(layer: nn.ConvTranspose2d, x_CHW: Tensor) -> Tensor:
    """Transposed convolution: every position adds its kernel to its surroundings; then the padding is cut off."""
    (up, left), edge = layer.padding, layer.kernel_size[0]
    height, width = x_CHW.shape[1] + edge - 1, x_CHW.shape[2] + edge - 1
    out = x_CHW.new_zeros(layer.weight.shape[1], height, width)
    for y in range(x_CHW.shape[1]):
        for x in range(x_CHW.shape[2]):
            out[:, y : y + edge, x : x + edge] += (x_CHW[:, y, x, None, None, None] * layer.weight).sum(0)
    return out[:, up : height - up, left : width - left] + layer.bias[:, None, None]


def residual(block: ResidualBlock, x_CHW: Tensor) -> Tensor:
    _, wide, _, narrow = block.layers
    inner = convolve(narrow, convolve(wide, x_CHW.clamp_min(0)).clamp_min(0))
    return (x_CHW + inner).clamp_min(0)


@pytest.mark.parametrize("size", MAPS)
def test_visual_network_equals_its_formulas(size):
    network, x, valid = make("visual", (*size, 24))
    code = make_code(valid)
    specific = network.specific(x, valid)
    reconstruction = network.decode(code, specific.features)
    assert reconstruction.shape == x.shape
    first, _, second, _, third, block = network.specific_encoder.layers
    spread_1, block_2, spread_2, _, last = network.decoder.layers
    with torch.no_grad():
        for b, t in ((0, 0), (2, 1)):
            maps = convolve(second, convolve(first, x[b, t].permute(2, 0, 1)).clamp_min(0)).clamp_min(0)
            maps = residual(block, convolve(third, maps))
            torch.testing.assert_close(specific.features[b, t], maps.permute(1, 2, 0))
            hidden = network.summary[0](maps.mean((1, 2))).clamp_min(0)
            torch.testing.assert_close(specific.summary_BTS[b, t], network.summary[2](hidden))
            tiled = network.decoder.code(code[b, t])[:, None, None].expand(-1, *maps.shape[1:])
            wider = residual(block_2, spread(spread_1, torch.cat([tiled, maps])))
            torch.testing.assert_close(
                reconstruction[b, t], convolve(last, spread(spread_2, wider).clamp_min(0)).permute(1, 2, 0)
            )


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_sequence_networks_equal_their_formulas(kind):
    network, x, valid = make(kind)
    code = make_code(valid)
    specific = network.specific(x, valid)
    (layer, _), decoder = network.specific_encoder, network.decoder
    want = (x @ layer.weight.T + layer.bias).clamp_min(0)
    torch.testing.assert_close(specific.features[valid], want[valid])
    assert torch.equal(specific.features, specific.summary_BTS)
    coded = code @ decoder.code.weight.T + decoder.code.bias
    want = torch.cat([coded, specific.features], 2) @ decoder.out.weight.T + decoder.out.bias
    torch.testing.assert_close(network.decode(code, specific.features), want)


def test_semantic_features_of_each_modality():
    network, x, valid = make("audio")
    assert torch.equal(network.semantic_features(x, valid), x)
    network, x, valid = make("text")
    assert torch.equal(network.semantic_features(x, valid), network.reader(x, valid))
    network, x, valid = make("visual")
    assert torch.equal(network.semantic_features(x, valid), network.attention(x))


@pytest.mark.parametrize(("size", "small"), [((7, 7), (3, 3)), ((6, 8), (6, 4)), ((3, 3), (3, 3)), ((14, 1), (10, 1))])
def test_long_edges_shrink_by_four_and_short_ones_stay(size, small):
    assert map_padding(size) == tuple(int(edge < 7) for edge in size)
    network, x, valid = make("visual", (*size, 24))
    assert network.specific(x, valid).features.shape == (*valid.shape, *small, CONFIG.visual_specific)


@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_have_the_sizes_that_the_network_states(kind):
    network, x, valid = make(kind)
    assert type(network) is NETWORKS[kind]
    assert network.semantic_features(x, valid).shape == (*valid.shape, network.semantic_channels)
    specific = network.specific(x, valid)
    assert specific.summary_BTS.shape == (*valid.shape, network.summary_channels)
    assert network.decode(make_code(valid), specific.features).shape == x.shape


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_clip_does_not_notice_padding_nor_other_clips(kind):
    network, x, valid = make(kind)
    code = make_code(valid)

    together = outputs(network, x, valid, code)
    for output in together[:3]:
        assert (output[~valid] == 0).all()
    for b, length in enumerate(LENGTHS):
        one = slice(b, b + 1), slice(0, length)
        for got, want in zip(outputs(network, x[one], valid[one], code[one]), together, strict=True):
            torch.testing.assert_close(got, want[one])


@pytest.mark.parametrize(("kind", "shape"), [*SHAPES.items(), *[("visual", (*size, 24)) for size in MAPS]])
def test_training_gives_every_parameter_a_gradient(kind, shape):
    network, x, valid = make(kind, shape)
    encoder = scattered(TemporalEncoder(network.semantic_channels, CONFIG.dim, 1, 4, 0.0))
    semantic = encoder(network.semantic_features(x, valid), valid)
    specific = network.specific(x, valid)
    code = torch.randn_like(semantic)
    loss = (network.decode(code, specific.features) - x)[valid].square().sum() + specific.summary_BTS.square().sum()
    (loss + (semantic * torch.randn_like(semantic)).sum()).backward()
    parameters = [*network.named_parameters(), *encoder.named_parameters()]
    assert not [name for name, p in parameters if p.grad is None or p.grad.abs().max() < 1e-9]


@pytest.mark.parametrize("kind", NETWORKS)
def test_sharded_parameters_suffice_and_nothing_is_read_on_the_host(kind):
    network, x, valid = make(kind)
    code = make_code(valid)

    with torch.no_grad():
        want = outputs(copy.deepcopy(network), x, valid, code)
        on_meta = outputs(copy.deepcopy(network).to("meta"), x.to("meta"), valid.to("meta"), code.to("meta"))
        shard_parameters(network)
        for g, w, m in zip(outputs(network, x, valid, code), want, on_meta, strict=True):
            assert torch.equal(g, w)
            assert m.shape == w.shape


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_run_in_bfloat16_with_a_code_in_float32(kind):
    network, x, valid = make(kind)
    network, x = network.bfloat16(), x.bfloat16()
    specific = network.specific(x, valid)
    reconstruction = network.decode(make_code(valid).float(), specific.features)
    assert reconstruction.dtype == specific.summary_BTS.dtype == torch.bfloat16
    assert torch.isfinite(reconstruction).all()
    assert network.semantic_features(x, valid).dtype == torch.bfloat16


def test_published_sizes():
    config = UnicodeConfig()
    with torch.device("meta"):
        published = {"audio": (128,), "text": (768,), "visual": (7, 7, 512)}
        networks = {kind: build_modality(kind, shape, config) for kind, shape in published.items()}
    sizes = {kind: sum(p.numel() for p in n.parameters()) for kind, n in networks.items()}
    sequence = {c: (c * 256 + 256) + (256 * 256 + 256) + (512 * c + c) for c in (128, 768)}
    assert sizes["audio"] == sequence[128]
    assert sizes["text"] == sequence[768] + 4 * 128 * 2 * ((768 + 128 + 2) + (256 + 128 + 2))
    attention = 2 * 512 * 64 + 2 * (512 * 256 + 256) + 257
    encoder = (9 * 512 * 1024 + 1024) + (9 * 1024 * 2048 + 2048) + (2048 * 2048 + 2048) + 10 * 2048 * 2048
    summary = 2048 * 1024 + 1024 + 1024 * 512 + 512
    decoder = (256 * 256 + 256) + (9 * 2304 * 1024 + 1024) + 10 * 1024**2 + (9 * 1024 * 512 + 512) + (512**2 + 512)
    assert sizes["visual"] == attention + encoder + summary + decoder
    assert networks["visual"].summary_channels == 512
    assert networks["text"].semantic_channels == 256


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"visual features .*\(49, 512\): must be \(h, w, C\)"):
        build_modality("visual", (49, 512), CONFIG)
    with pytest.raises(ValueError, match=r"text features .*\(10, 768\): must be \(C,\)"):
        build_modality("text", (10, 768), CONFIG)
    with pytest.raises(ValueError, match=r"no 'smell', only audio, text, visual"):
        build_modality("smell", (10,), CONFIG)
    for wrong in (30, 2):
        with pytest.raises(ValueError, match=rf"visual_specific={wrong}: must be a multiple of 4"):
            build_modality("visual", (7, 7, 24), UnicodeConfig(visual_specific=wrong))

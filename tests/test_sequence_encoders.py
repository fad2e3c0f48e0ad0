"""Semantic encoders against torch's own layers and literal formulas; padding, and what ZeRO and bfloat16 ask."""

from __future__ import annotations

import copy

import pytest
import torch
from test_transformer_decoder import shard_parameters
from torch import Tensor, nn

from avs_dist.modules.attention import Attention
from avs_dist.modules.sequence_encoders import BidirectionalLSTM, TemporalEncoder, VisualAttention

C, D, HEADS, LAYERS = 10, 16, 4, 2
LENGTHS = (5, 2, 7, 1, 0)  # the last clip has no token

ENCODERS = {
    "transformer": lambda: TemporalEncoder(C, D, LAYERS, HEADS, 0.1).eval(),
    "lstm": lambda: BidirectionalLSTM(C, D),
}


def make_sequences(lengths: tuple[int, ...] = LENGTHS, extra: int = 0) -> tuple[Tensor, Tensor]:
    """x_BTC in float64 and valid_BT; `extra` more tokens of padding than the longest clip needs."""
    valid_BT = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    x_BTC = torch.randn(*valid_BT.shape, C, dtype=torch.float64)
    return x_BTC * valid_BT[..., None], valid_BT


def scattered(module: nn.Module) -> nn.Module:
    """In float64; no scale, shift or bias is one or zero."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    # a bias of the keys, random here, makes no difference
    theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.randn(D).double(), ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def torch_transformer(encoder: TemporalEncoder, dropout: float) -> nn.TransformerEncoder:
    """torch's layers with the weights of ours."""
    layer = nn.TransformerEncoderLayer(D, HEADS, 4 * D, dropout, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    with torch.no_grad():
        for a, b in zip(encoder.layers, theirs.layers, strict=True):
            copy_attention(a.attention, b.self_attn)
            pairs = [(a.attention_norm, b.norm1), (a.norm, b.norm2)]
            pairs += [(a.feed_forward[0], b.linear1), (a.feed_forward[3], b.linear2)]
            for mine, other in pairs:
                other.load_state_dict(mine.state_dict())
    return theirs


@pytest.mark.parametrize("projects", [True, False])
def test_temporal_encoder_is_the_transformer_of_torch(projects):
    ours = scattered(TemporalEncoder(C if projects else None, D, LAYERS, HEADS, 0.1)).eval()
    theirs = torch_transformer(ours, 0.1).eval()
    x, valid = make_sequences(LENGTHS[:-1])  # theirs has nothing to say of an empty clip
    x = x if projects else torch.randn(*valid.shape, D, dtype=torch.float64) * valid[..., None]
    x.requires_grad_()
    got = ours(x, valid)
    want = theirs(ours.project(x) if projects else x, src_key_padding_mask=~valid)
    torch.testing.assert_close(got[valid], want[valid])
    assert (got[~valid] == 0).all()
    weight = torch.randn_like(got)
    layers = list(zip(ours.layers, theirs.layers, strict=True))
    inner = [(a.attention.out.weight, b.self_attn.out_proj.weight) for a, b in layers]
    inner += [(a.feed_forward[0].bias, b.linear1.bias) for a, b in layers]
    got_grads = torch.autograd.grad((got * weight).sum(), [x, *[a for a, _ in inner]])
    want_grads = torch.autograd.grad((want * weight)[valid].sum(), [x, *[b for _, b in inner]])
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w)


def test_dropout_is_where_torch_has_it():
    """One clip and no padding: then both draw the same numbers for the same places."""
    ours = scattered(TemporalEncoder(None, D, LAYERS, HEADS, 0.3))
    theirs = torch_transformer(ours, 0.3)
    x, valid = torch.randn(1, 6, D, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    torch.manual_seed(3)
    got = ours(x, valid)
    torch.manual_seed(3)
    torch.testing.assert_close(got, theirs(x))
    assert not torch.allclose(got, ours(x, valid))
    assert torch.equal(ours.eval()(x, valid), ours(x, valid))


def test_attention_masks_keys_alone():
    attention = scattered(Attention(D, HEADS))
    query, key, value = (torch.randn(2, n, D, dtype=torch.float64) for n in (3, 5, 5))
    valid = torch.tensor([[True, False, True, True, False], [True] * 5])
    got = attention(query, key, value, valid)
    torch.testing.assert_close(got[:1], attention(query[:1], key[:1, valid[0]], value[:1, valid[0]]))
    torch.testing.assert_close(got[1:], attention(query[1:], key[1:], value[1:]))
    nothing = attention(query, key, value, torch.zeros_like(valid))
    torch.testing.assert_close(nothing, attention(query, key, value))


def test_lstm_is_the_bidirectional_lstm_of_torch():
    ours = scattered(BidirectionalLSTM(C, D, layers=3))
    theirs = nn.LSTM(C, D // 2, 3, batch_first=True, bidirectional=True, dtype=torch.float64)
    pairs = []
    for layer in range(3):
        for lstm, suffix in ((ours.ahead[layer], ""), (ours.back[layer], "_reverse")):
            pairs += [(p, getattr(theirs, f"{n[:-1]}{layer}{suffix}")) for n, p in lstm.named_parameters()]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    lengths = LENGTHS[:-1]
    x, valid = make_sequences(lengths, extra=2)
    x.requires_grad_()
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    want, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True, total_length=valid.shape[1])
    got = ours(x, valid)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(got)
    got_grads = torch.autograd.grad((got * weight).sum(), [x, *[a for a, _ in pairs]])
    want_grads = torch.autograd.grad((want * weight).sum(), [x, *[b for _, b in pairs]])
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_clip_does_not_notice_padding_nor_other_clips(name):
    encoder = scattered(ENCODERS[name]())
    x, valid = make_sequences(extra=3)
    together = encoder(x, valid)
    assert (together[~valid] == 0).all()
    torch.testing.assert_close(encoder(x.flip(0), valid.flip(0)).flip(0), together)
    for b, length in enumerate(LENGTHS[:-1]):
        alone = encoder(x[b : b + 1, :length], valid[b : b + 1, :length])
        torch.testing.assert_close(alone[0], together[b, :length])
    torch.autograd.backward(together.square().sum())
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in encoder.parameters())


def look(module: VisualAttention, map_HWC: Tensor) -> Tensor:
    """One map, position by position."""
    squeeze, _, excite, _ = module.gate
    mean = map_HWC.mean((0, 1))
    gate = 1 / (1 + (-(excite.weight @ (squeeze.weight @ mean).clamp_min(0))).exp())
    gated = [(1 + gate) * place for row in map_HWC for place in row]
    average = module.average[0](mean).clamp_min(0)
    score = [torch.tanh(module.score[0](module.position[0](g).clamp_min(0) * average)).exp() for g in gated]
    return sum(s * g for s, g in zip(score, gated, strict=True)) / sum(score)


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)])
@pytest.mark.parametrize("channels", [12, 128])
def test_visual_attention_equals_its_formula(size, channels):
    module = scattered(VisualAttention(channels))
    assert module.gate[0].out_features == max(8, channels // 8)
    x_BTHWC = torch.randn(2, 3, *size, channels, dtype=torch.float64)
    x_BTHWC[1, 2] = 0
    got = module(x_BTHWC)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        torch.testing.assert_close(got[b, t], look(module, x_BTHWC[b, t]))
    assert (got[1, 2] == 0).all()


def test_visual_attention_learns_all_of_itself():
    module = scattered(VisualAttention(32))
    module(torch.randn(2, 3, 4, 4, 32, dtype=torch.float64)).square().sum().backward()
    assert not [n for n, p in module.named_parameters() if p.grad.abs().max() < 1e-9]


def test_published_sizes():
    """Parameters of the public code, but for biases of keys (there are none here)."""
    count = {
        "audio": TemporalEncoder(128, 256, 2, 4, 0.1),
        "words": BidirectionalLSTM(768, 256),
        "visual": VisualAttention(512),
    }
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in count.items()}
    layer = sum(p.numel() for p in nn.TransformerEncoderLayer(256, 4, 1024).parameters()) - 256
    assert sizes["audio"] == 128 * 256 + 256 + 2 * layer
    assert sizes["words"] == sum(p.numel() for p in nn.LSTM(768, 128, 2, bidirectional=True).parameters())
    assert sizes["visual"] == 2 * 512 * 64 + 2 * (512 * 256 + 256) + 256 + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_no_value_is_read_on_the_host(name):
    """Tensors of the meta device have no values to read."""
    x, valid = make_sequences()
    encoder = ENCODERS[name]().to("meta")
    assert encoder(x.float().to("meta"), valid.to("meta")).shape == (*valid.shape, D)


@pytest.mark.parametrize("name", ENCODERS)
def test_sharded_parameters_suffice(name):
    encoder = scattered(ENCODERS[name]())
    x, valid = make_sequences()
    with torch.no_grad():
        want = copy.deepcopy(encoder)(x, valid)
        shard_parameters(encoder)
        assert torch.equal(encoder(x, valid), want)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_run_in_bfloat16(name):
    encoder = scattered(ENCODERS[name]())
    x, valid = make_sequences()
    want = encoder(x, valid)
    got = encoder.bfloat16()(x.bfloat16(), valid)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 0.05 * want.abs().max()
    got.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"model\.unicode\.dim=10: .*model\.unicode\.heads=4"):
        TemporalEncoder(C, 10, LAYERS, 4, 0.1)
    with pytest.raises(ValueError, match=r"model\.unicode\.dim=9: must be even"):
        BidirectionalLSTM(C, 9)

"""The rank-T TPAVI and the literal formula agree, and the literal formula is the published block."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels import tpavi_passes
from avs_dist.modules.tpavi import PUBLISHED_NAMES, TPAVI, from_published

CHANNELS, AUDIO = 8, 6
SIZES = [(1, 3, 5), (5, 4, 3), (10, 1, 7), (32, 2, 1)]


class PublishedBlock(nn.Module):
    """The published block written independently with torch's own layers (AVSBench layout [B,C,T,H,W])."""

    def __init__(self, channels: int, audio_channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.align_channel = nn.Linear(audio_channels, channels)
        self.norm_layer = nn.LayerNorm(channels)
        self.theta, self.phi, self.g = (nn.Conv3d(channels, inner, 1) for _ in range(3))
        self.W_z = nn.Sequential(nn.Conv3d(inner, channels, 1), nn.BatchNorm3d(channels))

    def forward(self, x_BCTHW: Tensor, audio_BTD: Tensor | None) -> Tensor:
        key = x_BCTHW
        if audio_BTD is not None:
            key = self.align_channel(audio_BTD).transpose(1, 2)[..., None, None].expand_as(x_BCTHW)
        theta, phi, g = (conv(v).flatten(2) for conv, v in ((self.theta, x_BCTHW), (self.phi, key), (self.g, x_BCTHW)))
        attention_BNN = theta.transpose(1, 2) @ phi / theta.shape[-1]
        y_BNK = attention_BNN @ g.transpose(1, 2)
        y = y_BNK.transpose(1, 2).unflatten(2, x_BCTHW.shape[2:])
        z = self.W_z(y) + x_BCTHW
        return self.norm_layer(z.movedim(1, -1)).movedim(-1, 1)


def make_block(**options) -> TPAVI:
    """A block in float64 whose parameters are all random, so that no term vanishes."""
    torch.manual_seed(1)
    block = TPAVI(CHANNELS, AUDIO, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.7)
        block.running_mean.normal_()
        block.running_var.uniform_(0.5, 2.0)
    return block


def make_input(batch: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x_BTHWC = torch.randn(batch, frames, height, width, CHANNELS, dtype=torch.float64)
    x_BTCHW = (x_BTHWC + 0.5).permute(0, 1, 4, 2, 3)
    return x_BTCHW.requires_grad_(), torch.randn(batch, frames, AUDIO, dtype=torch.float64, requires_grad=True)


def run(block: nn.Module, x: Tensor, audio: Tensor | None, **options) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters for a random output gradient, and buffers after the pass."""
    out = block(x, audio, **options)
    torch.manual_seed(3)
    inputs = {"x": x} | ({"audio": audio} if audio is not None else {})
    wanted = inputs | dict(block.named_parameters())
    grads = torch.autograd.grad(out, list(wanted.values()), torch.randn_like(out), allow_unused=True)
    result = {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return result | {"out": out.detach()} | {name: b.clone() for name, b in block.named_buffers()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-11) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=atol, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("time_aligned", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key", ["audio", "visual", "both"])
def test_rank_t_equals_literal(size, time_aligned, training, masked, key, monkeypatch):
    monkeypatch.setattr(tpavi_passes, "CPU_CHUNK", 2 * 12 * CHANNELS)  # several groups of frames, the last one smaller
    fast = make_block(time_aligned=time_aligned, key=key, implementation="rank_t").train(training)
    slow = make_block(time_aligned=time_aligned, key=key, implementation="literal").train(training)
    x, audio = make_input(2, *size)
    valid = None
    if masked:
        valid = torch.ones(2, size[0], dtype=torch.bool)
        valid[1, (size[0] + 1) // 2 :] = False
        valid[0, 0] = size[0] == 1
    got, want = (run(block, x, None if key == "visual" else audio, valid_BT=valid) for block in (fast, slow))
    assert all(g is not None for g in want.values()), "every parameter must be in the graph"
    assert_equal(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("key", ["audio", "visual"])
@pytest.mark.parametrize("implementation", ["literal", "rank_t"])
def test_equals_published_block(training, key, implementation):
    torch.manual_seed(0)
    published = PublishedBlock(CHANNELS, AUDIO).double().train(training)
    for tensor in itertools.chain(published.parameters(), published.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0.5, 0.5).abs_().add_(0.1)  # positive, as one of them is a variance
    ours = TPAVI(CHANNELS, AUDIO, implementation=implementation, key=key).double().train(training)
    state = from_published(published.state_dict())
    ours.load_state_dict({k: v for k, v in state.items() if key == "audio" or not k.startswith("align.")})
    x_BTCHW, audio = make_input(2, 5, 3, 4)
    audio_or_none = audio if key == "audio" else None
    want = published(x_BTCHW.transpose(1, 2), audio_or_none).transpose(1, 2)
    got = ours(x_BTCHW, audio_or_none)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(want)
    names = [name for name, _ in ours.named_parameters()]
    theirs = dict(published.named_parameters())
    want_grads = torch.autograd.grad(want, [x_BTCHW, *(theirs[PUBLISHED_NAMES[n]] for n in names)], grad)
    got_grads = torch.autograd.grad(got, [x_BTCHW, *ours.parameters()], grad)
    for name, g, w in zip(["x", *names], got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w.reshape(g.shape), atol=1e-11, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    buffers = dict(published.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[PUBLISHED_NAMES[name]], msg=lambda m, n=name: f"{n}: {m}")


def test_both_keys_give_the_mean_of_the_two():
    x, audio = make_input(2, 5, 3, 4)
    both, *single = (make_block(key=key).eval() for key in ("both", "audio", "visual"))
    for block in single:
        block.load_state_dict({k: v for k, v in both.state_dict().items() if k in block.state_dict()})
    torch.testing.assert_close(both(x, audio), (single[0](x, audio) + single[1](x)) / 2)


def test_alignment_uses_the_distance_of_query_and_key_seconds():
    """With R = identity a token attends to its own second only: changing another second's sound changes nothing."""
    block = make_block(time_aligned=True).eval()
    x, audio = make_input(1, 4, 2, 2)
    with torch.no_grad():
        block.alignment.zero_()
        frames = 4
        block.alignment[31] = 5.0
        other = audio.clone()
        other[:, 2] += 1.0
        # cancel the published 1/T with an equal negative offset everywhere but on the diagonal
        block.alignment -= 1.0 / frames
        changed = (block(x, other) - block(x, audio)).abs().amax((0, 2, 3, 4))
        assert changed[2] > 1e-3
        assert changed[[0, 1, 3]].max() == 0
        # an offset at t0 - t = 1 hears the second before
        block.alignment.fill_(-1.0 / frames)
        block.alignment[31 + 1] = 1.0
        changed = (block(x, other) - block(x, audio)).abs().amax((0, 2, 3, 4))
        assert changed[3] > 1e-3
        assert changed[:3].max() == 0


@pytest.mark.parametrize("key", ["audio", "both"])
@pytest.mark.parametrize("implementation", ["literal", "rank_t"])
def test_without_projection_the_audio_is_taken_as_it_is(key, implementation):
    """As with a projection that is the identity; also from a published state, which has none (ECMVAE)."""
    torch.manual_seed(0)
    published = PublishedBlock(CHANNELS, CHANNELS).double()
    for parameter in published.parameters():
        nn.init.normal_(parameter)
    published.align_channel.load_state_dict({"weight": torch.eye(CHANNELS), "bias": torch.zeros(CHANNELS)})
    options = {"key": key, "implementation": implementation}
    projected = TPAVI(CHANNELS, CHANNELS, **options).double()
    projected.load_state_dict(from_published(published.state_dict()))
    bare = TPAVI(CHANNELS, CHANNELS, align_audio=False, **options).double()
    state = {k: v for k, v in published.state_dict().items() if not k.startswith("align_channel.")}
    bare.load_state_dict(from_published(state))
    x, _ = make_input(2, 5, 3, 4)
    audio = torch.randn(2, 5, CHANNELS, dtype=torch.float64, requires_grad=True)
    got, want = run(bare, x, audio), run(projected, x, audio)
    assert_equal(got, {name: value for name, value in want.items() if not name.startswith("grad align.")})
    assert bare.project_audio(audio) is audio
    with pytest.raises(RuntimeError, match=r"Missing.*align\.weight"):
        projected.load_state_dict(from_published(state))


def test_padded_frames_change_nothing():
    """A clip of 3 seconds padded to 5 gives what it gives alone, in moments, outputs and gradients."""
    x, audio = make_input(2, 5, 2, 3)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 3:] = False
    block = make_block(time_aligned=True)
    padded = run(copy.deepcopy(block), x, audio, valid_BT=valid)
    short_x, short_audio = x[:, :3].detach().requires_grad_(), audio[:, :3].detach().requires_grad_()
    short = block(short_x, short_audio)
    torch.testing.assert_close(padded["out"][:, :3], short)
    assert padded["out"][:, 3:].abs().max() == 0
    assert padded["grad x"][:, 3:].abs().max() == 0
    assert padded["grad audio"][:, 3:].abs().max() == 0
    torch.testing.assert_close(padded["running_var"], block.running_var)


def test_at_initialisation_the_block_is_layer_norm():
    block = TPAVI(CHANNELS, AUDIO)
    x, audio = make_input(1, 5, 3, 3)
    out = block(x.float(), audio.float())
    want = nn.functional.layer_norm(x.float().movedim(2, -1), [CHANNELS]).movedim(-1, 2)
    torch.testing.assert_close(out, want)


def test_channels_last_tokens_are_not_copied():
    block = make_block()
    x, audio = make_input(2, 5, 3, 4)
    out = block(x, audio)
    assert out.stride(2) == 1
    assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_closed_form_variance_keeps_its_digits_in_float32(offset):
    """A large common score (a large b_theta . phi) must not cancel the variance away."""
    block = make_block()
    x, audio = make_input(2, 5, 6, 6)
    with torch.no_grad():
        block.theta_bias += offset
    exact = block(x, audio)
    rounded = copy.deepcopy(block).float()(x.float(), audio.float())
    assert (rounded - exact).abs().max() < (1e-4 if offset == 0 else 2e-2)


def test_bfloat16_is_computed_in_float32_and_keeps_its_running_statistics():
    block = make_block().float()
    low = copy.deepcopy(block).bfloat16()
    assert low.running_var.dtype == torch.float32
    with torch.no_grad():
        for p, q in zip(block.parameters(), low.parameters(), strict=True):
            p.copy_(q)
    x, audio = (v.detach().bfloat16() for v in make_input(2, 5, 6, 6))
    out = low(x.requires_grad_(), audio)
    want = block(x.float(), audio.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).abs().max() < 0.05
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.running_var, block.running_var, rtol=0.02, atol=1e-3)


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="even"):
        TPAVI(7, 6)
    with pytest.raises(ValueError, match=r"align_audio=false.*6 channels.*8; .*model\.neck\.channels=6"):
        TPAVI(8, 6, align_audio=False)
    with pytest.raises(ValueError, match="has no audio"):
        TPAVI(8, 6, align_audio=False, key="visual").project_audio(torch.zeros(1, 1, 6))
    with pytest.raises(ValueError, match="32 frames, got 33"):
        make_block(time_aligned=True)(*make_input(1, 33, 1, 1))
    with pytest.raises(ValueError, match="audio_BTD"):
        make_block()(make_input(1, 2, 1, 1)[0])
    with pytest.raises(ValueError, match=r"W_z\.0\.weight"):
        from_published({k: v for k, v in PublishedBlock(8, 6).state_dict().items() if k != "W_z.0.weight"})
    with pytest.raises(ValueError, match=r"align_channel\.weight"):
        from_published({k: v for k, v in PublishedBlock(8, 6).state_dict().items() if k != "align_channel.weight"})


def test_linear_attention_equals_its_quadratic_form():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    mixing = torch.randn(2, 3, 3, dtype=torch.float64)
    got = rank_t.linear_attention(query, key, value, mixing)
    want = torch.zeros_like(value)
    for b, t0, i, t, j in itertools.product(range(2), range(3), range(4), range(3), range(4)):
        want[b, t0, i] += mixing[b, t0, t] / 4 * (query[b, t0, i] @ key[b, t, j]) * value[b, t, j]
    torch.testing.assert_close(got, want)


def test_backward_stores_scores_and_no_second_copy_of_the_tokens():
    frames, positions, channels = 5, 400, 64
    x = torch.randn(1, frames, positions, channels, requires_grad=True)
    block = TPAVI(channels, AUDIO)
    stored: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        block(x.permute(0, 1, 3, 2)[..., None], torch.randn(1, frames, AUDIO))
    stored.pop(x.untyped_storage().data_ptr())
    parameters = sum(p.numel() for p in block.parameters())
    scores = frames * positions * (frames + 1)
    assert scores <= sum(stored.values()) - parameters < 4 * scores < x.numel()

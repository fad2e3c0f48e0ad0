"""How TPAVI's kernels are used: memory and passes, bad input, choice of the form, autocast, compile, whole models."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor
from tpavi_calls import Case, make_call, run

from avs_dist.kernels import runtime
from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels.reference import Running
from avs_dist.modules.tpavi import TPAVI


@pytest.mark.parametrize("form", [rank_t.tpavi_triton, rank_t.tpavi_torch])
def test_autocast_changes_nothing(form):
    case = Case((2, 3, 5, 8), aligned=True)
    call = make_call(case, torch.float32)
    want = run(form, call, case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(form, call, case)
    assert torch.equal(got["out"], want["out"])
    if form is rank_t.tpavi_triton:
        for name in ("grad x", "grad g_KC", "grad out_CK", "grad ln_weight_C"):
            assert torch.equal(got[name], want[name]), name


def test_any_strides_without_a_copy():
    case = Case((2, 3, 20, 16))
    call = make_call(case, torch.float32)
    batch, frames, positions, channels = case.sizes
    planes = call.x_BTPC.detach().transpose(2, 3).contiguous().transpose(2, 3)  # [B,T,C,P] in memory
    wide = torch.empty(batch, frames, positions, 2 * channels, device=DEVICE)[..., ::2].copy_(call.x_BTPC.detach())
    want = rank_t.tpavi_triton(call.x_BTPC, call.audio_BTC, call.weights)[0]
    for x in (planes, wide):
        assert not x.is_contiguous()
        x = x.requires_grad_()
        got = rank_t.tpavi_triton(x, call.audio_BTC, call.weights)[0]
        torch.testing.assert_close(got, want)
        assert got.is_contiguous()
        # an expanded gradient, as of out.sum(), has strides of zero
        torch.testing.assert_close(
            torch.autograd.grad(got.sum() * 2, x)[0],
            torch.autograd.grad(want, call.x_BTPC, torch.full_like(want, 2.0), retain_graph=True)[0],
            atol=1e-5,
            rtol=1e-4,
        )
        with runtime.recording() as launches:
            rank_t.tpavi_triton(x, call.audio_BTC, call.weights)
        assert {launch.args[0].data_ptr() for launch in launches if launch.args[0].shape == x.shape} == {x.data_ptr()}


def test_passes_over_the_tokens():
    """Forward reads x twice and writes once; backward reads x and the gradient twice and writes once: five passes."""
    case = Case((1, 2, 40, 16))
    call = make_call(case, torch.float32)
    with runtime.recording() as launches:
        out, _ = rank_t.tpavi_triton(call.x_BTPC, call.audio_BTC, call.weights)
        forward = len(launches)
        out.backward(torch.ones(out.shape, device=DEVICE))
    size = call.x_BTPC.numel()
    big = [sum(isinstance(a, Tensor) and a.numel() == size for a in launch.args) for launch in launches]
    assert [n for n in big[:forward] if n] == [1, 2]
    assert [n for n in big[forward:] if n] == [2, 3]


def test_saves_the_scores_and_nothing_else_of_the_size_of_the_tokens():
    batch, frames, positions, channels = 1, 5, 400, 64
    call = make_call(Case((batch, frames, positions, channels)), torch.float32)
    stored: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        rank_t.tpavi_triton(call.x_BTPC, call.audio_BTC, call.weights)
    stored.pop(call.x_BTPC.untyped_storage().data_ptr())
    parameters = sum(value.numel() for value in call.weights)
    scores, small = frames * positions * frames, 8 * batch * frames * channels
    assert scores <= sum(stored.values()) - parameters <= scores + small


def test_bad_input_is_named():
    call = make_call(Case((2, 3, 4, 16)), torch.float32)
    with pytest.raises(ValueError, match=r"audio_BTC must be \[2, 3, 16\].*got \[2, 2, 16\]"):
        rank_t.tpavi(call.x_BTPC, call.audio_BTC[:, :2], call.weights)
    with pytest.raises(ValueError, match=r"x_BTPC must be \[any, any, any, any\].*got \[3, 4, 16\]"):
        rank_t.tpavi(call.x_BTPC[0], call.audio_BTC, call.weights)
    with pytest.raises(ValueError, match="x_BTPC must be .* float32 or float16 or bfloat16 or float64.*got .* int64"):
        rank_t.tpavi(call.x_BTPC.long(), call.audio_BTC, call.weights)
    with pytest.raises(ValueError, match=r"valid_BT must be \[2, 3\] bool.*got \[2, 3\] float32"):
        rank_t.tpavi(call.x_BTPC, call.audio_BTC, call.weights, valid_BT=torch.ones(2, 3, device=DEVICE))


@pytest.mark.parametrize("form", [rank_t.tpavi, rank_t.tpavi_triton, rank_t.tpavi_torch])
def test_bad_weights_are_named(form):
    call = make_call(Case((2, 3, 4, 16)), torch.float32)
    short = torch.ones(4, device=DEVICE)
    for name, expected in (("ln_weight_C", "16"), ("theta_KC", "8, 16"), ("out_CK", "16, 8"), ("g_bias_K", "8")):
        weights = call.weights._replace(**{name: short})
        pattern = rf"must be \[{expected}\]" if name != "g_bias_K" else r"must be \[4, 16\]"
        with pytest.raises(ValueError, match=pattern):
            form(call.x_BTPC, call.audio_BTC, weights)
    with pytest.raises(ValueError, match=r"running.var_C must be \[16\].*got \[1\]"):
        form(call.x_BTPC, call.audio_BTC, call.weights, running=Running(torch.ones(16).to(short), short[:1]))
    with pytest.raises(ValueError, match="alignment must have odd length.*got 4"):
        form(call.x_BTPC, call.audio_BTC, call.weights, short)
    for size in ((0, 3, 4, 16), (2, 3, 0, 16)):
        with pytest.raises(ValueError, match="at least one clip, frame, position"):
            form(torch.ones(size, device=DEVICE), call.audio_BTC, call.weights)


def test_beyond_the_kernels_auto_takes_torch(monkeypatch):
    call = make_call(Case((1, 33, 1, 8)), torch.float32)
    with pytest.raises(
        ValueError, match="up to 32 frames and 512 channels, got x_BTPC .1, 33, 1, 8.; AVS_KERNELS=torch"
    ):
        rank_t.tpavi_triton(call.x_BTPC, call.audio_BTC, call.weights)
    monkeypatch.setenv("AVS_KERNELS", "auto")
    out, _ = rank_t.tpavi(call.x_BTPC, call.audio_BTC, call.weights)
    assert out.shape == (1, 33, 1, 8)


def test_the_choice_of_kernels(monkeypatch, caplog):
    call = make_call(Case((1, 2, 3, 16)), torch.float32)
    arguments = (call.x_BTPC, call.audio_BTC, call.weights)
    ran = []
    monkeypatch.setattr(rank_t, "tpavi_triton", lambda *a: ran.append("triton"))
    monkeypatch.setattr(rank_t, "tpavi_torch", lambda *a: ran.append("torch"))
    monkeypatch.setattr(runtime, "_logged", set())
    for choice in ("auto", "torch", "triton"):
        monkeypatch.setenv("AVS_KERNELS", choice)
        with caplog.at_level(logging.INFO, logger=runtime.__name__):
            rank_t.tpavi(*arguments)
            rank_t.tpavi(*arguments)
    auto = "torch" if DEVICE == "cpu" else "triton"
    assert ran == [auto, auto, "torch", "torch", "triton", "triton"]
    messages = [record.message for record in caplog.records]
    assert messages == [f"tpavi: {auto} (AVS_KERNELS=auto, {DEVICE})"] + [
        f"tpavi: {name} (AVS_KERNELS={name}, {DEVICE})" for name in ("torch", "triton")
    ]
    monkeypatch.setenv("AVS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="AVS_KERNELS must be one of auto, torch, triton, got 'cuda'"):
        rank_t.tpavi(*arguments)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ValueError, match="tpavi: Triton was asked for, but the tensor is on meta"):
        runtime.require_triton("tpavi", torch.empty(1, device="meta"))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_module_runs_the_kernels_also_under_compile(backend, monkeypatch):
    # DeepSpeed at ZeRO stage 3 replaces torch's linear for the whole process, by one that loses gradients when compiled
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    block = TPAVI(16, 6, time_aligned=True, implementation="triton").to(DEVICE)
    plain = copy.deepcopy(block)
    plain._requested = "rank_t"
    assert (block.implementation, plain.implementation) == ("triton", "rank_t")
    x, audio = torch.randn(2, 5, 16, 4, 3, device=DEVICE), torch.randn(2, 5, 6, device=DEVICE)
    compiled = torch.compile(block, backend=backend)
    out, want = compiled(x, audio), plain(x, audio)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(want)  # not of a norm of the output, which the layer normalisation holds constant
    for module, result in ((block, out), (plain, want)):
        result.backward(grad)
        assert all(parameter.grad is not None for parameter in module.parameters())
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(block.running_var, plain.running_var)


@pytest.mark.parametrize(
    ("size", "frames", "steps"), [(32, 2, 4), pytest.param(224, 5, 10, marks=pytest.mark.gpu)], ids=str
)
def test_a_whole_model_learns_the_same_with_and_without_kernels(size, frames, steps):
    pytest.importorskip("timm", reason="the whole model needs timm")
    pytest.importorskip("torchaudio", reason="the whole model needs torchaudio")
    from avs_dist.clip import Clip
    from avs_dist.config import AudioConfig, BackboneConfig, Config, ModelConfig, NeckConfig, TPAVIConfig
    from avs_dist.systems import build_system

    clip = Clip(
        frames_BTCHW=torch.randn(2, frames, 3, size, size),
        mel_BTFM=torch.randn(2, frames, 96, 64),
        masks_BTHW=torch.randint(0, 2, (2, frames, size, size), dtype=torch.uint8),
        labelled_BT=torch.ones(2, frames, dtype=torch.bool),
        valid_BT=torch.ones(2, frames, dtype=torch.bool),
        key=("a", "b"),
    ).to(DEVICE)

    def losses(implementation: str) -> list[float]:
        torch.manual_seed(0)
        small = {"backbone": BackboneConfig("test_resnet"), "audio": AudioConfig("logmel_cnn")}
        tpavi = TPAVIConfig(time_aligned=True, implementation=implementation)
        model = ModelConfig(neck=NeckConfig("one_layer", 16), tpavi=tpavi, **small)
        system = build_system(Config(model=model)).to(DEVICE).train()
        optimiser = torch.optim.AdamW(system.parameters(), lr=1e-3)
        curve = []
        for step in range(steps):
            loss = sum(system.loss_terms(clip, step).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        return curve

    with_kernels, without = losses("triton"), losses("rank_t")
    assert len(set(without)) == steps
    assert with_kernels == pytest.approx(without, rel=2e-4)

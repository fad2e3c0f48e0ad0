"""TPAVI on Triton agrees with the literal formula: outputs, moments and every gradient.

In the interpreter the kernels also run in float64, where agreement means agreement of the formulas; float32 and the
half types are held against the error of the same computation by torch.
"""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor

from avs_dist.kernels import reference, runtime
from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels.reference import Running, TPAVIWeights
from avs_dist.modules.tpavi import TPAVI

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="float64 runs in the interpreter only")


class Case(NamedTuple):
    """Sizes (B, T, P, C) and variant of one call."""

    sizes: tuple[int, int, int, int]
    training: bool = True
    aligned: bool = False
    masked: bool = False
    l2: bool = False
    two_ranks: bool = False


CASES = [
    Case((2, 5, 37, 24)),  # several seconds, C no power of two
    Case((2, 5, 37, 24), aligned=True, masked=True, two_ranks=True),
    Case((2, 5, 37, 24), aligned=True, l2=True),
    Case((2, 5, 37, 24), training=False, masked=True),
    Case((1, 1, 1, 16)),  # one token
    Case((3, 1, 5, 16), masked=True),  # a clip without any frame
    Case((1, 2, 131, 8), l2=True, two_ranks=True),  # three programs a frame in the first pass
    Case((1, 2, 300, 8), aligned=True),  # two programs a frame in the passes over rows
    Case((1, 9, 3, 32), aligned=True),  # two groups of the loop over T
    Case((33, 1, 2, 8)),  # more clips than one block of the batch moments
    Case((1, 32, 1, 16), training=False, aligned=True, l2=True),  # most frames
    Case((1, 17, 2, 80), masked=True),  # T over 16, two blocks of channels
]


class Call(NamedTuple):
    x_BTPC: Tensor
    audio_BTC: Tensor
    weights: TPAVIWeights
    alignment: Tensor | None
    valid_BT: Tensor | None
    running: Running | None

    def leaves(self) -> dict[str, Tensor]:
        rest = {} if self.alignment is None else {"alignment": self.alignment}
        return {"x": self.x_BTPC, "audio": self.audio_BTC, **self.weights._asdict(), **rest}

    def to(self, dtype: torch.dtype) -> Call:
        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().to(dtype).requires_grad_()

        running = None if self.running is None else Running(*(value.to(dtype) for value in self.running))
        weights = TPAVIWeights(*map(cast, self.weights))
        return Call(cast(self.x_BTPC), cast(self.audio_BTC), weights, cast(self.alignment), self.valid_BT, running)


def make_call(case: Case, dtype: torch.dtype = torch.float64) -> Call:
    batch, frames, positions, channels = case.sizes
    inner = channels // 2

    def normal(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.7
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()

    projections = [normal(*shape) for _ in range(3) for shape in ((inner, channels), (inner,))]
    others = [normal(channels, inner), *(normal(channels) for _ in range(5))]
    x_BTPC = (normal(*case.sizes).detach() + 0.5).requires_grad_()
    alignment = normal(63) if case.aligned else None
    valid_BT = None
    if case.masked:
        valid_BT = torch.ones(batch, frames, dtype=torch.bool, device=DEVICE)
        valid_BT[0, frames // 2 :] = False
        valid_BT[-1, 0] = False
    running = None
    if not case.training:
        running = Running(normal(channels).detach(), normal(channels).detach().abs() + 0.5)
    weights = TPAVIWeights(*projections, *others)
    return Call(x_BTPC, normal(batch, frames, channels), weights, alignment, valid_BT, running)


def run(form, call: Call, case: Case) -> dict[str, Tensor]:
    """Output, moments, and the gradients of all inputs for a random output gradient."""
    # as if another rank held the same clips
    reduce = (lambda value: 2 * value) if case.two_ranks else None
    key = call.audio_BTC[:, :, None] if form is reference.tpavi else call.audio_BTC
    out, moments = form(
        call.x_BTPC, key, call.weights, call.alignment, call.valid_BT, call.running, reduce, l2_normalise=case.l2
    )
    torch.manual_seed(3)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out)
    leaves = call.leaves()
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    result = {"out": out.detach(), **{f"grad {name}": value for name, value in zip(leaves, grads, strict=True)}}
    return result | ({} if moments is None else {name: value.detach() for name, value in moments._asdict().items()})


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_literal_formula_in_float64(case, poisoned):
    call = make_call(case)
    want = run(reference.tpavi, call, case)
    got = run(rank_t.tpavi_triton, call, case)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-11, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=str)
def test_torch_form_equals_the_literal_formula_in_float64(case):
    call = make_call(case)
    want, got = (run(form, call, case) for form in (reference.tpavi, rank_t.tpavi_torch))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-11, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
def test_gradcheck():
    call = make_call(Case((1, 2, 3, 4), aligned=True))
    leaves = list(call.leaves().values())

    def out(x_BTPC: Tensor, audio_BTC: Tensor, *rest: Tensor) -> Tensor:
        weights = TPAVIWeights(*rest[:-1])
        # b_z has no influence in training mode; its gradient is exactly zero
        return rank_t.tpavi_triton(x_BTPC, audio_BTC, weights, rest[-1])[0]

    assert torch.autograd.gradcheck(out, leaves, fast_mode=True)


def check_accuracy(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    exact_form = reference.tpavi if case.sizes[2] < 1000 else rank_t.tpavi_torch  # their equality is another test
    exact = run(exact_form, call.to(torch.float64), case)
    eager = run(reference.tpavi, call, case)
    got = run(rank_t.tpavi_triton, call, case)
    for name in exact:
        if name == "num_tokens":
            assert got[name] == exact[name]
        elif name == "grad out_bias_C" and case.training:
            assert bool((got[name] == 0).all())
        elif name in ("mean_C", "var_C"):  # ours are float32
            assert_as_accurate(name, got[name].to(eager[name].dtype), exact[name], eager[name])
        else:
            assert_as_accurate(name, got[name], exact[name], eager[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case((2, 5, 37, 24), aligned=True, masked=True), Case((1, 9, 35, 64))], ids=str)
def test_as_accurate_as_torch(case, dtype, poisoned):
    check_accuracy(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((4, 5, 784, 256), aligned=True),
        Case((4, 5, 784, 128), l2=True),
        Case((2, 10, 196, 512), masked=True),
        Case((3, 5, 49, 64), training=False),
        Case((1, 32, 49, 256), aligned=True, masked=True),
        Case((1, 5, 3136, 256)),
    ],
    ids=str,
)
def test_as_accurate_as_torch_at_real_sizes(case, dtype, poisoned):
    check_accuracy(case, dtype)


def test_a_large_common_score_loses_no_digits():
    case = Case((2, 5, 37, 24))
    call = make_call(case, torch.float32)
    with torch.no_grad():
        call.weights.theta_bias_K.add_(300.0)
    exact = run(reference.tpavi, call.to(torch.float64), case)
    got = run(rank_t.tpavi_triton, call, case)
    assert (got["var_C"].double() / exact["var_C"] - 1).abs().max() < 1e-2
    assert (got["out"].double() - exact["out"]).abs().max() < 2e-2


def test_frames_that_do_not_exist_are_never_read():
    case = Case((2, 5, 37, 24), masked=True, l2=True)
    call = make_call(case, torch.float32)
    clean = run(rank_t.tpavi_triton, call, case)
    with torch.no_grad():
        call.x_BTPC[~call.valid_BT] = float("nan")
    got = run(rank_t.tpavi_triton, call, case)
    for name, value in clean.items():
        assert torch.equal(got[name], value), name
    assert got["out"][~call.valid_BT].abs().max() == 0
    assert got["grad x"][~call.valid_BT].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_repeats_bit_for_bit(dtype):
    case = Case((1, 2, 70, 24), aligned=True) if DEVICE == "cpu" else Case((4, 5, 784, 256), aligned=True)
    call = make_call(case, dtype)
    first = run(rank_t.tpavi_triton, call, case)
    for _ in range(1 if DEVICE == "cpu" else 10):
        for name, value in run(rank_t.tpavi_triton, call, case).items():
            assert torch.equal(value, first[name]), name


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


def test_module_runs_the_kernels_also_under_compile():
    block = TPAVI(16, 6, time_aligned=True, implementation="triton").to(DEVICE)
    plain = copy.deepcopy(block)
    plain._requested = "rank_t"
    assert (block.implementation, plain.implementation) == ("triton", "rank_t")
    x, audio = torch.randn(2, 5, 16, 4, 3, device=DEVICE), torch.randn(2, 5, 6, device=DEVICE)
    compiled = torch.compile(block, backend="eager" if DEVICE == "cpu" else "inductor")
    out, want = compiled(x, audio), plain(x, audio)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    for module, result in ((block, out), (plain, want)):
        result.square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(block.running_var, plain.running_var)


def test_a_whole_model_learns_the_same_with_and_without_kernels():
    pytest.importorskip("timm", reason="the whole model needs timm")
    pytest.importorskip("torchaudio", reason="the whole model needs torchaudio")
    from avs_dist.clip import Clip
    from avs_dist.config import AudioConfig, BackboneConfig, Config, ModelConfig, NeckConfig, TPAVIConfig
    from avs_dist.systems import build_system

    size, frames, steps = (32, 2, 4) if DEVICE == "cpu" else (224, 5, 10)
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

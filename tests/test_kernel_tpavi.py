"""TPAVI on Triton agrees with the literal formula: outputs, moments and every gradient.

In the interpreter the kernels also run in float64, where agreement means agreement of the formulas; float32 and the
half types are held against the error of the same computation by torch.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor
from tpavi_calls import Case, make_call, run

from avs_dist.kernels import reference
from avs_dist.kernels import tpavi as rank_t
from avs_dist.kernels.reference import Running, TPAVIWeights

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="float64 runs in the interpreter only")

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


def test_masks_and_statistics_of_any_strides():
    case = Case((2, 3, 5, 8), training=False)
    call = make_call(case, torch.float32)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool, device=DEVICE)
    wide = torch.rand(8, 2, device=DEVICE) + 0.5
    for valid_BT in (mask[:, :3], mask.T[:3].contiguous().T, mask[:1, 2:].expand(2, 3)):
        assert not valid_BT.is_contiguous()
        for running in (None, Running(wide[:, 0], wide[:, 1]), Running(wide[:1, 0].expand(8), wide[:1, 1].expand(8))):
            strided = run(rank_t.tpavi_triton, call._replace(valid_BT=valid_BT, running=running), case)
            dense = None if running is None else Running(*(value.contiguous() for value in running))
            want = run(rank_t.tpavi_torch, call._replace(valid_BT=valid_BT.contiguous(), running=dense), case)
            for name, value in want.items():
                torch.testing.assert_close(
                    strided[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("form", [rank_t.tpavi_triton, rank_t.tpavi_torch])
def test_moments_of_unequal_ranks_are_those_of_the_joint_batch(form):
    """Two ranks, the second without any frame, or with fewer."""
    call = make_call(Case((2, 3, 5, 8)), torch.float32)
    for second in ((0, 0, 0), (1, 0, 0)):
        valid_BT = torch.tensor([[1, 1, 1], second], dtype=torch.bool, device=DEVICE)
        packed: list[Tensor] = []

        def rank(index: int, reduce, valid_BT=valid_BT):
            part = slice(index, index + 1)
            rest = (call.weights, None, valid_BT[part], None, reduce)
            return form(call.x_BTPC[part], call.audio_BTC[part], *rest)

        def note(value: Tensor, packed=packed) -> Tensor:
            packed.append(value.detach())
            return value

        rank(1, note)
        out, moments = rank(0, lambda value, packed=packed: value + packed[0])
        rest = (call.weights, None, valid_BT)
        want, joint = reference.tpavi(call.x_BTPC, call.audio_BTC[:, :, None], *rest)
        assert moments.num_tokens == joint.num_tokens
        torch.testing.assert_close(moments.var_C, joint.var_C, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.mean_C, joint.mean_C, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[0], want[0], atol=1e-4, rtol=1e-3)


def test_a_batch_without_any_frame_gives_zeros_and_no_nan():
    case = Case((2, 3, 5, 8), masked=True)
    call = make_call(case, torch.float32)
    call.valid_BT.zero_()
    for name, value in run(rank_t.tpavi_triton, call, case).items():
        assert bool(value.isfinite().all()), name
        assert name in ("mean_C", "grad ln_bias_C") or value.abs().max() == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_repeats_bit_for_bit(dtype):
    case = Case((1, 2, 70, 24), aligned=True) if DEVICE == "cpu" else Case((4, 5, 784, 256), aligned=True)
    call = make_call(case, dtype)
    first = run(rank_t.tpavi_triton, call, case)
    for _ in range(1 if DEVICE == "cpu" else 10):
        for name, value in run(rank_t.tpavi_triton, call, case).items():
            assert torch.equal(value, first[name]), name

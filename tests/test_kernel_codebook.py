"""The nearest code against the literal loop of reference.py, and a whole step of a codebook."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor

from avs_dist.kernels import codebook, codebook_triton, reference
from avs_dist.kernels.codebook import (
    CodebookState,
    Observed,
    codebook_apply,
    codebook_assign,
    codebook_sums,
    codebook_update,
    initial_state,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*(invalid value|overflow|deterministic):"),  # of NaN tokens, of the interpreter
]
SHAPES = [
    (1, 1, 1),  # one of each
    (37, 29, 19),  # less than a tile
    (66, 130, 45),  # a little more than a tile
    (3, 17, 300),  # many dimensions
]
REAL = [(1600, 400, 256), (2560, 400, 256), (16384, 1024, 256), (20000, 1500, 512), (9000, 16384, 96)]


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AVS_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVS_KERNELS", "triton")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def choices(tokens: int, codes: int) -> Tensor:
    """Random codes; a fifth of the tokens has none."""
    indices_N = torch.randint(codes, (tokens,))
    return torch.where(torch.rand(tokens) < 0.2, -1, indices_N).to(DEVICE)


def distances(tokens_ND: Tensor, codes_LD: Tensor) -> Tensor:
    """Exact squared distances [N,L], in chunks of codes."""
    z_N1D = tokens_ND.double()[:, None]
    return torch.cat([(z_N1D - part.double()).square().sum(2) for part in codes_LD.split(16)], 1)


def assert_nearest(indices_N: Tensor, exact_NL: Tensor, tolerance: float = 1e-6) -> None:
    """Each index has the least distance, or one that is larger by less than the tolerance relative to it."""
    assert int(indices_N.min()) >= 0
    assert int(indices_N.max()) < exact_NL.shape[1]
    chosen_N = exact_NL.gather(1, indices_N[:, None])[:, 0]
    least_N, first_N = exact_NL.min(1)
    assert bool((chosen_N <= least_N * (1 + tolerance)).all()), f"worst {(chosen_N / least_N).max().item() - 1:.1e}"
    # not by accepting ties: nearly all are the very index
    assert (indices_N == first_N).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "codes", "dims"), SHAPES)
def test_assign_matches_loops(tokens: int, codes: int, dims: int, dtype: torch.dtype, form: str) -> None:
    tokens_ND, codes_LD = normal(tokens, dims, dtype=dtype), normal(codes, dims)
    got = codebook_assign(tokens_ND, codes_LD)
    indices, exact, _ = reference.codebook_assign(tokens_ND.cpu().double(), codes_LD.cpu().double())
    assert got.indices_N.dtype == torch.int64
    assert got.indices_N.tolist() == indices
    eager_N = (tokens_ND.float() - codes_LD[got.indices_N]).square().sum(1)
    assert_as_accurate("distances", got.distances_N, torch.tensor(exact).double(), eager_N)
    assert got.num_bad.item() == 0
    assert got.num_bad.dtype == torch.int32
    assert got.num_bad.device == tokens_ND.device


@pytest.mark.parametrize("offset", [0.0, 100.0, -3e4])
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_assign_keeps_digits(offset: float, size: float, form: str) -> None:
    """A common offset of tokens and codes, and the size of the numbers, cost no accuracy."""
    tokens_ND, codes_LD = (normal(128, 70) + offset) * size, (normal(96, 70) + offset) * size
    got = codebook_assign(tokens_ND, codes_LD)
    exact_NL = distances(tokens_ND, codes_LD)
    assert_nearest(got.indices_N, exact_NL)
    chosen_N = exact_NL.gather(1, got.indices_N[:, None])[:, 0]
    torch.testing.assert_close(got.distances_N.double(), chosen_N, rtol=1e-5, atol=0)


def test_assign_small_codes_among_large_tokens(form: str) -> None:
    """What decides, -2 z.e, is 30 orders of magnitude below |z|^2, which is the same for all codes."""
    tokens_ND, codes_LD = normal(128, 40), normal(96, 40) * 1e-30
    indices_N = codebook_assign(tokens_ND, codes_LD).indices_N
    assert torch.equal(indices_N, (tokens_ND.double() @ codes_LD.double().T).argmax(1))


@pytest.mark.parametrize("far", [16, 48, 80])  # the codes that the centre is taken from
def test_assign_is_not_misled_by_one_far_code(far: int, form: str) -> None:
    """Codes that left the others by five orders of magnitude."""
    tokens_ND, codes_LD = normal(128, 40), normal(96, 40)
    codes_LD[far] *= 1e5
    codes_LD[90] *= 1e5
    assert_nearest(codebook_assign(tokens_ND, codes_LD).indices_N, distances(tokens_ND, codes_LD))


@pytest.mark.parametrize(
    ("value", "broken"),
    [
        *itertools.product([torch.nan, torch.inf, -torch.inf], [[5], [16, 48], [16, 48, 80], [0, 1, 95]]),
        *itertools.product([1e25], [[5], [48]]),  # finite, but its square is not
    ],
)
def test_assign_never_chooses_a_broken_code(value: float, broken: list[int], form: str) -> None:
    """One component is enough; the other codes are found as if it were not there."""
    tokens_ND, codes_LD = normal(70, 20), normal(96, 20)
    codes_LD[broken, 7] = value
    left_K = torch.tensor([code for code in range(96) if code not in broken], device=DEVICE)
    got = codebook_assign(tokens_ND, codes_LD)
    assert got.num_bad.item() == 0
    assert torch.equal(got.indices_N, left_K[distances(tokens_ND, codes_LD[left_K]).argmin(1)])


def test_assign_without_a_usable_code(form: str) -> None:
    got = codebook_assign(normal(70, 20), torch.full([30, 20], torch.nan, device=DEVICE))
    assert got.num_bad.item() == 70
    assert got.indices_N.tolist() == [-1] * 70
    assert bool(got.distances_N.isnan().all())


def test_assign_under_autocast(form: str) -> None:
    tokens_ND, codes_LD = normal(128, 40), normal(96, 40)
    plain = codebook_assign(tokens_ND, codes_LD)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = codebook_assign(tokens_ND, codes_LD)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_assign_tokens_of_all_sizes(form: str) -> None:
    """Each row has its own scale: a large token does not drown its neighbours."""
    tokens_ND, codes_LD = normal(60, 32), normal(64, 32)
    tokens_ND *= torch.logspace(-6, 6, 60, device=DEVICE)[:, None]
    indices_N = codebook_assign(tokens_ND, codes_LD).indices_N
    exact_NL = distances(tokens_ND, codes_LD)
    # the distance of a large token is nearly its own square; compare what is left of it, |e|^2 - 2 z.e
    square_N = tokens_ND.double().square().sum(1)
    excess_N = exact_NL.gather(1, indices_N[:, None])[:, 0] - exact_NL.min(1).values
    assert bool((excess_N <= 1e-6 * (square_N.sqrt() + 1) * codes_LD.double().norm(dim=1).max()).all())


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("programs", [1, 256])
def test_assign_ties_go_to_the_lowest_index(programs: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal codes in the same tile, in other tiles of a program, and in other programs."""
    monkeypatch.setattr(codebook_triton, "PROGRAMS", programs)
    codes_LD = normal(7, 33)[torch.arange(200) % 7]
    tokens_ND = normal(70, 33)
    indices_N = codebook_assign(tokens_ND, codes_LD).indices_N
    assert torch.equal(indices_N, distances(tokens_ND, codes_LD[:7]).argmin(1))
    # two codes at the same distance, exactly
    codes_LD = torch.tensor([[3.0], [1.0], [-1.0], [1.0]], device=DEVICE)
    assert codebook_assign(torch.zeros(5, 1, device=DEVICE), codes_LD).indices_N.tolist() == [1] * 5


def test_assign_reports_bad_tokens(form: str) -> None:
    tokens_ND, codes_LD = normal(70, 20), normal(30, 20)
    clean = codebook_assign(tokens_ND, codes_LD)
    tokens_ND[3, 0], tokens_ND[64, 19], tokens_ND[69, 7] = torch.nan, torch.inf, -torch.inf
    bad = torch.tensor([3, 64, 69], device=DEVICE)
    got = codebook_assign(tokens_ND, codes_LD)
    assert got.num_bad.item() == 3
    assert got.indices_N[bad].tolist() == [-1] * 3
    assert bool(got.distances_N[bad].isnan().all())
    good = torch.ones(70, dtype=torch.bool, device=DEVICE)
    good[bad] = False
    assert torch.equal(got.indices_N[good], clean.indices_N[good])
    assert torch.equal(got.distances_N[good], clean.distances_N[good])


def test_assign_leaves_out_what_is_not_valid(form: str) -> None:
    tokens_ND, codes_LD = normal(70, 20), normal(30, 20)
    tokens_ND[1], tokens_ND[2] = torch.nan, torch.nan
    valid_N = torch.rand(70, device=DEVICE) < 0.5
    valid_N[1], valid_N[2] = True, False
    got = codebook_assign(tokens_ND, codes_LD, valid_N=valid_N)
    indices, exact, bad = reference.codebook_assign(tokens_ND.cpu().double(), codes_LD.cpu().double(), valid_N.cpu())
    assert got.indices_N.tolist() == indices
    torch.testing.assert_close(got.distances_N.cpu(), torch.tensor(exact), equal_nan=True)
    assert got.num_bad.item() == bad == 1


@pytest.mark.parametrize("precision", ["tf32", "half"])
def test_assign_fast_modes(precision: str, form: str) -> None:
    tokens_ND, codes_LD = normal(128, 64), normal(96, 64)
    got = codebook_assign(tokens_ND, codes_LD, precision=precision)
    exact_NL = distances(tokens_ND, codes_LD)
    chosen_N = exact_NL.gather(1, got.indices_N[:, None])[:, 0]
    assert bool((chosen_N <= exact_NL.min(1).values * 1.01).all())
    torch.testing.assert_close(got.distances_N.double(), chosen_N, rtol=1e-5, atol=0)


def test_assign_near_the_bisector(form: str) -> None:
    """Tokens a little off the middle of two codes: every digit of tokens and codes decides."""
    codes_LD = normal(48, 64)
    side_N1 = torch.tensor([[2e-6], [-2e-6]], device=DEVICE).repeat(24, 1)
    tokens_ND = (codes_LD + codes_LD.flip(0)) / 2 + side_N1 * (codes_LD - codes_LD.flip(0))
    exact_NL = distances(tokens_ND, codes_LD)
    first_N = exact_NL.argmin(1)
    assert torch.equal(codebook_assign(tokens_ND, codes_LD).indices_N, first_N)
    if form == "triton":  # and the fast mode is another computation
        assert (codebook_assign(tokens_ND, codes_LD, precision="half").indices_N != first_N).sum() > 3


def test_assign_larger_tiles(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many tokens."""
    monkeypatch.setattr(codebook_triton, "LARGE", 1)
    tokens_ND, codes_LD = normal(150, 40), normal(300, 40)
    assert_nearest(codebook_assign(tokens_ND, codes_LD).indices_N, distances(tokens_ND, codes_LD))


def test_assign_takes_any_strides(form: str) -> None:
    tokens_ND, codes_LD = normal(20, 70).T, normal(60, 40)[::2, ::2]
    got = codebook_assign(tokens_ND, codes_LD, valid_N=None)
    plain = codebook_assign(tokens_ND.contiguous(), codes_LD.contiguous())
    assert torch.equal(got.indices_N, plain.indices_N)
    torch.testing.assert_close(got.distances_N, plain.distances_N)


@pytest.mark.parametrize("valid", [[True], [False], None])
def test_assign_takes_any_strides_of_the_mask(valid: list[bool] | None, form: str) -> None:
    """Of an expanded mask memory holds one element only."""
    tokens_ND, codes_LD = normal(20, 10), normal(7, 10)
    if valid:
        valid_N = torch.tensor(valid, device=DEVICE).expand(20)
    else:
        valid_N = (torch.arange(40, device=DEVICE).view(20, 2) % 3 == 0)[:, 1]
    assert not valid_N.is_contiguous()
    got = codebook_assign(tokens_ND, codes_LD, valid_N=valid_N)
    plain = codebook_assign(tokens_ND, codes_LD)
    assert torch.equal(got.indices_N, torch.where(valid_N, plain.indices_N, -1))
    assert torch.equal(got.distances_N, torch.where(valid_N, plain.distances_N, 0.0))


def two_states(codes: int, dims: int) -> tuple[CodebookState, CodebookState]:
    """Equal, of two modalities; half of the codes is about to die."""
    state = initial_state(normal(codes, dims), 2)
    state.idle_ML[:, ::2] = 1
    return state, CodebookState(*(value.clone() for value in state))


def step(state: CodebookState, tokens_ND: Tensor, permutation_L: Tensor) -> Tensor:
    """What a training step does: assign to the codes as they are, then update them."""
    a = codebook_assign(tokens_ND, state.codes_LD)
    observed = [Observed(tokens_ND, tokens_ND.flip(0), a.indices_N), Observed(tokens_ND, None, a.indices_N)]
    codebook_update(state, observed, decay=0.9, reset_after=2, permutation_L=permutation_L)
    return a.distances_N.sum() + a.num_bad


def test_step_compiles(form: str) -> None:
    """One graph, fake tensors included; the state is updated in place."""
    tokens_ND, permutation_L = normal(40, 12), torch.randperm(21, device=DEVICE)
    state, plain = two_states(21, 12)
    expected = step(plain, tokens_ND, permutation_L)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(state, tokens_ND, permutation_L), expected)
    assert all(torch.equal(a, b) for a, b in zip(state, plain, strict=True))


def test_operators_are_registered_right(form: str) -> None:
    """Schemas, fake forms and mutation as declared."""
    tokens_ND, codes_LD = normal(20, 12), normal(21, 12)
    indices_N, state = choices(20, 21), initial_state(codes_LD, 1)
    flat, permutation_L = codebook_sums([Observed(tokens_ND, None, indices_N)], 21), torch.randperm(21, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(codebook._assign, (tokens_ND, codes_LD, None, "fp32"), test_utils=checks)
    torch.library.opcheck(codebook._sums, ([tokens_ND], [None], [indices_N], 21), test_utils=checks)
    arguments = (*state, flat, 0.9, 1e-5, 2, permutation_L, True, 0.01)
    torch.library.opcheck(codebook._apply, arguments, test_utils=checks)


def test_no_gradient_passes(form: str) -> None:
    tokens_ND, codes_LD = normal(20, 12).requires_grad_(), normal(21, 12).requires_grad_()
    got = codebook_assign(tokens_ND, codes_LD)
    assert not got.distances_N.requires_grad
    assert not codebook_sums([Observed(tokens_ND, tokens_ND, got.indices_N)], 21).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, e, s: codebook_assign(z, e[:, :3]), r"codes_LD must be \[any, 4\]"),
        (lambda z, e, s: codebook_assign(z, e.half()), "float32"),
        (lambda z, e, s: codebook_assign(z.double(), e), "tokens_ND must be"),
        (lambda z, e, s: codebook_assign(z, e[:0]), "at least one code"),
        (lambda z, e, s: codebook_assign(z, e, valid_N=torch.ones(6, device=DEVICE)), "bool"),
        (lambda z, e, s: codebook_assign(z, e, precision="bf16"), "got 'bf16'"),
        (lambda z, e, s: codebook_sums([], 5), "at least one modality"),
        (lambda z, e, s: codebook_sums([Observed(z[:, :0], None, choices(6, 5))], 5), "at least one dimension"),
        (
            lambda z, e, s: codebook_sums([Observed(z[:1].expand(1 << 27, 4), None, choices(1, 5).expand(1 << 27))], 5),
            "fewer than 134217728 tokens",
        ),
        (
            lambda z, e, s: codebook_apply(initial_state(e[:, :0], 2), torch.zeros(10, device=DEVICE), decay=0.9),
            r"at least one dimension, got \[5, 0\]",
        ),
        (lambda z, e, s: codebook_sums([Observed(z, z[:, :3], choices(6, 5))], 5), "teachers_ND"),
        (lambda z, e, s: codebook_sums([Observed(z, z.half(), choices(6, 5))], 5), "teachers_ND"),
        (lambda z, e, s: codebook_sums([Observed(z, None, choices(7, 5))], 5), "indices_N"),
        (lambda z, e, s: codebook_sums([Observed(z, None, choices(6, 5).int())], 5), "int64"),
        (lambda z, e, s: codebook_update(s, [Observed(z, None, choices(6, 5))], decay=0.9), "expected 2 modalities"),
        (lambda z, e, s: codebook_apply(s, torch.zeros(29, device=DEVICE), decay=0.9), r"flat must be \[30\]"),
        (lambda z, e, s: codebook_apply(s, torch.zeros(30, device=DEVICE), decay=1.5), r"decay in \[0, 1\]"),
        (lambda z, e, s: codebook_apply(s, torch.zeros(30, device=DEVICE), decay=1, reset_after=3), "permutation"),
        (lambda z, e, s: codebook_apply(s, torch.zeros(30, device=DEVICE), decay=1, reset_rule="one"), "'one'"),
        (
            lambda z, e, s: codebook_apply(
                s._replace(sum_LD=normal(4, 5).T), torch.zeros(30, device=DEVICE), decay=0.9
            ),
            "contiguous",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor, Tensor, CodebookState], object], message: str) -> None:
    state = initial_state(normal(5, 4), 2)
    with pytest.raises(ValueError, match=message):
        call(normal(6, 4), state.codes_LD, state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "codes", "dims"), REAL)
def test_assign_real_sizes(tokens: int, codes: int, dims: int, dtype: torch.dtype, triton_form: None) -> None:
    """Every index is that of float64, near-ties of 1e-6 aside; also around 100, where |z|^2 has lost the digits."""
    for offset in (0.0, 100.0):
        tokens_ND, codes_LD = normal(tokens, dims, dtype=dtype) + offset, normal(codes, dims) + offset
        got = codebook_assign(tokens_ND, codes_LD)
        exact_NL = torch.cdist(tokens_ND.double() - offset, codes_LD.double() - offset).square()
        assert_nearest(got.indices_N, exact_NL)
        for _ in range(10):
            again = codebook_assign(tokens_ND, codes_LD)
            assert torch.equal(again.indices_N, got.indices_N)
            assert torch.equal(again.distances_N, got.distances_N)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["torch", "triton"], indirect=True)
def test_whole_step_waits_for_nothing_and_can_be_captured(form: str) -> None:
    """No synchronisation with the host, and a replay of the CUDA graph is the step, on new tokens too."""
    torch.use_deterministic_algorithms(False)  # as users run it: torch's deterministic index_add is another one
    tokens_ND, permutation_L = normal(1600, 256), torch.randperm(400, device=DEVICE)
    state, plain = two_states(400, 256)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles the kernels, and fills what the first call fills
        step(two_states(400, 256)[0], tokens_ND, permutation_L)
    side.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step(plain, tokens_ND, permutation_L)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(state, tokens_ND, permutation_L)
    graph.replay()
    if form == "triton":  # the sums of the torch form are not repeatable on a GPU
        assert torch.equal(result, expected)
        assert all(torch.equal(a, b) for a, b in zip(state, plain, strict=True))
    tokens_ND.copy_(normal(1600, 256))
    expected = step(plain, tokens_ND, permutation_L)
    graph.replay()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(state.codes_LD, plain.codes_LD, rtol=1e-4, atol=1e-4)

"""The update of a codebook: kernels and torch form against the literal loops of reference.py."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor

from avs_dist.kernels import reference
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


def observe(
    modalities: int, tokens: int, codes: int, dims: int, teachers: bool = True, dtype: torch.dtype = torch.float32
) -> list[Observed]:
    """Random tokens of unequal numbers, some without a code."""
    observed = []
    for modality in range(modalities):
        number = max(0, tokens - 5 * modality)
        teachers_ND = normal(number, dims, dtype=dtype) if teachers else None
        observed.append(Observed(normal(number, dims, dtype=dtype), teachers_ND, choices(number, codes)))
    return observed


def choices(tokens: int, codes: int) -> Tensor:
    """Random codes; a fifth of the tokens has none."""
    indices_N = torch.randint(codes, (tokens,))
    return torch.where(torch.rand(tokens) < 0.2, -1, indices_N).to(DEVICE)


def random_state(codes: int, dims: int, modalities: int, oldest: int = 4) -> CodebookState:
    state = initial_state(normal(codes, dims), modalities)
    state.count_L.copy_(torch.rand(codes) + 0.1)
    state.sum_LD.copy_(state.codes_LD * state.count_L[:, None])
    state.idle_ML.copy_(torch.randint(oldest, (modalities, codes)))
    return state


def literal(values: CodebookState | Observed, dtype: torch.dtype = torch.float64) -> CodebookState | Observed:
    """On the CPU, floating values in this type."""
    moved = (None if v is None else v.to("cpu", dtype if v.is_floating_point() else v.dtype, copy=True) for v in values)
    return type(values)(*moved)


def copy_of(state: CodebookState) -> CodebookState:
    return CodebookState(*(value.clone() for value in state))


def assert_states_equal(a: CodebookState, b: CodebookState) -> None:
    for name, left, right in zip(a._fields, a, b, strict=True):
        assert torch.equal(left, right), name


def assert_same_state(got: CodebookState, exact: CodebookState, eager: CodebookState) -> None:
    assert torch.equal(got.idle_ML.cpu(), exact.idle_ML)
    for name in ("codes_LD", "count_L", "sum_LD"):
        assert_as_accurate(name, getattr(got, name).cpu(), getattr(exact, name), getattr(eager, name))


def test_no_tokens(form: str) -> None:
    """An empty rank assigns nothing, adds nothing, and still takes part in the update."""
    state = initial_state(normal(20, 10), 2)
    before = copy_of(state)
    nothing = codebook_assign(normal(0, 10), state.codes_LD)
    assert nothing.indices_N.shape == nothing.distances_N.shape == (0,)
    assert nothing.num_bad.item() == 0
    observed = [Observed(normal(0, 10), None, nothing.indices_N)] * 2
    assert not codebook_sums(observed, 20).any()
    codebook_update(state, observed, decay=0.5)
    torch.testing.assert_close(state.codes_LD, before.codes_LD, rtol=1e-4, atol=1e-5)
    assert bool((state.idle_ML == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teachers", [True, False])
@pytest.mark.parametrize(("modalities", "tokens", "codes", "dims"), [(1, 1, 1, 1), (2, 37, 29, 19), (3, 70, 33, 65)])
def test_sums_match_loops(
    modalities: int, tokens: int, codes: int, dims: int, teachers: bool, dtype: torch.dtype, form: str
) -> None:
    observed = observe(modalities, tokens, codes, dims, teachers, dtype)
    flat = codebook_sums(observed, codes)
    counts_ML, exact_LD = literal_sums(observed, codes)
    assert flat.dtype == torch.float32
    assert torch.equal(flat[: modalities * codes].view(modalities, codes).cpu().double(), counts_ML)
    _, eager_LD = literal_sums(observed, codes, torch.float32)
    assert_as_accurate("sums", flat[modalities * codes :].view(codes, dims).cpu(), exact_LD, eager_LD)


def literal_sums(observed: list[Observed], codes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Counts and sums by the literal update: from nothing, with decay 0, the averages are those of the batch."""
    dims = observed[0].tokens_ND.shape[1]
    zero = torch.zeros(codes, dims, dtype=dtype)
    state = CodebookState(zero, zero[:, 0], zero, torch.zeros(len(observed), codes, dtype=torch.int64))
    counts = []
    for one in observed:
        alone = reference.codebook_update(
            state._replace(idle_ML=state.idle_ML[:1]), [literal(one, dtype)], 0.0, 0.0, None, None, "all", 0.0
        )
        counts.append(alone.count_L)
    both = reference.codebook_update(state, [literal(one, dtype) for one in observed], 0.0, 0.0, None, None, "all", 0.0)
    return torch.stack(counts), both.sum_LD


@pytest.mark.parametrize("favourite", [0, 16, 40])
def test_sums_of_skewed_codes(favourite: int, form: str) -> None:
    """All tokens on one code: many blocks and all splits of one list; the other lists are empty."""
    tokens_ND = normal(700, 20) + 5.0
    indices_N = torch.full([700], favourite, device=DEVICE)
    flat = codebook_sums([Observed(tokens_ND, None, indices_N)], 41)
    expected_LD = torch.zeros(41, 20, dtype=torch.float64)
    expected_LD[favourite] = tokens_ND.double().sum(0).cpu()
    torch.testing.assert_close(flat[41:].view(41, 20).cpu().double(), expected_LD, rtol=2e-6, atol=0)
    assert flat[:41].tolist() == [700.0 if code == favourite else 0.0 for code in range(41)]


def test_sums_leave_out_what_has_no_code_or_teacher(form: str) -> None:
    """NaN in a token without a code is not read into any sum; a NaN teacher component falls back on the token."""
    tokens_ND, teachers_ND = normal(40, 8), normal(40, 8)
    tokens_ND[3], teachers_ND[5, 2], teachers_ND[6, 0] = torch.nan, torch.nan, torch.inf
    indices_N = torch.arange(40, device=DEVICE) % 10
    indices_N[3], indices_N[7], indices_N[8] = -1, 10, 1 << 40
    got_LD = codebook_sums([Observed(tokens_ND, teachers_ND, indices_N)], 10)[10:].view(10, 8)
    teachers_ND[5, 2], teachers_ND[6, 0] = tokens_ND[5, 2], tokens_ND[6, 0]
    value_ND = 0.5 * tokens_ND + 0.5 * teachers_ND
    value_ND[[3, 7, 8]] = 0.0
    torch.testing.assert_close(got_LD, value_ND.view(4, 10, 8).sum(0))


def test_sums_of_ranks_add_up(form: str) -> None:
    """The buffers of two ranks, added, are that of the whole batch."""
    whole = observe(2, 60, 21, 12)
    parts = [[Observed(*(v[rank::2] for v in one)) for one in whole] for rank in range(2)]
    summed = codebook_sums(parts[0], 21) + codebook_sums(parts[1], 21)
    flat = codebook_sums(whole, 21)
    assert torch.equal(summed[:42], flat[:42])
    torch.testing.assert_close(summed, flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize(
    ("modalities", "codes", "dims", "idle"),
    [(1, 1, 1, torch.int32), (2, 37, 21, torch.int64), (3, 18, 70, torch.int32)],
)
def test_updates_match_loops(modalities: int, codes: int, dims: int, idle: torch.dtype, rule: str, form: str) -> None:
    """Several steps, with codes that die, come back and die again."""
    state = random_state(codes, dims, modalities)
    state = state._replace(idle_ML=state.idle_ML.to(idle))
    exact, eager = literal(state), literal(state, torch.float32)
    resets = 0
    for _ in range(4):
        observed = observe(modalities, max(1, codes // 2), codes, dims)
        permutation_L = torch.randperm(codes, device=DEVICE)
        settings = {"decay": 0.9, "smoothing_eps": 1e-3, "reset_after": 3, "reset_rule": rule}
        codebook_update(state, observed, **settings, permutation_L=permutation_L, noise=0.01)
        settings |= {"permutation_L": permutation_L.cpu(), "noise": 0.01}
        exact = reference.codebook_update(exact, [literal(one) for one in observed], **settings)
        eager = reference.codebook_update(eager, [literal(one, torch.float32) for one in observed], **settings)
        assert_same_state(state, exact, eager)
        resets += int((exact.count_L == 1).sum())
    assert resets > 0 or codes == 1


def small_state(idle: list[list[int]]) -> CodebookState:
    """Codes 0, 10, 20, ... of one dimension with these idle counters."""
    codes_L1 = 10.0 * torch.arange(len(idle[0]), device=DEVICE)[:, None]
    state = initial_state(codes_L1, len(idle))
    state.idle_ML.copy_(torch.tensor(idle))
    return state


def apply_counts(state: CodebookState, counts: list[list[float]], **settings: object) -> None:
    """One update with these tokens, which all lie on their codes."""
    counts_ML = torch.tensor(counts, device=DEVICE)
    flat = torch.cat([counts_ML.flatten(), (counts_ML.sum(0)[:, None] * state.codes_LD).flatten()])
    codebook_apply(state, flat, decay=0.5, smoothing_eps=0.0, **settings)


def test_reset_in_numbers(form: str) -> None:
    """Codes 1, 3 and 4 die; they take the live codes 2 and 0 in the order of the permutation, and go round."""
    state = small_state([[0, 5, 0, 5, 5], [0, 5, 0, 0, 5]])
    permutation_L = torch.tensor([4, 2, 1, 0, 3], device=DEVICE)
    counts = [[1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0]]
    apply_counts(state, counts, reset_after=6, permutation_L=permutation_L, noise=0.0)
    assert state.codes_LD[:, 0].tolist() == pytest.approx([0.0, 20.0, 20.0, 0.0, 20.0], abs=1e-4)
    assert state.count_L.tolist() == pytest.approx([1.5, 1.0, 1.5, 1.0, 1.0])
    assert state.sum_LD[:, 0].tolist() == pytest.approx([0.0, 20.0, 30.0, 0.0, 20.0], abs=1e-4)
    assert not state.idle_ML.any()


@pytest.mark.parametrize("outside", [-1, 5, 1 << 40])
def test_reset_passes_over_what_is_outside(outside: int, form: str) -> None:
    """Code 2 lives but is not in the permutation: it is averaged as ever, and code 0 is the donor of all."""
    state = small_state([[0, 5, 0, 5, 5], [0, 5, 0, 0, 5]])
    permutation_L = torch.tensor([4, outside, 1, 0, 3], device=DEVICE)
    counts = [[1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0]]
    apply_counts(state, counts, reset_after=6, permutation_L=permutation_L, noise=0.0)
    assert state.codes_LD[:, 0].tolist() == pytest.approx([0.0, 0.0, 20.0, 0.0, 0.0], abs=1e-4)
    assert state.count_L.tolist() == pytest.approx([1.5, 1.0, 1.5, 1.0, 1.0])
    assert state.sum_LD[:, 0].tolist() == pytest.approx([0.0, 0.0, 30.0, 0.0, 0.0], abs=1e-4)
    assert not state.idle_ML.any()


def test_reset_with_nothing_but_what_is_outside(form: str) -> None:
    state = small_state([[0, 9, 9]])
    apply_counts(state, [[1.0, 0.0, 0.0]], reset_after=2, permutation_L=torch.tensor([3, 1, -1], device=DEVICE))
    assert state.codes_LD[:, 0].tolist() == pytest.approx([0.0, 10.0, 20.0])
    assert state.idle_ML.tolist() == [[0, 10, 10]]


def test_apply_takes_any_strides(form: str) -> None:
    """Of the buffer, which is whatever the caller's reduction returns, and of the permutation."""
    observed, permutation_L = observe(2, 40, 21, 12), torch.randperm(21, device=DEVICE)
    flat = codebook_sums(observed, 21)
    start = random_state(21, 12, 2)
    expected = copy_of(start)
    codebook_apply(expected, flat, decay=0.9, reset_after=2, permutation_L=permutation_L)
    for strided, mixed_L in (
        (torch.stack([flat, flat * 0], 1)[:, 0], permutation_L),
        (flat, torch.stack([permutation_L, permutation_L * 0], 1)[:, 0]),
    ):
        state = copy_of(start)
        codebook_apply(state, strided, decay=0.9, reset_after=2, permutation_L=mixed_L)
        assert_states_equal(state, expected)
    states = [copy_of(start), copy_of(start)]
    ones = torch.ones(1, device=DEVICE).expand(len(flat))
    for state, same in zip(states, (ones, ones.contiguous()), strict=True):
        codebook_apply(state, same, decay=0.9)
    assert_states_equal(*states)


def test_rules_differ(form: str) -> None:
    """A code that one modality of two uses lives by "any" and dies by "all"; one batch less and it lives by both."""
    counts = [[1.0, 1.0], [0.0, 1.0]]
    for rule, reset_after, place in (("all", 4, 10.0), ("any", 4, 0.0), ("all", 5, 0.0)):
        state = small_state([[3, 3], [3, 3]])
        permutation_L = torch.tensor([0, 1], device=DEVICE)
        apply_counts(state, counts, reset_after=reset_after, permutation_L=permutation_L, reset_rule=rule, noise=0.0)
        assert state.codes_LD[:, 0].tolist() == pytest.approx([place, 10.0]), (rule, reset_after)


def test_without_live_codes_nothing_is_reset(form: str) -> None:
    state = small_state([[9, 9, 9]])
    apply_counts(state, [[0.0, 0.0, 0.0]], reset_after=2, permutation_L=torch.tensor([2, 0, 1], device=DEVICE))
    assert state.codes_LD[:, 0].tolist() == pytest.approx([0.0, 10.0, 20.0])
    assert state.idle_ML.tolist() == [[10, 10, 10]]
    assert state.count_L.tolist() == pytest.approx([0.5] * 3)


def test_reset_survives_updates_and_clones_differ(form: str) -> None:
    """Clones stay where they are put while nobody chooses them, and no two codes are equal."""
    codes, dims = 40, 16
    state = random_state(codes, dims, 2, oldest=1)
    state.idle_ML[:, 10:] = 50
    indices_N = torch.arange(60, device=DEVICE) % 10
    observed = [Observed(state.codes_LD[indices_N], None, indices_N)] * 2
    permutation_L = torch.randperm(codes, device=DEVICE)
    codebook_update(state, observed, decay=0.99, reset_after=50, permutation_L=permutation_L)
    placed = copy_of(state)
    gap_LL = torch.cdist(placed.codes_LD[10:], placed.codes_LD[:10])
    assert bool((gap_LL.min(1).values < dims**0.5 / 1024 + 1e-6).all())  # each has a donor
    assert bool((torch.pdist(placed.codes_LD) > 1e-5).all())
    for _ in range(3):
        codebook_update(state, observed, decay=0.99, reset_after=50, permutation_L=permutation_L)
    torch.testing.assert_close(state.codes_LD[10:], placed.codes_LD[10:], rtol=1e-4, atol=1e-4)
    assert bool((state.idle_ML[:, 10:] == 3).all())


def test_state_without_counts_stays_finite(form: str) -> None:
    """Nothing ever seen: no division by zero."""
    state = initial_state(normal(20, 10), 1)
    state.count_L.zero_()
    before = state.codes_LD.clone()
    codebook_update(state, [Observed(normal(0, 10), None, choices(0, 20))], decay=0.9, smoothing_eps=0.0)
    assert torch.equal(state.codes_LD, before)


def test_clone_noise_is_uniform() -> None:
    noise = reference.clone_noise(torch.arange(400), 256)
    assert noise.abs().max() < 1
    assert noise.mean().abs() < 0.01
    assert (noise.square().mean() - 1 / 3).abs() < 0.01
    assert len(noise.unique()) > 0.98 * noise.numel()


def test_update_reduces_between_the_halves(form: str) -> None:
    """Two ranks whose buffers are added hold bit for bit the state that one gets from that buffer."""
    observed = observe(2, 40, 21, 12)
    ranks = [[Observed(*(v[rank::2] for v in one)) for one in observed] for rank in range(2)]
    summed = codebook_sums(ranks[0], 21) + codebook_sums(ranks[1], 21)
    states = [random_state(21, 12, 2)]
    states.append(copy_of(states[0]))
    permutation_L = torch.randperm(21, device=DEVICE)
    for state, mine in zip(states, ranks, strict=True):
        given: list[Tensor] = []
        codebook_update(
            state,
            mine,
            decay=0.9,
            reset_after=2,
            permutation_L=permutation_L,
            reduce=lambda flat, given=given: given.append(flat) or summed,
        )
        assert torch.equal(given[0], codebook_sums(mine, 21))
    assert_states_equal(*states)


def test_update_repeats(triton_form: None) -> None:
    tokens_ND, codes_LD = normal(70, 33), normal(80, 33)
    start, observed = random_state(40, 33, 2), observe(2, 100, 40, 33)
    permutation_L = torch.randperm(40, device=DEVICE)
    first = None
    for _ in range(2):
        state = copy_of(start)
        codebook_update(state, observed, decay=0.9, reset_after=2, permutation_L=permutation_L)
        result = (*codebook_assign(tokens_ND, codes_LD), *state)
        first = first or result
        for a, b in zip(first, result, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "codes", "dims"), REAL)
def test_update_real_sizes(
    tokens: int, codes: int, dims: int, dtype: torch.dtype, skewed: bool, triton_form: None
) -> None:
    observed = observe(2, tokens, codes, dims, True, dtype)
    if skewed:
        observed = [o._replace(indices_N=o.indices_N.clamp_max(0)) for o in observed]
    exact_LD = torch.zeros(codes, dims, dtype=torch.float64, device=DEVICE)
    eager_LD = torch.zeros(codes, dims, device=DEVICE)
    for tokens_ND, teachers_ND, indices_N in observed:
        kept_N = indices_N >= 0
        exact_ND = (tokens_ND.double() + teachers_ND.double()) / 2
        exact_LD.index_add_(0, indices_N[kept_N], exact_ND[kept_N])
        eager_LD.index_add_(0, indices_N[kept_N], (0.5 * tokens_ND.float() + 0.5 * teachers_ND.float())[kept_N])
    flat = codebook_sums(observed, codes)
    assert_as_accurate("sums", flat[2 * codes :].view(codes, dims), exact_LD, eager_LD)
    counts_ML = torch.stack([o.indices_N[o.indices_N >= 0].bincount(minlength=codes) for o in observed])
    assert torch.equal(flat[: 2 * codes].view(2, codes), counts_ML.float())
    start, permutation_L = random_state(codes, dims, 2), torch.randperm(codes, device=DEVICE)
    results = []
    for _ in range(10):
        state = copy_of(start)
        codebook_update(state, observed, decay=0.99, reset_after=2, permutation_L=permutation_L)
        results.append(state)
        assert_states_equal(state, results[0])
    assert torch.equal(codebook_sums(observed, codes), flat)


@pytest.mark.gpu
def test_forms_agree_at_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    observed, permutation_L = observe(2, 2560, 400, 256), torch.randperm(400, device=DEVICE)
    start = random_state(400, 256, 2)
    states = []
    for form in ("torch", "triton"):
        monkeypatch.setenv("AVS_KERNELS", form)
        states.append(copy_of(start))
        codebook_update(states[-1], observed, decay=0.99, reset_after=2, permutation_L=permutation_L)
    assert torch.equal(states[0].idle_ML, states[1].idle_ML)
    for name in ("codes_LD", "count_L", "sum_LD"):
        torch.testing.assert_close(getattr(states[0], name), getattr(states[1], name), rtol=1e-5, atol=1e-5)

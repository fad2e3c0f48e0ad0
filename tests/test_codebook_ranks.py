"""The shared codebook over ranks, over an interruption, and on a GPU: the same codes everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from codebook_loops import NAMES, D, T, assert_same, copy_of, make, masks, tokens
from torch import Tensor

from avs_dist.modules.codebook import MultiModalCodebook
from avs_dist.modules.codebook_average import reset_order


def in_ranks(make_rank: Callable[..., MultiModalCodebook], batches: list[list[dict]]) -> list[MultiModalCodebook]:
    """Two ranks as threads whose reduction waits for the other; batches: of each rank."""
    barrier, given = threading.Barrier(2, timeout=20), [torch.empty(0)] * 2
    calls = [0, 0]

    def reduction(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(flat: Tensor) -> Tensor:
            given[rank] = flat
            calls[rank] += 1
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        return reduce

    modules = [make_rank(reduce=reduction(rank)) for rank in range(2)]

    def work(rank: int) -> None:
        for z in batches[rank]:
            modules[rank](z)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [len(batches[0])] * 2
    return modules


@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize("teacher", ["time_aligned", "cross_attention"])
def test_two_ranks_are_one_process(teacher: str, update: str) -> None:
    """Ranks agree to the last bit; with one process too where float32 sums are exact, else to rounding."""

    def make_rank(reduce: Callable[[Tensor], Tensor] | None = None) -> MultiModalCodebook:
        # with decay 0.5 the weights of a sequential step are thirds, which do not add exactly
        return make(update=update, teacher=teacher, decay=0.5, reset_after=2, reduce=reduce)

    whole = [{name: (8 * torch.randn(4, T, D)).round() / 8 for name in NAMES[:2]} for _ in range(4)]
    batches = [[{name: value[rank::2] for name, value in z.items()} for z in whole] for rank in range(2)]
    first, second = in_ranks(make_rank, batches)
    alone = make_rank()
    for z in whole:
        alone(z)
    assert_same(first, second)
    if teacher == "time_aligned" and update == "joint":
        assert_same(first, alone)
    for got, want in zip(first.state, alone.state, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_run_continues_from_its_state() -> None:
    """Bit for bit, resets included: the order of the clones goes on where it was."""
    batches = [tokens() for _ in range(6)]
    whole, first, second = (make(reset_after=2) for _ in range(3))
    for z in batches:
        whole(z)
    for z in batches[:3]:
        first(z)
    second.load_state_dict(copy_of(first))
    for z in batches[3:]:
        second(z)
    assert_same(whole, second)
    assert whole.idle.min() == 0


def test_order_of_clones_is_a_permutation_of_seed_and_update() -> None:
    def order(seed: int, updates: int) -> list[int]:
        return reset_order(400, seed, torch.tensor(updates)).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(0, 2**31), order(-1, 5)]
    assert all(sorted(one) == list(range(400)) for one in orders)
    for one in range(len(orders)):
        for other in range(one):
            # no order is another one, moved on: 1 is expected of each difference
            steps = [(a - b) % 400 for a, b in zip(orders[one], orders[other], strict=True)]
            assert max(steps.count(step) for step in range(400)) < 12
    assert order(0, 1) == orders[1]

    def mixed(value: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
            value = (value ^ value >> shift) * factor % 2**32
        return value ^ value >> 16

    key = mixed(9 + mixed(5))
    assert order(5, 9) == sorted(range(400), key=lambda code: mixed((code + key) % 2**32))
    places = torch.tensor([order(7, updates).index(3) for updates in range(200)]).double()
    assert abs(places.mean() - 199.5) < 30  # uniform: standard deviation 8


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_a_step_on_a_gpu_does_not_wait_and_is_that_of_a_cpu(update: str) -> None:
    host, module = make(3, update=update, reset_after=2), make(3, update=update, reset_after=2).cuda()
    for _ in range(3):
        z, valid = tokens(3), masks(3)
        there = [{name: value.detach().cuda() for name, value in given.items()} for given in (z, valid)]
        there[0] = {name: value.requires_grad_() for name, value in there[0].items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = module(*there)
            output.commitment_loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want = host(z, valid)
        want.commitment_loss.backward()
        for name in z:
            assert torch.equal(output.indices[name].cpu(), want.indices[name])
            torch.testing.assert_close(there[0][name].grad.cpu(), z[name].grad)
    for got, expected in zip(module.state, host.state, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)

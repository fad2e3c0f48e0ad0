"""The order of clips: a permutation, the same for any world and any loading processes, equal steps, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avs_dist.shards.plan import (
    MIXTURE_BLOCK,
    PADDING,
    StepPlan,
    StreamState,
    TrainSequence,
    epoch_order,
    eval_batches,
    fingerprint,
    micro_batch_size,
    substitutes,
    swapped,
)

counts = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda c: sum(c) > 0)
mixtures = st.lists(st.tuples(counts, st.floats(0.1, 10)), min_size=1, max_size=3)
worlds = st.integers(1, 8)
workers_of = st.integers(0, 4)
quick = settings(max_examples=60, deadline=None)


@quick
@given(counts, st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 100))
def test_an_epoch_is_a_permutation_and_repeatable(shards, seed, epoch, window):
    order = epoch_order(shards, seed, epoch, window)
    assert sorted(order) == list(range(sum(shards)))
    assert (order == epoch_order(shards, seed, epoch, window)).all()


def test_seed_epoch_and_set_change_the_order():
    orders = {tuple(epoch_order([50, 50], *numbers[:2], 100, numbers[2])) for numbers in np.ndindex(2, 2, 2)}
    assert len(orders) == 8


def test_shards_are_shuffled_even_with_a_window_of_one_clip():
    order = epoch_order([10] * 20, seed=0, epoch=0, window=1)
    shards = [int(clip) // 10 for clip in order[::10]]
    assert shards != sorted(shards)
    assert all((order[b : b + 10] == order[b] + range(10)).all() for b in range(0, 200, 10))


@quick
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 60), st.integers(0, 99))
def test_a_window_mixes_consecutive_shards_only(shards, size, window, seed):
    """Windows cut the sequence of (shuffled) shards, so a window touches few of them: reading stays local."""
    order = epoch_order([size] * shards, seed, 0, window)
    for begin in range(0, len(order), window):
        touched = {clip // size for clip in order[begin : begin + window]}
        assert len(touched) <= (window - 1) // size + 2


def interleaved(plan: StepPlan, workers: int) -> list[range]:
    """Micro-batches as a DataLoader takes them from its loading processes: from each in turn."""
    if workers == 0:
        return list(plan.micro_batches())
    streams = [plan.micro_batches(w, workers) for w in range(workers)]
    taken = [next(streams[number % workers]) for number in range(len(plan))]
    assert all(next(stream, None) is None for stream in streams)
    return taken


def global_steps(plan: StepPlan, workers: int = 0) -> list[list[int]]:
    """Positions of every step, in order, put together from all ranks, whose micro-batches are equal and disjoint."""
    ranks = [interleaved(replace(plan, rank=rank), workers) for rank in range(plan.world_size)]
    assert {len(batches) for batches in ranks} == {len(plan)} == {plan.num_steps * plan.accumulation}
    assert {len(batch) for batches in ranks for batch in batches} == {plan.size}
    steps = []
    for step in range(plan.num_steps):
        micro = range(step * plan.accumulation, (step + 1) * plan.accumulation)
        steps.append([position for a in micro for batches in ranks for position in batches[a]])
    assert len({p for step in steps for p in step}) == plan.num_steps * plan.global_batch
    return steps


@quick
@given(worlds, workers_of, st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000), st.integers(1, 6))
def test_ranks_workers_and_accumulation_do_not_change_the_steps(world, workers, accumulation, size, start, steps):
    global_batch = world * accumulation * size
    plan = StepPlan(start, steps, global_batch, accumulation, 0, world)
    alone = StepPlan(start, steps, global_batch, 1, 0, 1)
    assert global_steps(plan, workers) == global_steps(alone)
    assert sum(global_steps(alone), []) == list(range(start, start + steps * global_batch))


@quick
@given(counts, st.integers(0, 99), st.integers(1, 40), worlds, workers_of, st.integers(1, 3), st.integers(1, 3))
def test_every_clip_exactly_once_in_each_epoch(shards, seed, window, world, workers, accumulation, size):
    """Over all ranks and loading processes, also where the number of clips is odd and a batch crosses two epochs."""
    clips, global_batch = sum(shards), world * accumulation * size
    plan = StepPlan(0, -(-2 * clips // global_batch), global_batch, accumulation, 0, world)
    sequence = TrainSequence([shards], seed, window)
    seen = [sequence[position] for step in global_steps(plan, workers) for position in step]
    assert sorted(seen[:clips]) == sorted(seen[clips : 2 * clips]) == list(range(clips))
    assert len(seen) - 2 * clips < global_batch


@quick
@given(mixtures, st.integers(0, 99), st.integers(1, 40), st.integers(0, 3000), st.integers(0, 60))
def test_resuming_continues_the_sequence(parts, seed, window, start, more):
    """From a position alone, without going through what came before."""
    sets, weights = [p[0] for p in parts], [p[1] for p in parts]
    whole = TrainSequence(sets, seed, window, weights)
    walked = [whole[position] for position in range(start + more)]
    resumed = TrainSequence(sets, seed, window, weights)
    assert [resumed[position] for position in range(start, start + more)] == walked[start:]


def test_elastic_resume_over_4_2_and_3_ranks_goes_through_the_same_clips():
    """Global batch 12, 2 loading processes; then the same with another global batch behind the resume."""
    sequence = TrainSequence([[13, 8, 24]], 5, 16)
    straight = [sequence[position] for position in range(20 * 12)]
    state, seen = StreamState(0, 5, 16, "x"), []
    for world, accumulation, steps, global_batch in ((4, 1, 7, 12), (2, 3, 5, 12), (3, 2, 4, 12), (2, 1, 8, 6)):
        plan = StepPlan(state.position, steps, global_batch, accumulation, 0, world)
        seen += [sequence[position] for step in global_steps(plan, workers=2) for position in step]
        state = StreamState.from_dict(json.loads(json.dumps(state.advanced(steps * global_batch).to_dict())))
    assert seen == straight
    assert len(json.dumps(state.to_dict())) < 200


@quick
@given(mixtures, st.integers(0, 99), st.integers(1, 40), st.integers(0, 5))
def test_a_mixture_keeps_shares_and_epochs(parts, seed, window, block):
    sets, weights = [p[0] for p in parts], [p[1] for p in parts]
    sequence = TrainSequence(sets, seed, window, weights)
    firsts = np.cumsum([0, *(sum(c) for c in sets)])
    drawn = [sequence[p] for p in range(MIXTURE_BLOCK * (block + 1))]
    owners = np.searchsorted(firsts, drawn, side="right") - 1
    shares = np.bincount(owners, minlength=len(sets)) / len(drawn)
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= 1 / MIXTURE_BLOCK
    last_block = np.bincount(owners[-MIXTURE_BLOCK:], minlength=len(sets))
    assert (last_block * (block + 1) == shares * len(drawn)).all()
    for number, shards in enumerate(sets):
        own = [clip - firsts[number] for clip, owner in zip(drawn, owners, strict=True) if owner == number]
        size = sum(shards)
        for begin in range(0, len(own) - size + 1, size):
            assert sorted(own[begin : begin + size]) == list(range(size))


def test_a_mixture_is_shuffled_anew_in_each_block_and_each_set_has_its_own_order():
    sequence = TrainSequence([[50], [50]], 0, 50, (1, 1))
    blocks = [[sequence[p] >= 50 for p in range(b * MIXTURE_BLOCK, (b + 1) * MIXTURE_BLOCK)] for b in range(2)]
    assert blocks[0] != blocks[1]
    assert max(len(list(run)) for run in np.split(blocks[0], np.flatnonzero(np.diff(blocks[0])) + 1)) < 30
    drawn = [sequence[p] for p in range(MIXTURE_BLOCK)]
    first, second = [c for c in drawn if c < 50][:50], [c - 50 for c in drawn if c >= 50][:50]
    assert first != second


def test_one_set_alone_is_not_changed_by_its_weight():
    alone, weighted = TrainSequence([[7, 5]], 1, 4), TrainSequence([[7, 5]], 1, 4, (3.0,))
    assert [alone[p] for p in range(40)] == [weighted[p] for p in range(40)]
    order = [int(clip) for epoch in range(3) for clip in epoch_order([7, 5], 1, epoch, 4)]
    assert [alone[p] for p in range(36)] == order


def test_state_of_other_data_is_another():
    keys = [["a", "b"], ["c"]]
    same = fingerprint([keys], (1.0,))
    others = [
        fingerprint([[["a"], ["b", "c"]]], (1.0,)),  # other shards, another order
        fingerprint([[["b", "a"], ["c"]]], (1.0,)),
        fingerprint([keys, keys], (1.0, 1.0)),
        fingerprint([keys, keys], (1.0, 2.0)),
    ]
    assert fingerprint([keys], (5.0,)) == same
    assert len({same, *others}) == 5
    for values in ({"position": -1}, {"position": True}, {"position": "3"}, {"more": 1}):
        with pytest.raises(ValueError, match="stream"):
            StreamState.from_dict({**StreamState(3, 0, 1, "x").to_dict(), **values})


@quick
@given(st.integers(1, 300), st.integers(0, 10**6))
def test_substitutes_are_all_others_once_and_far_away(clips, number):
    clip = number % clips
    found = list(substitutes(clip, clips))
    assert sorted([*found, clip]) == list(range(clips))
    if clips >= 8:
        distance = min((found[0] - clip) % clips, (clip - found[0]) % clips)
        assert distance >= clips / 8
        assert gcd(distance, clips) == 1


def test_substitutes_of_a_cut_shard_leave_it_at_once():
    """Clips 100..199 of 1000 are gone: no substitute of them but a few lies among them."""
    first = Counter(next(iter(substitutes(clip, 1000))) in range(100, 200) for clip in range(100, 200))
    assert first[False] == 100
    assert len(set(islice(substitutes(3, 1000), 50))) == 50


@quick
@given(st.integers(1, 70), st.integers(1, 9), worlds, workers_of)
def test_evaluation_covers_each_clip_once_with_equal_batches(clips, batch, world, workers):
    ranks = [eval_batches(clips, batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(b) for batches in ranks for b in batches} == {batch}
    seen = [clip for batches in ranks for b in batches for clip in b if clip != PADDING]
    assert sorted(seen) == list(range(clips))
    for rank in range(world):
        shares = [eval_batches(clips, batch, rank, world, w, workers) for w in range(workers)]
        taken = [shares[i % workers][i // workers] for i in range(len(ranks[rank]))] if workers else ranks[rank]
        assert taken == ranks[rank]


@quick
@given(st.integers(2, 100))
def test_swapping_is_a_derangement(clips):
    partners = [swapped(clip, clips) for clip in range(clips)]
    assert sorted(partners) == list(range(clips))
    assert all(partner != clip for clip, partner in enumerate(partners))


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="global batch 10 cannot be divided by 2 accumulation steps x 3 ranks.*of 6"):
        micro_batch_size(10, 2, 3)
    with pytest.raises(ValueError, match="global batch 10 cannot be divided"):
        StepPlan(0, 1, 10, 2, 0, 3)
    with pytest.raises(ValueError, match="at least two clips"):
        swapped(0, 1)
    with pytest.raises(ValueError, match="all shards are empty"):
        epoch_order([0, 0], 0, 0, 10)
    with pytest.raises(ValueError, match="all shards are empty"):
        TrainSequence([[1], [0]], 0, 1, (1, 1))
    with pytest.raises(ValueError, match="rank 3"):
        eval_batches(4, 2, 3, 3)
    with pytest.raises(ValueError, match="rank 3"):
        StepPlan(0, 1, 3, 1, 3, 3)
    for weights in ((1,), (1, 0), (1, -1), (1, float("nan")), (1, 1e-6)):
        with pytest.raises(ValueError, match=r"mixture of 2 sets|never be drawn"):
            TrainSequence([[1], [1]], 0, 1, weights)

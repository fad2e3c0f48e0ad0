"""The order of clips: a permutation, the same for any world, equal steps for all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avs_dist.shards.plan import (
    PADDING,
    TrainSequence,
    epoch_order,
    eval_batches,
    micro_batch_size,
    micro_batches,
    swapped,
)

counts = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda c: sum(c) > 0)
quick = settings(max_examples=60, deadline=None)


@quick
@given(counts, st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 100))
def test_an_epoch_is_a_permutation_and_repeatable(shards, seed, epoch, window):
    order = epoch_order(shards, seed, epoch, window)
    assert sorted(order) == list(range(sum(shards)))
    assert (order == epoch_order(shards, seed, epoch, window)).all()


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order([50, 50], seed, epoch, 100)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


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


def global_steps(shards, seed, window, world, accumulation, global_batch, start, steps):
    """Clips of every step, in order, put together from all ranks."""
    sequence = TrainSequence(shards, seed, window)
    plans = [list(micro_batches(start, steps, global_batch, accumulation, r, world)) for r in range(world)]
    assert {len(plan) for plan in plans} == {steps * accumulation}
    merged = []
    for step in range(steps):
        clips = []
        for a in range(accumulation):
            for plan in plans:
                clips += [sequence[p] for p in plan[step * accumulation + a]]
        merged.append(clips)
    return merged


@quick
@given(counts, st.integers(0, 99), st.integers(1, 40), st.integers(0, 20))
def test_world_size_and_accumulation_do_not_change_the_clips(shards, seed, window, start):
    reference = global_steps(shards, seed, window, 1, 1, 12, start, 4)
    for world, accumulation in ((2, 1), (3, 1), (1, 3), (2, 3), (4, 1), (3, 4)):
        assert global_steps(shards, seed, window, world, accumulation, 12, start, 4) == reference


@quick
@given(counts, st.integers(1, 12), st.integers(0, 15))
def test_resuming_at_a_step_continues_the_sequence(shards, batch, start):
    whole = global_steps(shards, 0, 16, 1, 1, batch, 0, start + 3)
    assert global_steps(shards, 0, 16, 1, 1, batch, start, 3) == whole[start:]


def test_each_epoch_of_the_sequence_visits_every_clip_once():
    sequence = TrainSequence([3, 4], seed=1, window=7)
    for epoch in range(3):
        assert sorted(sequence[p] for p in range(7 * epoch, 7 * epoch + 7)) == list(range(7))


@quick
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 7))
def test_evaluation_covers_each_clip_once_with_equal_batches(clips, batch, world):
    ranks = [eval_batches(clips, batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(b) for batches in ranks for b in batches} == {batch}
    seen = [clip for batches in ranks for b in batches for clip in b if clip != PADDING]
    assert sorted(seen) == list(range(clips))


@quick
@given(st.integers(2, 100))
def test_swapping_is_a_derangement(clips):
    partners = [swapped(clip, clips) for clip in range(clips)]
    assert sorted(partners) == list(range(clips))
    assert all(partner != clip for clip, partner in enumerate(partners))


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="global batch 10 cannot be divided by 2 accumulation steps x 3 ranks.*of 6"):
        micro_batch_size(10, 2, 3)
    with pytest.raises(ValueError, match="at least two clips"):
        swapped(0, 1)
    with pytest.raises(ValueError, match="all shards are empty"):
        epoch_order([0, 0], 0, 0, 10)
    with pytest.raises(ValueError, match="rank 3"):
        eval_batches(4, 2, 3, 3)

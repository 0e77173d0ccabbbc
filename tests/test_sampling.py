"""Sampling: pure functions of (seed, epoch, sample); no sample twice, none missing; patches inside the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import UsageError
from medseg.sampling import batches, epoch_plan, patch_start, sample_seed


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**40), st.integers(1, 5))
def test_cases_come_in_rounds_across_epochs(cases, samples, seed, epochs):
    plan = [sample for epoch in range(epochs) for sample in epoch_plan(cases, epoch=epoch, seed=seed, samples=samples)]
    assert len(plan) == samples * epochs
    for start in range(0, len(plan) - cases + 1, cases):
        assert sorted(sample.case for sample in plan[start : start + cases]) == list(range(cases))
    tail = [sample.case for sample in plan[len(plan) // cases * cases :]]
    assert len(set(tail)) == len(tail)
    assert len({sample.seed for sample in plan}) == len(plan)
    assert all(0 <= sample.seed < 2**63 for sample in plan)


def test_a_plan_depends_on_seed_and_epoch_alone():
    assert epoch_plan(9, epoch=2, seed=5) == epoch_plan(9, epoch=2, seed=5)
    assert epoch_plan(9, epoch=2, seed=5) != epoch_plan(9, epoch=3, seed=5)
    assert epoch_plan(9, epoch=2, seed=5) != epoch_plan(9, epoch=2, seed=6)
    assert sample_seed(1, 2) != sample_seed(2, 1)
    orders = {tuple(sample.case for sample in epoch_plan(9, epoch=epoch, seed=5)) for epoch in range(20)}
    assert len(orders) == 20


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_processes_share_the_samples_without_overlap(size, world, steps):
    plan = epoch_plan(7, epoch=0, seed=0, samples=size * world * steps)
    dealt = [batches(plan, size, rank=rank, world=world) for rank in range(world)]
    assert [len(mine) for mine in dealt] == [steps] * world
    assert all(len(batch) == size for mine in dealt for batch in mine)
    seeds = [sample.seed for mine in dealt for batch in mine for sample in batch]
    assert sorted(seeds) == sorted(sample.seed for sample in plan)
    # a step of all processes together holds the samples that one process with a larger batch would have had
    alone = batches(plan, size * world)
    for step in range(steps):
        together = {sample.seed for mine in dealt for sample in mine[step]}
        assert together == {sample.seed for sample in alone[step]}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=3),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_a_patch_holds_as_much_of_the_image_as_possible(axes, foreground, seed):
    shape, patch = zip(*axes, strict=True)
    points = {1: np.array([[n - 1 for n in shape]]), 2: np.zeros((0, len(shape)), int)}
    start = patch_start(shape, patch, np.random.default_rng(seed), points=points, foreground=foreground)
    for first, size, wanted in zip(start, shape, patch, strict=True):
        inside = min(first + wanted, size) - max(first, 0)
        assert inside == min(size, wanted)
        if size <= wanted:  # centred: the padding on both sides differs by one voxel at most
            assert abs(-first - (wanted - size + first)) <= 1
    again = patch_start(shape, patch, np.random.default_rng(seed), points=points, foreground=foreground)
    assert start == again


def test_patches_around_classes_hold_the_point_and_classes_are_drawn_alike():
    points = {1: np.array([[10, 10]] * 1000), 2: np.array([[90, 90]])}
    hits = []
    for seed in range(300):
        start = patch_start((100, 100), (20, 20), np.random.default_rng(seed), points=points, foreground=1.0)
        inside = [all(s <= c < s + 20 for s, c in zip(start, point, strict=True)) for point in ((10, 10), (90, 90))]
        assert sum(inside) == 1
        hits.append(inside[1])
    assert 0.4 < np.mean(hits) < 0.6  # the class with one point comes as often as the one with a thousand


def test_without_points_all_positions_come():
    starts = {patch_start((5, 4), (3, 4), np.random.default_rng(seed), foreground=1.0) for seed in range(60)}
    assert starts == {(0, 0), (1, 0), (2, 0)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"cases": 0, "epoch": 0, "seed": 0},
        {"cases": 2, "epoch": -1, "seed": 0},
        {"cases": 2, "epoch": 0, "seed": -1},
        {"cases": 2, "epoch": 0, "seed": 0, "samples": 0},
    ],
)
def test_numbers_out_of_range(arguments):
    with pytest.raises(UsageError):
        epoch_plan(arguments.pop("cases"), **arguments)
    with pytest.raises(UsageError):
        batches([], 1, rank=2, world=2)

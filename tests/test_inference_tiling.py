"""The plan of tiles against its definition: kept boxes partition the image, with their context, on the grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import ResourceError, UsageError
from medseg.inference import plan_tiles, plan_windows


def paper_output(size):
    return [n - 184 for n in size]


def paper_legal(size):
    return [max(-(-(n - 12) // 16), 11) * 16 + 12 for n in size]


def check_plan(plan):
    """Every claim of the plan, voxel by voxel."""
    covered = np.zeros(plan.image_size, int)
    for tile in plan.tiles:
        assert tile.size == plan.window
        box = tuple(slice(a, b) for a, b in zip(tile.start, tile.stop, strict=True))
        covered[box] += 1
        for a, (start, stop, first, extent) in enumerate(
            zip(tile.start, tile.stop, tile.window, tile.size, strict=True)
        ):
            margin, length = plan.context[a], plan.image_size[a]
            assert 0 <= start < stop <= length
            at_low, at_high = start == 0, stop == length
            if plan.border == "mirror" or not at_low:
                assert start - first >= margin
            if plan.border == "mirror" or not at_high:
                assert first + extent - stop >= margin
            assert (first + (margin if plan.border == "mirror" else 0)) % plan.divisor[a] == 0
            assert (start - (0 if at_low else start)) % plan.divisor[a] == 0
    assert (covered == 1).all()
    starts = [tile.start[plan.axis] for tile in plan.tiles]
    assert starts == sorted(starts)
    assert plan.slabs[0][0] == 0
    assert plan.slabs[-1][1] == plan.image_size[plan.axis]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.slabs))


@settings(max_examples=150, deadline=None)
@given(
    size=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    context=st.integers(0, 9),
    divisor=st.sampled_from([1, 2, 4]),
    tile=st.integers(1, 60),
    border=st.sampled_from(["auto", "mirror", "network"]),
    axis=st.integers(0, 2),
)
def test_tiles_partition_any_image(size, context, divisor, tile, border, axis):
    axis %= len(size)
    try:
        plan = plan_tiles(size, context=context, divisor=divisor, tile=tile, border=border, axis=axis)
    except UsageError:
        assert tile < 2 * (context + divisor) + divisor
        return
    check_plan(plan)


@pytest.mark.parametrize("size", [(1, 1), (388, 388), (389, 300), (1000, 517)])
@pytest.mark.parametrize("tile", [204, 300, 572, "auto"])
def test_tiles_of_the_paper_network(size, tile):
    plan = plan_tiles(size, context=92, divisor=16, output_size=paper_output, legal_size=paper_legal, tile=tile)
    assert plan.border == "mirror"
    assert all((n - 12) % 16 == 0 for n in plan.window)
    check_plan(plan)


def test_paper_example():
    # one 572 tile gives 388: an image of 388 needs exactly one, an image of 389 two (steps are multiples of 16)
    options = {"context": 92, "divisor": 16, "output_size": paper_output, "legal_size": paper_legal}
    assert len(plan_tiles((388, 388), tile=572, **options).tiles) == 1
    assert plan_tiles((388, 388), tile=572, **options).window == (572, 572)
    assert len(plan_tiles((389, 388), tile=572, **options).tiles) == 2


def test_padded_context_is_rounded_up_to_the_grid():
    plan = plan_tiles((512, 64), context=92, divisor=16, tile=256)
    assert plan.context == (96, 96)  # DESIGN.md: 92 becomes 96 with padding
    assert plan.border == "network"
    # (512 - 192) / (256 - 192) = 5 tiles along the first axis, one along the second
    assert len(plan.tiles) == 5
    assert plan.window == (256, 64)


def test_budget_chooses_the_least_computation():
    size, options = (200, 160, 120), {"context": 20, "divisor": 4}
    budget = 500_000
    best = plan_tiles(size, max_voxels=budget, **options)
    check_plan(best)
    assert np.prod(best.window) <= budget
    # brute force over windows that leave the last axis whole
    work = [
        plan_tiles(size, tile=(a, b, 120), **options).redundancy
        for a, b in itertools.product(range(44, 204, 4), range(44, 164, 4))
        if a * b * 120 <= budget
    ]
    assert best.redundancy <= min(work) + 1e-9


def test_redundancy_falls_with_memory_and_ends_at_one():
    found = [
        plan_tiles((256, 256, 128), context=24, divisor=8, max_bytes=budget, bytes_per_voxel=100).redundancy
        for budget in (2e8, 3e8, 6e8, 1e9)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1.0


def test_slack_takes_the_smallest_windows_among_nearly_the_cheapest_plans():
    options = {"context": 24, "divisor": 4, "max_voxels": 4096 * 4096}
    size = (20_000, 20_000)
    cheapest, sparse = plan_tiles(size, **options), plan_tiles(size, **options, slack=1.05)
    assert sparse.redundancy <= 1.05 * cheapest.redundancy
    assert math.prod(sparse.window) < math.prod(cheapest.window) / 4
    # half of that window again would cost more than the slack, by arithmetic: (w / (w - 48))^2
    half = [n / 2 for n in sparse.window]
    assert math.prod(n / (n - 48) for n in half) > 1.05 * cheapest.redundancy
    # without a limit the cheapest plan is one window
    assert len(plan_tiles((8192, 8192), context=24, divisor=4).tiles) == 1
    assert len(plan_tiles((8192, 8192), context=24, divisor=4, slack=1.05).tiles) > 1
    assert plan_tiles(size, **options, slack=1.0) == cheapest


def test_large_picture_is_planned_at_once():
    plan = plan_tiles((50_000, 50_000), context=92, divisor=16, max_voxels=4_000_000)
    assert plan.redundancy < 1.3
    assert np.prod(plan.window) <= 4_000_000


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"tile": 8, "context": 8}, "context"),
        ({"context": (1, 2, 3)}, "axis"),
        ({"divisor": 0}, "divisor"),
        ({"batch": 0}, "batch"),
        ({"slack": 0.9}, "slack"),
        ({"max_bytes": 10}, "bytes_per_voxel"),
        ({"border": "zero"}, "border"),
    ],
)
def test_wrong_options_are_refused(wrong, word):
    with pytest.raises(UsageError, match=word):
        plan_tiles((64, 64), **wrong)


def test_unpadded_network_cannot_use_its_own_border():
    with pytest.raises(UsageError, match="unpadded"):
        plan_tiles((64, 64), context=92, divisor=16, output_size=paper_output, legal_size=paper_legal, border="network")


def test_no_plan_fits():
    with pytest.raises(ResourceError, match="smallest legal tile"):
        plan_tiles((512, 512, 512), context=96, divisor=16, max_voxels=1000)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), roi=st.sampled_from([8, 16, 40]), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_windows_are_evenly_spaced_and_as_few_as_possible(size, roi, overlap):
    starts = plan_windows((size,), (roi,), overlap).starts[0]
    extent = min(roi, size)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - extent)
    steps = np.diff(starts)
    if len(steps):
        assert steps.max() - steps.min() <= 1
        assert steps.max() <= max(1, round(extent * (1 - overlap) + 0.5))
        count = len(starts) - 1
        assert (count - 1) * max(1.0, extent * (1 - overlap)) < size - extent


@given(
    size=st.integers(1, 200), steps=st.integers(1, 12), divisor=st.sampled_from([2, 4, 8]), overlap=st.floats(0, 0.9)
)
def test_windows_stand_on_the_grid_of_one_pass(size, steps, divisor, overlap):
    plan = plan_windows((size,), (steps * divisor,), overlap, divisor=divisor)
    starts, extent = plan.starts[0], plan.output[0]
    assert all(start % divisor == 0 for start in starts)
    assert starts[0] == 0
    assert size <= starts[-1] + extent < size + divisor
    for one, two in itertools.pairwise(starts):  # closer than the overlap asks for, or by the smallest step there is
        assert 0 < two - one <= max(divisor, extent * (1 - overlap) + 1e-6)


def test_windows_refuse_what_does_not_fit():
    with pytest.raises(UsageError, match="strides"):
        plan_windows((64,), (20,), divisor=16)
    with pytest.raises(UsageError, match="overlap"):
        plan_windows((64,), (16,), 1.0)

"""Sampling: pure functions of (seed, epoch, sample); no sample twice, none missing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import UsageError
from medseg.sampling import epoch_plan, sample_seed


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

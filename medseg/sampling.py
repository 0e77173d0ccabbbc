"""Which case comes when, and with which random numbers: pure functions of (seed, epoch, sample).

Nothing here has state, so a run that was killed and resumed draws what an uninterrupted one would have drawn, on any
number of workers and processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medseg.errors import UsageError

__all__ = ["PlannedSample", "epoch_plan", "sample_seed"]


@dataclass(frozen=True)
class PlannedSample:
    """One patch to come: position of the case in the list of cases, and the seed of everything random about it."""

    case: int
    seed: int


def epoch_plan(cases: int, *, epoch: int, seed: int, samples: int | None = None) -> list[PlannedSample]:
    """The samples of an epoch, in order.

    Cases come in rounds: each round is a fresh permutation of all cases, so no case comes twice before all have come
    once, also where an epoch is longer or shorter than a round; the next epoch goes on where this one stopped.

    Args:
        cases: number of training cases, at least 1.
        epoch: counted from 0.
        seed: of the run.
        samples: length of the epoch; one round when None. Has to be the same in all epochs of a run.

    Raises:
        UsageError: a number out of range.

    >>> sorted(sample.case for sample in epoch_plan(4, epoch=3, seed=0))
    [0, 1, 2, 3]
    """
    length = cases if samples is None else samples
    for name, value, least in (("cases", cases, 1), ("samples", length, 1), ("epoch", epoch, 0), ("seed", seed, 0)):
        if value < least:
            raise UsageError("out of range", field=name, expected=f"at least {least}", found=value)
    first = epoch * length
    order: dict[int, np.ndarray] = {}
    plan = []
    for number in range(first, first + length):
        turn, position = divmod(number, cases)
        if turn not in order:
            order = {turn: np.random.default_rng([seed, 1, turn]).permutation(cases)}
        plan.append(PlannedSample(int(order[turn][position]), sample_seed(seed, number)))
    return plan


def sample_seed(seed: int, number: int) -> int:
    """Seed of the sample with this number, counted over the whole run; 63 bits, so that torch takes it too.

    >>> sample_seed(0, 5) == sample_seed(0, 5) != sample_seed(0, 6)
    True
    """
    return int(np.random.SeedSequence([seed, 2, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))

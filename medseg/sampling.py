"""Which case comes when, where its patch lies, and with which random numbers: pure functions of (seed, epoch, sample).

Nothing here has state, so a run that was killed and resumed draws what an uninterrupted one would have drawn, on any
number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import UsageError

__all__ = ["PlannedSample", "batches", "epoch_plan", "patch_start", "sample_seed"]


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


def batches(plan: Sequence[PlannedSample], size: int, *, rank: int = 0, world: int = 1) -> list[list[PlannedSample]]:
    """The batches of one of `world` processes; together they hold every sample once, and each has equally many batches.

    A global batch holds size x world samples, dealt out in turn; what does not fill a last global batch is left for the
    next epoch's rounds by `epoch_plan`'s caller choosing a length divisible by size x world, else it is dropped here.

    >>> plan = epoch_plan(8, epoch=0, seed=0)
    >>> [len(batch) for batch in batches(plan, 2, rank=1, world=2)]
    [2, 2]
    """
    if size < 1 or world < 1 or not 0 <= rank < world:
        raise UsageError("out of range", field="batch, rank, world", found=(size, rank, world))
    whole = len(plan) // (size * world) * size * world
    return [list(plan[i + rank : i + size * world : world]) for i in range(0, whole, size * world)]


def patch_start(
    shape: Sequence[int],
    patch: Sequence[int],
    random: np.random.Generator,
    *,
    points: Mapping[int, np.ndarray] | None = None,
    foreground: float = 0.0,
) -> tuple[int, ...]:
    """First voxel of a patch, which always holds as much of the image as possible.

    With probability `foreground` the patch lies around a voxel of a class: first a class is drawn, each alike, then one
    of its points, and the patch is moved by up to a quarter of its size so that the structure is not always central.
    Otherwise all positions are alike. Along an axis where the image is smaller than the patch the start is negative:
    the image is centred, and whoever reads pads.

    Args:
        shape: of the image, (*spatial).
        patch: size of the patch, as many axes.
        random: drawn from in the same order for the same arguments.
        points: class -> (n, axes) voxel coordinates; classes without points are left out.
        foreground: share of patches around a class, in [0, 1].

    >>> patch_start((10, 4), (10, 8), np.random.default_rng(0))
    (0, -2)
    """
    usable = [coordinates for _, coordinates in sorted((points or {}).items()) if len(coordinates)]
    aimed = bool(usable) and random.random() < foreground
    if aimed:
        coordinates = usable[int(random.integers(len(usable)))]
        centre = coordinates[int(random.integers(len(coordinates)))]
    start = []
    for axis, (size, wanted) in enumerate(zip(shape, patch, strict=True)):
        if size <= wanted:
            start.append(-((wanted - size) // 2))
            continue
        if aimed:
            shift = int(random.integers(-(wanted // 4), wanted // 4 + 1))
            first = int(centre[axis]) - wanted // 2 + shift  # pyright: ignore[reportPossiblyUnboundVariable]
        else:
            first = int(random.integers(size - wanted + 1))
        start.append(min(max(first, 0), size - wanted))
    return tuple(start)

"""Distances to the nearest and the second nearest of many labelled objects, exact within a reach, axis by axis.

The separable distance transform (Saito and Toriwaki 1994; Felzenszwalb and Huttenlocher 2012) keeps, per voxel, the
nearest object along the axes done so far. Keeping the two nearest *different* objects is enough to find the two
nearest in the end: whatever column holds the second nearest, only the nearest of all can be nearer in that column. So
the cost depends on the number of voxels and on the reach, and not on the number of objects.

References: doi:10.1016/0031-3203(94)90133-3, doi:10.4086/toc.2012.v008a019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["distance_to_other", "distance_to_two"]

_BLOCK = 2**15  # voxels treated at a time: what one step reads and writes stays in the second-level cache
_ROWS = 64  # ... of them along the axis of the window
_FAR: dict[Any, Any] = {np.int16: np.int16(16000), np.float32: np.float32(1e30)}  # squared; may be added to once more


def distance_to_two(labels: np.ndarray, spacing: Sequence[float], reach: float) -> np.ndarray:
    """d1 + d2 of each background voxel: distances to the nearest and the second nearest object.

    Args:
        labels: integers (*spatial), 0 background, each other value one object.
        spacing: size of a voxel per axis.
        reach: distances up to here matter, in the unit of spacing.

    Returns:
        float32 of the same shape: exact where d1 + d2 <= reach; elsewhere the true value, a larger one, or infinity.
        Infinite on the objects themselves.

    >>> distance_to_two(np.array([[1, 0, 0, 2]]), (1, 1), 10.0)
    array([[inf,  3.,  3., inf]], dtype=float32)
    """
    # d1 is at most half of the sum, d2 all of it
    first, second, unit = _two(labels, spacing, reach / 2, reach, ignore_zero=True)
    total = _length(first, unit)
    total += _length(second, unit)
    return total


def distance_to_other(labels: np.ndarray, spacing: Sequence[float], reach: float) -> np.ndarray:
    """Distance of each voxel to the nearest voxel of another value, background counting as a value.

    Arguments and result as `distance_to_two`; exact up to `reach`.

    >>> distance_to_other(np.array([[0, 0, 3, 3]]), (1, 1), 10.0)
    array([[2., 1., 1., 2.]], dtype=float32)
    """
    # a voxel's own value is nearest, at distance 0: the second nearest is the nearest other
    _, second, unit = _two(labels, spacing, 0.0, reach, ignore_zero=False)
    return _length(second, unit)


def _two(
    labels: np.ndarray, spacing: Sequence[float], reach1: float, reach2: float, *, ignore_zero: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Squared distances to the nearest and second nearest value, exact up to reach1 and reach2, and their unit."""
    if labels.size and labels.max() >= 2**31:  # numbers too large for what follows; zero stays zero
        present, numbered = np.unique(labels, return_inverse=True)
        labels = numbered.reshape(labels.shape) + int(present[0] != 0)
    window = [min(n - 1, math.floor(reach2 / s)) for n, s in zip(labels.shape, spacing, strict=True)]
    # the scan costs the same for any reach, so the longest window goes there; the last step is cheaper than those
    # between
    order = sorted(range(labels.ndim), key=lambda axis: (window[axis], axis))
    order = [*order[-2:-1], *order[:-2], order[-1]]
    steps = [float(spacing[axis]) for axis in order]
    # voxels that are cubes have whole squared distances: in 16 bits everything takes half the time
    cubes = len(set(steps)) == 1
    unit = steps[0] if cubes else 1.0
    reach1, reach2, steps = reach1 / unit, reach2 / unit, [step / unit for step in steps]
    small = cubes and labels.ndim * (reach2 + 1) ** 2 < _FAR[np.int16] and max(*labels.shape, labels.max()) < 2**14
    turned = np.ascontiguousarray(np.transpose(labels, order)).astype(np.int16 if small else np.int32, copy=False)
    nearest = _scan(turned, steps[-1], reach2, np.int16 if small else np.float32, ignore_zero)
    for axis in range(1, labels.ndim - 1):
        nearest = _merge(nearest, axis, steps[axis], reach2)
    pair = nearest[::2] if labels.ndim == 1 else _finish(nearest, turned, steps[0], reach1, reach2, ignore_zero)
    first, second = (np.transpose(a, np.argsort(order)) for a in pair)
    return first, second, unit


def _length(squared: np.ndarray, unit: float) -> np.ndarray:
    far = squared >= _FAR[squared.dtype.type]
    length = np.sqrt(squared, dtype=np.float32)
    if unit != 1.0:
        length *= np.float32(unit)
    length[far] = np.inf
    return length


def _scan(labels: np.ndarray, step: float, reach: float, number: Any, ignore_zero: bool) -> list[np.ndarray]:
    """Along the last axis: [squared distance, value] of the nearest value and [.., ..] of the nearest other one."""
    shape, n = labels.shape, labels.shape[-1]
    lines = labels.reshape(-1, n)
    out = [np.empty(lines.shape, number if i % 2 == 0 else labels.dtype) for i in range(4)]
    # squares of the distances along a line; beyond reach, and from nowhere (n and more), they are far
    square = np.full(2 * n + 1, _FAR[number], number)
    within = min(n, math.floor(reach / step * (1 + 1e-6)) + 1)
    square[:within] = (np.arange(within) * step) ** 2
    # distance and value in one integer, so that one comparison orders both
    bits, key = (16, np.int32) if labels.dtype == np.int16 else (32, np.int64)
    value_bits = key((1 << bits) - 1)
    thick = max(1, _BLOCK // n)
    for start in range(0, len(lines), thick):
        part = lines[start : start + thick].astype(key)
        left, left2 = _from_left(part, bits, within, ignore_zero)
        # copies: arithmetic on reversed views is several times slower
        mirrored = _from_left(np.ascontiguousarray(part[:, ::-1]), bits, within, ignore_zero)
        right, right2 = (np.ascontiguousarray(a[:, ::-1]) for a in mirrored)
        turn = right < left
        near, far = np.minimum(left, right), np.maximum(left, right)
        near2 = np.where(turn, right2, left2)
        far2 = left2 ^ right2 ^ near2
        # second: the far side's nearest or, if that is the same value, its next; or the near side's next
        second = np.minimum(near2, np.where(((near ^ far) & value_bits) == 0, far2, far))
        for (distance, value), source in zip((out[:2], out[2:]), (near, second), strict=True):
            distance[start : start + thick] = np.take(square, source >> bits, mode="clip")
            value[start : start + thick] = source & value_bits
    return [a.reshape(shape) for a in out]


def _from_left(lines: np.ndarray, bits: int, within: int, ignore_zero: bool) -> tuple[np.ndarray, np.ndarray]:
    """Per voxel, distance << bits | value of the nearest voxel at or left of it, and of the nearest other value."""
    n = lines.shape[1]
    after = np.arange(1, n + 1, dtype=lines.dtype)  # positions from 1, so that 0 is nowhere
    packed = after << bits | lines
    if ignore_zero:
        packed *= np.minimum(lines, 1)  # integers throughout: a mask of booleans would be converted voxel by voxel
    last = _running_maximum(packed, within)
    before = np.zeros_like(last)
    before[:, 1:] = last[:, :-1]
    # where a new value begins, the last voxel of the one before; it stays so until the next begins
    begins = np.minimum((before ^ packed) & ((1 << bits) - 1), 1) * np.minimum(packed, 1)
    other = _running_maximum(before * begins, within)
    return _measure(last, after, n, bits), _measure(other, after, n, bits)


def _running_maximum(values: np.ndarray, within: int) -> np.ndarray:
    """Of each voxel and the `within` or more to the left of it: by doubling, faster than `maximum.accumulate`."""
    step = 1
    while step <= min(within, values.shape[1] - 1):
        wider = np.empty_like(values)
        wider[:, :step] = values[:, :step]
        np.maximum(values[:, step:], values[:, :-step], out=wider[:, step:])
        values, step = wider, 2 * step
    return values


def _measure(packed: np.ndarray, after: np.ndarray, n: int, bits: int) -> np.ndarray:
    # position << bits | value -> distance << bits | value; from nowhere it is more than n
    nowhere = (1 - np.minimum(packed, 1)) * packed.dtype.type(n << bits)
    return packed + (after << bits) - ((packed >> bits) << (bits + 1)) + nowhere


def _sizes(n: int, step: float, reach: float, number: np.dtype) -> Iterator[tuple[int, Any]]:
    """Offsets by growing size, and the square of their length."""
    for size in range(1, min(n - 1, math.floor(reach / step * (1 + 1e-6))) + 1):
        yield size, number.type((size * step) ** 2)


def _overlap(rows: slice, offset: int, n: int) -> tuple[slice, slice]:
    """Rows of the block whose neighbour at `offset` exists, counted from the block's start; those neighbours' rows."""
    low, high = max(rows.start, -offset), min(rows.stop, n - offset)
    high = max(low, high)
    return slice(low - rows.start, high - rows.start), slice(low + offset, high + offset)


def _merge(nearest: list[np.ndarray], axis: int, step: float, reach: float) -> list[np.ndarray]:
    """Bring one axis between into the two nearest values."""
    moved = [np.moveaxis(a, axis, 0) for a in nearest]
    n = moved[0].shape[0]
    out = [np.empty(a.shape, a.dtype) for a in nearest]
    for index in range(nearest[0].shape[0]):  # one slice of the first axis at a time stays small
        take = (slice(None), index)
        source = [np.ascontiguousarray(a[take]) for a in moved]
        d1, v1, d2, v2 = (a.copy() for a in source)
        if (source[0] < _FAR[d1.dtype.type]).any():
            for size, length in _sizes(n, step, reach, d1.dtype):
                for offset in (size, -size):
                    mine, theirs = _overlap(slice(0, n), offset, n)
                    state = (d1[mine], v1[mine], d2[mine], v2[mine])
                    _insert(state, source[0][theirs] + length, source[1][theirs])
                    _insert(state, source[2][theirs] + length, source[3][theirs])
        for target, result in zip(out, (d1, v1, d2, v2), strict=True):
            np.moveaxis(target, axis, 0)[take] = result
    return out


def _insert(state: tuple[np.ndarray, ...], distance: np.ndarray, value: np.ndarray) -> None:
    """Let one more candidate per voxel into the two nearest of different values."""
    d1, v1, d2, v2 = state
    first = distance < d1
    other = value != v1
    # a nearer one of another value pushes the nearest to second place
    push = first & other
    second = other & ~first & (distance < d2)
    np.copyto(d2, d1, where=push)
    np.copyto(v2, v1, where=push)
    np.copyto(d2, distance, where=second)
    np.copyto(v2, value, where=second)
    np.copyto(d1, distance, where=first)
    np.copyto(v1, value, where=push)


def _finish(
    nearest: list[np.ndarray], labels: np.ndarray, step: float, reach1: float, reach2: float, ignore_zero: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The first axis, last of all: squared distances. Of the second nearest no values are needed, only its distance.

    Voxels of the objects themselves (where zero is no value) get a distance of far.
    """
    n = labels.shape[0]
    c1, l1, c2, _ = (a.reshape(n, -1) for a in nearest)
    far = _FAR[c1.dtype.type]
    own = labels.reshape(n, -1)
    first, second = np.full_like(c1, far), np.full_like(c1, far)
    width = max(1, _BLOCK // min(n, _ROWS))
    halo = min(n - 1, math.floor(reach2 / step * (1 + 1e-6)))
    for left in range(0, c1.shape[1], width):
        columns = slice(left, left + width)
        # rows of a block next to each other, and nothing beyond the ends: every shift is one plain slice
        lines = tuple(
            np.full((n + 2 * halo, len(c1[0, columns])), v, a.dtype) for a, v in ((c1, far), (l1, 0), (c2, far))
        )
        for line, a in zip(lines, (c1, l1, c2), strict=True):
            line[halo : halo + n] = a[:, columns]
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            window = tuple(line[start : rows.stop + 2 * halo] for line in lines)
            known = window[1][window[0] < far]
            if known.size == 0 or (known.min() == known.max() and window[2].min() >= far):
                continue  # fewer than two values within reach
            idle = own[rows, columns] != 0 if ignore_zero else np.zeros_like(own[rows, columns], bool)
            best, value = _nearest(window, idle, halo, step, reach1)
            idle |= best > reach1**2 * (1 + 1e-6)
            first[rows, columns], second[rows, columns] = best, _nearest_other(window, value, idle, halo, step)
    return first.reshape(labels.shape), second.reshape(labels.shape)


def _nearest(
    window: tuple[np.ndarray, ...], idle: np.ndarray, halo: int, step: float, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the nearest value over the first axis's window, and that value; 0 where idle."""
    d1, v1, _ = window
    n = len(d1) - 2 * halo
    best, value = d1[halo : halo + n].copy(), v1[halo : halo + n].copy()
    best[idle] = 0  # nothing is nearer: these do not keep the search going
    room, nearer = np.empty_like(best), np.empty(best.shape, bool)
    for size in range(1, min(halo, math.floor(reach / step * (1 + 1e-6))) + 1):
        length = best.dtype.type((size * step) ** 2)
        if length >= best.max():
            break
        for at in (halo - size, halo + size):
            np.add(d1[at : at + n], length, out=room)
            np.less(room, best, out=nearer)
            np.minimum(best, room, out=best)
            np.copyto(value, v1[at : at + n], where=nearer)
    return best, value


def _nearest_other(
    window: tuple[np.ndarray, ...], value: np.ndarray, idle: np.ndarray, halo: int, step: float
) -> np.ndarray:
    """Squared distance to the nearest value that is not `value` over the first axis's window; far where idle."""
    d1, v1, d2 = window
    n, far = len(value), _FAR[d1.dtype.type]
    here = slice(halo, halo + n)
    other = np.where(v1[here] != value, d1[here], d2[here])
    other[idle] = 0
    # an integer as wide as the distances: floats not below 0 are ordered like their bits
    whole = value.dtype
    b1, b2, mask = d1.view(whole), d2.view(whole), np.empty_like(value)
    candidate = mask.view(d1.dtype)
    for size in range(1, halo + 1):
        length = d1.dtype.type((size * step) ** 2)
        if length >= other.max():
            break
        for at in (halo - size, halo + size):
            # d2 where the nearest there is the value itself, else d1 (never larger): max(d1, d2 & mask), all bits set
            # where the values are equal. numpy's `where` takes longer than these five together.
            np.bitwise_xor(v1[at : at + n], value, out=mask)
            np.minimum(mask, 1, out=mask)
            np.subtract(mask, 1, out=mask)
            np.bitwise_and(mask, b2[at : at + n], out=mask)
            np.maximum(mask, b1[at : at + n], out=mask)
            np.add(candidate, length, out=candidate)
            np.minimum(other, candidate, out=other)
    other[idle] = far
    return other

"""The plan of blended windows and their importance. Pure arithmetic but for the importance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medseg.errors import UsageError
from medseg.inference.tiling import spread

__all__ = ["WindowPlan", "importance_1d", "plan_windows", "shares"]


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one size; `starts` holds, per axis, the first voxel of each window's *output* in the image."""

    image_size: tuple[int, ...]
    window: tuple[int, ...]
    output: tuple[int, ...]
    margin: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    axis: int
    batch: int

    @property
    def count(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    @property
    def redundancy(self) -> float:
        """Computed voxels / voxels of the image."""
        return self.count * math.prod(self.window) / math.prod(self.image_size)

    @property
    def slabs(self) -> tuple[tuple[int, int], ...]:
        """Ranges along the slab axis, each finished by one row of windows."""
        starts, length = self.starts[self.axis], self.image_size[self.axis]
        return tuple(itertools.pairwise((*starts, length)))


def plan_windows(
    image_size: Sequence[int],
    roi_size: Sequence[int],
    overlap: float | Sequence[float] = 0.5,
    *,
    output: Sequence[int] | None = None,
    divisor: int | Sequence[int] = 1,
    batch: int = 1,
    axis: int = -1,
) -> WindowPlan:
    """Windows evenly re-spaced: as few as the overlap allows, at equal distances (to the divisor), from edge to edge.

    Args:
        image_size: voxels along each axis.
        roi_size: size of the window; shortened (to a multiple of `divisor`) where the image is smaller.
        overlap: share of a window that the next one covers at least (but for a voxel, or the divisor, that rounding
            takes), 0 <= overlap < 1.
        output: the network's output for a window of `roi_size`, when it is smaller.
        divisor, batch, axis: as in `plan_tiles`.

    >>> plan_windows((100,), (40,), 0.5).starts
    ((0, 20, 40, 60),)
    >>> plan_windows((90,), (40,), 0.5).starts  # not 0, 20, 40, 50
    ((0, 17, 33, 50),)
    >>> plan_windows((90,), (40,), 0.5, divisor=4).starts  # the last window ends at 92
    ((0, 16, 36, 52),)
    """
    size = tuple(int(n) for n in image_size)
    dims = len(size)
    if not size or min(size) < 1:
        raise UsageError("an image needs at least one voxel along each axis", field="image_size", found=size)
    divisors = spread(divisor, dims, "divisor")
    shares = (float(overlap),) * dims if isinstance(overlap, int | float) else tuple(float(o) for o in overlap)
    if len(shares) != dims or any(not 0 <= share < 1 for share in shares):
        raise UsageError("overlap must be 0 <= overlap < 1", field="overlap", found=overlap)
    roi = spread(tuple(roi_size), dims, "roi_size")
    if any(n < 1 or n % d for n, d in zip(roi, divisors, strict=True)) and output is None:
        legal = tuple(max(1, -(-n // d)) * d for n, d in zip(roi, divisors, strict=True))
        raise UsageError(
            "roi_size does not fit the strides of the network",
            field="roi_size",
            expected=f"multiples of {divisors}, such as {legal}",
            found=roi,
        )
    if output is None:
        window = tuple(min(r, -(-n // d) * d) for r, n, d in zip(roi, size, divisors, strict=True))
        kept, margin = window, (0,) * dims
    else:
        window, kept = roi, tuple(int(n) for n in output)
        margin = tuple((a - b) // 2 for a, b in zip(window, kept, strict=True))
    starts = [
        _starts(n, extent, share, step) for n, extent, share, step in zip(size, kept, shares, divisors, strict=True)
    ]
    return WindowPlan(size, window, kept, margin, tuple(starts), axis % dims, batch)


def _starts(length: int, extent: int, share: float, divisor: int) -> tuple[int, ...]:
    """Multiples of the divisor, so that pooling falls on the grid of one pass over the whole image.

    The last window may then reach beyond the image by less than the divisor, as that pass would.
    """
    if extent >= length:
        return (0,)
    way = -(-(length - extent) // divisor)  # of the last window, in multiples of the divisor
    most = extent * (1 - share) / divisor  # between two windows
    count = math.ceil(way / max(1.0, most if divisor == 1 else math.floor(most + 1e-9))) + 1
    return tuple(divisor * round(i * way / (count - 1)) for i in range(count))


def importance_1d(size: int, sigma_share: float = 0.125) -> torch.Tensor:
    """exp(-(x - centre)^2 / (2 sigma^2)) along one axis, sigma = size * `sigma_share`.

    MONAI's map is the product of these with a floor of 1e-3 on the product. Along the image's faces and edges all
    weights are below that, so that there a window's last voxels, computed without their surroundings, count as much as
    those of the window that sees further. Without the floor the result is nearer to one pass over the whole image.

    >>> importance_1d(4).tolist() == importance_1d(4).flip(0).tolist()
    True
    """
    position = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    sigma = size * sigma_share
    # weights are divided by their sum, so only zeros (of very narrow sigmas) have to be kept away
    return torch.exp(-(position**2) / (2 * sigma**2)).clamp_min_(1e-20)


def shares(starts: Sequence[int], extent: int, length: int, sigma_share: float = 0.125) -> list[torch.Tensor]:
    """What each window of an axis contributes to its voxels: its importance / the importance of all windows there.

    Windows form a grid, so the importance of all windows at a voxel is the product of sums along each axis; with shares
    as weights no sum of weights is accumulated, and accumulators stay in the range of the logits.

    >>> [share.tolist() for share in shares((0, 2), 3, 5)]
    [[1.0, 1.0, 0.5], [0.5, 1.0, 1.0]]
    """
    importance = importance_1d(extent, sigma_share)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + extent] += importance[: length - start]
    return [importance[: length - start] / total[start : start + extent] for start in starts]

"""The plan of tiled inference: which windows the network sees, and which part of each output is kept. Pure arithmetic.

Overlap-tile (Ronneberger, Fischer, Brox 2015, doi:10.1007/978-3-319-24574-4_28): the kept parts meet without
blending, every kept voxel has at least `context` voxels of real or mirrored image around it inside its window, and
window offsets are multiples of `divisor`, so that pooling falls on the same grid as in one pass over the whole image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from medseg.errors import ResourceError, UsageError

__all__ = ["Border", "Tile", "TilePlan", "plan_tiles"]

Border = Literal["auto", "mirror", "network"]
Sizes = Callable[[tuple[int, ...]], Sequence[int]]
_TRIED = 40  # window sizes tried per axis; more do not find a cheaper plan in practice


@dataclass(frozen=True)
class Tile:
    """One window and the part of its output that is kept. Coordinates are voxels of the image.

    `start`, `stop`: the kept box. `window`: first voxel of the input window (negative or beyond the end = mirrored).
    `size`: the window's size. `offset`: where the kept box begins inside the network's output.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    window: tuple[int, ...]
    size: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def crop(self) -> tuple[slice, ...]:
        """The kept box as slices into the network's output (without batch and channel axes)."""
        return tuple(slice(o, o + b - a) for o, a, b in zip(self.offset, self.start, self.stop, strict=True))


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one image, in rows along the slab axis.

    `window`: input size of every tile. `context`: voxels that are computed and thrown away on a side between two
    tiles. `border`: what is beyond the image: "mirror" (mirrored image) or "network" (the network's own padding).
    """

    image_size: tuple[int, ...]
    window: tuple[int, ...]
    context: tuple[int, ...]
    divisor: tuple[int, ...]
    border: str
    axis: int
    batch: int
    tiles: tuple[Tile, ...]

    @property
    def redundancy(self) -> float:
        """Computed voxels / voxels of the image; 1.0 is one pass over an image of legal size."""
        return len(self.tiles) * math.prod(self.window) / math.prod(self.image_size)

    @property
    def slabs(self) -> tuple[tuple[int, int], ...]:
        """Ranges along the slab axis, each finished by one row of tiles; they meet and cover the axis."""
        return tuple(dict.fromkeys((tile.start[self.axis], tile.stop[self.axis]) for tile in self.tiles))

    def rows(self) -> Iterator[tuple[tuple[int, int], tuple[Tile, ...]]]:
        """Each slab with its tiles, in order."""
        for slab, tiles in itertools.groupby(self.tiles, lambda tile: (tile.start[self.axis], tile.stop[self.axis])):
            yield slab, tuple(tiles)


@dataclass(frozen=True)
class _Axis:
    """What one axis of the network does, reduced to five numbers."""

    length: int
    margin: int  # computed but not kept, per side
    divisor: int
    rest: int  # output size modulo divisor (4 for 572 -> 388 with divisor 16; 0 with padding)
    outside: bool  # context is mirrored beyond the border
    cut: int  # what the network itself cuts off, per side: the margin, or 0 with padding

    def window(self, count: int) -> int:
        """Smallest window with which `count` windows cover the axis."""
        whole = _up(self.length, self.divisor)
        if not self.outside:
            if count == 1:
                return whole
            return min(whole, _up(-(-(whole - 2 * self.margin) // count), self.divisor) + 2 * self.margin)
        step = max(_up(-(-(self.length - self.rest) // count), self.divisor), 0 if self.rest else self.divisor)
        return step + self.rest + 2 * self.margin

    def count(self, window: int) -> int:
        if not self.outside:
            whole = _up(self.length, self.divisor)
            return 1 if window >= whole else -(-(whole - 2 * self.margin) // (window - 2 * self.margin))
        kept = window - 2 * self.margin
        step = kept // self.divisor * self.divisor
        return 1 if kept >= self.length else 1 + -(-(self.length - kept) // step)

    @property
    def smallest(self) -> int:
        """Smallest window that yields at least one step of output, or covers the axis."""
        step = self.divisor + self.rest + 2 * self.margin
        return step if self.outside else min(step, _up(self.length, self.divisor))

    def pieces(self, window: int) -> list[tuple[int, int, int, int]]:
        """(kept start, kept stop, window start, offset in the output) of each window."""
        count = self.count(window)
        kept = window - 2 * self.margin
        step = kept // self.divisor * self.divisor
        if self.outside:
            bounds = [min(i * step, self.length) for i in range(count)] + [self.length]
            ahead = self.margin - self.cut
            return [(a, b, i * step - self.margin, ahead) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
        whole = _up(self.length, self.divisor)
        starts = [min(i * step, whole - window) for i in range(count)]
        bounds = [0, *(start + self.margin for start in starts[1:]), self.length]
        return [(a, b, s, a - s) for s, (a, b) in zip(starts, itertools.pairwise(bounds), strict=True)]


def plan_tiles(
    image_size: Sequence[int],
    *,
    context: int | Sequence[int] = 0,
    divisor: int | Sequence[int] = 1,
    output_size: Sizes | None = None,
    legal_size: Sizes | None = None,
    tile: int | Sequence[int] | Literal["auto"] | None = "auto",
    max_voxels: int | None = None,
    max_bytes: int | None = None,
    bytes_per_voxel: float | None = None,
    batch: int = 1,
    border: Border = "auto",
    axis: int = -1,
    slack: float = 1.0,
) -> TilePlan:
    """Cut an image into overlap-tiles; without `tile`, the plan with the least computation whose window fits.

    Args:
        image_size: voxels along each axis.
        context: voxels per side that an output voxel needs (`network.context`).
        divisor: product of strides (`network.divisor`); windows start at multiples of it.
        output_size: input size -> output size (`network.output_size`); None: the output is as large as the input.
        legal_size: nearest legal input size >= size (`network.legal_size`), needed with `output_size` of a network
            whose outputs are smaller than its inputs.
        tile: size of the input window, context included; rounded up to a legal size. "auto" or None: chosen.
        max_voxels: bound on the voxels of one batch of input windows; None: no bound, so the whole image is one tile.
        max_bytes, bytes_per_voxel: the same bound as memory and what the network needs per input voxel.
        batch: windows per pass.
        border: "mirror": context beyond the image is mirrored. "network": nothing is added, the network's own padding
            acts at the image's border as it does in one pass over the whole image (padded networks only).
            "auto": "mirror" for unpadded networks, "network" for padded ones.
        axis: the slab axis; tiles are ordered along it first.
        slack: of plans with at most `slack` times the least computation that with the smallest windows is taken.

    Raises:
        UsageError: sizes or options that do not fit together; `tile` too small for the context.
        ResourceError: no window fits `max_voxels` or `max_bytes`.

    >>> plan = plan_tiles((512, 512), context=92, divisor=16, tile=572,
    ...                   output_size=lambda size: [n - 184 for n in size],
    ...                   legal_size=lambda size: [max(-(-(n - 12) // 16), 11) * 16 + 12 for n in size])
    >>> len(plan.tiles), plan.window, plan.tiles[1].start, plan.tiles[1].window
    (4, (444, 444), (256, 0), (164, -92))
    >>> plan_tiles((256, 256, 128), context=44, divisor=8).redundancy
    1.0
    """
    size = tuple(int(n) for n in image_size)
    dims = len(size)
    if not size or min(size) < 1:
        raise UsageError("an image needs at least one voxel along each axis", field="image_size", found=size)
    contexts, divisors = spread(context, dims, "context"), spread(divisor, dims, "divisor")
    if min(contexts) < 0 or min(divisors) < 1:
        raise UsageError("context must be >= 0 and divisor >= 1", found=f"context {contexts}, divisor {divisors}")
    if min(batch, slack) < 1:
        raise UsageError("batch and slack must be at least 1", found=f"batch {batch}, slack {slack}")
    axes, chosen_border = _axes(size, contexts, divisors, output_size, legal_size, border)
    if max_bytes is not None:
        if not bytes_per_voxel or bytes_per_voxel <= 0:
            raise UsageError("max_bytes needs bytes_per_voxel", field="bytes_per_voxel", found=bytes_per_voxel)
        fits = int(max_bytes / bytes_per_voxel)
        max_voxels = fits if max_voxels is None else min(fits, max_voxels)
    if tile is None or tile == "auto":
        window = _cheapest(axes, max_voxels, batch, bytes_per_voxel, slack)
    else:
        window = _given(axes, spread(tile, dims, "tile"))
    pieces = [part.pieces(extent) for part, extent in zip(axes, window, strict=True)]
    axis %= dims
    order = [axis, *(a for a in range(dims) if a != axis)]
    tiles = []
    for chosen in itertools.product(*(pieces[a] for a in order)):
        by_axis = [piece for _, piece in sorted(zip(order, chosen, strict=True))]
        start, stop, first, offset = (tuple(part) for part in zip(*by_axis, strict=True))
        tiles.append(Tile(start, stop, first, window, offset))
    margins = tuple(part.margin for part in axes)
    return TilePlan(size, window, margins, divisors, chosen_border, axis, batch, tuple(tiles))


def spread(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    """One number for all axes, or one for each."""
    values = (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != dims:
        raise UsageError(f"{name} needs one number, or one per axis", field=name, expected=f"{dims}", found=value)
    return values


def _axes(
    size: tuple[int, ...],
    context: tuple[int, ...],
    divisor: tuple[int, ...],
    output_size: Sizes | None,
    legal_size: Sizes | None,
    border: Border,
) -> tuple[list[_Axis], str]:
    probe = tuple(_up(2 * c + 2 * d, d) for c, d in zip(context, divisor, strict=True))
    if legal_size is not None:
        probe = tuple(legal_size(probe))
    lost = (0,) * len(size)
    if output_size is not None:
        lost = tuple(a - b for a, b in zip(probe, output_size(probe), strict=True))
    unpadded = any(lost)
    if border not in ("auto", "mirror", "network"):
        raise UsageError("unknown border", field="border", expected='"auto", "mirror" or "network"', found=border)
    if border == "network" and unpadded:
        raise UsageError(
            "an unpadded network has no padding of its own", field="border", expected="mirror", found=border
        )
    mirror = unpadded or border == "mirror"
    axes = []
    for n, c, d, gone, extent in zip(size, context, divisor, lost, probe, strict=True):
        if gone % 2:
            raise UsageError("a network must lose as many voxels on both sides", field="output_size", found=gone)
        margin = gone // 2 if unpadded else _up(c, d)
        axes.append(_Axis(n, margin, d, (extent - gone) % d if unpadded else 0, mirror, gone // 2))
    return axes, "mirror" if mirror else "network"


def _given(axes: list[_Axis], tile: tuple[int, ...]) -> tuple[int, ...]:
    window = []
    for part, wanted in zip(axes, tile, strict=True):
        base = part.rest + 2 * part.margin if part.outside else 0
        legal = min(base + _up(max(wanted - base, 0), part.divisor), part.window(1))
        if legal < part.smallest and legal < part.window(1):
            raise UsageError(
                "a tile must be larger than its context",
                field="tile",
                expected=f">= {part.smallest}",
                found=wanted,
                fix=f"give at least {part.smallest}, or leave the choice to the plan",
            )
        # as many windows as the wanted size needs, but no larger than they need to be
        window.append(min(legal, part.window(part.count(legal))))
    return tuple(window)


def _cheapest(
    axes: list[_Axis], max_voxels: int | None, batch: int, bytes_per_voxel: float | None, slack: float
) -> tuple[int, ...]:
    if max_voxels is None and slack <= 1:
        return tuple(part.window(1) for part in axes)
    choices = []
    for part in axes:
        counts: list[int] = []
        last = part.count(part.smallest) if part.smallest < part.window(1) else 1
        step = 1.0
        while not counts or counts[-1] < last:
            counts.append(min(last, max(counts[-1] + 1, int(counts[-1] * step)) if counts else 1))
            step = 1.0 if len(counts) < _TRIED // 2 else 1.2
        windows = sorted({max(part.window(count), min(part.smallest, part.window(1))) for count in counts})
        choices.append([(window, part.count(window) * window) for window in windows])
    limit, ranks = math.inf if max_voxels is None else max_voxels, []
    for combination in itertools.product(*choices):
        voxels = math.prod(window for window, _ in combination)
        if voxels * batch <= limit:
            ranks.append((math.prod(work for _, work in combination), voxels, tuple(w for w, _ in combination)))
    if not ranks:
        smallest = math.prod(choice[0][0] for choice in choices) * batch
        per_voxel = bytes_per_voxel or 0
        raise ResourceError(
            "the smallest legal tile does not fit the memory",
            code="E520",
            field="max_bytes" if per_voxel else "max_voxels",
            expected=f"{smallest * per_voxel / 2**20:.0f} MiB" if per_voxel else f"{smallest} voxels",
            found=f"{limit * per_voxel / 2**20:.0f} MiB" if per_voxel else f"{limit} voxels",
            fix="allow more memory, lower the batch, or use GaussianTileInferer with a small roi_size",
        )
    enough = slack * min(ranks)[0]
    return min((voxels, work, window) for work, voxels, window in ranks if work <= enough)[2]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

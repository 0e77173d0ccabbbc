"""What a network needs around its outputs, and windows of an image that may reach beyond its border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medseg.errors import UsageError
from medseg.inference.tiling import Sizes, spread

__all__ = ["NetworkGeometry", "constant_value", "mirror_index", "network_geometry", "read_window"]


@dataclass(frozen=True)
class NetworkGeometry:
    """`context` is None when the network does not state one: then only one pass over the whole image is exact."""

    context: tuple[int, ...] | None
    divisor: tuple[int, ...]
    output_size: Sizes | None
    legal_size: Sizes | None
    exact: bool

    def output(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return size if self.output_size is None else tuple(self.output_size(size))


def network_geometry(network: Any, dims: int) -> NetworkGeometry:
    """Read `.context`, `.divisor`, `.output_size`, `.legal_size` and `.exact_under_tiling`.

    A network without them (any module) counts as size-keeping, with unknown context and not exact.
    """
    # DistributedDataParallel keeps the network in .module, torch.compile in ._orig_mod
    for wrapper in ("module", "_orig_mod"):
        network = getattr(network, wrapper, network)
    context = getattr(network, "context", None)
    stated = getattr(network, "spatial_dims", dims)
    if isinstance(stated, int) and stated != dims:
        raise UsageError(
            "the network has another number of dimensions than the image",
            field="spatial_dims",
            expected=f"{stated} spatial axes",
            found=f"{dims} spatial axes",
        )
    return NetworkGeometry(
        context=None if context is None else spread(context, dims, "context"),
        divisor=spread(getattr(network, "divisor", 1), dims, "divisor"),
        output_size=getattr(network, "output_size", None),
        legal_size=getattr(network, "legal_size", None),
        exact=bool(getattr(network, "exact_under_tiling", False)),
    )


def mirror_index(start: int, size: int, length: int) -> torch.Tensor:
    """Indices of `size` voxels from `start` in an axis of `length`, mirrored at its ends as often as needed.

    The border voxel itself is not repeated (`reflect`); an axis of one voxel repeats it.

    >>> mirror_index(-3, 9, 3).tolist()
    [1, 2, 1, 0, 1, 2, 1, 0, 1]
    """
    index = torch.arange(start, start + size)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def read_window(image: Any, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Window (C, *size) of `image` (C, *spatial) from voxel `start`, mirrored beyond the border; a view when inside.

    `image` is a tensor, or what has `shape` and reads boxes of itself, such as `medseg.inference.large.LargePicture`.
    """
    lows, extents, indices = [], [], []
    for axis, (first, extent) in enumerate(zip(start, size, strict=True), start=1):
        length = image.shape[axis]
        if first >= 0 and first + extent <= length:
            lows.append(first)
            extents.append(extent)
        else:
            # cut to the voxels that occur before repeating them, so that only the window is copied
            index = mirror_index(first, extent, length)
            low, high = int(index.min()), int(index.max())
            lows.append(low)
            extents.append(high - low + 1)
            indices.append((axis, index - low))
    if isinstance(image, torch.Tensor):
        window = image
        for axis, (low, extent) in enumerate(zip(lows, extents, strict=True), start=1):
            window = window.narrow(axis, low, extent)
    else:
        window = image.read(lows, extents)
    for axis, index in indices:
        window = window.index_select(axis, index.to(window.device))
    return window


def constant_value(window: torch.Tensor) -> tuple[float, ...] | None:
    """The value of each channel if every channel is constant (air after clipping, padding), else None."""
    values = []
    for channel in window:
        # most windows differ at once: look at one line before looking at all
        line = channel[(slice(None), *(0,) * (channel.ndim - 1))]
        if bool((line != line[0]).any()):
            return None
        low, high = torch.aminmax(channel)
        if bool(low != high):
            return None
        values.append(float(low))
    return tuple(values)

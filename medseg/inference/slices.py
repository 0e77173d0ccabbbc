"""A 2-D network on a volume: slice by slice along the last axis, perhaps with neighbouring slices as channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from medseg.errors import GeometryError
from medseg.inference.inferers import OverlapTileInferer
from medseg.inference.keeping import kept_windows
from medseg.inference.streams import Block, TileInferer

__all__ = ["SliceBlocks", "middle_slice", "neighbours"]


class SliceBlocks:
    """Gives a 2-D inferer's blocks for each slice of (C, i, j, k) as blocks of the volume, k ascending.

    A network with an odd multiple of C input channels gets as many slices around k as channels (see `neighbours`).
    """

    def __init__(self, inferer: TileInferer) -> None:
        self.inferer = inferer

    def blocks(
        self,
        image: torch.Tensor,
        networks: Sequence[Any],
        *,
        axis: int = -1,
        mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Block]:
        """See `TileInferer.blocks`. `complete` counts along `axis`; unless that is the last one, only the end does."""
        depth, reach = image.shape[-1], _reach(networks[0], image.shape[0])
        axis %= image.ndim - 1
        with self._kept(image, networks, reach, device or self.inferer.device or image.device):
            for k in range(depth):
                inside = None if mask is None else mask[..., k]
                for block in self.inferer.blocks(neighbours(image, k, reach), networks, mask=inside, device=device):
                    last = block.complete >= image.shape[-2] and k + 1 == depth
                    complete = k if axis == image.ndim - 2 else (image.shape[axis + 1] if last else 0)
                    values = None if block.values is None else block.values[..., None]
                    yield Block((*block.start, k), (*block.stop, k + 1), values, complete)
        if axis == image.ndim - 2:
            yield Block((0, 0, 0), (0, 0, 0), None, depth)

    def _kept(
        self, image: torch.Tensor, networks: Sequence[Any], reach: int, device: torch.device | str
    ) -> contextlib.AbstractContextManager[None]:
        if torch.device(device).type != "cpu":
            return contextlib.nullcontext()
        channels, *size = neighbours(image, 0, reach).shape
        known: dict[str, Any] = {"channels": channels} if isinstance(self.inferer, OverlapTileInferer) else {}
        plan = self.inferer.plan(size, networks[0], **known)
        return kept_windows(self.inferer, plan, networks, channels, repeats=image.shape[-1])


def _reach(network: Any, channels: int) -> int:
    """How many slices on either side the network sees."""
    wanted = getattr(network, "in_channels", channels)
    if wanted % channels or not wanted // channels % 2:
        raise GeometryError("the network takes another number of channels", expected=wanted, found=channels)
    return wanted // channels // 2


def middle_slice(image: torch.Tensor, network: Any) -> tuple[torch.Tensor, int]:
    """What `network` sees of the middle slice of a volume, when it is a 2-D network, and the number of slices.

    Otherwise the image itself, and 1.
    """
    dims = getattr(network, "spatial_dims", image.ndim - 1)
    if dims != 2 or image.ndim != 4:
        return image, 1
    depth = image.shape[-1]
    return neighbours(image, depth // 2, _reach(network, image.shape[0])), depth


def neighbours(image: torch.Tensor, k: int, reach: int) -> torch.Tensor:
    """Slices k - reach to k + reach of (C, i, j, n) as channels (C * (2 * reach + 1), i, j): those of the first channel
    first; beyond the ends the volume is mirrored, its border slice not repeated.

    >>> neighbours(torch.arange(3.0).reshape(1, 1, 1, 3), 0, 2).flatten().tolist()
    [2.0, 1.0, 0.0, 1.0, 2.0]
    """
    if reach == 0:
        return image[..., k]
    period = max(1, 2 * (image.shape[-1] - 1))
    places = [min(p % period, period - p % period) for p in range(k - reach, k + reach + 1)]
    if image.shape[-1] == 1:
        places = [0] * len(places)
    return image[..., places].movedim(-1, 1).flatten(0, 1)

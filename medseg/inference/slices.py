"""A 2-D network on a volume: slice by slice along the last axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from medseg.inference.streams import Block, TileInferer

__all__ = ["SliceBlocks"]


class SliceBlocks:
    """Gives a 2-D inferer's blocks for each slice of (C, i, j, k) as blocks of the volume, k ascending."""

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
        depth = image.shape[-1]
        axis %= image.ndim - 1
        for k in range(depth):
            inside = None if mask is None else mask[..., k]
            for block in self.inferer.blocks(image[..., k], networks, mask=inside, device=device):
                last = block.complete >= image.shape[-2] and k + 1 == depth
                complete = k if axis == image.ndim - 2 else (image.shape[axis + 1] if last else 0)
                values = None if block.values is None else block.values[..., None]
                yield Block((*block.start, k), (*block.stop, k + 1), values, complete)
        if axis == image.ndim - 2:
            yield Block((0, 0, 0), (0, 0, 0), None, depth)

"""Whether predicting a case keeps freed memory for the next window: faster, where there is room for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from medseg.inference.gaussian import GaussianTileInferer
from medseg.inference.inferers import OverlapTileInferer
from medseg.inference.memory import bytes_per_voxel
from medseg.inference.streams import TileInferer
from medseg.inference.tiling import TilePlan

__all__ = ["held_bytes", "keeps_memory"]

_MANY = 4  # windows: with fewer there is nothing to gain
_SPARE = 2  # kept blocks lie unused between those in use: peaks of 1.1 to 1.25 times the activations were measured


def keeps_memory(
    inferer: TileInferer, networks: Sequence[Any], shape: Sequence[int], *, device: torch.device | str = "cpu"
) -> bool:
    """Whether freed memory should be kept while an image of `shape` (C, *spatial) is predicted (`kept_memory`).

    Each window allocates and frees the same large blocks; the system hands them out as fresh pages, to be zeroed and
    mapped again, which is a tenth to a third of a small 3-D network's time. Kept ones are reused, and stay with the
    process, so this is for several windows on a CPU whose activations are small beside the memory that is allowed.
    """
    if torch.device(device).type != "cpu":
        return False
    channels, *size = shape
    dims = getattr(networks[0], "spatial_dims", len(size))
    sheets = math.prod(size[dims:])  # a 2-D network takes a volume slice by slice, perhaps with its neighbours
    channels = channels if dims == len(size) else getattr(networks[0], "in_channels", channels)
    size = size[:dims]
    if isinstance(inferer, OverlapTileInferer):
        plan: Any = inferer.plan(size, networks[0], channels=channels, device=device)
        count = len(plan.tiles)
    elif isinstance(inferer, GaussianTileInferer):
        plan = inferer.plan(size, networks[0])
        count = plan.count
    else:
        return False
    if count * sheets < _MANY:
        return False
    half = inferer.precision != "fp32"
    activations = bytes_per_voxel(networks[0], channels, plan.window, half=half) * math.prod(plan.window)
    classes = int(getattr(networks[0], "out_channels", 2))
    batch = inferer.batch if isinstance(inferer.batch, int) else 1
    return held_bytes(plan, classes) + _SPARE * activations * batch <= inferer.budget(device)


def held_bytes(plan: Any, classes: int) -> int:
    """Bytes of the accumulators of a plan, in float32; none for tiles that are not blended."""
    if isinstance(plan, TilePlan):
        return 0
    slab = math.prod(n for a, n in enumerate(plan.image_size) if a != plan.axis)
    return 4 * classes * slab * min(plan.window[plan.axis], plan.image_size[plan.axis])

"""Freed memory is kept for the next window: faster, where there are several and there is room for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from medseg.hardware import kept_memory, memory_is_kept
from medseg.inference.blending import WindowPlan
from medseg.inference.memory import bytes_per_voxel
from medseg.inference.tiling import TilePlan

if TYPE_CHECKING:
    from medseg.inference.streams import TileInferer

__all__ = ["held_bytes", "keeps_memory", "kept_windows"]

_MANY = 4  # windows: with fewer there is nothing to gain
_SPARE = 2  # kept blocks lie unused between those in use: peaks of 1.1 to 1.25 times the activations were measured


def kept_windows(
    inferer: TileInferer,
    plan: TilePlan | WindowPlan,
    networks: Sequence[Any],
    channels: int,
    *,
    repeats: int = 1,
    device: torch.device | str = "cpu",
) -> contextlib.AbstractContextManager[None]:
    """A block in which freed memory stays with the process, or one in which nothing is changed (`keeps_memory`)."""
    if memory_is_kept() or not keeps_memory(inferer, plan, networks, channels, repeats=repeats, device=device):
        return contextlib.nullcontext()
    return kept_memory()


def keeps_memory(
    inferer: TileInferer,
    plan: TilePlan | WindowPlan,
    networks: Sequence[Any],
    channels: int,
    *,
    repeats: int = 1,
    device: torch.device | str = "cpu",
) -> bool:
    """Whether freed memory should be kept while the windows of `plan` are computed, for `repeats` images.

    Each window allocates and frees the same large blocks; the system hands them out as fresh pages, to be zeroed and
    mapped again, which is a tenth to a third of a small 3-D network's time. Kept ones are reused, and stay with the
    process meanwhile, so this is for several windows on a CPU whose activations are small beside what is allowed.
    """
    count = len(plan.tiles) if isinstance(plan, TilePlan) else plan.count
    if torch.device(device).type != "cpu" or count * repeats < _MANY:
        return False
    half = inferer.precision != "fp32"
    try:
        activations = bytes_per_voxel(networks[0], channels, plan.window, half=half) * math.prod(plan.window)
    except Exception:  # a network of another library that cannot be measured may run all the same
        return False
    classes = int(getattr(networks[0], "out_channels", 2))
    return held_bytes(plan, classes) + _SPARE * activations * plan.batch <= inferer.budget(device)


def held_bytes(plan: TilePlan | WindowPlan, classes: int) -> int:
    """Bytes of the accumulators of a plan, in float32; none for tiles that are not blended."""
    if isinstance(plan, TilePlan):
        return 0
    slab = math.prod(n for a, n in enumerate(plan.image_size) if a != plan.axis)
    return 4 * classes * slab * min(plan.window[plan.axis], plan.image_size[plan.axis])

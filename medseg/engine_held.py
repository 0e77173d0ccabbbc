"""Training cases held in the device's memory, so that patches are cut there and no batch is copied to it.

    cases, told = hold_cases(stored, "auto", torch.device("cuda"))

Where a patch lies follows from the sample's seed, as with the store, so it is the same patch bit for bit; a run may be
resumed with or without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medseg.cache_blocks import mirror_index
from medseg.errors import ResourceError
from medseg.inference.memory import available_memory
from medseg.patches import ARRAYS

__all__ = ["SHARE", "HeldCase", "hold_cases"]

SHARE = 0.25  # of a GPU's free memory that "auto" takes; the step needs most of the rest
_MOST = 0.8  # of the free memory that may be asked for


class HeldCase:
    """A case of the store with its image, label, weight and field of view in a device's memory.

    Attributes:
        arrays: name -> (C, *spatial) on the device, in the number types of the store.
        shape, affine, places: as of the stored case.
    """

    def __init__(self, stored: Any, device: torch.device) -> None:
        self._stored = stored
        self.shape, self.affine, self.places = stored.shape, stored.affine, stored.places
        names = [name for name in ARRAYS if name in stored.arrays]
        self.arrays = {name: torch.from_numpy(stored.read(name)).to(device) for name in names}

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A box of the array `name`, (C, *size), mirrored beyond the borders as the store does; it may be a view."""
        box = self.arrays[name]
        for axis, (first, extent) in enumerate(zip(start, size, strict=True), start=1):
            if first >= 0 and first + extent <= box.shape[axis]:
                box = box.narrow(axis, first, extent)
            else:
                index = torch.from_numpy(mirror_index(first, extent, box.shape[axis]))
                box = box.index_select(axis, index.to(box.device, non_blocking=True))
        return box

    def pick(self, label: int, number: float) -> tuple[int, ...]:
        """As of the stored case."""
        return self._stored.pick(label, number)


def hold_cases(
    stored: Mapping[str, Any], wish: bool | str, device: torch.device, *, neighbours: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """The cases that batches are cut from, held or as they are; and what should be told.

    Args:
        stored: id -> stored case.
        wish: `train.keep_on_device`. "auto" holds them on a CUDA device if they take at most `SHARE` of its free
            memory, and nowhere else: on a CPU the system keeps in memory what was read, and gives it back when it is
            needed. True holds them in any case, in main memory where the device is no CUDA device; False never.
        device: where the network is trained.
        neighbours: processes that share main memory.

    Raises:
        ResourceError: E525, they were to be held and do not fit.
    """
    if wish is False or (wish == "auto" and device.type != "cuda"):
        return dict(stored), []
    place = device if device.type == "cuda" else torch.device("cpu")
    free = available_memory(place) // (1 if place.type == "cuda" else neighbours)
    need = sum(_size(case) for case in stored.values())
    size, room = f"{len(stored)} training cases ({need / 1e9:.3g} GB)", f"{free / 1e9:.3g} GB free on {place}"
    if wish == "auto" and need > SHARE * free:
        return dict(stored), [f"{size} are read from the store: more than {SHARE:.0%} of {room}"]
    if need > _MOST * free:
        raise ResourceError(
            "the training cases do not fit into the memory that they are to be kept in",
            code="E525",
            field="train.keep_on_device",
            expected=f"at most {_MOST:.0%} of what is free",
            found=f"{size}, {room}",
            fix="--set train.keep_on_device=false reads patches from the store",
        )
    told = f"{size} are kept on {place}, of {room}: patches are cut there"
    return {name: HeldCase(case, place) for name, case in stored.items()}, [told]


def _size(case: Any) -> int:
    arrays = [array for name, array in case.arrays.items() if name in ARRAYS]
    return sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in arrays)

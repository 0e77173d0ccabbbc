"""Where each sample's patch lies, and the patch itself: pure functions of the sample's seed.

The numbers are drawn in one function and used in another: a sample does not depend on the worker that reads it, on
the number of workers, on what was read before, or on whether the run was resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medseg.volumes_geometry import voxel_size

__all__ = ["ARRAYS", "Draw", "PatchReader", "derive_seed", "stack"]

ARRAYS = ("image", "label", "weight", "fov")  # what of a case goes into patches
_FILLED = {"weight": torch.float32, "fov": torch.uint8}  # where only some cases have them


def derive_seed(*numbers: int) -> int:
    """63 random bits that depend on nothing but `numbers` (a sample's seed and what it is for, as a rule).

    >>> derive_seed(7, 1) == derive_seed(7, 1) != derive_seed(7, 2)
    True
    """
    state = np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample, all in [0, 1): whether it is centred on a structure, on which class and voxel
    of it, and where it is otherwise."""

    centred: float
    label: float
    voxel: float
    place: tuple[float, ...]

    @classmethod
    def of(cls, seed: int, dims: int) -> Draw:
        """The numbers that belong to a sample's seed."""
        numbers = np.random.default_rng(seed).random(3 + dims)
        return cls(*map(float, numbers[:3]), place=tuple(map(float, numbers[3:])))


@dataclass(frozen=True)
class PatchReader:
    """Reads patches of stored cases.

    Args:
        patch: size of a patch, 2 or 3 numbers; 2 for a volume means one slice along the last axis.
        margin: voxels per side by which a patch may reach beyond the image (mirrored there): what an unpadded network
            cuts off, so that it also learns the image's border.
        foreground: share of the patches that are centred on a voxel of a class other than 0; the classes that occur in
            the case are equally likely.
        slices: of a volume's slice, this many neighbours on either side come as further channels (2.5-D): all slices
            of the first channel in their order, then those of the next; mirrored at the volume's ends.
        context: voxels per side that are read around each patch for the transform that turns and scales it, which
            takes them off; mirrored beyond the image.
    """

    patch: tuple[int, ...]
    margin: tuple[int, ...]
    foreground: float
    slices: int = 0
    context: tuple[int, ...] = ()

    def start(self, stored: Any, draw: Draw) -> tuple[int, ...]:
        """First voxel of the patch of a stored case; negative where it reaches beyond the image."""
        shape = stored.shape
        patch, margin = self._on(shape, self.patch, 1), self._on(shape, self.margin, 0)
        labels = sorted(stored.places)
        if labels and draw.centred < self.foreground:
            label = labels[min(int(draw.label * len(labels)), len(labels) - 1)]
            voxel = stored.pick(label, draw.voxel)
            wanted = [v - p // 2 for v, p in zip(voxel, patch, strict=True)]
        else:
            wanted = None
        start = []
        for axis, (n, p, m) in enumerate(zip(shape, patch, margin, strict=True)):
            low, high = -m, n - p + m
            if high <= low:  # the image is smaller than the patch: it stands in the middle
                start.append((n - p) // 2)
            elif wanted is not None:
                start.append(min(max(wanted[axis], low), high))
            else:
                start.append(low + min(int(draw.place[axis] * (high - low + 1)), high - low))
        return tuple(start)

    def read(self, stored: Any, start: Sequence[int]) -> dict[str, torch.Tensor]:
        """image, label, and weight and fov where the case has them, each (C, *patch), where the case's arrays are; with
        a context (C, *(patch + 2 * context))."""
        around = self.context or (0,) * len(self.patch)
        patch = tuple(p + 2 * c for p, c in zip(self.patch, around, strict=True))
        size = self._on(stored.shape, patch, 1)
        start = [s - c for s, c in zip(start, self._on(stored.shape, around, 0), strict=True)]
        found = {}
        for name in ARRAYS:
            if name not in stored.arrays:
                continue
            if name == "image" and self.slices and len(size) > len(self.patch):
                wider = (*start[:-1], start[-1] - self.slices), (*size[:-1], 2 * self.slices + 1)
                found[name] = torch.as_tensor(stored.read(name, *wider)).movedim(-1, 1).reshape(-1, *patch)
            else:
                array = torch.as_tensor(stored.read(name, start, size))
                found[name] = array[..., 0] if len(size) > len(self.patch) else array
        return found

    def spacing(self, stored: Any) -> tuple[float, ...]:
        """Size of a voxel along the patch's axes."""
        return tuple(float(v) for v in voxel_size(stored.affine)[: len(self.patch)])

    @staticmethod
    def _on(shape: Sequence[int], values: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return values + (fill,) * (len(shape) - len(values))


def stack(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Patches as one batch, (B, C, *patch) per name; a weight or field of view that only some have is 1 elsewhere."""
    names = [name for name in ARRAYS if any(name in sample for sample in samples)]
    batch = {}
    for name in names:
        parts = []
        for sample in samples:
            if name in sample:
                parts.append(sample[name])
            else:
                parts.append(torch.ones_like(sample["image"][:1], dtype=_FILLED[name]))
        batch[name] = torch.stack(parts)
    return batch

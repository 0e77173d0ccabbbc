"""One step of `preprocess` on one case: refused by name where it fails, before it takes memory that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from medseg.errors import DataError, MedsegError, ResourceError

__all__ = ["run_step"]

RESAMPLING = 57  # bytes that Spacingd takes for each voxel of its result at once, most for their places; measured


def run_step(
    name: str,
    step: Callable[[dict[str, Any]], Mapping[str, Any]],
    sample: dict[str, Any],
    *,
    case: str,
    free: Callable[[], int],
) -> dict[str, Any]:
    """`step(sample)`, the transform called `name`; `free()` tells the bytes of memory that it may take.

    Raises:
        DataError: E371, the transform fails on this case.
        ResourceError: E526, its result does not fit into the memory.
    """
    if name == "Spacingd":
        _require_memory(step, sample, case, free)
    try:
        return dict(step(sample))
    except MedsegError:
        raise
    except Exception as error:  # whatever a transform raises on this case must not stop the others
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ResourceError(f"out of memory in {name}", code="E526", case=case, found=found) from error
        raise DataError(f"{name} fails on this case: {found}", code="E371", case=case) from error


def _require_memory(step: Any, sample: dict[str, Any], case: str, free: Callable[[], int]) -> None:
    """Refuse what Linux would grant and then kill the process for: a file may state voxels as large as it likes."""
    import torch
    from monai.data.meta_tensor import MetaTensor

    image = sample["image"]
    # an image of this size that takes no memory, on which nothing is computed but the size of the result
    stand_in = MetaTensor(torch.zeros(1).expand(image.shape), affine=image.affine)
    shape = step({"image": stand_in}, lazy=True)["image"].peek_pending_shape()
    needed, left = math.prod(shape) * RESAMPLING, free()
    if needed > left:
        before, after = (" x ".join(map(str, size)) for size in (image.shape[1:], shape))
        sides = np.linalg.norm(np.asarray(image.affine)[:-1, :-1], axis=0)[: len(shape)]
        voxels = " x ".join(f"{side:.4g}" for side in sides)
        raise ResourceError(
            f"Spacingd would make {after} voxels of {before}, which do not fit the memory",
            code="E526",
            case=case,
            expected=f"up to {left / 1e9:.3g} GB",
            found=f"about {needed / 1e9:.4g} GB; voxels of {voxels}, as the file states",
            fix="correct the voxel size if it is wrong; else a larger pixdim",
        )

"""Small helpers that the transforms share: what a sample's arrays are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from scipy import ndimage

from medseg.errors import UsageError

__all__ = ["components", "like", "needed_probabilities", "parted_components", "plain", "spacing_of"]


def components(mask: np.ndarray, *, corners: bool = False) -> tuple[np.ndarray, int]:
    """Connected components of a mask, numbered from 1 in memory order, and how many there are.

    Args:
        mask: bool (*spatial).
        corners: voxels that share an edge or a corner are connected too, not only those that share a face.

    >>> components(np.array([[True, False], [False, True]]), corners=True)[1]
    1
    """
    structure = ndimage.generate_binary_structure(mask.ndim, mask.ndim if corners else 1)
    numbers = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, structure, output=numbers)
    return numbers, int(count)  # pyright: ignore[reportArgumentType]  (with an output, the count alone is returned)


def parted_components(mask: np.ndarray, *, neck: float = 0.0, min_size: int = 1) -> np.ndarray:
    """Objects of a mask: its components (faces), parted at thin necks, without specks.

    For labels in which a line parts touching objects but leaks at some pixels. A component is parted between two of its
    parts when both hold a ball of radius 2 `neck` and all that joins them is thinner than 2 `neck`; the border between
    them is the watershed of the distance to the background.

    Args:
        mask: bool (*spatial).
        neck: half the width, in voxels, of the widest neck that is cut; 0 cuts none.
        min_size: voxels; smaller objects are left out.

    Returns:
        int32 (*spatial): 0 background, 1.. objects without gaps in numbering.

    >>> dumbbell = np.zeros((9, 21), bool)
    >>> dumbbell[:, :9] = dumbbell[:, 12:] = dumbbell[4] = True  # two squares, joined by a line
    >>> int(parted_components(dumbbell).max()), int(parted_components(dumbbell, neck=2).max())
    (1, 2)
    """
    objects, count = components(mask)
    if neck > 0 and count:
        from skimage.segmentation import watershed

        # voxels beyond the image do not count as background: an object that the image cuts is not thin there
        depth = np.asarray(ndimage.distance_transform_edt(mask), np.float32)
        cores, number = components(depth > neck)
        deepest = ndimage.maximum(depth, cores, np.arange(number + 1)) if number else np.zeros(1)
        thick = np.asarray(deepest) > 2 * neck
        thick[0] = False
        seeds = np.where(thick[cores], cores, 0)
        parts = watershed(-depth, seeds, mask=mask)
        # what no seed reaches is an object as a whole
        objects = np.where(parts > 0, parts, np.where(mask, objects + number, 0))
    sizes = np.bincount(objects.ravel())
    kept = np.flatnonzero(sizes >= min_size)
    kept = kept[(kept > 0) & (sizes[kept] > 0)]
    renumber = np.zeros(len(sizes), np.int32)
    renumber[kept] = np.arange(1, len(kept) + 1)
    return renumber[objects]


def plain(array: Any) -> torch.Tensor:
    """The array as a bare tensor, sharing memory; operations on a MetaTensor itself cost tens of microseconds each.

    >>> plain(np.zeros((1, 2)))
    tensor([[0., 0.]], dtype=torch.float64)
    """
    if isinstance(array, MetaTensor):
        return array.as_tensor()
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def like(tensor: torch.Tensor, model: Any) -> Any:
    """`tensor` as the kind of array that `model` is: MetaTensor with its meta data, tensor, or numpy array.

    >>> like(torch.zeros(2), np.zeros(2)).tolist()
    [0.0, 0.0]
    """
    if isinstance(model, MetaTensor):
        # the meta data are shared, as slicing does: no transform here changes them
        out = MetaTensor(tensor)
        out.copy_meta_from(model, copy_attr=False)
        return out
    return tensor if isinstance(model, torch.Tensor) else tensor.numpy()


def spacing_of(array: Any, dims: int | None = None) -> tuple[float, ...] | None:
    """Size of a voxel per axis from a MetaTensor's affine; None for anything else.

    Args:
        array: (C, *spatial).
        dims: number of spatial axes when the array is a batch.

    >>> spacing_of(MetaTensor(torch.zeros(1, 4, 4), affine=torch.diag(torch.tensor([2.0, 0.5, 1.0, 1.0]))))
    (2.0, 0.5)
    """
    if not isinstance(array, MetaTensor):
        return None
    count = array.ndim - 1 if dims is None else dims
    affine = torch.as_tensor(array.affine).numpy(force=True).astype(np.float64)
    if affine.ndim == 3:  # a collated batch carries one per sample
        affine = affine[0]
    columns: Sequence[float] = np.linalg.norm(affine[:-1, : min(count, affine.shape[1] - 1)], axis=0)
    if len(columns) != count or not all(np.isfinite(c) and c > 0 for c in columns):
        return None
    return tuple(float(c) for c in columns)


class NeedsClasses(Protocol):
    """A step of post-processing that works on so many classes, background included, and no other number."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Numbers of classes."""
        ...


def needed_probabilities(probabilities: np.ndarray | None, step: NeedsClasses) -> np.ndarray:
    """The probabilities (K, *spatial) that a step of post-processing cannot do without.

    Raises:
        UsageError: there are none, or not of as many classes as the step works on.
    """
    if probabilities is None:
        raise UsageError(f"{type(step).__name__} needs probabilities", field="probabilities")
    if len(probabilities) not in step.classes:
        raise UsageError(
            f"{type(step).__name__} needs another number of classes",
            field="probabilities",
            expected=" or ".join(map(str, step.classes)),
            found=len(probabilities),
        )
    return probabilities

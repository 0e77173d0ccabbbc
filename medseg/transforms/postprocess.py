"""From a network's output to the label image that is written: components, holes, thresholds, single objects.

Each step is called as `step(label, probabilities=..., spacing=...)` with a native label image (*spatial) and gives a
label image of the same shape; steps with `needs_probabilities` get probabilities (K, *spatial), others may get None.
No step is `local`: what belongs to a component is known only when the whole image is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy import ndimage

from medseg.errors import UsageError
from medseg.transforms.arrays import components, needed_probabilities
from medseg.transforms.membrane_cells import CellsFromMembranes

__all__ = [
    "CellsFromMembranes",
    "FillHoles",
    "InstancesFromProbability",
    "KeepLargestComponent",
    "RemoveSmallObjects",
    "Threshold",
]


class KeepLargestComponent:
    """Keep the largest connected component (faces) of each label, and set the rest to background.

    Args:
        labels: labels to treat; all but background when None.
        together: treat them as one structure (an organ with its tumours); each for itself when False.

    Of several components of equal size the one that comes first in memory order is kept.

    >>> label = np.array([[1, 1, 0, 1, 0, 2]])
    >>> KeepLargestComponent()(label, spacing=(1, 1)).tolist()
    [[1, 1, 0, 0, 0, 2]]
    >>> KeepLargestComponent(together=True)(label, spacing=(1, 1)).tolist()
    [[1, 1, 0, 0, 0, 0]]
    """

    needs_probabilities = False
    local = False

    def __init__(self, labels: Sequence[int] | None = None, together: bool = False) -> None:
        self.labels, self.together = labels, together

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The cleaned label image, a copy."""
        label = label.copy()
        for mask in _structures(label, self.labels, self.together):
            box = _box(mask)
            if box is None:
                continue
            numbers, count = components(mask[box])
            if count > 1:
                sizes = np.bincount(numbers.ravel())
                sizes[0] = 0
                inside = label[box]
                inside[mask[box] & (numbers != sizes.argmax())] = 0
        return label


class RemoveSmallObjects:
    """Set connected components (faces) of a label that are smaller than `min_size` to background.

    Args:
        min_size: smallest size kept.
        unit: "voxel", or "mm3" (in 2-D the square of the unit of spacing).
        labels: labels to treat; all but background when None.

    >>> RemoveSmallObjects(2)(np.array([[1, 1, 0, 1]]), spacing=(1, 1)).tolist()
    [[1, 1, 0, 0]]
    """

    needs_probabilities = False
    local = False

    def __init__(
        self, min_size: float, unit: Literal["voxel", "mm3"] = "voxel", labels: Sequence[int] | None = None
    ) -> None:
        if min_size <= 0:
            raise UsageError("a size is positive", field="min_size", found=min_size)
        if unit not in ("voxel", "mm3"):
            raise UsageError("unknown unit", field="unit", expected="voxel or mm3", found=unit)
        self.min_size, self.unit, self.labels = min_size, unit, labels

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The cleaned label image, a copy."""
        label = label.copy()
        size = 1.0 if self.unit == "voxel" else float(np.prod(spacing))
        for mask in _structures(label, self.labels, together=False):
            numbers, _ = components(mask)
            small = np.bincount(numbers.ravel()) * size < self.min_size
            small[0] = False
            label[small[numbers]] = 0
        return label


class FillHoles:
    """Fill background that a label encloses on all sides (face neighbours; in 2-D pictures: 4-neighbours).

    Args:
        labels: labels to treat; all but background when None. Holes are filled with the label around them (the
            innermost, where one label lies within another); only background is ever filled.

    >>> FillHoles()(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), spacing=(1, 1))[1, 1]
    np.int64(1)
    """

    needs_probabilities = False
    local = False

    def __init__(self, labels: Sequence[int] | None = None) -> None:
        self.labels = labels

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The filled label image, a copy."""
        filled, cavities = label.copy(), []
        for value in _values(label, self.labels):
            mask = label == value
            box = _box(mask) or ()
            numbers, _ = components(ndimage.binary_fill_holes(mask[box]) & ~mask[box])
            for number, part in enumerate(ndimage.find_objects(numbers), start=1):
                cavity = numbers[part] == number
                hole = cavity & (label[box][part] == 0)
                cavities.append((np.count_nonzero(cavity), value, filled[box][part], hole))
        # a hole that several labels enclose, one within the other, is the innermost one's: it comes last
        for _, value, place, hole in sorted(cavities, key=lambda cavity: -cavity[0]):
            place[hole] = value
        return filled


class Threshold:
    """Foreground where the probability of label 1 is above `value`; for sets with one foreground label.

    Args:
        value: in (0, 1), or a threshold that training chooses at its end and stores in the checkpoint (0.5 before there
            is one): "validation" by the pipeline's `best` on the validation cases; "training" by the Dice of all pixels
            of the training images together, inside the field of view, which keeps the validation cases untouched.

    >>> shares = np.array([[[0.7, 0.2]], [[0.3, 0.8]]])
    >>> Threshold(0.25)(np.array([[0, 1]]), probabilities=shares, spacing=(1, 1)).tolist()
    [[1, 1]]
    """

    needs_probabilities = True
    classes = (2,)
    local = True

    def __init__(self, value: float | Literal["validation", "training"] = 0.5) -> None:
        if value not in ("validation", "training") and not 0 < float(value) < 1:
            raise UsageError("a threshold is a probability", field="value", expected="0 < value < 1", found=value)
        self.value = value

    @property
    def chosen_on(self) -> str | None:
        """The cases that the value is to be chosen on, "validation" or "training"; None when it is given."""
        return self.value if isinstance(self.value, str) else None

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The label image with 1 where the probability is above the threshold."""
        shares = needed_probabilities(probabilities, self)
        value = 0.5 if isinstance(self.value, str) else self.value
        return (shares[1] > value).astype(label.dtype)


class InstancesFromProbability:
    """Single objects from the probability of being inside one: seeds, then a watershed back to the objects' borders.

    With two classes (background, object; touching objects parted by a gap that the network has learnt) the seeds are
    the maxima, by at least `depth`, of the smoothed distance to the background. With three (background, interior,
    border) they are the connected interiors, and the foreground is interior and border together.

    Args:
        threshold: foreground where the probability of background is below 1 - threshold.
        depth: voxels by which a maximum of the distance must stand out (two classes); larger merges more.
        smooth: sd in voxels of the Gaussian over the distance (two classes).
        seed: probability of interior above which a voxel belongs to a seed (three classes).
        min_size: voxels; smaller objects are dropped.
        grow: voxels by which objects are grown at the end where nothing else is, to give back a gap that parting took.

    Returns:
        int32 (*spatial): 0 background, 1.. objects in order of their first voxel.

    >>> row = np.array([0, .9, .9, .9, .2, .9, .9, .9, 0])
    >>> shares = np.stack([1 - np.tile(row, (3, 1)), np.tile(row, (3, 1))])
    >>> InstancesFromProbability(min_size=1)(shares[1] > 0.5, probabilities=shares, spacing=(1, 1))[1].tolist()
    [0, 1, 1, 1, 0, 2, 2, 2, 0]
    """

    needs_probabilities = True
    classes = (2, 3)
    local = False

    def __init__(
        self,
        threshold: float = 0.5,
        depth: float = 0.75,
        smooth: float = 1.0,
        seed: float = 0.5,
        min_size: int = 10,
        grow: int = 0,
    ) -> None:
        for name, value in (("threshold", threshold), ("seed", seed)):
            if not 0 < value < 1:
                raise UsageError("a threshold is a probability", field=name, expected="0 < value < 1", found=value)
        if depth < 0 or smooth < 0 or min_size < 1 or grow < 0:
            raise UsageError("depth, smooth and grow are not negative, min_size is at least 1", field="depth, smooth")
        self.threshold, self.depth, self.smooth, self.seed = threshold, depth, smooth, seed
        self.min_size, self.grow = min_size, grow

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The objects."""
        from skimage.morphology import h_maxima
        from skimage.segmentation import expand_labels, watershed

        shares = needed_probabilities(probabilities, self)
        inside = shares[0] < 1 - self.threshold
        if len(shares) == 2:
            distance = np.asarray(ndimage.distance_transform_edt(inside), np.float32)
            if self.smooth:
                distance = ndimage.gaussian_filter(distance, self.smooth)
            seeds, _ = components((h_maxima(distance, self.depth) > 0) & inside, corners=True)
            objects = watershed(-distance, seeds, mask=inside)
        else:
            seeds, _ = components(shares[1] > self.seed)
            objects = watershed(-shares[1], seeds, mask=inside)
        # what no seed reaches (too small for a maximum, or all border) is an object of its own
        rest, _ = components(inside & (objects == 0))
        objects = np.where(rest > 0, rest + objects.max(), objects)
        sizes = np.bincount(objects.ravel())
        keep = sizes >= self.min_size
        keep[0] = False
        # numbers in the order of the objects' first voxels, without gaps, whatever the seeds' order was
        present, first = np.unique(objects, return_index=True)
        order = [value for _, value in sorted(zip(first, present, strict=True)) if keep[value]]
        number = np.zeros(len(sizes), np.int32)
        number[order] = np.arange(1, len(order) + 1)
        objects = number[objects]
        return expand_labels(objects, self.grow).astype(np.int32) if self.grow else objects


def _values(label: np.ndarray, labels: Sequence[int] | None) -> list[int]:
    present = np.unique(label)
    return [int(value) for value in present if value != 0 and (labels is None or value in labels)]


def _structures(label: np.ndarray, labels: Sequence[int] | None, together: bool) -> Iterator[np.ndarray]:
    """Masks one after the other: all of them at once would take a byte for each voxel and label."""
    values = _values(label, labels)
    if together:
        yield np.isin(label, values)
        return
    for value in values:
        yield label == value


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds the mask: components are found in it, not in the whole volume."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    return found[0] if found else None

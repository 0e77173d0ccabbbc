"""Transforms of labels: touching instances parted, and targets made from instances."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform
from scipy import ndimage

from medseg.errors import LabelError, UsageError
from medseg.transforms.arrays import like, plain

__all__ = ["InstancesToLabeld", "InteriorBorderLabeld", "RemapLabelsd", "part_instances", "whole_numbers"]


def whole_numbers(label: np.ndarray, key: str) -> np.ndarray:
    """An array of labels or instances as integers: resampling by nearest neighbour leaves whole numbers in floats.

    Args:
        label: any shape.
        key: its name, for the error.

    Raises:
        LabelError: fractions or NaN.

    >>> whole_numbers(np.array([0.0, 3.0]), "instances").tolist()
    [0, 3]
    """
    if label.dtype.kind in "iu":
        return label
    with np.errstate(invalid="ignore"):  # NaN and infinity become some number, which they do not equal
        whole = label.astype(np.int32)
    if not np.array_equal(whole, label):
        raise LabelError("a label image holds whole numbers", field=key, found=f"{label.dtype} with fractions")
    return whole


def part_instances(instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Part touching instances by a background gap of one voxel.

    Of two voxels that touch (faces, edges or corners) and belong to different instances, the one of the larger instance
    (of equal ones: of the higher number) becomes background, so that no two instances touch any more. An instance that
    would disappear keeps its voxels and its neighbours give way, unless one of them disappeared then: only instances of
    a few voxels in a crowd of still smaller ones are lost.

    Args:
        instances: integers (*spatial), 0 background.

    Returns:
        (instances with gaps, of the same dtype; bool mask of the voxels that became background).

    >>> parted, gap = part_instances(np.array([[1, 1, 1, 2, 2]]))
    >>> parted.tolist(), gap.tolist()
    ([[1, 1, 0, 2, 2]], [[False, False, True, False, False]])
    """
    instances = np.asarray(instances)
    if instances.dtype.kind not in "iu":
        raise LabelError("instances are integers", field="instances", found=instances.dtype)
    gap = np.zeros(instances.shape, bool)
    if instances.size == 0:
        return instances.copy(), gap
    # instances from small to large: the higher rank gives way; background ranks highest, it is in nobody's way
    ranked, sizes = _ranked(instances)
    if len(sizes) - int((instances == 0).any()) < 2:
        return instances.copy(), gap
    lowest = ranked
    for axis in range(instances.ndim):
        lowest = _lowest_of_three(lowest, axis)
    gap = (lowest < ranked) & (instances != 0)
    if not gap.any():
        return instances.copy(), gap
    left = sizes - np.bincount(ranked[gap], minlength=len(sizes))
    for gone in np.flatnonzero(left == 0):
        own = ranked == gone
        yielding = ndimage.binary_dilation(own, np.ones((3,) * own.ndim)) & ~own & ~gap & (instances != 0)
        losses = np.bincount(ranked[yielding], minlength=len(sizes))
        if ((losses > 0) & (losses == left)).any():
            continue  # it could only be kept by losing another one
        gap[own], gap[yielding] = False, True
        left += np.bincount(ranked[own], minlength=len(sizes)) - losses
    parted = instances.copy()
    parted[gap] = 0
    return parted, gap


def _ranked(instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each voxel's rank among the values present (by size, then by number, 0 last), and the size of each rank."""
    highest = int(instances.max())
    if instances.min() < 0 or highest > max(4 * instances.size, 2**16):
        values, numbered, sizes = np.unique(instances, return_inverse=True, return_counts=True)
        numbered = numbered.reshape(instances.shape)
    else:
        # counting is much faster than sorting, and numbers of instances are mostly small
        counts = np.bincount(instances.ravel())
        values, numbered = np.flatnonzero(counts), instances
        sizes = counts[values]
    order = np.lexsort((values, sizes, values == 0))
    kind = np.int16 if len(values) < 2**15 else np.int32
    table = np.zeros(highest + 1 if numbered is instances else len(values), kind)
    table[values[order] if numbered is instances else order] = np.arange(len(values), dtype=kind)
    return table[numbered], sizes[order]


def _lowest_of_three(values: np.ndarray, axis: int) -> np.ndarray:
    """Of each voxel and its two neighbours along the axis."""
    turned = np.moveaxis(values, axis, 0)
    lowest = turned.copy()
    np.minimum(lowest[1:], turned[:-1], out=lowest[1:])
    np.minimum(lowest[:-1], turned[1:], out=lowest[:-1])
    return np.moveaxis(lowest, 0, axis)


class InstancesToLabeld(MapTransform):
    """Make the label of instances: 1 (or the label's own class) inside, background between touching ones.

    Args:
        part: part touching instances by a one-voxel gap, in label and instances (see `part_instances`).
        ignore: label value of voxels that count for nothing, which keep it; the data set's own when None.
        keys: (label, instances): names of the arrays written and read.

    A sample without instances (prediction) is given back as it is.

    >>> sample = {"instances": torch.tensor([[[1, 1, 2, 2]]], dtype=torch.int32)}
    >>> InstancesToLabeld()(sample)["label"]
    tensor([[[1, 1, 0, 1]]], dtype=torch.uint8)
    """

    def __init__(
        self,
        part: bool = True,
        ignore: int | None = None,
        keys: KeysCollection = ("label", "instances"),
        allow_missing_keys: bool = True,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 2:
            raise UsageError("two names are needed", field="keys", expected="label, instances", found=keys)
        self.part, self.ignore = part, ignore

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The sample with its label."""
        sample = dict(data)
        label_key, instance_key = self.keys
        if instance_key not in sample:
            return sample
        model = sample[instance_key]
        instances = whole_numbers(plain(model).numpy()[0], str(instance_key))
        if self.part:
            instances, _ = part_instances(instances)
            sample[instance_key] = like(torch.from_numpy(instances[None]), model)
        inside = instances > 0
        if label_key in sample:
            old = plain(sample[label_key]).numpy()[0]
            kept = inside & (old > 0) if self.ignore is None else (inside & (old > 0)) | (old == self.ignore)
            label = np.where(kept, old, inside).astype(old.dtype)
        else:
            label = inside.astype(np.uint8)
        sample[label_key] = like(torch.from_numpy(label[None]), model)
        return sample


class InteriorBorderLabeld(MapTransform):
    """Label 1 inside an instance and 2 within `width` voxels of its border, for networks with three classes.

    Args:
        width: voxels; the border lies inside the instance, so that the foreground is unchanged.
        ignore: value of voxels that count for nothing, which keep it; the data set's own when None.
        keys: (label, instances): names of the arrays written and read.

    An instance too thin to have an interior keeps its innermost voxels as one.

    >>> sample = {"instances": torch.tensor([[[0, 1, 1, 1, 2, 2, 2]]], dtype=torch.int32)}
    >>> InteriorBorderLabeld()(sample)["label"]
    tensor([[[0, 2, 1, 2, 2, 1, 1]]], dtype=torch.uint8)
    """

    out_channels = 3

    def __init__(
        self,
        width: int = 1,
        ignore: int | None = None,
        keys: KeysCollection = ("label", "instances"),
        allow_missing_keys: bool = True,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if width < 1:
            raise UsageError("a border has at least one voxel", field="width", found=width)
        if ignore is not None and ignore < self.out_channels:
            raise UsageError(
                "the value of voxels that count for nothing is one of the classes written",
                field="ignore", expected=f"{self.out_channels} or more", found=ignore,
            )  # fmt: skip
        if len(self.keys) != 2:
            raise UsageError("two names are needed", field="keys", expected="label, instances", found=keys)
        self.width, self.ignore = width, ignore

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The sample with its label."""
        sample = dict(data)
        label_key, instance_key = self.keys
        if instance_key not in sample:
            return sample
        instances = _low_numbers(whole_numbers(plain(sample[instance_key]).numpy()[0], str(instance_key)))
        label = np.zeros(instances.shape, np.uint8)
        for number, box in enumerate(ndimage.find_objects(instances.astype(np.int64)), start=1):
            if box is None:
                continue
            wide = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in box)
            own = instances[wide] == number
            # the image's own border is no border of an instance that leaves the picture
            pad = [(int(b.start == 0), int(b.stop >= n)) for b, n in zip(box, instances.shape, strict=True)]
            padded = np.pad(own, pad, mode="edge")
            distance = ndimage.distance_transform_edt(padded)
            inner = tuple(slice(low, low + n) for (low, _), n in zip(pad, own.shape, strict=True))
            distance = np.asarray(distance)[inner]
            interior = own & (distance > self.width)
            if not interior.any():
                interior = own & (distance == distance[own].max())
            label[wide][own] = 2
            label[wide][interior] = 1
        if self.ignore is not None and label_key in sample:
            label = label.astype(np.uint8 if self.ignore < 256 else np.int16)
            label[plain(sample[label_key]).numpy()[0] == self.ignore] = self.ignore
        sample[label_key] = like(torch.from_numpy(label[None]), sample[instance_key])
        return sample


def _low_numbers(instances: np.ndarray) -> np.ndarray:
    """The same instances, with numbers not above that of voxels: scipy keeps a place for each number up to the highest.

    >>> _low_numbers(np.array([0, 10**9, 5])).tolist()
    [0, 2, 1]
    """
    if instances.size == 0 or int(instances.max()) <= instances.size:
        return instances
    present, numbered = np.unique(np.maximum(instances, 0), return_inverse=True)
    return numbered.reshape(instances.shape) + int(present[0] != 0)


class RemapLabelsd(MapTransform):
    """Give label values new meanings: several structures merged into one, some dropped.

    Args:
        mapping: old value -> new value, both from 0 to 255; values that are not named stay as they are.
        keys: keys of the labels.
        allow_missing_keys: whether keys may be missing (in prediction there is no label).

    Raises:
        UsageError: values out of range. LabelError: a label that does not hold whole numbers from 0 to 255.

    >>> RemapLabelsd({2: 1, 3: 0})({"label": torch.tensor([[0, 1, 2, 3]])})["label"]
    tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    """

    def __init__(
        self, mapping: Mapping[int, int], keys: KeysCollection = ("label",), allow_missing_keys: bool = True
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        pairs = {int(old): int(new) for old, new in mapping.items()}
        if not pairs or not all(0 <= value <= 255 for pair in pairs.items() for value in pair):
            raise UsageError("label values are from 0 to 255", field="mapping", found=dict(mapping))
        self.table = np.arange(256, dtype=np.uint8)
        self.table[list(pairs)] = list(pairs.values())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The sample with its labels renamed, as uint8."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            label = plain(sample[key]).numpy()
            whole = whole_numbers(label, str(key))
            if label.size and (whole.min() < 0 or whole.max() > 255):
                raise LabelError("labels are whole numbers from 0 to 255", field=str(key), found=label.dtype)
            sample[key] = like(torch.from_numpy(self.table[whole]), sample[key])
        return sample

"""The U-Net paper's weight map: background between close instances, or voxels near a boundary, count more.

Source: Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015,
equation 2, doi:10.1007/978-3-319-24574-4_28.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform

from medseg.errors import GeometryError, LabelError, UsageError
from medseg.transforms.arrays import components, like, plain, spacing_of
from medseg.transforms.labels import part_instances, whole_numbers
from medseg.transforms.nearest_two import distance_to_other, distance_to_two

__all__ = ["BoundaryWeightMapd", "boundary_weight_map"]

Mode = Literal["separation", "contour"]
ClassWeights = Sequence[float] | Mapping[int, float] | Literal["balanced"] | None

# Where the term is smaller it is left out; 1e-4 is promised.
_NEGLIGIBLE = 0.5e-4


def boundary_weight_map(
    instances: np.ndarray,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    mode: Mode = "separation",
    spacing: Sequence[float] | None = None,
    class_weights: ClassWeights = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """The weight of every voxel.

    `separation` (equation 2 of the paper): w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on background, with d1 and d2
    the Euclidean distances to the nearest and the second nearest instance (to the set of its voxels); w = w_c on
    foreground, and everywhere when there are fewer than two instances. A straight gap of g voxels has d1 + d2 = g +
    1. Instances that touch are first parted by a gap of one voxel, which is background from then on (see
    `part_instances`).

    `contour`: w = w_c + w0 exp(-d^2 / (2 sigma^2)) on both sides of every boundary between instances or background, d
    the distance to the nearest voxel of another value (1 for the voxels at the boundary). Nothing is parted.

    Args:
        instances: integers (*spatial), 2-D, 3-D or of any dimension; 0 background, each other value one instance.
        w0: height of the term; 0 turns it off.
        sigma: its width, in the unit of `spacing` (voxels when None).
        mode: "separation" or "contour".
        spacing: size of a voxel along each axis; 1 when None.
        class_weights: w_c, one number for each class (sequence or mapping); "balanced": such that each class present
            has the same sum, with mean 1 over the voxels of a class; None: 1.
        classes: class of each voxel, for w_c; by default 0 on background, 1 on instances; negative: of none, with w_c
            = 0.

    Returns:
        float32 of the shape of `instances`; equal to the definition, computed by one distance transform per instance,
        within 1e-4.

    Raises:
        LabelError: not integers, or negative. GeometryError: spacing or classes that do not fit. UsageError: others.

    The cost does not depend on the number of instances: it grows with the voxels within the term's reach (5.2 sigma for
    w0 = 10) of any instance, see `medseg.transforms.nearest_two`.

    >>> gap = np.array([[1, 1, 0, 2, 2]] * 9)
    >>> [round(float(w), 3) for w in boundary_weight_map(gap)[4]]
    [1.0, 1.0, 10.231, 1.0, 1.0]
    """
    instances = _checked(instances)
    step = _steps(spacing, instances.ndim)
    _check_term(w0, sigma, mode)
    if mode == "separation":
        instances, _ = part_instances(instances)
    weight = _class_weights(instances, class_weights, classes)
    if w0 == 0 or instances.size == 0:
        return weight
    # beyond this distance the term is negligible
    reach = sigma * math.sqrt(2 * math.log(max(w0 / _NEGLIGIBLE, 1.0)))
    box = _box_of_changes(instances, step, reach)
    if box is None:
        return weight
    inside = instances[box]
    distance = distance_to_two if mode == "separation" else distance_to_other
    term = distance(inside, step, reach)
    np.square(term, out=term)
    np.multiply(term, np.float32(-0.5 / sigma**2), out=term)
    np.exp(term, out=term)
    np.multiply(term, np.float32(w0), out=term)
    if mode == "separation":
        term[inside != 0] = 0
    weight[box] += term
    return weight


class BoundaryWeightMapd(MapTransform):
    """Write `weight` for a sample: the map of its instances, 0 where the label says ignore.

    Instances come from `sample["instances"]` (in the data set's files, or one file per object); without them each
    connected component (through corners too) of each label is one. In `separation` mode touching instances are first
    parted by a one-voxel gap, in the instances and in the training target alike (see `part_instances`); in `contour`
    mode labels are left as they are and the boundaries are those of the label.

    Args:
        w0, sigma, mode, class_weights: as in `boundary_weight_map`; w_c belongs to the label's class.
        use_spacing: sigma in the unit of the image's spacing (mm) instead of voxels.
        ignore: label value of voxels that count for nothing; the data set's own when None. 255 is usual.
        keys: (label, instances, weight): names of the arrays read and written.

    >>> sample = {"label": torch.tensor([[[1, 1, 0, 1, 1]]], dtype=torch.uint8)}
    >>> BoundaryWeightMapd()(sample)["weight"].round(decimals=3)
    tensor([[[ 1.0000,  1.0000, 10.2310,  1.0000,  1.0000]]])
    """

    def __init__(
        self,
        w0: float = 10.0,
        sigma: float = 5.0,
        mode: Mode = "separation",
        class_weights: ClassWeights = None,
        use_spacing: bool = False,
        ignore: int | None = None,
        keys: KeysCollection = ("label", "instances", "weight"),
        allow_missing_keys: bool = True,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 3:
            raise UsageError("three names are needed", field="keys", expected="label, instances, weight", found=keys)
        _check_term(w0, sigma, mode)
        _by_class(class_weights)
        self.w0, self.sigma = w0, sigma
        self.class_weights: ClassWeights = class_weights
        self.mode: Mode = mode
        self.use_spacing, self.ignore = use_spacing, ignore

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The sample with `weight` (1, *spatial) float32; a sample without a label (prediction) is given back."""
        sample = dict(data)
        label_key, instance_key, weight_key = self.keys
        if label_key not in sample:
            return sample
        label = whole_numbers(plain(sample[label_key]).numpy()[0], str(label_key))
        void = np.zeros(label.shape, bool) if self.ignore is None else label == self.ignore
        known = np.where(void, 0, label).astype(np.int32)
        if self.mode == "contour":
            instances = known
        elif instance_key in sample:
            instances = whole_numbers(plain(sample[instance_key]).numpy()[0], str(instance_key))
        else:
            instances = _components(known)
        if self.mode == "separation":
            instances, gap = part_instances(instances)
            if gap.any():
                label = np.where(gap & ~void, 0, label).astype(label.dtype)
                sample[label_key] = like(torch.from_numpy(label[None]), sample[label_key])
                known = np.where(gap, 0, known)
                if instance_key in sample:
                    sample[instance_key] = like(torch.from_numpy(instances[None]), sample[instance_key])
        weight = boundary_weight_map(
            instances,
            w0=self.w0,
            sigma=self.sigma,
            mode=self.mode,
            spacing=spacing_of(sample[label_key]) if self.use_spacing else None,
            class_weights=self.class_weights,
            classes=np.where(void, -1, known),
        )
        weight[void] = 0
        sample[weight_key] = like(torch.from_numpy(weight[None]), sample[label_key])
        return sample


def _components(label: np.ndarray) -> np.ndarray:
    instances, count = np.zeros(label.shape, np.int32), 0
    for value in np.unique(label[label > 0]):
        # with corners: a thin oblique structure is one instance, and not parted into its voxels
        found, number = components(label == value, corners=True)
        instances[found > 0] = found[found > 0] + count
        count += number
    return instances


def _check_term(w0: float, sigma: float, mode: str) -> None:
    if mode not in ("separation", "contour"):
        raise UsageError("unknown mode", field="mode", expected="separation or contour", found=mode)
    try:
        sound = 0 <= w0 < math.inf and 0 < sigma < math.inf
    except (TypeError, ValueError):  # no numbers at all
        sound = False
    if not sound:
        raise UsageError("w0 is not negative and sigma positive", field="w0, sigma", found=f"{w0}, {sigma}")


def _box_of_changes(instances: np.ndarray, step: tuple[float, ...], reach: float) -> tuple[slice, ...] | None:
    """The box outside of which nothing is within reach of a boundary; None when there is no boundary."""
    box, filled = [], instances != 0
    for axis, s in enumerate(step):
        others = tuple(a for a in range(instances.ndim) if a != axis)
        # planes that hold any instance; where every plane does, the box is the image
        planes = np.flatnonzero(filled.any(axis=others))
        if not planes.size:
            return None
        margin = math.ceil(reach / s)
        box.append(slice(max(0, int(planes[0]) - margin), int(planes[-1]) + 1 + margin))
    return tuple(box)


def _checked(instances: np.ndarray) -> np.ndarray:
    instances = np.asarray(instances)
    if instances.dtype.kind not in "iub":
        raise LabelError("instances are integers", field="instances", expected="integers", found=instances.dtype)
    if instances.ndim < 1:
        raise GeometryError("instances have at least one axis", field="instances", found=instances.shape)
    if instances.dtype.kind == "i" and instances.size and instances.min() < 0:
        raise LabelError(
            "instances are not negative", field="instances", found=f"{np.count_nonzero(instances < 0)} negative voxels"
        )
    return instances.astype(np.uint8) if instances.dtype.kind == "b" else instances


def _steps(spacing: Sequence[float] | None, dims: int) -> tuple[float, ...]:
    try:
        step = (1.0,) * dims if spacing is None else tuple(float(s) for s in np.atleast_1d(spacing))
    except (TypeError, ValueError):  # what is no number
        step = ()
    if len(step) != dims or not all(s > 0 and math.isfinite(s) for s in step):
        raise GeometryError("spacing does not fit", field="spacing", expected=f"{dims} positive numbers", found=spacing)
    return step


def _class_weights(instances: np.ndarray, given: Any, classes: np.ndarray | None) -> np.ndarray:
    if given is None:
        return np.ones(instances.shape, np.float32)
    kinds = (instances != 0).astype(np.int64) if classes is None else np.asarray(classes).astype(np.int64)
    if kinds.shape != instances.shape:
        raise GeometryError("classes have another shape", field="classes", expected=instances.shape, found=kinds.shape)
    present, where, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    none = int((present < 0).sum())  # they come first
    present, counts = present[none:], counts[none:]
    by_class = _by_class(given)
    if by_class is None:
        table = counts.sum() / (len(present) * counts)
    else:
        if lacking := [int(kind) for kind in present if kind not in by_class]:
            raise _weights_error(f"{by_class}, none for {lacking}")
        table = np.array([by_class[int(kind)] for kind in present])
    return np.concatenate([np.zeros(none), table])[where].reshape(instances.shape).astype(np.float32)


def _by_class(given: Any) -> dict[int, float] | None:
    """The weight of each class; None for "balanced" (and for None), which depends on the image."""
    if given is None or (isinstance(given, str) and given == "balanced"):
        return None
    try:
        pairs = list(given.items() if isinstance(given, Mapping) else enumerate(given))
        by_class = {kind: float(share) for kind, share in pairs}
        sound = all(0 <= share < math.inf for share in by_class.values())
        sound = sound and not any(isinstance(share, str) for _, share in pairs)  # "2" is none
    except (TypeError, ValueError):  # a number where several are needed, or what is none
        sound, by_class = False, {}
    if not sound:
        raise _weights_error(given)
    return by_class


def _weights_error(found: object) -> UsageError:
    return UsageError(
        "each class needs a weight that is not negative",
        field="class_weights",
        expected="a number for each class (in a sequence or by its number), or balanced",
        found=found,
    )

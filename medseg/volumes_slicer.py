"""Segmentations of 3D Slicer (`.seg.nrrd`): segments with names, on layers where they overlap, cut to what is drawn.

What a number stands for is written in each file (`Segment0_Name`, `Segment0_LabelValue`) and need not be the same in
all files of a set: segments are found by their names. The voxels fill a box around the segments; the grid of the image
that was segmented stands among the conversion parameters. Verified reading is that of every NRRD, see volumes_itk.
Format: https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.errors import FormatError, LabelError, counted
from medseg.volumes_geometry import Geometry, check_affine
from medseg.volumes_labels import value_counts

__all__ = ["Segment", "by_name", "fold_name", "lay_together", "numbered", "read_segments", "reference_grid", "restore"]

_FIELD = re.compile(r"Segment([0-9]{1,6})_(ID|Name|LabelValue|Layer)")
_PARAMETERS, _REFERENCE = "Segmentation_ConversionParameters", "Reference image geometry"
_TOLERANCE = 0.01  # voxels: headers are decimal numbers, boxes begin at whole voxels
_MOST = 1 << 32  # voxels of a grid that a header alone claims


@dataclass(frozen=True)
class Segment:
    """A segment's name, its number in the voxels and the layer (of the first dimension of four) that it lies on."""

    name: str
    value: int
    layer: int


def read_segments(fields: Mapping[str, str], path: Path, case: str | None = None) -> tuple[Segment, ...]:
    """The segments that an NRRD's own fields list, in their order; none where it is no segmentation.

    Raises:
        FormatError: E305, a number that is none or that of the background.

    >>> read_segments({"Segment0_Name": "liver", "Segment0_LabelValue": "2", "Segment0_Layer": "0"}, Path("a.seg.nrrd"))
    (Segment(name='liver', value=2, layer=0),)
    """
    listed: dict[int, dict[str, str]] = {}
    for key, text in fields.items():
        if found := _FIELD.fullmatch(key):
            listed.setdefault(int(found[1]), {})[found[2]] = text.strip()
    try:
        segments = tuple(  # the oldest files have a layer of zeros and ones for each segment, and say neither
            Segment(own.get("Name") or own.get("ID", ""), int(own.get("LabelValue", 1)), int(own.get("Layer", number)))
            for number, own in sorted(listed.items())
        )
        if wrong := [segment.value for segment in segments if segment.value < 1]:
            raise ValueError(f"a segment with the number {wrong[0]}, which is background")
        return segments
    except ValueError as error:
        raise FormatError("the list of segments is damaged", code="E305", case=case, file=path, found=error) from None


def reference_grid(fields: Mapping[str, str], stored: Geometry) -> tuple[Geometry, tuple[int, ...]]:
    """The grid of the image that was segmented, and where on it the stored box begins (i, j, k).

    The stored grid itself, and 0, where the file does not name that image's grid, or names one whose voxels are others.
    One voxel alone is what the format stores for "nothing drawn": its place says nothing.
    """
    parameters = (text.split("|") for text in fields.get(_PARAMETERS, "").split("&"))
    text = next((parts[1] for parts in parameters if parts[0] == _REFERENCE and len(parts) > 1), "")
    as_stored = stored, (0, 0, 0)
    try:
        numbers = np.array([float(number) for number in text.strip("; ").split(";")])
        affine, ends = numbers[:16].reshape(4, 4).copy(), numbers[16:].reshape(3, 2)
    except ValueError:  # not there, or damaged
        return as_stored
    affine[:3, 3] += affine[:3, :3] @ ends[:, 0]
    sizes = ends[:, 1] - ends[:, 0] + 1
    if check_affine(affine) is not None or not (sizes.min() >= 1 and sizes.prod() <= _MOST):
        return as_stored
    grid = Geometry.of(tuple(int(n) for n in sizes), affine)
    if math.prod(stored.shape) == 1:
        return grid, (0, 0, 0)
    way = np.linalg.solve(affine, stored.affine)  # from voxels of the box to voxels of the image
    start = np.rint(way[:3, 3])
    corners = np.array(stored.shape)  # where a direction that differs has led to at the box's far end
    apart = np.abs(way[:3, :3] - np.eye(3)) @ corners + np.abs(way[:3, 3] - start)
    if apart.max() > _TOLERANCE:
        return as_stored
    return grid, tuple(int(n) for n in start)


def restore(array: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The box (i, j, k) in its place on the whole grid, 0 around it; what sticks out is cut off.

    >>> restore(np.ones((2, 2, 1)), (1, -1, 0), (4, 3, 1))[..., 0].tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if array.size > 1 and tuple(shape) == array.shape and not any(start):
        return array
    whole = np.zeros(shape, array.dtype)
    if array.size == 1:
        return whole
    inside, box = [], []
    for begin, own, full in zip(start, array.shape, shape, strict=True):
        low, high = max(0, begin), min(full, begin + own)
        inside.append(slice(low, max(low, high)))
        box.append(slice(low - begin, max(low, high) - begin))
    whole[tuple(inside)] = array[tuple(box)]
    return whole


def numbered(segments: Sequence[Segment], layers: int) -> dict[int, str]:
    """The segments' names by the numbers that `lay_together` gives: on one layer their own, else in their order."""
    return {n if layers > 1 else segment.value: segment.name for n, segment in enumerate(segments, start=1)}


def lay_together(
    array: np.ndarray, segments: Sequence[Segment], path: Path, case: str | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One number for each voxel of (i, j, k[, layer]), and notes.

    Where segments of several layers overlap, the later one has the voxel, as in 3D Slicer's own export.

    Raises:
        FormatError: E305, a layer that the file does not have.
    """
    if array.ndim == 3:
        return array, ()
    kind = np.uint8 if len(segments) < 256 else np.int32
    result = np.zeros(array.shape[:3], kind)
    overlap = 0
    for number, segment in enumerate(segments, start=1):
        if not 0 <= segment.layer < array.shape[3]:
            found = f"layer {segment.layer} of {array.shape[3]}"
            raise FormatError("the list of segments is damaged", code="E305", case=case, file=path, found=found)
        mask = array[..., segment.layer] == segment.value
        overlap += int(np.count_nonzero(result[mask]))
        result[mask] = number
    return result, (f"{overlap} voxels are in several segments; the later one has them",) if overlap else ()


def by_name(
    segments: Mapping[int, str],
    array: np.ndarray,
    names: Mapping[int, str],
    *,
    path: Path | None = None,
    case: str | None = None,
) -> tuple[dict[int, int] | None, tuple[str, ...]]:
    """What each number of a segmentation means by the labels' names (whatever their case), and notes.

    Args:
        segments: number -> the segment's name.
        array: the numbers.
        names: index of a label -> its name.

    Returns:
        {number: index}; None where there is one label alone and no segment has its name: then numbers mean what they do
        in other files, which is noted.

    Raises:
        LabelError: E332, a segment with voxels has the name of no label.

    >>> by_name({1: "Tumour", 2: "liver"}, np.array([0, 1, 2]), {0: "background", 1: "liver", 2: "tumour"})
    ({1: 2, 2: 1}, ())
    """
    known = {"background": 0, **{fold_name(name): index for index, name in names.items()}}
    table = {number: known[fold_name(name)] for number, name in segments.items() if fold_name(name) in known}
    if not table and len(set(known.values()) - {0}) == 1:
        listed = ", ".join(f"{number} = {name}" for number, name in segments.items())
        return None, (f"no segment has the name of the label, so they are taken by their numbers: {listed}",)
    present = {int(v): int(n) for v, n in zip(*value_counts(array), strict=True)}
    if strange := {name: present[n] for n, name in segments.items() if n in present and n not in table}:
        raise LabelError(
            "a segment is not among the labels", code="E332", case=case, file=path, field="label",
            expected=", ".join(names.values()),
            found=", ".join(f"`{name}` in {counted(count, 'voxel')}" for name, count in strange.items()),
            fix="call it as in `labels` (3D Slicer: double-click its name), or add it there",
        )  # fmt: skip
    return table, ()


def fold_name(name: str) -> str:
    """The same for names that differ in upper and lower case or in spaces alone."""
    return " ".join(name.split()).casefold()

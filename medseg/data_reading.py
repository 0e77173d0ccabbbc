"""The arrays of a case as they are stored: channels, label, instances, field of view, each held against the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.config import DatasetSpec
from medseg.config_dataset import Objects
from medseg.data_case import Case
from medseg.errors import LabelError, MedsegError, UsageError, collect
from medseg.transforms.arrays import parted_components
from medseg.volumes import Geometry, Volume, check_pair, read_image, read_label

__all__ = ["read_channels", "read_fov", "read_instances", "read_reference"]


def read_reference(
    case: Case, spec: DatasetSpec, image: Volume | Geometry | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Label (1, *spatial) and, where the set tells objects apart, instances (1, *spatial) int32 of a case.

    Args:
        case: the case; one without reference gives an empty dict.
        spec: the data set's facts.
        image: what the label has to share its grid with; None skips that check.

    Raises:
        DataError: see `load_sample`.
    """
    result: dict[str, np.ndarray] = {}
    notes: list[str] = []
    if case.label is not None:
        mapping = {tuple(rgb): index for index, rgb in spec.colours.items()} if spec.colours else spec.encoding
        volume = read_label(
            case.label, dims=spec.dims, allowed=spec.labels, ignore=spec.ignore, affine=spec.affine, case=case.id,
            mapping=None if mapping == "index" else mapping, names=spec.labels,
        )  # fmt: skip
        if image is not None:
            check_pair(image, volume, case=case.id)
        result["label"] = volume.array
        notes += volume.notes
    if case.instances:
        instances, more = read_instances(case, spec, image)
        result["instances"] = instances
        notes += more
        if "label" not in result:
            result["label"] = (instances > 0).astype(np.uint8)
    elif spec.instances is not None and "label" in result:
        result["instances"] = _components(result["label"], spec)
    return result, notes


def read_instances(case: Case, spec: DatasetSpec, image: Volume | Geometry | None) -> tuple[np.ndarray, list[str]]:
    """Instances (1, *spatial) int32, 0 = background, from one index image or one mask for each instance.

    Masks are numbered 1, 2, ... in natural order of their files' names. A voxel that several masks claim goes to the
    smallest of them (ties: to the later name), so that no nucleus vanishes under a larger one. One mask alone that is
    all 0 says that the image shows no object.

    Raises:
        DataError: see `load_sample`; LabelError E336, a mask without a voxel among others.
    """
    if len(case.instances) == 1 and not is_single_mask(spec):
        volume = read_label(case.instances[0], dims=spec.dims, affine=spec.affine, palette="index", case=case.id)
        if image is not None:
            check_pair(image, volume, case=case.id)
        return volume.array.astype(np.int32), list(volume.notes)
    masks: list[tuple[int, int, tuple[slice, ...], np.ndarray]] = []
    problems: list[MedsegError] = []
    shape: tuple[int, ...] | None = None
    for number, path in enumerate(case.instances, start=1):
        try:
            volume = read_label(path, dims=spec.dims, affine=spec.affine, case=case.id)
            if image is not None:
                check_pair(image, volume, case=case.id)
        except MedsegError as error:
            problems += error.problems
            continue
        shape = volume.array.shape
        box = _bounding_box(volume.array[0])
        if box is None and len(case.instances) == 1:  # an image without objects; an empty folder may be a forgotten one
            return np.zeros(shape, np.int32), list(volume.notes)
        if box is None:
            fix = "remove the file"
            problems.append(
                LabelError("an instance's mask has no voxel", code="E336", case=case.id, file=path, fix=fix)
            )
            continue
        window = volume.array[0][box] > 0
        masks.append((int(window.sum()), number, box, window))
    if problems:
        raise collect(problems)
    assert shape is not None
    result = np.zeros(shape, np.int32)
    overlap = 0
    for _, number, box, window in sorted(masks, key=lambda mask: (-mask[0], mask[1])):
        region = result[0][box]
        overlap += int(np.count_nonzero(region[window]))
        region[window] = number
    return result, [f"{overlap} voxels are claimed by several instances; the smallest has them"] if overlap else []


def is_single_mask(spec: DatasetSpec) -> bool:
    """Whether a case's only file of instances is the mask of one, not an index image: the pattern tells."""
    parts = [part for way in spec.files for part in (way.training, way.validation, way.test) if part is not None]
    return any(part.instances is not None and "*" in part.instances for part in parts)


def read_channels(
    files: Sequence[Path], spec: DatasetSpec, case: str, *, series: str | None = None
) -> tuple[Volume, list[str]]:
    """The image (C, *spatial) as stored, of one file or of one file for each channel, and the reader's notes.

    Raises:
        UsageError: another number of files than channels. DataError: a file is refused, or the channels' grids differ.
    """
    common: dict[str, Any] = {"dims": spec.dims, "nan": spec.nan, "affine": spec.affine, "case": case}
    if len(files) == 1:
        image = read_image(files[0], channels=spec.in_channels, colour=spec.colour, series=series, **common)
        return image, list(image.notes)
    if len(files) != spec.in_channels:
        raise UsageError(
            "another number of files than channels",
            case=case,
            expected=f"{spec.in_channels}: {', '.join(spec.channels)}",
            found=len(files),
        )
    volumes = [read_image(path, channels=1, **common) for path in files]
    for other in volumes[1:]:
        check_pair(volumes[0], other, case=case)
    first = volumes[0]
    array = np.concatenate([volume.array for volume in volumes])
    notes = [note for volume in volumes for note in volume.notes]
    return Volume(array, first.geometry, first.path, first.format, first.header, len(array), tuple(notes)), notes


def read_fov(case: Case, spec: DatasetSpec, image: Volume | Geometry | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Field of view (1, *spatial) uint8, 0 outside; empty where the set has none. Errors as `read_reference`."""
    if case.fov is None:
        return {}, []
    volume = read_label(case.fov, dims=spec.dims, mapping="nonzero", affine=spec.affine, case=case.id)
    if image is not None:
        check_pair(image, volume, case=case.id)
    return {"fov": volume.array.astype(np.uint8)}, list(volume.notes)


def _components(label: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    rule = spec.instances if isinstance(spec.instances, Objects) else Objects()
    result = np.zeros(label.shape, np.int32)
    for index in sorted(spec.labels)[1:]:
        parts = parted_components(label[0] == index, neck=rule.neck, min_size=rule.min_size)
        result[0] += np.where(parts > 0, parts + result.max(), 0).astype(np.int32)
    return result


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not used.size:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)

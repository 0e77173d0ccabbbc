"""From a data set's facts to cases, folds and samples.

    cases = find_cases(load_dataset("liver"), root)      what there is
    fold = make_split(cases, folds=5, seed=0)[0]         which to train on
    sample = load_sample(cases[0], spec)                 one case in memory, on its native grid

A sample is a dict of MONAI MetaTensors, channel first: `image` float32 (C, *spatial), `label` (1, *spatial) uint8 or
int16, `instances` (1, *spatial) int32, `fov` (1, *spatial) uint8, each with its affine; and `case` (the id), `native`
(the Geometry of the image as stored) and `notes` (what the reader wants told).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.config import DatasetSpec
from medseg.data_layout import PARTS, Case, list_cases
from medseg.errors import LabelError, MedsegError, UsageError, collect
from medseg.splitting import Fold, check_leaks, make_split
from medseg.volumes import Geometry, Volume, check_pair, read_image, read_label

__all__ = [
    "Case",
    "Fold",
    "check_leaks",
    "data_root",
    "find_cases",
    "load_image_sample",
    "load_sample",
    "make_split",
    "read_instances",
    "read_reference",
]


def data_root(option: str | Path | None = None, *, must_exist: bool = True) -> Path:
    """The data root: `option` (--data), else the environment's MEDSEG_DATA, nothing more.

    Raises:
        UsageError: E102, neither is given, or there is no such folder.
    """
    given = option or os.environ.get("MEDSEG_DATA")
    if not given:
        fix = "--data DIR, or set MEDSEG_DATA"
        raise UsageError("the data folder is not given", code="E102", field="--data", fix=fix)
    root = Path(given)
    if must_exist and not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise UsageError("no such data folder", code="E102", field="--data", file=root, expected="a folder", found=found)
    return root


def find_cases(spec: DatasetSpec, root: str | Path, *, part: str = "training") -> list[Case]:
    """The cases of a part, in natural order of their ids.

    Args:
        spec: the data set's facts.
        root: the data root.
        part: "training" (everything that is labelled and not for testing: an official validation part too, told apart
            by `Case.split`), "validation", "test", or "all".

    Raises:
        UsageError: E103, no such folder or not one case; ConfigError: dataset.json, a table or a list is wrong, a path
            leaves the root, two cases have one id; DataError: labels or images are missing. All of them, collected.
    """
    if part not in (*PARTS, "all"):
        raise UsageError("no such part", field="part", expected=", ".join((*PARTS, "all")), found=part)
    root = data_root(root)
    cases, problems = list_cases(spec, root)
    if problems:
        raise collect(problems)
    wanted = {"training": ("training", "validation"), "all": PARTS}.get(part, (part,))
    chosen = [case for case in cases if case.split in wanted]
    if not chosen:
        looked = [text for layout in spec.files for text in _places(layout, wanted)]
        expected = " or ".join(looked) or "files for this part in datasets.yaml"
        fix = f"put {spec.name} there ({spec.url})" if spec.url else "put the images there"
        message = f"no case of {spec.name}, part {part}"
        raise UsageError(message, code="E103", file=root, expected=expected, found="0 cases, at least 1 is needed", fix=fix)
    return chosen


def load_sample(case: Case, spec: DatasetSpec) -> dict[str, Any]:
    """Read a case: image, label, instances and field of view, checked against each other, on the native grid.

    Raises:
        DataError: a file is refused (FormatError), the grids differ (GeometryError), labels are wrong (LabelError); all
            problems of the case, collected.
    """
    image, notes = _read_channels(case.images, spec, case.id)
    arrays: dict[str, np.ndarray] = {}
    problems: list[MedsegError] = []
    for name, read in (("reference", read_reference), ("fov", _read_fov)):
        try:
            found, more = read(case, spec, image)
        except MedsegError as error:
            problems += error.problems
            continue
        arrays |= {("fov" if name == "fov" else key): array for key, array in found.items()}
        notes += more
    if problems:
        raise collect(problems)
    return _to_sample(case.id, image, arrays, notes)


def load_image_sample(
    paths: str | Path | Sequence[str | Path], spec: DatasetSpec, *, case: str | None = None, series: str | None = None
) -> dict[str, Any]:
    """Read an image without label, for prediction: one file, one DICOM folder, or one file for each channel.

    Raises:
        DataError: the image is refused.
    """
    from medseg.volumes import case_id

    files = tuple(Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths))
    name = case or case_id(files[0])
    image, notes = _read_channels(files, spec, name, series=series)
    return _to_sample(name, image, {}, notes)


def read_reference(case: Case, spec: DatasetSpec, image: Volume | Geometry | None) -> tuple[dict[str, np.ndarray], list[str]]:
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
            mapping=None if mapping == "index" else mapping,
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
    elif spec.instances == "components" and "label" in result:
        result["instances"] = _components(result["label"], spec)
    return result, notes


def read_instances(case: Case, spec: DatasetSpec, image: Volume | Geometry | None) -> tuple[np.ndarray, list[str]]:
    """Instances (1, *spatial) int32, 0 = background, from one index image or one mask for each instance.

    Masks are numbered 1, 2, ... in natural order of their files' names. A voxel that several masks claim goes to the
    smallest of them (ties: to the later name), so that no nucleus vanishes under a larger one.

    Raises:
        DataError: see `load_sample`; LabelError E336, a mask without a voxel.
    """
    if len(case.instances) == 1 and not _is_single_mask(case, spec):
        volume = read_label(case.instances[0], dims=spec.dims, affine=spec.affine, palette="index", case=case.id)
        if image is not None:
            check_pair(image, volume, case=case.id)
        return volume.array.astype(np.int32), list(volume.notes)
    masks: list[tuple[int, int, tuple[slice, ...], np.ndarray]] = []
    problems: list[MedsegError] = []
    shape: tuple[int, ...] | None = None
    for number, path in enumerate(case.instances, start=1):
        try:
            volume = read_label(path, dims=spec.dims, mapping="nonzero", affine=spec.affine, case=case.id)
            if image is not None:
                check_pair(image, volume, case=case.id)
        except MedsegError as error:
            problems += error.problems
            continue
        shape = volume.array.shape
        box = _bounding_box(volume.array[0])
        if box is None:
            fix = "remove the file"
            problems.append(LabelError("an instance's mask has no voxel", code="E336", case=case.id, file=path, fix=fix))
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


def _is_single_mask(case: Case, spec: DatasetSpec) -> bool:
    # one file may be an index image or the only mask of an image with one nucleus: the pattern tells
    parts = [part for way in spec.files for part in (way.training, way.validation, way.test) if part is not None]
    return any(part.instances is not None and "*" in part.instances for part in parts)


def _read_channels(files: Sequence[Path], spec: DatasetSpec, case: str, *, series: str | None = None) -> tuple[Volume, list[str]]:
    common: dict[str, Any] = {"dims": spec.dims, "nan": spec.nan, "affine": spec.affine, "case": case}
    if len(files) == 1:
        image = read_image(files[0], channels=spec.in_channels, colour=spec.colour, series=series, **common)
        return image, list(image.notes)
    if len(files) != spec.in_channels:
        raise UsageError(
            "another number of files than channels", case=case, expected=f"{spec.in_channels}: {', '.join(spec.channels)}", found=len(files)
        )
    volumes = [read_image(path, channels=1, **common) for path in files]
    for other in volumes[1:]:
        check_pair(volumes[0], other, case=case)
    first = volumes[0]
    array = np.concatenate([volume.array for volume in volumes])
    notes = [note for volume in volumes for note in volume.notes]
    return Volume(array, first.geometry, first.path, first.format, first.header, len(array), tuple(notes)), notes


def _read_fov(case: Case, spec: DatasetSpec, image: Volume) -> tuple[dict[str, np.ndarray], list[str]]:
    if case.fov is None:
        return {}, []
    volume = read_label(case.fov, dims=spec.dims, mapping="nonzero", affine=spec.affine, case=case.id)
    check_pair(image, volume, case=case.id)
    return {"fov": volume.array.astype(np.uint8)}, list(volume.notes)


def _components(label: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    from scipy import ndimage

    result = np.zeros(label.shape, np.int32)
    for index in spec.labels:
        if index == 0:
            continue
        parts, count = ndimage.label(label[0] == index)  # the default structure joins voxels that share a face
        result[0] += np.where(parts > 0, parts + result.max(), 0).astype(np.int32) if count else 0
    return result


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not used.size:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _to_sample(case: str, image: Volume, arrays: dict[str, np.ndarray], notes: Sequence[str]) -> dict[str, Any]:
    import torch
    from monai.data.meta_tensor import MetaTensor

    affine = torch.as_tensor(np.array(image.geometry.affine))  # a copy: the geometry's own is read-only
    sample: dict[str, Any] = {"image": MetaTensor(torch.as_tensor(np.ascontiguousarray(image.array, np.float32)), affine=affine)}
    for name, array in arrays.items():
        sample[name] = MetaTensor(torch.as_tensor(np.ascontiguousarray(array)), affine=affine.clone())
    return sample | {"case": case, "native": image.geometry, "notes": tuple(notes)}


def _places(layout: Any, parts: Sequence[str]) -> list[str]:
    if layout.training is None:
        return [layout.msd or layout.nnunet or layout.csv]
    return [files.image[0] for part in parts if (files := getattr(layout, part)) is not None]

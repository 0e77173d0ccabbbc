"""From a data set's facts to cases, folds and samples.

    cases = find_cases(load_dataset("liver"), root)      what there is
    fold = make_split(cases, folds=5, seed=0)[0]         which to train on
    sample = load_sample(cases[0], spec)                 one case in memory, on its native grid

A sample is a dict of MONAI MetaTensors, channel first: `image` float32 (C, *spatial), `label` (1, *spatial) uint8 or
int16, `instances` (1, *spatial) int32, `fov` (1, *spatial) uint8, each with its affine; and `case` (the id), `native`
(the Geometry of the image as stored) and `notes` (what the reader wants told).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.config import DatasetSpec
from medseg.config_place import data_root
from medseg.data_layout import PARTS, Case, list_cases
from medseg.data_reading import read_channels, read_fov, read_instances, read_reference
from medseg.errors import MedsegError, UsageError, collect
from medseg.splitting import Fold, check_leaks, check_parts, make_split, tell_test_leaks
from medseg.volumes import Volume

__all__ = [
    "Case",
    "Fold",
    "check_leaks",
    "check_parts",
    "data_root",
    "find_cases",
    "find_parts",
    "load_image_sample",
    "load_sample",
    "make_split",
    "read_channels",
    "read_fov",
    "read_instances",
    "read_reference",
    "tell_test_leaks",
]


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
    return _of_part(_listed(spec, root), part, spec, root)


def find_parts(spec: DatasetSpec, root: str | Path) -> tuple[list[Case], list[Case]]:
    """What `find_cases` gives for training, and the cases for testing (perhaps none), from one look at the files."""
    root = data_root(root)
    cases = _listed(spec, root)
    return _of_part(cases, "training", spec, root), [case for case in cases if case.split == "test"]


def _listed(spec: DatasetSpec, root: Path) -> list[Case]:
    cases, problems = list_cases(spec, root)
    if problems:
        raise collect(problems)
    return cases


def _of_part(cases: list[Case], part: str, spec: DatasetSpec, root: Path) -> list[Case]:
    wanted = {"training": ("training", "validation"), "all": PARTS}.get(part, (part,))
    chosen = [case for case in cases if case.split in wanted]
    if not chosen:
        looked = [text for layout in spec.files for text in _places(layout, wanted)]
        expected = " or ".join(looked) or "files for this part in datasets.yaml"
        fix = f"put {spec.name} there ({spec.url})" if spec.url else "put the images there"
        message = f"no case of {spec.name}, part {part}"
        raise UsageError(
            message, code="E103", file=root, expected=expected, found="0 cases, at least 1 is needed", fix=fix
        )
    return chosen


def load_sample(case: Case, spec: DatasetSpec) -> dict[str, Any]:
    """Read a case: image, label, instances and field of view, checked against each other, on the native grid.

    Raises:
        DataError: a file is refused (FormatError), the grids differ (GeometryError), labels are wrong (LabelError); all
            problems of the case, collected.
    """
    image, notes = read_channels(case.images, spec, case.id)
    arrays: dict[str, np.ndarray] = {}
    problems: list[MedsegError] = []
    for name, read in (("reference", read_reference), ("fov", read_fov)):
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
    image, notes = read_channels(files, spec, name, series=series)
    return _to_sample(name, image, {}, notes)


def _to_sample(case: str, image: Volume, arrays: dict[str, np.ndarray], notes: Sequence[str]) -> dict[str, Any]:
    import torch
    from monai.data.meta_tensor import MetaTensor

    sample: dict[str, Any] = {}
    # at once in the order that torch wants: NIfTI is stored the other way round, and a second copy is 4 bytes a voxel
    floats = image.array.astype(np.float32, order="C", copy=False)
    for name, array in {"image": floats, **arrays}.items():
        own = np.require(array, requirements=["C", "W"])  # readers may give views of read-only memory
        affine = torch.as_tensor(np.array(image.geometry.affine))
        sample[name] = MetaTensor(torch.as_tensor(own), affine=affine)
    return sample | {"case": case, "native": image.geometry, "notes": tuple(notes)}


def _places(layout: Any, parts: Sequence[str]) -> list[str]:
    if layout.training is None:
        return [layout.msd or layout.nnunet or layout.csv]
    return [files.image[0] for part in parts if (files := getattr(layout, part)) is not None]

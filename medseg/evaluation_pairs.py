"""Which prediction belongs to which reference: found by case id, checked by header, before anything is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg.errors import DataError, GeometryError, MedsegError, UsageError, collect, listed
from medseg.evaluation_names import match_names, shorter_names
from medseg.tables import named_as_pooled
from medseg.volumes import Geometry, case_id, check_pair, list_inputs, read_geometry
from medseg.volumes_dicom_grid import SEG_FIX
from medseg.volumes_inputs import NO_IMAGES, check_unique, one_kind

__all__ = [
    "Pair",
    "Reading",
    "check_grids",
    "find_predictions",
    "match_folders",
    "pair_cases",
    "parse_labels",
    "without_probabilities",
]

SIDE_FILES = ("_overlay",)  # written by predict beside the label images


@dataclass(frozen=True)
class Reading:
    """How label values are read and named.

    Attributes:
        labels: index -> name, background 0 left out; None until the references were looked at.
        ignore: value of void voxels in the reference.
        encoding: raw value -> index for references ("index": as stored, "nonzero", or a table).
        prediction_encoding: the same for predictions.
        affine: which affine of a NIfTI counts, see `read_label`.
        spec: facts of the data set, when references come from one.
    """

    labels: Mapping[int, str]
    ignore: int | None = None
    encoding: Any = None
    prediction_encoding: Any = None
    affine: str = "auto"
    spec: Any = None


@dataclass(frozen=True)
class Pair:
    """One case: its reference and, if there is one, its prediction."""

    case: str
    reference: Path
    prediction: Path | None
    images: tuple[Path, ...] = ()
    fov: Path | None = None
    instances: tuple[Path, ...] = ()
    group: str | None = None
    probabilities: Path | None = None
    source: Any = field(default=None, compare=False)  # the data set's own description of the case, when it has one


def parse_labels(labels: str | Mapping[int, str]) -> dict[int, str]:
    """Label names as text "1=liver,2=tumour" or as a mapping; background 0 is left out.

    >>> parse_labels("1=liver, 2=tumour")
    {1: 'liver', 2: 'tumour'}

    Raises:
        UsageError: not of that form, no label, one number or name twice, or the name `all`, which tables have.
    """
    found: dict[int, str] = {}
    given = labels.items() if isinstance(labels, Mapping) else [part.partition("=")[::2] for part in labels.split(",")]
    for number, name in ((str(number).strip(), str(name).strip()) for number, name in given):
        if not number.isdecimal() or not name or int(number) in found:
            raise UsageError("labels cannot be read", field="labels", expected="1=liver,2=tumour", found=labels)
        found[int(number)] = name
    found.pop(0, None)
    if not found or len({*found.values(), "all"}) != len(found) + 1:
        text = "labels need numbers above 0 and a name of its own for each, which is not `all`"
        raise UsageError(text, field="labels", found=labels)
    return found


def find_predictions(folder: str | Path, what: str = "predictions", field: str | None = None) -> dict[str, Path]:
    """Label images of a folder by case id; overlays and the like that predict writes beside them are left out.

    `what` and `field` say in messages what the folder is, and which argument named it.

    Raises:
        DataError: the folder is missing or holds no images.
    """
    found = _files_of_cases(Path(folder), what, "label images (NIfTI, PNG, TIFF ...)", field=field)
    return {
        case: path
        for case, path in found.items()
        if not any(case.endswith(end) and case.removesuffix(end) in found for end in SIDE_FILES)
    }


def match_folders(
    predictions: str | Path, references: str | Path, images: str | Path | None = None
) -> tuple[list[Pair], list[str], list[str]]:
    """Pairs of two folders by case id (names without suffix), the predictions that have no reference, and notes.

    Where no name of one folder occurs in the other, all names of one may have more text around them (`a1_mask`).

    Args:
        predictions, references: folders of label images.
        images: folder of the images that belong to them, named alike or, as nnU-Net does, with `_0000` behind.

    Raises:
        DataError: a folder is missing or empty, or not a single name of a reference occurs in one of the others; E352.
    """
    wanted = find_predictions(references, "references")
    present = find_predictions(predictions)
    probabilities = _probabilities(Path(predictions))
    notes: list[str] = []
    if not wanted.keys() & present.keys():
        if names := shorter_names(wanted, present):
            wanted, notes = _renamed(wanted, names), _told("references", names)
        elif names := shorter_names(present, wanted):
            present, probabilities = _renamed(present, names), _renamed(probabilities, names)
            notes = _told("predictions", names)
    shown = {} if images is None else _named_images(Path(images), wanted)
    if taken := named_as_pooled(wanted):
        raise taken[0]
    if not wanted.keys() & present.keys():
        raise DataError(
            "no prediction has the name of a reference", code="E350", file=predictions,
            expected=listed(wanted), found=listed(present), fix=_renaming(present),
        )  # fmt: skip
    pairs = [
        Pair(case, path, present.get(case), images=shown.get(case, ()), probabilities=probabilities.get(case))
        for case, path in wanted.items()
    ]
    return pairs, sorted(present.keys() - wanted.keys()), notes


def _renamed(files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, Path]:
    """The files that have a shorter name, under it."""
    return {names[name]: path for name, path in files.items() if name in names}


def _told(what: str, names: Mapping[str, str]) -> list[str]:
    name = next(iter(names))
    return [f"The {what}' names have more text than the others': {name} was taken as {names[name]}, and so on."]


def pair_cases(
    cases: Iterable[Any], predictions: str | Path, *, only: Sequence[str] | None = None
) -> tuple[list[Pair], list[str]]:
    """Pairs of a data set's cases (`medseg.data.Case`) with a folder's predictions.

    A prediction is named as the case's id, or as its image file where no other case has one of that name.

    Args:
        cases: with id, images, label, instances, fov, group.
        predictions: folder.
        only: ids of the cases to take (a validation fold); None takes all that have a label.

    Raises:
        DataError: no case has a reference, or not a single prediction belongs to one; a prediction is named as the
            image file of several cases (frames of several videos), so that it cannot be told whose it is.
    """
    present = find_predictions(predictions)
    probabilities = _probabilities(Path(predictions))
    cases = [c for c in cases if (only is None or c.id in only) and (c.label is not None or c.instances)]
    named = match_names({case.id: case.images for case in cases}, present)
    pairs, used = [], set()
    for case in cases:
        name = named[case.id]
        used.add(name)
        pairs.append(
            Pair(
                case.id, case.label or case.instances[0], present.get(name) if name else None,
                images=tuple(case.images), fov=case.fov,
                instances=tuple(case.instances), group=case.group, probabilities=probabilities.get(name or case.id),
                source=case,
            )
        )  # fmt: skip
    if not pairs:
        raise DataError(
            "no case has a reference label", code="E350", file=predictions, fix="choose a part that has labels"
        )
    if not any(pair.prediction for pair in pairs):
        raise DataError(
            "no prediction has the name of a case", code="E350", file=predictions,
            expected=listed(pair.case for pair in pairs), found=listed(present), fix=_renaming(present),
        )  # fmt: skip
    return pairs, sorted(present.keys() - used)


def without_probabilities(pairs: Sequence[Pair], resampled: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Masks are brought to the references' grids, stored probabilities are not: those cases have none; and a note."""
    kept = [replace(pair, probabilities=None) if pair.case in resampled else pair for pair in pairs]
    left = sum(one != two for one, two in zip(kept, pairs, strict=True))
    note = f"{left} resampled cases: their stored probabilities lie on another grid and were left out."
    return kept, [note] if left else []


def check_grids(pairs: Sequence[Pair], *, resample: bool, affine: str = "auto") -> list[str]:
    """Compare the grids of all pairs by their headers; returns the cases that are to be resampled.

    `affine`: which one of a NIfTI counts, see `Reading`.

    Raises:
        GeometryError: grids differ and resampling was not asked for; every such case is told, with both geometries.
        FormatError: a header cannot be read.
    """
    problems: list[MedsegError] = []
    differing = []
    for pair in pairs:
        if pair.prediction is None:
            continue
        try:
            one, two = (read_geometry(path, affine=affine)[0] for path in (pair.reference, pair.prediction))
        except MedsegError as error:
            problems.append(error)
            continue
        try:
            check_pair(one, two, case=pair.case)
        except GeometryError as error:
            if resample:
                differing.append(pair.case)
            else:
                problems.append(
                    GeometryError(
                        "prediction and reference lie on different grids", code=error.code, case=pair.case,
                        file=pair.prediction,
                        expected=describe_grid(one), found=describe_grid(two),
                        fix="predict on the reference's grid, or ask for --resample",
                    )
                )  # fmt: skip
    if problems:
        raise collect(problems)
    return differing


def describe_grid(geometry: Geometry) -> str:
    """A grid in one line: shape, spacing, and for volumes origin and axis codes."""
    spacing = " x ".join(f"{v:.4g}" for v in geometry.spacing)
    text = f"{' x '.join(map(str, geometry.shape))} voxels of {spacing} {geometry.unit}"
    if geometry.kind == "volume":
        origin = ", ".join(f"{v:.2f}" for v in geometry.affine[:3, 3])
        text += f", origin {origin}, axes {''.join(geometry.codes)}"
    return text


def _named_images(folder: Path, wanted: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """The image of each case that has one there; of several channels the first."""
    files = _files_of_cases(folder, "images", "images (NIfTI, PNG, TIFF ...)", field="images")
    found = {case: files.get(case) or files.get(f"{case}_0000") for case in wanted}
    if not any(found.values()):
        raise DataError(
            "no image has the name of a reference", code="E350", field="images", file=folder,
            expected=listed(wanted), found=listed(files), fix="name each image as its reference, or leave --images out",
        )  # fmt: skip
    return {case: (path,) for case, path in found.items() if path is not None}


def _files_of_cases(folder: Path, what: str, expected: str, *, field: str | None = None) -> dict[str, Path]:
    if not folder.exists():
        raise DataError(f"there is no such folder of {what}", code="E302", field=field, file=folder)
    try:
        files = one_kind(list_inputs([folder], unique=False), images=what == "images")
        check_unique(files)
        return {case_id(path): path for path in files}
    except UsageError as error:
        if error.message != NO_IMAGES:  # two files of one case
            raise
        raise DataError(error.message, code="E302", field=field, file=folder, expected=expected) from error


def _probabilities(folder: Path) -> dict[str, Path]:
    end = ".probabilities.zarr"  # the name that predict gives them
    return {path.name.removesuffix(end): path for path in sorted(folder.glob("*" + end))}


def _renaming(present: Mapping[str, Path]) -> str:
    dicom = any(path.is_dir() for path in present.values())  # its ids are hashes, whatever the files are called
    return SEG_FIX if dicom else "name each prediction as its reference"

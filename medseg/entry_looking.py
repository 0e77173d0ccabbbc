"""What the files of a new data set are; of images dimensions, channels, colour, spacing, intensities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.data_case import Case
from medseg.entry_bands import look_at_bands, read_header
from medseg.entry_grids import unlike_grids
from medseg.entry_labels import LabelFacts, look_at_labels, spread, unread_labels
from medseg.errors import DataError, MedsegError, collect, counted, listed
from medseg.volumes import Geometry, find_format, read_image

__all__ = ["ImageFacts", "look_at_files", "look_at_images"]

_IMAGES_READ = 12  # images read whole to learn colours and intensities


@dataclass
class ImageFacts:
    """Dimensions, channels and whether pictures are grey or coloured; `notes` are sentences for the user.

    `grids`: the grid of each case's first image, from its header.
    """

    dims: int
    channels: int
    colour: str | None
    grids: list[tuple[Case, Geometry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_at_files(
    cases: Sequence[Case], problems: Sequence[MedsegError], channels: Sequence[str] = (), *,
    nan: str | float = "refuse", affine: str = "auto", named: bool = False, listed: Collection[int] = (),
) -> tuple[ImageFacts, LabelFacts]:  # fmt: skip
    """What images and labels are; `problems` are known already, and their cases left out.

    Raises:
        MedsegError: the problems, and all that are found beside them in images, labels and their grids.
    """
    refused = {problem.case for problem in problems}
    cases = [case for case in cases if case.id not in refused]
    labelled = [case for case in cases if case.labelled]
    found = list(problems)
    if not labelled:
        raise collect(found)
    seen = known = None
    try:
        seen = look_at_images(cases, channels, nan=nan, affine=affine)
        grids = seen.grids
    except MedsegError as error:
        found += error.problems
        grids = _read_grids(cases, affine)
    dims, *others = {len(geometry.shape) for _, geometry in grids} or {0}
    if others or not dims:
        raise collect([*found, *unread_labels(labelled, affine)])
    try:
        known = look_at_labels(labelled, dims, named=named, listed=listed, affine=affine)
    except MedsegError as error:
        # that all labels are empty may be wrong where others could not be read
        found += [problem for problem in error.problems if not found or problem.code != "E335"]
    found += unlike_grids(grids, dims, affine)
    if found or seen is None or known is None:
        raise collect(list({(p.code, p.case, p.file, p.found): p for p in found}.values()))
    return seen, known


def _read_grids(cases: Sequence[Case], affine: str) -> list[tuple[Case, Geometry]]:
    grids = []
    for case in cases:
        try:
            grids.append((case, read_header(case, affine)[0]))
        except MedsegError:
            continue  # told already
    return grids


def look_at_images(
    cases: Sequence[Case], channels: Sequence[str] = (), *, nan: str | float = "refuse", affine: str = "auto"
) -> ImageFacts:
    """Read the headers of all images and some images whole; `channels` are their names, where something tells them.

    `nan` and `affine` as for `read_image`.

    Raises:
        DataError: an image is refused; dimensions, channels or depths are mixed, with counts; there are more or fewer
            channels than names.
    """
    problems: list[MedsegError] = []
    seen = []
    for case in cases:
        try:
            geometry, bands, dtype = read_header(case, affine)
        except MedsegError as error:
            problems += error.problems
            continue
        seen.append((case, geometry, bands, np.dtype(dtype)))
    kinds = [(case, len(geometry.shape)) for case, geometry, _, _ in seen]
    if not seen or _are_mixed(kinds, "dimensions", "E310", problems):
        raise collect(problems)
    facts = ImageFacts(kinds[0][1], 1, None, [(case, geometry) for case, geometry, *_ in seen])
    pictures = facts.dims == 2
    if pictures:
        _are_mixed([(case, dtype) for case, *_, dtype in seen], "types of numbers", "E318", problems)
    some = [case for case, *_ in spread(seen, _IMAGES_READ)]
    counts = [(case, bands) for case, _, bands, _ in seen]
    if pictures:
        try:
            pictured = [case.images[0] for case in some]
            bands = Counter(count for _, count in counts)
            facts.colour, facts.channels = look_at_bands(pictured, bands, channels, facts.notes, nan=nan)
        except DataError as error:
            problems += error.problems
            if error.code != "E314" or error.file is not None:
                raise collect(problems) from None
            error.found, error.file = _tell_kinds(counts, " channels")
            facts.colour = "luma"  # as which all of them are read, to see what else is wrong
    else:
        facts.channels = counts[0][1]
        if not _are_mixed(counts, "channels", "E310", problems) and facts.channels > 1 and not channels:
            facts.notes.append(
                f"{facts.channels} values in each voxel: taken as channels of one image; if they are points in time, "
                "make one file of each"
            )
    if (files := len(cases[0].images)) > 1:
        facts.channels, facts.colour = files, None
    if channels and len(channels) != facts.channels and facts.colour != "luma":
        expected = f"{len(channels)}: {', '.join(channels)}"
        message = "the number of channels differs from what is told"
        fix = "name each channel in dataset.json; if the values are points in time, make one file of each"
        wrong = DataError(
            message, code="E310", file=cases[0].images[0], expected=expected, found=facts.channels, fix=fix
        )
        raise collect([*problems, wrong])
    try:
        facts.notes += _describe(seen, some, facts, nan=nan, affine=affine)
    except MedsegError as error:
        problems += error.problems
    if problems:
        raise collect(problems)
    return facts


def _describe(seen: list, some: list[Case], facts: ImageFacts, *, nan: str | float, affine: str) -> list[str]:
    shapes = np.array([geometry.shape for _, geometry, _, _ in seen])
    low, high = shapes.min(axis=0), shapes.max(axis=0)
    notes = [f"{counted(len(seen), 'image')} of {_range(low, high)} {'pixels' if facts.dims == 2 else 'voxels'}"]
    if facts.dims == 3:
        spacing = np.array([geometry.spacing for _, geometry, _, _ in seen])
        notes.append(f"voxels of {_range(spacing.min(axis=0).round(3), spacing.max(axis=0).round(3))} mm")
        if find_format(some[0].images[0]) == "tiff":
            notes.append(
                "of TIFF stacks no voxel size is read, 1 mm stands for it: where slices are thicker than pixels, "
                "convert them to .nii.gz or .nrrd with their true size"
            )
    levels, told = [], Counter[str]()
    problems: list[MedsegError] = []
    for case in some:
        channels = facts.channels if len(case.images) == 1 else 1
        try:
            image = read_image(
                case.images[0], dims=facts.dims, channels=channels, colour=facts.colour, nan=nan, affine=affine
            )
        except MedsegError as error:
            problems += error.problems
            continue
        levels.append(np.percentile(image.array, (1, 99)))
        told.update(image.notes)
    if problems:
        raise collect(problems)
    notes += [f"{note} ({count} of {counted(len(some), 'image')} read whole)" for note, count in told.items()]
    notes.append("intensities: 1 % below {:g}, 1 % above {:g} (medians)".format(*np.median(levels, axis=0)))
    return notes


def _range(low: np.ndarray, high: np.ndarray) -> str:
    return " x ".join(f"{a:g}" if a == b else f"{a:g}-{b:g}" for a, b in zip(low, high, strict=True))


def _are_mixed(kinds: Sequence[tuple[Case, Any]], what: str, code: str, problems: list[MedsegError]) -> bool:
    """Whether images are of several kinds, which is then added to the problems."""
    if len({kind for _, kind in kinds}) == 1:
        return False
    found, file = _tell_kinds(kinds)
    message, expected = f"images with different {what} in one set", f"the same {what}"
    fix = "convert them to one kind, or make two data sets"
    problems.append(DataError(message, code=code, file=file, expected=expected, found=found, fix=fix))
    return True


def _tell_kinds(kinds: Sequence[tuple[Case, Any]], unit: str = "") -> tuple[str, str]:
    """How many images are of which kind and which ones are of the rarer kinds; the first file of these."""
    counts = Counter(kind for _, kind in kinds).most_common()
    rare = [case for case, kind in kinds if kind != counts[0][0]]
    told = ", ".join(f"{count} with {kind}{unit}" for kind, count in counts)
    return f"{told}: {listed(case.id for case in rare)}", str(rare[0].images[0])

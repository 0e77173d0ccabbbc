"""What the images of a new data set are: dimensions, channels, colour, spacing, intensities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.data_case import Case
from medseg.entry_bands import look_at_bands, read_header
from medseg.entry_labels import spread
from medseg.errors import DataError, MedsegError, collect, counted
from medseg.volumes import Geometry, find_format, read_image

__all__ = ["ImageFacts", "look_at_images"]

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
    if problems:
        raise collect(problems)
    dims = _one(Counter(len(geometry.shape) for _, geometry, _, _ in seen), "dimensions", "E310")
    pictures = dims == 2
    if pictures:
        _one(Counter(str(dtype) for *_, dtype in seen), "types of numbers", "E318")
    facts = ImageFacts(dims, 1, None, [(case, geometry) for case, geometry, *_ in seen])
    some = [case for case, *_ in spread(seen, _IMAGES_READ)]
    if pictures:
        counts = Counter(count for *_, count, _ in seen)
        pictured = [case.images[0] for case in some]
        facts.colour, facts.channels = look_at_bands(pictured, counts, channels, facts.notes, nan=nan)
    else:
        facts.channels = _one(Counter(bands for *_, bands, _ in seen), "channels", "E310")
        if facts.channels > 1 and not channels:
            facts.notes.append(
                f"{facts.channels} values in each voxel: taken as channels of one image; if they are points in time, "
                "make one file of each"
            )
    if (files := len(cases[0].images)) > 1:
        facts.channels, facts.colour = files, None
    if channels and len(channels) != facts.channels:
        expected = f"{len(channels)}: {', '.join(channels)}"
        message = "the number of channels differs from what is told"
        fix = "name each channel in dataset.json; if the values are points in time, make one file of each"
        raise DataError(message, code="E310", file=cases[0].images[0], expected=expected, found=facts.channels, fix=fix)
    facts.notes += _describe(seen, some, facts, nan=nan, affine=affine)
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


def _one(counts: Counter, what: str, code: str) -> Any:
    if len(counts) == 1:
        return next(iter(counts))
    found = ", ".join(f"{count} with {value}" for value, count in counts.most_common())
    fix = "convert them to one kind, or make two data sets"
    raise DataError(
        f"images with different {what} in one set", code=code, expected=f"the same {what}", found=found, fix=fix
    )

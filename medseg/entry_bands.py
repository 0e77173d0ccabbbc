"""What the bands of a new data set's pictures are: grey, colours, transparency, or channels that are none of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg.data_case import Case
from medseg.errors import DataError, MedsegError
from medseg.volumes import Geometry, find_format, read_geometry, read_image

__all__ = ["look_at_bands", "read_header"]


def read_header(case: Case, affine: str) -> tuple[Geometry, int, np.dtype]:
    """`read_geometry` of a case's image; where its label is a picture, the pages of a TIFF are no slices but channels.

    Raises:
        DataError: E310, a TIFF of several pages beside a picture as label does not call them channels.
    """
    mask = case.label or next(iter(case.instances), None)
    try:
        dims = None if mask is None else len(read_geometry(mask)[0].shape)
    except MedsegError:
        dims = None  # told when labels are looked at
    found = read_geometry(case.images[0], dims=dims, affine=affine)
    if dims == 2 < len(found[0].shape) and find_format(case.images[0]) == "tiff":
        read_image(case.images[0], dims=2, case=case.id)  # says why not
    return found


def look_at_bands(
    pictures: Sequence[Path], bands: Counter[int], names: Sequence[str], notes: list[str], *, nan: str | float
) -> tuple[str | None, int]:
    """`colour` of the entry and the number of channels.

    Args:
        pictures: those that are read whole.
        bands: how many pictures have how many bands, by their headers.
        names: of the channels, where something tells them.
        notes: sentences for the user are added.
        nan: as for `read_image`.

    Raises:
        DataError: a picture is refused, or some are grey and some coloured.
    """
    many = max(bands)
    named = len(names) == many != 3
    if len(bands) == 1 and many > 1 and (named or _are_channels(pictures[0], nan)):
        notes += [] if names else [f"{many} values in each pixel that are no colours: taken as channels"]
        return None, many
    colour = "rgb" if len(names) == 3 and set(bands) <= {3, 4} else _colour(pictures, bands, notes, nan)
    return colour, 3 if colour == "rgb" else 1


def _are_channels(picture: Path, nan: str | float) -> bool:
    """Whether the bands are neither colours nor transparency, so that nothing but their number can be declared."""
    try:
        read_image(picture, dims=2, colour="luma", nan=nan)
    except DataError as error:
        return error.code == "E310"
    return False


def _is_coloured(picture: Path, nan: str | float) -> bool:
    try:
        read_image(picture, dims=2, colour="grey", nan=nan)
    except MedsegError as error:  # what else is wrong is told by who reads it for what it is
        return error.code == "E314"
    return False


def _colour(pictures: Sequence[Path], bands: Counter[int], notes: list[str], nan: str | float) -> str:
    if any(_is_coloured(picture, nan) for picture in pictures):
        if {1, 2} & set(bands) and len(bands) > 1:
            found = ", ".join(f"{count} with {n} channels" for n, count in bands.most_common())
            fix = "convert them to one kind, or give a pattern for each kind and make two data sets"
            raise DataError("grey and coloured pictures in one set", code="E314", found=found, fix=fix)
        return "rgb"  # of palettes too, which are one band of indices
    if set(bands) <= {1, 2}:
        return "grey"
    notes.append("the pictures have colour channels, but all are equal: read as grey")
    return "grey"

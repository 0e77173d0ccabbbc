"""From stored bands and palettes to the channels that were asked for; nothing is converted without being told.

`colour`
    None    as stored: 1 channel, or 3; a palette becomes its colours; alpha is dropped when it is opaque everywhere
    "grey"  1 channel; a picture whose bands are equal is grey; one with real colour is refused
    "luma"  1 channel; colour becomes 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), rounded
    "rgb"   3 channels; grey is repeated
Transparent pixels keep their stored colour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medseg.errors import DataError, UsageError

__all__ = ["apply_palette", "is_grey", "to_channels"]

COLOURS = (None, "grey", "luma", "rgb")


def is_grey(bands: np.ndarray) -> bool:
    """Whether (..., 3+) bands hold the same value three times everywhere.

    >>> is_grey(np.array([[1, 1, 1], [2, 2, 2]])), is_grey(np.array([[1, 1, 2]]))
    (True, False)
    """
    return bool((bands[..., 0] == bands[..., 1]).all() and (bands[..., 1] == bands[..., 2]).all())


def apply_palette(indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of palette indices, or grey values (...) when all colours in use are grey."""
    used = np.unique(indices)
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette[:256]
    return table[:, 0][indices] if is_grey(table[used]) else table[indices]


def to_channels(
    array: np.ndarray,
    spatial: int,
    colour: str | None,
    *,
    channels: int | None = None,
    path: Path,
    case: str | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(*spatial) or (*spatial, bands) -> (C, *spatial) as `colour` asks, and notes.

    `channels`: their declared number; if there are as many bands, each of them is one, and none is alpha.

    Raises:
        DataError: E314, colour where grey is expected, or two or more than four bands.
        UsageError: E101, `colour` is none of the four.
    """
    if colour not in COLOURS:
        raise UsageError("unknown colour", field="colour", expected='None, "grey", "luma" or "rgb"', found=repr(colour))
    notes: tuple[str, ...] = ()
    if array.ndim == spatial:
        array = array[..., None]
    bands = array.shape[-1]
    if colour is None and bands == channels:
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)), notes
    if bands in (2, 4):  # the last one is alpha
        alpha = array[..., -1]
        opaque = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
        if not (alpha == opaque).all():
            notes = ("E314: the alpha channel is ignored; transparent pixels keep their stored colour",)
        array = array[..., :-1]
        bands -= 1
    if bands not in (1, 3):
        expected = "1, 3 or 4 bands"
        raise DataError("unusable number of bands", code="E314", case=case, file=path, expected=expected, found=bands)
    if bands == 3 and colour in ("grey", "luma"):
        if is_grey(array):
            array = array[..., :1]
        elif colour == "luma":
            weighted = array @ np.array([0.299, 0.587, 0.114])
            array = (np.rint(weighted) if array.dtype.kind in "iu" else weighted).astype(array.dtype)[..., None]
        else:
            raise DataError(
                "a colour picture where grey is expected",
                code="E314",
                case=case,
                file=path,
                expected="one channel",
                found="three channels that differ",
                fix="save it as a grey picture; to train on such pictures, `colour: luma` or `rgb` in datasets.yaml",
            )
    elif bands == 1 and colour == "rgb":
        array = np.repeat(array, 3, axis=-1)
        notes = (*notes, "E314: a grey picture where colour is expected: all three channels have its values")
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)), notes

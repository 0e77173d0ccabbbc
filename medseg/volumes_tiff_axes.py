"""What a TIFF says of its colours, and ImageJ and OME of its pages: slices, points in time, channels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medseg.errors import DataError

__all__ = ["are_channels", "check_axes", "check_colours"]

# PhotometricInterpretation of TIFF 6.0 and of its supplements
_COLOURS = {5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32844: "LogL", 32845: "LogLuv"}
_JPEG = (6, 7)  # Compression whose YCbCr is unpacked to RGB
_NAMES = {"slices": "Z", "frames": "T", "channels": "C"}


def check_axes(file: Any, bands: int, path: Path, case: str | None) -> None:
    """Refuse pages along several axes by the file's own words: channels in turn would become slices of a volume.

    One axis alone may be any, because programs call slices channels.

    Raises:
        DataError: E310.
    """
    found = _axes(file, bands)
    axes = [f"{count} {name}" for name, count in found.items() if count > 1]
    if len(axes) > 1:
        message, fix = "the pages of the TIFF lie along several axes", "save each channel, or point in time, as a file"
        expected, told = "slices alone", ", ".join(axes)
        raise DataError(message, code="E310", case=case, file=path, expected=expected, found=told, fix=fix)


def are_channels(file: Any, bands: int, pages: int) -> bool:
    """Whether the pages are the channels of a picture by the file's own words (not in RGB or the like)."""
    return pages > 1 and bands == 1 and _axes(file, bands) == {"slices": 1, "frames": 1, "channels": pages}


def _axes(file: Any, bands: int) -> dict[str, int]:
    """Pages along each axis, by what ImageJ, OME or tifffile wrote; empty where the file does not say."""
    if file.is_imagej:
        return {name: int(file.imagej_metadata.get(name, 1)) for name in _NAMES}
    # tifffile would open the other files that OME's text may name
    if file.is_ome and (pixels := re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata)):
        sizes = dict(re.findall(r'\bSize([ZTC])="(\d{1,9})"', pixels[0]))
        return {name: int(sizes.get(key, 1)) // (bands if key == "C" else 1) for name, key in _NAMES.items()}
    if file.is_shaped and len(written := file.shaped_metadata) == 1 and (axes := written[0].get("axes")):
        sizes = dict(zip(str(axes).upper(), written[0]["shape"], strict=False))
        return {name: int(sizes.get(key, 1)) for name, key in _NAMES.items()}
    return {}


def check_colours(page: Any, path: Path, case: str | None) -> None:
    """Refuse colours that are not red, green and blue: as such they would be read.

    Raises:
        DataError: E314.
    """
    found = _COLOURS.get(int(page.photometric))
    if found and not (found == "YCbCr" and int(page.compression) in _JPEG):
        message, fix = "a TIFF whose colours are not red, green and blue", "save it as RGB"
        raise DataError(message, code="E314", case=case, file=path, expected="RGB or grey", found=found, fix=fix)

"""TIFF: pictures, stacks, float, BigTIFF, LZW and the like through tifffile; windows of very large ones.

A stack of pages of one size is a volume: i runs along the columns, j along the rows, k along the pages, with a spacing
of one (TIFF has no agreed place for the distance of pages). Where a picture is asked for, pages that the file itself
calls channels are that; else they are slices, for tifffile by itself calls all pages of an ImageJ file channels.
Format: TIFF 6.0 and its BigTIFF extension.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, FormatError, MedsegError
from medseg.files import require_file
from medseg.volumes_geometry import Geometry
from medseg.volumes_image import Raw
from medseg.volumes_tiff_axes import are_channels, check_axes, check_colours
from medseg.volumes_tiff_checks import SMALL, check_chain, check_room, check_segments

__all__ = ["has_windows", "read_tiff", "read_tiff_header", "read_tiff_window"]


def read_tiff(path: Path, *, dims: int | None = None, case: str | None = None) -> Raw:
    """Read a TIFF: one page as a picture, several as a volume (with `dims=2` as channels, or they are refused).

    Raises:
        FormatError: E301 no TIFF, E303 cut off, E305 corrupt, E306 too large, E307 data type.
        DataError: E310 pages of different sizes, several series.
    """
    with _opened(path, case) as (file, pages, size):
        hidden = _hidden_pages(file, pages)
        shape, bands = _layout(file, pages, path, case, hidden, dims)
        check_room(pages, shape, bands, size, path, case)
        if dims == 2 and len(shape) > 2:
            found = f"{shape[-1]} pages"
            message = "a stack where a picture is expected"
            fix = "make pictures of its pages (medseg data pages STACK -o FOLDER), or declare the set as 3-D"
            fix += "; if its pages are channels, the file has to say so (ImageJ: Stack to Hyperstack; OME: SizeC)"
            raise DataError(message, code="E310", case=case, file=path, expected="1 page", found=found, fix=fix)
        first = pages[0]
        if hidden:
            series = file.series[0].asarray().reshape(hidden, *first.shape)
            array = np.stack([_tidy(part, first) for part in series])
        else:
            parts = [_tidy(page.asarray(), page) for page in pages]
            array = parts[0] if len(parts) == 1 else np.stack(parts)
        palette = None
        if first.colormap is not None:
            palette = (np.asarray(first.colormap) >> 8).astype(np.uint8).T
        bits = int(first.bitspersample)
        orientation = int(first.tags.valueof(274, 1))
        # TIFF 6.0, ExtraSamples: of grey pictures 1 and 2 are alpha; other samples, such as stains, are no colours
        stains = int(first.photometric) < 2 and bands != 3 and not {1, 2} & set(map(int, first.extrasamples))
        if len(shape) == 2 and bands > int(first.samplesperpixel):  # its pages are its channels
            array, stains = np.moveaxis(array, 0, -1), True
    if len(shape) > 2:  # (page, row, column[, band]) -> (column, row, page[, band]), so that slices are the last axis
        array = array.transpose(2, 1, 0, *range(3, array.ndim))
    kind = "palette" if palette is not None else "grey" if bands == 1 else "axis" if stains else "colour"
    return Raw(array, Geometry.of(shape), "tiff", {"bits": bits, "orientation": orientation}, kind, palette, bits)


def read_tiff_header(path: Path, *, dims: int | None = None) -> tuple[Geometry, int, np.dtype]:
    """Geometry, bands and type from the tags alone; `dims` as for `read_tiff`."""
    with _opened(path, None) as (file, pages, _size):
        shape, bands = _layout(file, pages, path, None, _hidden_pages(file, pages), dims)
        return Geometry.of(shape), bands, np.dtype(pages[0].dtype)


def has_windows(path: Path) -> bool:
    """Whether windows of a picture can be read without most of it: no palette, and not packed in strips above 64 MB."""
    with _opened(path, None) as (file, pages, _):
        first = pages[0]
        segment = math.prod(_segment(first)) * int(first.samplesperpixel) * np.dtype(first.dtype).itemsize
        return segment <= SMALL and len(pages) == 1 and first.colormap is None and not _hidden_pages(file, pages)


def segment_shape(path: Path) -> tuple[int, int]:
    """Rows and columns of a picture that are packed together: a tile, a strip, or a row that is stored plainly."""
    with _opened(path, None) as (_, pages, _):
        return _segment(pages[0])


def _segment(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return int(page.tilelength), int(page.tilewidth)
    rows, columns = int(page.imagelength), int(page.imagewidth)
    return (1 if page.is_memmappable else min(int(page.rowsperstrip or rows), rows)), columns


def read_tiff_window(path: Path, slices: tuple[slice, ...]) -> np.ndarray:
    """(C, *window) of a picture (row, column) or stack (i, j, k); only the tiles or strips it touches are decoded."""
    with _opened(path, None) as (file, pages, _):
        if _hidden_pages(file, pages):
            fix = "save it with a directory for each page, or read it whole"
            raise DataError("this stack cannot be read in windows", code="E310", file=path, fix=fix)
        shape, bands = _layout(file, pages, path, None)
        if len(slices) != len(shape):
            message = "one slice for each axis is needed"
            raise DataError(message, code="E310", file=path, expected=f"{len(shape)} slices", found=len(slices))
        bounds = [part.indices(n) for part, n in zip(slices, shape, strict=True)]
        if len(shape) == 2:
            return _to_front(_cut(file, pages[0], bounds[0], bounds[1], bands), bands)
        cuts = [_cut(file, pages[k], bounds[1], bounds[0], bands) for k in range(*bounds[2])]
        if not cuts:
            return np.zeros((bands, *(len(range(*bound)) for bound in bounds)), pages[0].dtype)
        stack = np.stack(cuts)
        return _to_front(stack.transpose(2, 1, 0, *range(3, stack.ndim)), bands)


def _to_front(array: np.ndarray, bands: int) -> np.ndarray:
    return np.moveaxis(array, -1, 0) if bands > 1 else array[None]


def _cut(file: Any, page: Any, rows: tuple, columns: tuple, bands: int) -> np.ndarray:
    """Rows and columns of one page, decoded segment by segment; of one that is stored plainly, what is asked for."""
    if page.is_memmappable and (bands == 1 or int(page.planarconfig) != 2):
        stored = page.asarray(out="memmap").reshape(page.imagelength, page.imagewidth, bands)
        part = stored[slice(*rows), slice(*columns)].astype(page.dtype)
        return _upright(part if bands > 1 else part[..., 0], page)
    height, width = page.imagelength, page.imagewidth
    step_rows = page.tilelength if page.is_tiled else min(int(page.rowsperstrip or height), height)
    step_columns = page.tilewidth if page.is_tiled else width
    across = -(-width // step_columns)
    down = -(-height // step_rows)
    planar = int(page.planarconfig) == 2 and bands > 1
    out = np.zeros((_length(rows), _length(columns), bands), page.dtype)
    low_row, high_row, low_column, high_column = rows[0], rows[1], columns[0], columns[1]
    for plane in range(bands if planar else 1):
        for down_index in range(low_row // step_rows, -(-high_row // step_rows)):
            for across_index in range(low_column // step_columns, -(-high_column // step_columns)):
                index = (plane * down + down_index) * across + across_index
                if not page.databytecounts[index]:
                    continue  # a sparse segment: zeros by definition
                file.filehandle.seek(page.dataoffsets[index])
                data = file.filehandle.read(page.databytecounts[index])
                tables = page.jpegtables
                segment = page.decode(data, index, **({"jpegtables": tables} if tables is not None else {}))[0]
                block = segment[0]
                top, left = down_index * step_rows, across_index * step_columns
                a, b = max(low_row, top), min(high_row, top + block.shape[0], height)
                c, d = max(low_column, left), min(high_column, left + block.shape[1], width)
                target = slice(plane, plane + 1) if planar else slice(None)
                out[a - low_row : b - low_row, c - low_column : d - low_column, target] = block[
                    a - top : b - top, c - left : d - left
                ]
    out = out[:: rows[2], :: columns[2]]
    return _upright(out if bands > 1 else out[..., 0], page)


def _length(bounds: tuple) -> int:
    return max(0, bounds[1] - bounds[0])


def _hidden_pages(file: Any, pages: list) -> int:
    """Number of pages of a stack that states only its first one (large ImageJ and `truncate`d files), else 0."""
    if len(pages) != 1 or not (file.is_imagej or file.is_shaped) or not file.series:
        return 0
    count = file.series[0].size // max(pages[0].size, 1)
    return count if count > 1 else 0


def _tidy(array: np.ndarray, page: Any) -> np.ndarray:
    if int(page.planarconfig) == 2 and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    return _upright(array, page)


def _upright(array: np.ndarray, page: Any) -> np.ndarray:
    """0 is black: photometric MINISWHITE stores the negative."""
    if int(page.photometric) == 0 and array.dtype.kind in "iub":
        bits = int(page.bitspersample)
        return np.asarray((1 << bits) - 1 - array.astype(np.int64)).astype(array.dtype)
    return array


@contextlib.contextmanager
def _opened(path: Path, case: str | None) -> Iterator[tuple[Any, list, int]]:
    import tifffile

    path = require_file(path, case=case)
    size = path.stat().st_size
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it would log is raised below
    try:
        check_chain(path, size, case)
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if not page.subfiletype & 5]  # previews and masks are not the image
            if not pages:
                raise FormatError("a TIFF without a page", code="E305", case=case, file=path)
            pages = [page if isinstance(page, tifffile.TiffPage) else page.aspage() for page in pages]
            for page in pages:
                check_segments(page, size, path, case)
            yield file, pages, size
    except MedsegError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # tifffile and its codecs raise what they like on bad data
        message = f"{type(error).__name__}: {error}"
        short = isinstance(error, EOFError | IndexError) or "buffer" in message
        what, code = ("the TIFF is cut off", "E303") if short else ("the TIFF is corrupt", "E305")
        raise FormatError(what, code=code, case=case, file=path, found=message[:200]) from None
    finally:
        logger.setLevel(level)


def _layout(
    file: Any, pages: list, path: Path, case: str | None, hidden: int = 0, dims: int | None = None
) -> tuple[tuple[int, ...], int]:
    first = pages[0]
    sizes = {(p.imagelength, p.imagewidth, int(p.samplesperpixel), str(p.dtype)) for p in pages}
    if len(sizes) > 1:
        found = ", ".join(f"{c} x {r} x {b} {t}" for r, c, b, t in sorted(sizes))
        message, fix = "the pages of the TIFF differ", "split them into files"
        raise DataError(message, code="E310", case=case, file=path, expected="one size and type", found=found, fix=fix)
    if first.dtype is None or first.dtype.kind not in "iufb" or first.imagedepth > 1:
        message = "the TIFF's type of values cannot be used"
        raise FormatError(message, code="E307", case=case, file=path, found=first.dtype)
    check_colours(first, path, case)
    rows, columns = first.imagelength, first.imagewidth
    count = max(hidden, len(pages))
    bands = int(first.samplesperpixel)
    if count > 1:
        check_axes(file, bands, path, case)
        if dims == 2 and first.colormap is None and are_channels(file, bands, count):
            return (rows, columns), count
    return (rows, columns) if count == 1 else (columns, rows, count), bands

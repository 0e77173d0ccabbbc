"""The pages of TIFF stacks as pictures of their own, for 2-D data sets and models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medseg.errors import DataError, UsageError
from medseg.files import atomic_path
from medseg.volumes import case_id, read_geometry, read_image

__all__ = ["split_stacks"]


def split_stacks(stacks: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write each page of TIFF stacks as a TIFF: the same numbers of the same type, named in the order of the pages.

    Pages of `train-volume.tif` become `train-volume_00.tif`, `train-volume_01.tif` ...; joined again by
    `tifffile.imwrite("masks.tif", tifffile.imread("masks/*.tif"))`.

    Args:
        stacks: TIFF files of several pages, grey or RGB; images or labels.
        output: folder to write into; made when missing.

    Returns:
        The files, in the order of stacks and pages.

    Raises:
        UsageError: E101, a file is there already, or two pages would be written to one; nothing is written then.
        DataError: a stack cannot be read, or is none.

    >>> import numpy as np, tempfile, tifffile
    >>> folder = Path(tempfile.mkdtemp())
    >>> stack = np.arange(24, dtype=np.uint16).reshape(4, 2, 3)
    >>> tifffile.imwrite(folder / "stack.tif", stack, photometric="minisblack")
    >>> files = split_stacks([folder / "stack.tif"], folder / "pages")
    >>> [file.name for file in files], tifffile.imread(files[3]).tolist()
    (['stack_0.tif', 'stack_1.tif', 'stack_2.tif', 'stack_3.tif'], [[18, 19, 20], [21, 22, 23]])
    """
    import tifffile

    planned: dict[Path, str | Path] = {}
    for stack in stacks:
        for target, _ in _pages(Path(stack), Path(output)):
            if target.exists() or target in planned:
                found = planned.get(target, "a file of that name")
                raise UsageError("a page's file is there already", file=target, found=found, fix="another -o")
            planned[target] = stack
    for stack in stacks:  # read again, so that one stack at a time is held and none is written before all are sound
        for target, picture in _pages(Path(stack), Path(output)):
            with atomic_path(target) as temporary:
                tifffile.imwrite(temporary, picture, photometric="rgb" if picture.ndim == 3 else "minisblack")
    return list(planned)


def _pages(stack: Path, output: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Each page's file, and its picture (row, column[, band])."""
    if stack.is_file() and stack.suffix.lower() not in (".tif", ".tiff"):
        raise DataError("this is no TIFF", code="E301", file=stack, expected="a TIFF of several pages")
    bands = read_geometry(stack)[1]
    if bands not in (1, 3):
        raise DataError("pages are grey or RGB", code="E310", file=stack, expected="1 or 3 bands", found=bands)
    volume = read_image(stack, dims=3, channels=bands).array  # (C, column, row, page)
    digits = len(str(volume.shape[-1] - 1))
    for page in range(volume.shape[-1]):
        picture = volume[..., page].T
        yield output / f"{case_id(stack)}_{page:0{digits}d}.tif", picture if bands == 3 else picture[..., 0]

"""Writing label images on exactly the grid of an input, slab by slab where they are large, and coloured overlays.

NIfTI labels keep the input's shape, sform, qform, their codes and units; free text of its header (which may name the
patient) is not copied. gzip members carry neither time nor name, so the same label gives the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from medseg.errors import UsageError
from medseg.files import atomic_path, atomic_write, full_suffix, put_aside
from medseg.volumes_geometry import Volume, check_affine, corner_shift
from medseg.volumes_labels import smallest_type

__all__ = ["LabelWriter", "open_label_writer", "write_label", "write_overlay"]

_LEVEL = 3  # gzip: label maps shrink a hundredfold at any level; higher ones only cost time
_LARGE = 2**26  # pixels of a picture beyond which its label is written in tiles
_TILE = 512
_AT_ONCE = 2**24  # bytes of tiles that tifffile packs at once; by itself it takes 256 MB
# voxels between the header's own affine and the one in use, from which on the header is rewritten: qform and sform of a
# header may differ by this much and count as one (medseg.volumes_geometry), and both are to stay to the bit
_SAME = 0.5


class LabelWriter:
    """Takes a label volume slab by slab along its last axis; see `open_label_writer`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, put: Any) -> None:
        self.shape = shape
        self.dtype = dtype
        self.written = 0
        self._put = put

    def write_slab(self, start: int, array: np.ndarray) -> None:
        """Append voxels [..., start : start + n]; slabs come in order, without gap or overlap."""
        count = array.shape[-1] if array.ndim == len(self.shape) else -1
        if array.shape[:-1] != self.shape[:-1] or start != self.written or start + count > self.shape[-1]:
            expected = f"start {self.written}, shape {self.shape[:-1]} + (n,), at most {self.shape[-1]} in all"
            found = f"start {start}, shape {array.shape}"
            raise UsageError("a slab does not continue the label", field="write_slab", expected=expected, found=found)
        limits = np.iinfo(self.dtype)
        # values of the same type fit; looking at them would bring all of a mapped label into memory
        if array.dtype != self.dtype and array.size and (array.min() < limits.min or array.max() > limits.max):
            found = f"{array.min()} to {array.max()}"
            expected = f"{limits.min} to {limits.max}"
            raise UsageError("label values do not fit the type", field="dtype", expected=expected, found=found)
        self._put(np.asarray(array, self.dtype))
        self.written += count


@contextlib.contextmanager
def open_label_writer(
    path: str | Path, like: Volume, dtype: Any = np.uint8, *, description: str = ""
) -> Iterator[LabelWriter]:
    """A writer of a label image on the grid of `like`; the file appears when the block ends and all slabs are there.

    Args:
        path: `.nii.gz`, `.nii`; `.tif` for volumes as a stack; `.png`, `.tif` for pictures.
        like: the input image; only geometry, format and header are used.
        dtype: integer type of the label.
        description: up to 79 letters for the NIfTI header.

    Raises:
        UsageError: E101 a slab out of order, missing slabs, a suffix that cannot hold the label.
        ResourceError: E501, E502.
    """
    path, dtype = Path(path), np.dtype(dtype)
    if dtype.kind not in "iu":
        raise UsageError("labels are integers", field="dtype", expected="an integer type", found=dtype)
    shape = like.geometry.shape
    check_suffix(path, like.geometry.kind)
    opener = _SUFFIXES[full_suffix(path)]
    with atomic_path(path) as temporary, opener(temporary, like, dtype, description) as put:
        writer = LabelWriter(shape, dtype, put)
        yield writer
        if writer.written != shape[-1]:
            found = f"{writer.written} of {shape[-1]} slabs"
            raise UsageError("the label is not complete", file=path, field="write_slab", found=found)


def check_suffix(path: str | Path, kind: str, source: str = "") -> None:
    """Refuse a file whose suffix cannot hold the label of an image, before any work is done for it.

    Args:
        path: where the label is to be written.
        kind: "picture" or "volume".
        source: the image's format; only a DICOM series has DICOM SEG (`.dcm`).

    Raises:
        UsageError: E101.
    """
    suffix = full_suffix(Path(path))
    good = (".png", ".tif", ".tiff") if kind == "picture" else (".nii.gz", ".nii", ".tif", ".tiff")
    if suffix not in good and not (suffix == ".dcm" and source == "dicom"):
        expected = ", ".join((*good, ".dcm") if source == "dicom" else good)
        raise UsageError("labels of this image cannot be written so", file=path, expected=expected, found=suffix)


def write_label(path: str | Path, array: np.ndarray, like: Volume, *, description: str = "") -> None:
    """Write a label (*spatial) on the grid of `like`, in the smallest of uint8, int16, int32 that holds its values.

    Raises:
        UsageError: E101, another shape than `like`, not integers, or a suffix that cannot hold it.
        ResourceError: E501, E502.
    """
    if array.shape != like.geometry.shape or array.dtype.kind not in "iub":
        expected, found = f"integers of shape {like.geometry.shape}", f"{array.dtype} of shape {array.shape}"
        raise UsageError("the label does not fit the image", field="array", expected=expected, found=found)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    with open_label_writer(path, like, smallest_type(low, high), description=description) as writer:
        step = max(1, (1 << 24) // max(1, array[..., :1].size))
        for start in range(0, array.shape[-1], step):
            writer.write_slab(start, array[..., start : start + step])


def write_overlay(path: str | Path, image: np.ndarray, label: np.ndarray, reference: np.ndarray | None = None) -> None:
    """Write a picture with the label's outline and a light fill in colour over the grey image, as PNG.

    Args:
        path: PNG file.
        image: (row, column) or (C, row, column); three channels are colours, of other numbers the first is shown; from
            its 0.5th to its 99.5th percentile, uint8 as it is.
        label: (row, column) integers; colours by index, distinguishable with the common colour blindnesses.
        reference: a second label, drawn as a white outline.
    """
    from PIL import Image

    grey = np.asarray(image)
    bands = grey if grey.ndim == 3 else grey[None]
    bands = bands if len(bands) == 3 else bands[:1]
    if bands.shape[1:] != label.shape:
        raise UsageError("image and label do not fit", field="image", expected=label.shape, found=grey.shape)
    if bands.dtype != np.uint8:
        low, high = np.percentile(bands, (0.5, 99.5))
        bands = (np.clip((bands - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    canvas = np.repeat(bands, 3, axis=0) if bands.shape[0] == 1 else bands
    canvas = np.moveaxis(canvas, 0, -1).astype(np.float32)
    colours = _PALETTE[(label.astype(np.int64) - 1) % len(_PALETTE)]
    inside, edge = label != 0, _outline(label)
    canvas = np.where(inside[..., None], 0.75 * canvas + 0.25 * colours, canvas)
    canvas = np.where(edge[..., None], colours, canvas)
    if reference is not None:
        canvas = np.where(_outline(reference)[..., None], 255.0, canvas)
    with atomic_write(path) as file:
        Image.fromarray(np.rint(canvas).astype(np.uint8)).save(file, format="PNG")


# Okabe and Ito's eight colours without black (https://jfly.uni-koeln.de/color/)
_PALETTE = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (230, 159, 0), (0, 114, 178)],
    dtype=np.float32,
)


def _outline(label: np.ndarray) -> np.ndarray:
    padded = np.pad(label, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return (centre != 0) & np.any([centre != other for other in neighbours], axis=0)


@contextlib.contextmanager
def _nifti_sink(path: Path, like: Volume, dtype: np.dtype, description: str) -> Iterator[Any]:
    header = label_header(like, dtype, description)
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("wb"))
        if full_suffix(path) == ".nii.gz":
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0)
            file = stack.enter_context(packed)  # type: ignore[assignment]
        file.write(header.binaryblock)
        file.write(bytes(int(header["vox_offset"]) - len(header.binaryblock)))
        yield lambda slab: file.write(slab.tobytes(order="F"))


def label_header(like: Volume, dtype: np.dtype, description: str) -> Any:
    """A nibabel header for a label on the grid of `like`."""
    import nibabel

    shape, affine = like.geometry.shape, like.geometry.affine
    if like.format == "nifti":
        header = like.header.as_byteswapped("<") if like.header.endianness != "<" else like.header.copy()
        stored = int(header["dim"][0])
        header.set_data_shape(shape[:2] if stored == 2 else shape)
        for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
            if field in header.keys():  # noqa: SIM118  (nibabel headers are no mappings)
                header[field] = b""
        for field in ("cal_max", "cal_min", "intent_p1", "intent_p2", "intent_p3", "toffset", "slice_duration"):
            header[field] = 0
        if not _keeps(header, shape, affine):
            code = max(int(header["sform_code"]), int(header["qform_code"]), 1)
            header["xyzt_units"] = 2
            header.set_sform(affine, code)
            header.set_qform(affine, code)
    else:
        header = nibabel.Nifti1Header()
        header.set_data_shape(shape)
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
        header["xyzt_units"] = 2  # mm
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["intent_code"] = 1002  # NIFTI_INTENT_LABEL
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["vox_offset"] = len(header.binaryblock) + 4
    header["magic"] = header.single_magic
    return header


def _keeps(header: Any, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    """Whether the header's own affines say what was used, so that they can stay to the bit."""
    from medseg.volumes_nifti_header import affines_of

    known = affines_of(header, shape)
    return all(m is not None and not check_affine(m) and corner_shift(shape, affine, m) < _SAME for m in known.values())


@contextlib.contextmanager
def _tiff_sink(path: Path, like: Volume, dtype: np.dtype, description: str) -> Iterator[Any]:
    import tifffile

    geometry = like.geometry
    pixels = int(np.prod(geometry.shape))
    big = pixels * dtype.itemsize > 2**31
    with tifffile.TiffWriter(path, bigtiff=big) as writer:
        options = {
            "compression": "zlib",
            "metadata": None,
            "description": description[:200],
            "photometric": "minisblack",
        }
        if geometry.kind == "volume":

            def put(slab: np.ndarray) -> None:  # a page per k, rows are j, columns are i
                for k in range(slab.shape[-1]):
                    writer.write(np.ascontiguousarray(slab[..., k].T), contiguous=False, **options)

            yield put
        else:
            columns: list[np.ndarray] = []
            yield columns.append
            if sum(part.shape[-1] for part in columns) != geometry.shape[-1]:
                return  # the caller raises; nothing is written
            if pixels <= _LARGE:
                writer.write(np.concatenate(columns, axis=-1), **options)
            else:  # tiles can be read back in windows, and no second copy of the label is held
                tiles = _tiles(columns, geometry.shape)
                writer.write(
                    tiles, shape=geometry.shape, dtype=dtype, tile=(_TILE, _TILE), buffersize=_AT_ONCE, **options
                )


def _tiles(columns: list[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Tiles row by row out of a label that was given in groups of columns; beyond the border they are 0."""
    ends = np.cumsum([part.shape[-1] for part in columns])
    for top in range(0, shape[0], _TILE):
        for left in range(0, shape[1], _TILE):
            right = min(left + _TILE, shape[1])
            first, last = int(np.searchsorted(ends, left, "right")), int(np.searchsorted(ends, right, "left"))
            begin = int(ends[first]) - columns[first].shape[-1]
            parts = [part[top : top + _TILE] for part in columns[first : last + 1]]
            tile = np.concatenate(parts, axis=-1)[:, left - begin : right - begin]
            yield np.pad(tile, ((0, _TILE - tile.shape[0]), (0, _TILE - tile.shape[1])))
        put_aside(columns[0])  # all are parts of one label; what is packed is not looked at again


@contextlib.contextmanager
def _png_sink(path: Path, like: Volume, dtype: np.dtype, description: str) -> Iterator[Any]:
    from PIL import Image

    columns: list[np.ndarray] = []
    yield columns.append
    if sum(part.shape[-1] for part in columns) != like.geometry.shape[-1]:
        return  # the caller raises; nothing is written
    array = np.concatenate(columns, axis=-1)
    if array.min() < 0 or array.max() > 65535:
        raise UsageError("PNG holds labels from 0 to 65535", file=path, found=f"{array.min()} to {array.max()}")
    Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16)).save(path, format="PNG")


_SUFFIXES = {
    ".nii": _nifti_sink,
    ".nii.gz": _nifti_sink,
    ".tif": _tiff_sink,
    ".tiff": _tiff_sink,
    ".png": _png_sink,
}

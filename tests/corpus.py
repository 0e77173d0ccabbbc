"""Deterministic generator of the bad files that docs/reliability.md promises to refuse, and of good ones beside them.

    files = write_corpus(folder)        # list of Bad(row, name, path, codes, ...), in about a second
    series(folder, array, ...)          # a DICOM series with chosen faults

Nothing is committed: tests write the files where they need them.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

OFFSETS = {  # NIfTI-1 header fields: byte offset and struct format
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "b"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "srow_x": (280, "4f"),
    "srow_y": (296, "4f"),
    "srow_z": (312, "4f"),
    "magic": (344, "4s"),
}


@dataclass(frozen=True)
class Bad:
    """A file that must be refused: the row it stands for, and the codes one of which the refusal has."""

    row: str
    name: str
    path: Path
    codes: tuple[str, ...]
    says: str = ""  # must appear in the message


def image(shape: Sequence[int] = (6, 7, 8), dtype: object = np.int16, seed: int = 0) -> np.ndarray:
    """Noise in the range of CT, not constant."""
    values = np.random.default_rng(seed).integers(-50, 1000, tuple(shape))
    return np.abs(values).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype)


def nifti(array: np.ndarray, affine: np.ndarray | None = None, **fields: object) -> bytes:
    """A plain NIfTI-1 file, with single header fields overwritten by raw values."""
    affine = np.diag([-0.8, -0.8, 2.0, 1.0]) if affine is None else affine
    written = nibabel.Nifti1Image(array, affine)
    written.header.set_sform(affine, 1)
    if abs(np.linalg.det(affine[:3, :3])) > 0:
        written.header.set_qform(affine, 1)
    data = bytearray(written.to_bytes())
    for name, value in fields.items():
        offset, form = OFFSETS[name]
        values = value if isinstance(value, tuple | list) else (value,)
        struct.pack_into("<" + form, data, offset, *values)
    return bytes(data)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def png(array: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG")
    return out.getvalue()


def png_bomb(columns: int, rows: int) -> bytes:
    """A small valid grey PNG head of a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
        + chunk(b"IEND", b"")
    )


def tiff(array: np.ndarray, **options: object) -> bytes:
    import io

    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)  # type: ignore[arg-type]
    return out.getvalue()


def flipped(data: bytes, position: int, mask: int = 0x10) -> bytes:
    changed = bytearray(data)
    changed[position] ^= mask
    return bytes(changed)


def write_corpus(folder: Path) -> list[Bad]:
    """Write every bad image file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = nifti(image())
    gz = packed(plain)
    one_nan, all_nan, inf = (image(dtype=np.float32) for _ in range(3))
    one_nan[1, 2, 3], all_nan[:], inf[5, 6, 7] = np.nan, np.nan, -np.inf
    sheared = np.diag([1.0, 1.0, 2.0, 1.0])
    sheared[0, 1] = 0.3
    grey = image((20, 30), np.uint8)
    good_png, good_tif = png(grey), tiff(grey)
    found: list[Bad] = []

    def add(row: str, name: str, data: bytes, *codes: str, says: str = "") -> None:
        path = folder / name
        path.write_bytes(data)
        found.append(Bad(row, name, path, codes, says))

    row = "cut in half; shorter than its header; header only; vox_offset past the end"
    add(row, "half.nii.gz", gz[: len(gz) // 2], "E303", "E304", says="expected")
    add(row, "short.nii", plain[:-1], "E303", says=f"expected: {len(plain)}")
    add(row, "header_only.nii", plain[:352], "E303", says="found: 352 bytes")
    add(row, "header_half.nii", plain[:200], "E303")
    add(row, "header_only.nii.gz", packed(plain[:352]), "E303")
    add(row, "vox_offset.nii", nifti(image(), vox_offset=1e7), "E303", says="10000672")
    add(row, "vox_offset_nan.nii", nifti(image(), vox_offset=float("nan")), "E305", says="vox_offset")
    add(row, "vox_offset_small.nii", nifti(image(), vox_offset=16.0), "E305", says="vox_offset")
    row = "one flipped byte in the gzip stream; wrong checksum; last 8 bytes missing"
    add(row, "flipped.nii.gz", flipped(gz, len(gz) // 2), "E304")
    add(row, "checksum.nii.gz", flipped(gz, len(gz) - 8), "E304", says="checksum")
    add(row, "length.nii.gz", flipped(gz, len(gz) - 4), "E304", says="checksum")
    add(row, "no_trailer.nii.gz", gz[:-8], "E304", says="checksum")
    add(row, "garbage.nii.gz", gz + b"garbage", "E304")
    row = "empty file; text; an HTML error page named .nii.gz"
    add(row, "empty.nii.gz", b"", "E302", says="empty")
    add(row, "text.nii", b"this is text, and long enough for a header " * 20, "E301", says="not a NIfTI")
    add(row, "page.nii.gz", b"<html><body>404</body></html>" * 20, "E301", says="not a NIfTI (starts with `<html")
    add(row, "text_packed.nii.gz", packed(b"text" * 200), "E301", says="not a NIfTI")
    row = "wrong magic"
    add(row, "magic.nii", nifti(image(), magic=b"xx1\0"), "E305", says="magic")
    add(row, "pair.nii", nifti(image(), magic=b"ni1\0"), "E305", says="two-file")
    add(row, "not_packed.nii.gz", plain, "E301", says="not compressed")
    row = "dim 0, negative, nine dimensions, 32767^3"
    add(row, "dim_0.nii", nifti(image(), dim=(3, 6, 0, 8, 1, 1, 1, 1)), "E305", says="6 x 0 x 8")
    add(row, "dim_negative.nii", nifti(image(), dim=(3, 6, -7, 8, 1, 1, 1, 1)), "E305", says="6 x -7 x 8")
    add(row, "dim_9.nii", nifti(image(), dim=(9, 6, 7, 8, 1, 1, 1, 1)), "E305", says="dim[0] = 9")
    add(row, "huge.nii", nifti(image(), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), "E303", says="32767 x 32767 x 32767")
    huge = packed(nifti(image(), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)))
    add(row, "huge.nii.gz", huge, "E303", says="32767 x 32767 x 32767")
    row = "complex, RGB24, unknown data type"
    add(row, "complex.nii", nifti(image(dtype=np.complex64)), "E307", says="complex64")
    add(
        row,
        "rgb.nii",
        nifti(image((6, 7, 24), np.uint8), dim=(3, 6, 7, 8, 1, 1, 1, 1), datatype=128, bitpix=24),
        "E314",
    )
    add(row, "unknown.nii", nifti(image(), datatype=999), "E307", says="999")
    add(row, "bitpix.nii", nifti(image(), bitpix=8), "E305", says="bitpix")
    row = "one NaN or inf in the image; all-NaN"
    add(row, "nan.nii.gz", packed(nifti(one_nan)), "E311", says="1 of 336 voxels, the first at (1, 2, 3)")
    add(row, "inf.nii", nifti(inf), "E311", says="(5, 6, 7)")
    add(row, "all_nan.nii", nifti(all_nan), "E312", says="336")
    add(row, "slope_inf.nii", nifti(image(), scl_slope=2.0, scl_inter=float("inf")), "E305", says="scl_inter")
    row = "pixdim 0, negative, NaN, spacing outside 0.001-100 mm"
    for name, value in {"zero": 0.0, "negative": -1.0, "nan": float("nan"), "small": 1e-5, "large": 500.0}.items():
        sizes = (1.0, value, 0.8, 2.0, 0.0, 0.0, 0.0, 0.0)
        add(row, f"pixdim_{name}.nii", nifti(image(), pixdim=sizes, sform_code=0), "E322", "E324")
        add(row, f"pixdim_{name}_alone.nii", nifti(image(), pixdim=sizes, sform_code=0, qform_code=0), "E322", "E324")
    row = "sform NaN or singular; sheared affine; sform and qform that disagree"
    add(row, "sform_nan.nii", nifti(image(), srow_x=(float("nan"), 0, 0, 0)), "E322", says='affine "qform"')
    add(row, "sform_singular.nii", nifti(image(), srow_y=(-0.8, 0, 0, 0)), "E322", "E323", says='affine "qform"')
    add(row, "sform_zero.nii", nifti(image(), srow_z=(0, 0, 0, 0)), "E322", "E324", says='affine "qform"')
    add(row, "sheared.nii", nifti(image(), sheared, qform_code=0), "E323", says="sheared")
    add(row, "disagree.nii", nifti(image(), srow_x=(0.8, 0, 0, 0)), "E321", says="sform")
    row = "4-D NIfTI: channels undeclared; time"
    add(row, "four.nii.gz", packed(nifti(image((6, 7, 8, 3)))), "E310", says="(6, 7, 8, 3)")
    add(row, "five.nii", nifti(image((4, 4, 4, 2, 2))), "E310")
    add(row, "line.nii", nifti(image((6, 1, 1)), dim=(1, 6, 1, 1, 1, 1, 1, 1)), "E310")
    row = "truncated PNG or TIFF; PNG named .tif; 60000^2 PNG; decompression bombs"
    add(row, "cut.png", good_png[: len(good_png) * 2 // 3], "E303")
    add(row, "no_end.png", good_png[:-12], "E303")
    add(row, "checksum.png", flipped(good_png, len(good_png) // 2), "E304")
    add(row, "cut.tif", good_tif[: len(good_tif) // 2], "E303", "E305")
    add(row, "cut_packed.tif", tiff(grey, compression="zlib")[:-40], "E303", "E305")
    add(row, "really_png.tif", good_png, "E301", says="PNG")
    add(row, "really_tif.png", good_tif, "E301", says="TIFF")
    add(row, "huge.png", png_bomb(60000, 60000), "E306", says="3600000000")
    add(row, "bomb.png", png_bomb(20000, 20000), "E306")
    add(row, "empty.png", b"", "E302")
    add(row, "text.png", b"no picture", "E301")
    add(row, "wrong.xyz", b"something", "E301", says="unknown image format")
    row = "missing file, folder in its place, dangling link, no permission"
    found.append(Bad(row, "missing", folder / "missing.nii", ("E308",), "does not exist"))
    os.symlink(folder / "nothing.nii", folder / "dangling.nii")
    found.append(Bad(row, "dangling", folder / "dangling.nii", ("E308",), "link to nothing"))
    row = "MetaImage and NRRD cut off"
    for suffix in (".mha", ".nrrd"):
        for compress in (False, True):
            path = folder / f"whole_{compress}{suffix}"
            write_itk(path, image(), compress)
            data = path.read_bytes()
            path.unlink()
            add(row, f"cut_{compress}{suffix}", data[:-20], "E303", "E304")
            add(row, f"half_{compress}{suffix}", data[: len(data) // 2], "E303", "E304")
    return found


def write_itk(path: Path, array: np.ndarray, compress: bool = False) -> None:
    """(i, j, k) as MetaImage or NRRD, LPS directions, 0.8 x 0.8 x 2 mm."""
    import SimpleITK

    out = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    out.SetSpacing((0.8, 0.8, 2.0))
    out.SetOrigin((-10.0, 20.0, 30.0))
    SimpleITK.WriteImage(out, str(path), compress)


def series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    edit: Callable[[int, object], object] | None = None,
    uid: str = "1.2.3.4",
    number: int = 1,
    prefix: str = "",
    intercept: float = -1024.0,
    patient: str = "CANARY^NAME",
) -> Path:
    """Write (i, j, k) integers as a CT series, one file a slice, named so that name order is not slice order.

    `affine` is RAS+ with right angles. `edit(k, dataset)` may change a dataset, or return False to leave the slice out.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, -0.8, 2.0, 1.0]) if affine is None else affine
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / sizes
    for k in range(array.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = f"{uid}.100", uid, f"{uid}.200"
        data.PatientName, data.PatientID, data.PatientBirthDate = patient, "CANARY-ID", "19000101"
        data.InstitutionName, data.AccessionNumber, data.StudyID = "CANARY-HOSPITAL", "CANARY-ACC", "CANARY-STUDY"
        data.SeriesDescription, data.PatientSex = "CANARY-DESCRIPTION", "O"
        data.StudyDate = data.SeriesDate = data.ContentDate = "19000102"
        data.StudyTime = data.SeriesTime = data.ContentTime = "010203"
        data.ReferringPhysicianName, data.Manufacturer = "CANARY^DOCTOR", "CANARY-MAKER"
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", number, k + 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Columns, data.Rows = array.shape[0], array.shape[1]
        data.PixelSpacing = [f"{sizes[1]:.10g}", f"{sizes[0]:.10g}"]
        data.SliceThickness = f"{sizes[2]:.10g}"
        data.ImageOrientationPatient = [f"{v:.10f}"[:16] for v in (*axes[:, 0], *axes[:, 1])]
        data.ImagePositionPatient = [f"{v:.10f}"[:16] for v in (lps @ [0, 0, k, 1])[:3]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, intercept
        data.PixelData = (array[:, :, k].T - intercept).astype("<u2").tobytes()
        if edit is not None and edit(k, data) is False:
            continue
        name = f"{prefix}{(k * 7919) % 997:03d}"
        data.save_as(folder / name, enforce_file_format=True)
    return folder

"""Damage and claims that the corpus has no file for: each refusal of the readers, and what is still read."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path

import corpus
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import DataError, FormatError, GeometryError
from medseg.volumes import case_id, list_inputs, read_geometry, read_image, read_label, read_window, write_label
from medseg.volumes_gzip import unpack

META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 2
DimSize = 6 7 8
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 6 7 8
space directions: (1,0,0) (0,1,0) (0,0,2)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (0,0,0)

"""
DATA = corpus.image().tobytes(order="F")


def refused(path: Path, content: bytes, code: str) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(corpus.nifti(corpus.image()))

    def forbidden(self: Path, *arguments: object, **options: object) -> object:  # root may read everything
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(FormatError, match="cannot be read") as caught:
        read_image(path)
    assert (caught.value.code, caught.value.found) == ("E308", "Permission denied")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ElementType = MET_SHORT", "ElementType = MET_NONE", "E305"),
        ("DimSize = 6 7 8", "DimSize = 6 7 x", "E305"),
        ("DimSize = 6 7 8", "DimSize = 6 7 0", "E305"),
        ("DimSize = 6 7 8", "DimSize = 60 70 80", "E303"),
        ("BinaryData = True", "BinaryData = False", "E307"),
        ("ElementDataFile = LOCAL", "ElementDataFile = LIST", "E307"),
        ("ElementDataFile = LOCAL", "ElementDataFile = ../secret.raw", "E308"),
        ("ElementDataFile = LOCAL", "ElementDataFile = missing.raw", "E308"),
        ("CompressedData = False", "CompressedData = True", "E304"),
        ("ElementSpacing = 1 1 2", "ElementSpacing = 1 1 500", "E324"),
        ("TransformMatrix = 1 0 0 0 1 0 0 0 1", "TransformMatrix = 1 0 0 1 1 0 0 0 1", "E323"),
        ("ObjectType = Image", "{ObjectType: Image}", "E301"),
        ("DimSize = 6 7 8", "ElementNumberOfChannels = 2\nDimSize = 3 7 8", "E310"),
        ("NDims = 3", "NDims = 4", "E305"),
    ],
)
def test_metaimage_claims(tmp_path: Path, old: str, new: str, code: str) -> None:
    assert old in META
    refused(tmp_path / "a.mha", META.replace(old, new).encode() + DATA, code)


def test_metaimage_as_written_by_hand_and_beside_its_data(tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_bytes(META.encode() + DATA)
    np.testing.assert_array_equal(read_image(tmp_path / "a.mha").array[0], corpus.image())
    (tmp_path / "b.raw").write_bytes(b"12345" + DATA)
    for skip in ("-1", "5"):
        text = META.replace("ElementDataFile = LOCAL", f"HeaderSize = {skip}\nElementDataFile = b.raw")
        (tmp_path / "b.mhd").write_text(text)
        np.testing.assert_array_equal(read_image(tmp_path / "b.mhd").array[0], corpus.image())
    big = META.replace("MSB = False", "MSB = True").encode() + corpus.image().astype(">i2").tobytes(order="F")
    (tmp_path / "c.mha").write_bytes(big)
    np.testing.assert_array_equal(read_image(tmp_path / "c.mha").array[0], corpus.image())


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("type: short", "type: block", "E307"),
        ("sizes: 6 7 8", "sizes: 6 7", "E305"),
        ("sizes: 6 7 8", "sizes: 60 70 80", "E303"),
        ("encoding: raw", "encoding: hex", "E307"),
        ("encoding: raw", "encoding: gzip", "E304"),
        ("encoding: raw", "encoding: raw\ndata file: LIST", "E307"),
        ("encoding: raw", "encoding: raw\ndata file: /etc/passwd", "E308"),
        ("encoding: raw", "encoding: raw\nbyte skip: 4", "E307"),
        ("NRRD0004", "NNRD0004", "E301"),
        ("encoding: raw\n", "", "E305"),
    ],
)
def test_nrrd_claims(tmp_path: Path, old: str, new: str, code: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(NRRD.encode() + DATA)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nrrd").array[0], corpus.image())
    assert old in NRRD
    refused(tmp_path / "a.nrrd", NRRD.replace(old, new).encode() + DATA, code)


def test_nrrd_without_an_end_and_with_more_than_it_says(tmp_path: Path) -> None:
    refused(tmp_path / "a.nrrd", NRRD.strip().encode(), "E305")
    packed = NRRD.replace("encoding: raw", "encoding: gzip").encode() + gzip.compress(DATA + b"more")
    refused(tmp_path / "a.nrrd", packed, "E306")
    packed = NRRD.replace("encoding: raw", "encoding: gzip").encode() + gzip.compress(DATA[:-2])
    refused(tmp_path / "a.nrrd", packed, "E303")


def test_voxels_that_are_not_those_of_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import SimpleITK

    monkeypatch.setattr(SimpleITK, "GetArrayFromImage", lambda image: np.zeros((8, 7, 6), np.int16))
    error = refused(tmp_path / "a.mha", META.encode() + DATA, "E305")
    assert "not those in the file" in str(error)


def test_bands_of_metaimage(tmp_path: Path) -> None:
    import SimpleITK

    bands = corpus.image((8, 7, 6, 3), np.uint8)  # k, j, i, band
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(bands, isVector=True), str(tmp_path / "a.mha"))
    expected = np.moveaxis(bands.transpose(2, 1, 0, 3), -1, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "a.mha", colour="rgb").array, expected)
    deep = corpus.image((8, 7, 6, 2), np.int16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(deep, isVector=True), str(tmp_path / "b.nrrd"))
    np.testing.assert_array_equal(
        read_image(tmp_path / "b.nrrd", channels=2).array[1], deep.transpose(2, 1, 0, 3)[..., 1]
    )
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((5, 5), np.complex64)), str(tmp_path / "c.mha"))
    with pytest.raises(DataError):
        read_image(tmp_path / "c.mha")


def test_gzip_that_goes_on_far_beyond_the_image(tmp_path: Path) -> None:
    bomb = gzip.compress(corpus.nifti(corpus.image()) + bytes(70 << 20))
    assert refused(tmp_path / "a.nii.gz", bomb, "E306").found
    with pytest.raises(FormatError) as caught:
        unpack(b"", 10, tmp_path)
    assert caught.value.code == "E303"


def test_nifti_without_a_byte_of_its_data_type_aligned(tmp_path: Path) -> None:
    data = bytearray(corpus.nifti(corpus.image()))
    struct.pack_into("<f", data, 108, 353.0)  # voxels begin at an odd byte
    (tmp_path / "a.nii").write_bytes(bytes(data[:352]) + b"x" + bytes(data[352:]))
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").array[0], corpus.image())


def test_windows_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(corpus.nifti(corpus.image((4, 4, 4, 2))))
    (tmp_path / "a.tif").write_bytes(corpus.tiff(corpus.image((9, 8), np.uint8)))
    stack = tmp_path / "s.tif"
    tifffile.imwrite(stack, corpus.image((4, 9, 8), np.uint16), imagej=True, truncate=True)
    Image.fromarray(corpus.image((9, 8), np.uint8)).save(tmp_path / "a.png")
    three = (slice(0, 1),) * 3
    for name in ("a.nii", "a.tif", "s.tif", "a.png"):
        with pytest.raises(DataError) as caught:
            read_window(tmp_path / name, three)
        assert caught.value.code == "E310"
    tifffile.imwrite(stack, corpus.image((4, 9, 8), np.uint16), photometric="minisblack")
    assert read_window(stack, (slice(0, 3), slice(0, 2), slice(2, 2))).shape == (1, 3, 2, 0)


def test_pictures_that_lie(tmp_path: Path) -> None:
    good = corpus.png(corpus.image((9, 8), np.uint8))
    refused(tmp_path / "a.png", good[:8] + good[33:], "E305")  # no header chunk
    refused(tmp_path / "a.png", good[:20], "E303")
    refused(tmp_path / "a.png", corpus.png_bomb(0, 5), "E305")
    refused(tmp_path / "a.png", corpus.png_bomb(300, 300), "E305")  # rows that are not there
    refused(tmp_path / "a.jpg", b"\xff\xd8\xff\xe0" + bytes(3), "E303")
    refused(tmp_path / "a.jpg", b"\xff\xd8\xff\xd9" * 20, "E303")
    refused(tmp_path / "a.gif", b"GIF89a\x05", "E303")


def test_cmyk_ycbcr_and_palettes_with_alpha(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.full((9, 8, 3), (250, 10, 20), np.uint8))
    rgb.convert("CMYK").save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").channels == 3
    indexed = rgb.quantize(2)
    indexed.save(tmp_path / "b.png", transparency=bytes([255, 0]))
    assert read_image(tmp_path / "b.png").array[:, 0, 0].tolist() == [250, 10, 20]


def test_sixteen_bits_of_colour_and_few_bits_of_grey(tmp_path: Path) -> None:
    for bands in (2, 3, 4):  # Pillow would give the upper eight bits
        deep = corpus.image((9, 8, bands), np.uint16) * 61
        deep[..., -1] = 65535 if bands != 3 else deep[..., -1]
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
        np.testing.assert_array_equal(
            read_image(tmp_path / "a.png").array, np.moveaxis(deep, -1, 0)[: 3 if bands > 2 else 1]
        )
        assert read_geometry(tmp_path / "a.png")[2] == np.uint16
    for bits in (2, 4):
        label = np.arange(72).reshape(9, 8) % (1 << bits)
        (tmp_path / "b.png").write_bytes(grey_png(label, bits))
        np.testing.assert_array_equal(read_label(tmp_path / "b.png", allowed=range(1 << bits)).array[0], label)
        np.testing.assert_array_equal(read_image(tmp_path / "b.png").array[0], label)
        expected = label == (1 << bits) - 1
        scaled = {n * 255 // ((1 << bits) - 1): int(n == (1 << bits) - 1) for n in range(1 << bits)}
        np.testing.assert_array_equal(read_label(tmp_path / "b.png", mapping=scaled).array[0], expected)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 2 or 4 bits a sample, written by hand (ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    each = 8 // bits
    packed = sum(values[:, n::each].astype(np.uint8) << (bits * (each - 1 - n)) for n in range(each)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(corpus.packed(corpus.nifti(corpus.image())))

    def full(*arguments: object) -> object:
        raise MemoryError

    monkeypatch.setattr("medseg.volumes_nifti.unpack", full)
    with pytest.raises(FormatError, match="memory"):
        read_image(path)


def test_a_singular_affine_of_a_chosen_kind_names_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(corpus.nifti(corpus.image(), pixdim=(1.0, 0.0, 1.0, 1.0, 0, 0, 0, 0)))
    with pytest.raises(GeometryError) as caught:
        read_image(path, affine="qform")
    assert 'affine="sform"' not in str(caught.value) or "valid" in str(caught.value)
    assert caught.value.field == "qform"


def test_volumes_cross_processes(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(corpus.packed(corpus.nifti(corpus.image())))
    volume = pickle.loads(pickle.dumps(read_image(path)))
    write_label(tmp_path / "b.nii.gz", (volume.array[0] > 0).astype(np.uint8), volume)
    assert read_label(tmp_path / "b.nii.gz").geometry == volume.geometry


def test_listing_goes_on_where_one_folder_is_damaged(tmp_path: Path) -> None:
    corpus.series(tmp_path / "a", corpus.image())
    corpus.series(tmp_path / "b", corpus.image(), uid="1.9")
    broken = tmp_path / "b" / "000"
    broken.write_bytes(broken.read_bytes()[:180])
    assert list_inputs([tmp_path / "a", tmp_path / "b"]) == [tmp_path / "a", tmp_path / "b"]
    assert case_id(tmp_path / "a")
    with pytest.raises(DataError):
        read_image(tmp_path / "b")

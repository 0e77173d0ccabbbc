"""Pictures and labels: palettes, bit depths, alpha, TIFF variants; values exact to the bit."""

from __future__ import annotations

import io
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import DataError, FormatError, LabelError, UsageError
from medseg.volumes import read_geometry, read_image, read_label, read_window
from medseg.volumes_labels import check_values, value_counts

GREY = corpus.image((23, 31), np.uint8, seed=1)
LABEL = (np.arange(12).reshape(3, 4) % 3).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def palette_image(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices)
    out = Image.new("P", image.size)
    out.putpalette([v for colour in colours for v in colour])
    out.putdata(indices.ravel().tolist())
    return out


# ---------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif"])
def test_grey_pictures_to_the_value(tmp_path: Path, suffix: str) -> None:
    volume = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(GREY)), dims=2)
    np.testing.assert_array_equal(volume.array[0], GREY)
    assert volume.geometry.shape == (23, 31)
    assert volume.geometry.unit == "px"
    assert read_geometry(tmp_path / f"a{suffix}")[0] == volume.geometry
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / f"a{suffix}", dims=3)
    assert caught.value.code == "E310"


def test_colour_alpha_and_conversions(tmp_path: Path) -> None:
    rgb = corpus.image((9, 8, 3), np.uint8)
    rgba = np.dstack([rgb, np.full((9, 8), 255, np.uint8)])
    file = save(tmp_path / "a.png", Image.fromarray(rgb))
    np.testing.assert_array_equal(read_image(file).array, np.moveaxis(rgb, -1, 0))
    np.testing.assert_array_equal(read_image(file, colour="rgb").array, np.moveaxis(rgb, -1, 0))
    with pytest.raises(DataError) as caught:
        read_image(file, colour="grey")
    assert caught.value.code == "E314"
    luma = np.rint(rgb @ np.array([0.299, 0.587, 0.114]))
    np.testing.assert_array_equal(read_image(file, colour="luma").array[0], luma)
    with pytest.raises(DataError, match="channels"):
        read_image(file, channels=1)
    with pytest.raises(UsageError):
        read_image(file, colour="blue")
    file = save(tmp_path / "b.png", Image.fromarray(rgba))
    volume = read_image(file)
    assert volume.channels == 3
    assert volume.notes == ()
    rgba[0, 0, 3] = 10
    volume = read_image(save(tmp_path / "c.png", Image.fromarray(rgba)), colour="rgb")
    np.testing.assert_array_equal(volume.array, np.moveaxis(rgb, -1, 0))
    assert any("alpha" in note for note in volume.notes)
    same = np.repeat(GREY[..., None], 3, axis=-1)
    file = save(tmp_path / "d.png", Image.fromarray(same))
    np.testing.assert_array_equal(read_image(file, colour="grey").array[0], GREY)
    file = save(tmp_path / "e.png", Image.fromarray(GREY))
    np.testing.assert_array_equal(read_image(file, colour="rgb").array, np.repeat(GREY[None], 3, axis=0))
    file = save(tmp_path / "f.png", Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])))
    np.testing.assert_array_equal(read_image(file).array[0], GREY)


def test_sixteen_bits_one_bit_and_jpeg(tmp_path: Path) -> None:
    deep = corpus.image((9, 8), np.uint16) * 60
    volume = read_image(save(tmp_path / "a.png", Image.fromarray(deep)))
    np.testing.assert_array_equal(volume.array[0], deep)
    assert volume.array.dtype == np.uint16
    volume = read_image(save(tmp_path / "b.png", Image.fromarray(GREY > 99)))
    np.testing.assert_array_equal(volume.array[0], GREY > 99)
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8)
    for name in ("c.jpg", "d.jpeg"):
        volume = read_image(save(tmp_path / name, Image.fromarray(smooth), quality=95))
        assert np.abs(volume.array[0].astype(int) - smooth).max() <= 4
        assert read_geometry(tmp_path / name)[0].shape == (32, 48)


def test_palettes_become_their_colours(tmp_path: Path) -> None:
    inverted = palette_image(LABEL, [(255, 255, 255), (128, 128, 128), (0, 0, 0)])  # index 0 is white
    coloured = palette_image(LABEL, [(0, 0, 0), (128, 0, 0), (0, 128, 0)])
    for suffix in (".png", ".gif"):
        volume = read_image(save(tmp_path / f"a{suffix}", inverted))
        np.testing.assert_array_equal(volume.array[0], np.array([255, 128, 0], np.uint8)[LABEL])
        volume = read_image(save(tmp_path / f"b{suffix}", coloured))
        assert volume.channels == 3
        np.testing.assert_array_equal(volume.array[0], np.array([0, 128, 0])[LABEL])


def test_animations_and_truncated_jpeg_and_gif_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(FormatError, match="animation"):
        read_image(tmp_path / "a.gif")
    noise = Image.fromarray(corpus.image((64, 64, 3), np.uint8))
    for suffix in (".jpg", ".gif"):
        data = save(tmp_path / f"b{suffix}", noise).read_bytes()
        (tmp_path / f"b{suffix}").write_bytes(data[: len(data) // 2])
        with pytest.raises(FormatError):
            read_image(tmp_path / f"b{suffix}")


# ------------------------------------------------------------------------------------------------------ TIFF


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_tiff_variants_and_windows(tmp_path: Path, compression: str | None, dtype: str, tile: object) -> None:
    array = corpus.image((50, 41), np.dtype(dtype))
    strips = {"tile": tile} if tile else {"rowsperstrip": 7}
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression, bigtiff=True, **strips)
    volume = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(volume.array[0], array)
    assert volume.array.dtype == np.dtype(dtype)
    for window in ((slice(5, 33), slice(9, 40)), (slice(None), slice(0, 1)), (slice(40, 90), slice(3, 30, 4))):
        np.testing.assert_array_equal(read_window(tmp_path / "a.tif", window)[0], array[window])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_colour_and_planes(tmp_path: Path, planar: str) -> None:
    array = corpus.image((20, 30, 3), np.uint8)
    stored = array if planar == "contig" else np.moveaxis(array, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, tile=(16, 16))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, np.moveaxis(array, -1, 0))
    window = (slice(3, 19), slice(2, 28))
    np.testing.assert_array_equal(read_window(tmp_path / "a.tif", window), np.moveaxis(array[window], -1, 0))
    assert read_geometry(tmp_path / "a.tif")[1] == 3


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"imagej": True, "truncate": True}, {"compression": "lzw"}])
def test_tiff_stacks_are_volumes_with_pages_last(tmp_path: Path, options: dict) -> None:
    array = corpus.image((4, 7, 5), np.uint16)  # page, row, column
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **options)
    volume = read_image(tmp_path / "a.tif", dims=3)
    np.testing.assert_array_equal(volume.array[0], array.transpose(2, 1, 0))
    assert read_geometry(tmp_path / "a.tif")[0].shape == (5, 7, 4)
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.tif", dims=2)
    assert caught.value.code == "E310"
    if "truncate" not in options:
        window = (slice(1, 4), slice(2, 7), slice(1, 3))
        np.testing.assert_array_equal(read_window(tmp_path / "a.tif", window), volume.array[(slice(None), *window)])


def test_tiff_of_different_pages_negatives_and_previews(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(GREY)
        writer.write(GREY[:5])
    with pytest.raises(DataError, match="pages"):
        read_image(tmp_path / "a.tif")
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(GREY)
        writer.write(GREY[::4, ::4], subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif", dims=2).array[0], GREY)
    tifffile.imwrite(tmp_path / "c.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif").array[0], 255 - GREY)
    tifffile.imwrite(tmp_path / "d.tif", GREY > 9, photometric="minisblack")
    np.testing.assert_array_equal(read_image(tmp_path / "d.tif").array[0], GREY > 9)
    tifffile.imwrite(tmp_path / "e.tif", GREY.astype(np.complex64))
    with pytest.raises(FormatError) as caught:
        read_image(tmp_path / "e.tif")
    assert caught.value.code == "E307"


def test_a_window_of_a_picture_far_larger_than_memory_allows(tmp_path: Path) -> None:
    # 50 000 x 50 000, sparse: only the tiles that hold something are stored
    side = 50_000
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=True) as writer:
        count = -(-side // 1008)
        block = corpus.image((1008, 1008), np.uint8)
        data = (block if n in (0, count * 3 + 2) else None for n in range(count * count))
        writer.write(data, shape=(side, side), dtype=np.uint8, tile=(1008, 1008), compression="zlib")
    window = read_window(tmp_path / "a.tif", (slice(3000, 4100), slice(2000, 3100)))
    expected = np.zeros((1100, 1100), np.uint8)
    expected[24:1032, 16:1024] = block
    np.testing.assert_array_equal(window[0], expected)
    with pytest.raises(FormatError) as caught:
        read_image(tmp_path / "a.tif")
    assert caught.value.code == "E306"


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float32, np.uint16, np.int8, np.uint8])
def test_labels_of_any_type_are_exact(tmp_path: Path, dtype: type) -> None:
    array = np.zeros((4, 5, 6), dtype)
    array[1, 2, 3], array[0, 0, 0] = 2, 1
    if np.dtype(dtype).kind == "i" and np.dtype(dtype).itemsize == 8:
        nibabel.Nifti1Image(array, np.eye(4), dtype=np.int64).to_filename(tmp_path / "a.nii.gz")
    else:
        nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    label = read_label(tmp_path / "a.nii.gz", allowed={0, 1, 2})
    np.testing.assert_array_equal(label.array[0], array)
    assert label.array.dtype == np.uint8


def test_scaled_labels_are_whole_again(tmp_path: Path) -> None:
    array = np.array([0, 255, 128], np.int16).reshape(3, 1, 1)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array, scl_slope=1 / 255.0 * 3, scl_inter=0.0))
    with pytest.raises(LabelError) as caught:
        read_label(tmp_path / "a.nii")
    assert "1.50588 in 1 voxel" in str(caught.value)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array[:2], scl_slope=1 / 255.0, scl_inter=0.0))
    assert read_label(tmp_path / "a.nii").array.ravel().tolist() == [0, 1]


def test_refused_label_values_name_value_and_count(tmp_path: Path) -> None:
    array = np.zeros((4, 5, 6), np.float32)
    array[0, 0, :3] = 0.5
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    with pytest.raises(LabelError) as caught:
        read_label(tmp_path / "a.nii", case="c")
    assert caught.value.code == "E330"
    assert caught.value.found == "0.5 in 3 voxels"
    for values, options, code, found in (
        ([-1, -1, 2], {}, "E331", "-1 in 2 voxels"),
        ([0, 7, 1], {"allowed": {0, 1}}, "E332", "7 in 1 voxel"),
        ([0, 255, 255], {"allowed": {0, 1}}, "E332", "255 in 2 voxels"),
        ([0, 9, 1], {"mapping": {1: 1}}, "E332", "9 in 1 voxel"),
        ([0, 1, 70000], {"allowed": {0, 1}}, "E332", "70000 in 1 voxel"),
    ):
        array = np.array(values, np.int32).reshape(3, 1, 1)
        (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
        with pytest.raises(LabelError) as caught:
            read_label(tmp_path / "a.nii", **options)
        assert (caught.value.code, caught.value.found) == (code, found)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(np.full((2, 2, 2), np.nan, np.float32)))
    with pytest.raises(LabelError):
        read_label(tmp_path / "a.nii")


def test_ignore_mapping_and_empty(tmp_path: Path) -> None:
    array = np.array([0, 255, 1], np.uint8).reshape(3, 1, 1)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    assert read_label(tmp_path / "a.nii", allowed={0, 1}, ignore=255).array.ravel().tolist() == [0, 255, 1]
    assert read_label(tmp_path / "a.nii", mapping="nonzero").array.ravel().tolist() == [0, 1, 1]
    assert read_label(tmp_path / "a.nii", mapping="nonzero", ignore=255).array.ravel().tolist() == [0, 255, 1]
    assert read_label(tmp_path / "a.nii", mapping={0: 1, 255: 0, 1: 2}).array.ravel().tolist() == [1, 0, 2]
    with pytest.raises(UsageError):
        read_label(tmp_path / "a.nii", mapping="positive")
    (tmp_path / "a.nii").write_bytes(corpus.nifti(np.zeros((2, 2, 2), np.uint8)))
    assert any(note.startswith("E333") for note in read_label(tmp_path / "a.nii").notes)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(np.zeros((2, 2, 2, 2), np.uint8)))
    with pytest.raises(LabelError, match="four dimensions"):
        read_label(tmp_path / "a.nii")


def test_palette_and_one_bit_labels(tmp_path: Path) -> None:
    inverted = palette_image(LABEL // 2, [(255, 255, 255), (0, 0, 0)])
    coloured = palette_image(LABEL, [(0, 0, 0), (128, 0, 0), (0, 128, 0)])
    for suffix in (".gif", ".png"):
        file = save(tmp_path / f"a{suffix}", inverted)
        np.testing.assert_array_equal(read_label(file, mapping={255: 1}).array[0], LABEL // 2 == 0)
        np.testing.assert_array_equal(read_label(file, palette="index").array[0], LABEL // 2)
        np.testing.assert_array_equal(read_label(file, palette="grey").array[0], (LABEL // 2 == 0) * 255)
        # grey values 0 and 255 are no labels here, the indices are
        np.testing.assert_array_equal(read_label(file, allowed={0, 1}).array[0], LABEL // 2)
        file = save(tmp_path / f"b{suffix}", coloured)
        np.testing.assert_array_equal(read_label(file, allowed={0, 1, 2}).array[0], LABEL)
        table = {(0, 0, 0): 0, (128, 0, 0): 2, (0, 128, 0): 1}
        np.testing.assert_array_equal(read_label(file, mapping=table).array[0], np.array([0, 2, 1])[LABEL])
        with pytest.raises(LabelError) as caught:
            read_label(file, mapping={(0, 0, 0): 0, (128, 0, 0): 1})
        assert "(0, 128, 0) in 4 pixels" in str(caught.value)
        with pytest.raises(LabelError):
            read_label(file, palette="grey")
    with pytest.raises(UsageError):
        read_label(file, palette="best")
    file = save(tmp_path / "c.png", Image.fromarray(LABEL > 0))
    np.testing.assert_array_equal(read_label(file, allowed={0, 1}).array[0], LABEL > 0)
    np.testing.assert_array_equal(read_label(file, mapping={255: 1}).array[0], LABEL > 0)


def test_colour_labels(tmp_path: Path) -> None:
    same = np.repeat(LABEL[..., None], 3, axis=-1)
    file = save(tmp_path / "a.png", Image.fromarray(same))
    np.testing.assert_array_equal(read_label(file, allowed={0, 1, 2}).array[0], LABEL)
    file = save(tmp_path / "b.png", Image.fromarray(np.dstack([same, np.full_like(LABEL, 255)])))
    np.testing.assert_array_equal(read_label(file, allowed={0, 1, 2}).array[0], LABEL)
    file = save(tmp_path / "c.png", Image.fromarray(np.dstack([same, LABEL])))
    with pytest.raises(LabelError, match="transparent"):
        read_label(file)
    same[0, 0, 1] = 9
    file = save(tmp_path / "d.png", Image.fromarray(same))
    with pytest.raises(LabelError) as caught:
        read_label(file)
    assert caught.value.code == "E334"


def test_label_types_grow_with_their_values() -> None:
    for high, dtype in ((255, np.uint8), (256, np.int16), (32767, np.int16), (32768, np.int32), (2**31 - 1, np.int32)):
        label = check_values(np.array([0, high]))
        assert label.dtype == dtype
        assert label[1] == high
    with pytest.raises(LabelError):
        check_values(np.array([0, 2**31]))
    mapped = check_values(np.array([0, 10**9, 5]), mapping={10**9: 1, 5: 2})
    assert mapped.tolist() == [0, 1, 2]


def test_value_counts_equal_numpy_unique() -> None:
    for array in (corpus.image((50, 40)), corpus.image((9, 9), np.int64) * 10**6, np.zeros((0,), np.int16)):
        for view in (array, array.T, array[::2]):
            values, counts = value_counts(view)
            expected = np.unique(view, return_counts=True)
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_array_equal(counts, expected[1])


def test_a_picture_that_pillow_cannot_open_is_refused_not_raised(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(GREY).save(out, format="GIF")
    data = bytearray(out.getvalue())
    data[13:40] = b"\xff" * 27
    (tmp_path / "a.gif").write_bytes(bytes(data[:60]))
    with pytest.raises(FormatError):
        read_image(tmp_path / "a.gif")

"""Pictures and labels: palettes, bit depths, alpha, TIFF variants; values exact to the bit."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import corpus
import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import DataError, FormatError, LabelError, UsageError
from medseg.volumes import read_geometry, read_image, read_label, read_window

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


@pytest.mark.parametrize("further", [(128, 0, 0), (128, 128, 128)])
def test_a_mask_in_black_and_white_is_one_whatever_else_its_palette_holds(tmp_path: Path, further: tuple) -> None:
    mask = (LABEL > 0).astype(np.uint8)
    painted = palette_image(1 - mask, [(255, 255, 255), (0, 0, 0), further])  # index 0 is white, and the foreground
    for suffix in (".png", ".gif"):
        volume = read_label(save(tmp_path / f"a{suffix}", painted), dims=2, mapping="nonzero")
        np.testing.assert_array_equal(volume.array[0], mask)


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


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [2, 4, 5])
def test_samples_of_a_tiff_that_are_no_colours_are_channels(tmp_path: Path, bands: int, planar: str) -> None:
    """Neither is the last of two or four stains alpha, nor are more than four refused; but their number is declared."""
    array = corpus.image((bands, 9, 8), np.uint8, seed=3)
    stored = array if planar == "separate" else np.moveaxis(array, 0, -1)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar)
    volume = read_image(tmp_path / "a.tif", channels=bands)
    np.testing.assert_array_equal(volume.array, array)
    assert not volume.notes
    for asked in ({}, {"colour": "grey"}, {"channels": 1}, {"colour": "rgb", "channels": 3}):
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / "a.tif", **asked)
        assert caught.value.code == "E310", asked
    with pytest.raises(LabelError, match="several channels"):
        read_label(tmp_path / "a.tif")


def test_alpha_of_a_tiff_is_alpha(tmp_path: Path) -> None:
    array = corpus.image((9, 8, 4), np.uint8, seed=3)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, np.moveaxis(array, -1, 0)[:3])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", channels=4).array, np.moveaxis(array, -1, 0))
    options = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "b.tif", array[..., :2], **options)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").array[0], array[..., 0])


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_what_a_tiff_says_of_its_pages(tmp_path: Path, kind: str) -> None:
    """Pages along one axis are a volume, whatever it is called; channels in turn are no slices."""
    array = corpus.image((3, 2, 7, 5), np.uint8)

    def file(axes: str, pages: np.ndarray) -> Path:
        tifffile.imwrite(tmp_path / f"{axes}.tif", pages, metadata={"axes": axes}, **{kind: True})
        return tmp_path / f"{axes}.tif"

    for axes in ("ZYX", "TYX", "CYX"):
        np.testing.assert_array_equal(read_image(file(axes, array[:, 0])).array[0], array[:, 0].transpose(2, 1, 0))
    for axes in ("ZCYX", "TCYX"):
        with pytest.raises(DataError, match="several axes") as caught:
            read_image(file(axes, array))
        assert caught.value.code == "E310"
        assert "2 channels" in str(caught.value)
    rgb = file("ZYXS", corpus.image((3, 7, 5, 3), np.uint8))  # three samples of a pixel are no axis of pages
    assert read_image(rgb, colour="rgb").array.shape == (3, 5, 7, 3)


@pytest.mark.parametrize("kind", ["imagej", "ome", "shaped"])
def test_pages_that_are_called_channels_are_that_where_a_picture_is_asked_for(tmp_path: Path, kind: str) -> None:
    """What Fiji saves of a fluorescence picture of three stains; a stack of slices stays refused."""
    array = corpus.image((3, 7, 5), np.uint16)
    options = {} if kind == "shaped" else {kind: True}

    def file(axes: str, pages: np.ndarray) -> Path:
        tifffile.imwrite(tmp_path / f"{axes}.tif", pages, photometric="minisblack", metadata={"axes": axes}, **options)
        return tmp_path / f"{axes}.tif"

    picture = read_image(file("CYX", array), dims=2, channels=3)
    np.testing.assert_array_equal(picture.array, array)
    geometry, bands, dtype = read_geometry(tmp_path / "CYX.tif", dims=2)
    assert (geometry.shape, geometry.kind, bands, dtype) == ((7, 5), "picture", 3, np.uint16)
    assert read_geometry(tmp_path / "CYX.tif")[:2] == (read_image(tmp_path / "CYX.tif", dims=3).geometry, 1)
    np.testing.assert_array_equal(read_image(file("CYX", array[:2]), dims=2, channels=2).array, array[:2])
    for asked, text in (
        ({}, "several channels"),
        ({"channels": 3}, "number of channels"),
        ({"colour": "rgb"}, "several"),
    ):
        with pytest.raises(DataError, match=text) as caught:
            read_image(tmp_path / "CYX.tif", dims=2, **asked)
        assert caught.value.code == "E310"
    with pytest.raises(LabelError, match="several channels"):
        read_label(tmp_path / "CYX.tif", dims=2)
    for axes in ("ZYX", "TYX"):
        with pytest.raises(DataError, match="a stack where a picture is expected") as caught:
            read_image(file(axes, array), dims=2, channels=3)
        assert "OME: SizeC" in str(caught.value)


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


def test_a_picture_that_pillow_cannot_open_is_refused_not_raised(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(GREY).save(out, format="GIF")
    data = bytearray(out.getvalue())
    data[13:40] = b"\xff" * 27
    (tmp_path / "a.gif").write_bytes(bytes(data[:60]))
    with pytest.raises(FormatError):
        read_image(tmp_path / "a.gif")


def test_directories_that_loop_and_tiles_that_are_huge_are_refused_at_once(tmp_path: Path) -> None:
    for big in (False, True):
        out = io.BytesIO()
        tifffile.imwrite(out, corpus.image((3, 9, 8), np.uint8), photometric="minisblack", bigtiff=big)
        data = bytearray(out.getvalue())
        form, head = ("<Q", 8) if big else ("<I", 4)
        first = struct.unpack_from(form, data, head)[0]
        with tifffile.TiffFile(io.BytesIO(bytes(data))) as opened:
            last = opened.pages[2].offset
        entries = struct.unpack_from("<Q" if big else "<H", data, last)[0]
        following = last + (8 + 20 * entries if big else 2 + 12 * entries)
        for target, says in ((first, "again"), (len(data) + 100, "directory 4")):
            struct.pack_into(form, data, following, target)
            (tmp_path / "a.tif").write_bytes(bytes(data))
            with pytest.raises(FormatError, match="directories are broken") as caught:
                read_image(tmp_path / "a.tif")
            assert says in str(caught.value)
    out = io.BytesIO()
    tifffile.imwrite(out, GREY, tile=(16, 16))
    data = bytearray(out.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as opened:
        place = opened.pages[0].tags["TileWidth"].valueoffset
    struct.pack_into("<H", data, place + 2, 0x4000)  # 16 becomes 16 + 2^30
    (tmp_path / "b.tif").write_bytes(bytes(data))
    with pytest.raises(FormatError) as caught:
        read_image(tmp_path / "b.tif")
    assert caught.value.code == "E305"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("tag", [1, 6])
def test_an_orientation_tag_is_told_and_not_applied(tmp_path: Path, suffix: str, tag: int) -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[274] = tag
    picture.save(tmp_path / f"a{suffix}", exif=exif)
    image = read_image(tmp_path / f"a{suffix}")
    assert image.array.shape == (1, 3, 4)
    assert [note[:4] for note in image.notes] == ["E319"] * (tag == 6)
    if suffix != ".jpg":
        assert read_label(tmp_path / f"a{suffix}").notes == ()


@pytest.mark.parametrize(("photometric", "bands", "name"), [("separated", 4, "CMYK"), ("cielab", 3, "CIELAB")])
def test_colours_that_are_not_red_green_and_blue_are_refused(tmp_path, photometric, bands, name):
    """They were read as if they were: four inks as colours and alpha."""
    values = np.random.default_rng(0).integers(0, 256, (16, 18, bands), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric)
    for read in (read_image, read_geometry):
        with pytest.raises(DataError, match=f"E314(.|\n)*{name}(.|\n)*save it as RGB"):
            read(tmp_path / "a.tif")


def test_ycbcr_is_read_where_jpeg_packs_it(tmp_path):
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[..., 0], rgb[..., 2] = 200, 40
    Image.fromarray(rgb).save(tmp_path / "a.tif", compression="jpeg")
    Image.fromarray(rgb).convert("YCbCr").save(tmp_path / "b.tif")
    assert np.abs(read_image(tmp_path / "a.tif").array[:, 5, 5] - np.array([200.0, 0, 40])).max() < 5
    with pytest.raises(DataError, match="YCbCr"):
        read_image(tmp_path / "b.tif")

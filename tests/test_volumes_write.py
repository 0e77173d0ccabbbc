"""Writers: exactly the input's grid, slab by slab, whole or not at all; deterministic bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import ResourceError, UsageError
from medseg.volumes import open_label_writer, read_image, read_label, write_label, write_overlay


def volume(tmp_path: Path, shape: tuple[int, ...] = (6, 7, 8), **fields: object):
    (tmp_path / "in.nii").write_bytes(corpus.nifti(corpus.image(shape), **fields))
    return read_image(tmp_path / "in.nii")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.NII.GZ"])
def test_slabs_equal_one_piece_and_nibabel_reads_them(tmp_path: Path, name: str) -> None:
    image = volume(tmp_path)
    label = np.random.default_rng(0).integers(0, 200, (6, 7, 8)).astype(np.uint8)
    with open_label_writer(tmp_path / "out" / name, image, np.uint8, description="liver") as writer:
        for start, stop in ((0, 3), (3, 4), (4, 8)):
            assert not (tmp_path / "out" / name).exists()
            writer.write_slab(start, label[..., start:stop])
    read = nibabel.load(tmp_path / "out" / name)
    np.testing.assert_array_equal(np.asarray(read.dataobj), label)
    np.testing.assert_array_equal(read.affine, nibabel.load(tmp_path / "in.nii").affine)
    assert bytes(read.header["descrip"]).rstrip(b"\0") == b"liver"
    assert read.header.get_intent()[0] == "label"
    np.testing.assert_array_equal(read_label(tmp_path / "out" / name).array[0], label)
    if name.lower().endswith(".gz"):
        assert (tmp_path / "out" / name).read_bytes()[3:8] == bytes(5)  # no name, no time (RFC 1952)
    write_label(tmp_path / "again" / name, label, image, description="liver")
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_incomplete_or_disordered_slabs_leave_no_file(tmp_path: Path) -> None:
    image = volume(tmp_path)
    path = tmp_path / "out" / "a.nii.gz"
    slab = np.zeros((6, 7, 2), np.uint8)
    with pytest.raises(UsageError, match="not complete"), open_label_writer(path, image) as writer:
        writer.write_slab(0, slab)
    for start, array in ((2, slab), (0, slab[:-1]), (0, np.zeros((6, 7, 9), np.uint8)), (0, slab[..., 0])):
        with pytest.raises(UsageError, match="does not continue"), open_label_writer(path, image) as writer:
            writer.write_slab(start, array)
    with pytest.raises(UsageError, match="fit the type"), open_label_writer(path, image) as writer:
        writer.write_slab(0, np.full((6, 7, 2), 300))
    assert os.listdir(path.parent) == []


def test_types_shapes_and_suffixes(tmp_path: Path) -> None:
    image = volume(tmp_path)
    for high, dtype in ((1, np.uint8), (300, np.int16), (40000, np.int32)):
        label = np.zeros((6, 7, 8), np.int64)
        label[0, 0, 0] = high
        write_label(tmp_path / "a.nii.gz", label, image)
        assert nibabel.load(tmp_path / "a.nii.gz").get_data_dtype() == dtype
        assert read_label(tmp_path / "a.nii.gz").array[0, 0, 0, 0] == high
    write_label(tmp_path / "b.nii", np.ones((6, 7, 8), bool), image)
    assert read_label(tmp_path / "b.nii").array.all()
    for path, array in (
        ("a.nii.gz", np.zeros((6, 7, 9), np.uint8)),
        ("a.nii.gz", np.zeros((6, 7, 8), np.float32)),
        ("a.png", np.zeros((6, 7, 8), np.uint8)),
        ("a.jpg", np.zeros((6, 7, 8), np.uint8)),
        ("a", np.zeros((6, 7, 8), np.uint8)),
    ):
        with pytest.raises(UsageError):
            write_label(tmp_path / "new" / path, array, image)
    with pytest.raises(UsageError), open_label_writer(tmp_path / "a.nii", image, np.float32):
        pass
    assert not (tmp_path / "new").exists()


def test_header_codes_units_and_byte_order_are_kept_and_free_text_is_not(tmp_path: Path) -> None:
    for order in "<>":
        header = nibabel.Nifti1Header(endianness=order)
        header["descrip"], header["db_name"], header["intent_name"] = b"CANARY", b"CANARY", b"CANARY"
        original = nibabel.Nifti1Image(corpus.image(), np.diag([1.0, 2, 3, 1]), header)
        original.set_sform(original.affine, 4)
        original.set_qform(original.affine, 2)
        original.header.set_xyzt_units("mm", "sec")
        original.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"CANARY"))
        original.to_filename(tmp_path / "in.nii.gz")
        write_label(tmp_path / "a.nii", np.ones((6, 7, 8), np.uint8), read_image(tmp_path / "in.nii.gz"))
        label = nibabel.load(tmp_path / "a.nii")
        assert (int(label.header["sform_code"]), int(label.header["qform_code"])) == (4, 2)
        assert label.header.get_xyzt_units() == ("mm", "sec")
        assert b"CANARY" not in (tmp_path / "a.nii").read_bytes()


def test_a_chosen_affine_is_what_the_label_says(tmp_path: Path) -> None:
    (tmp_path / "in.nii").write_bytes(corpus.nifti(corpus.image(), srow_x=(float("nan"), 0, 0, 0)))
    image = read_image(tmp_path / "in.nii", affine="qform")
    write_label(tmp_path / "a.nii.gz", np.ones((6, 7, 8), np.uint8), image)
    label = read_label(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(label.geometry.affine, image.geometry.affine, atol=1e-6)


def test_nifti_2_two_dimensions_and_four(tmp_path: Path) -> None:
    nibabel.Nifti2Image(corpus.image(), np.eye(4)).to_filename(tmp_path / "a.nii")
    write_label(tmp_path / "b.nii.gz", np.ones((6, 7, 8), np.uint8), read_image(tmp_path / "a.nii"))
    assert isinstance(nibabel.load(tmp_path / "b.nii.gz"), nibabel.Nifti2Image)
    nibabel.Nifti1Image(corpus.image((6, 7)), np.eye(4)).to_filename(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    write_label(tmp_path / "b.nii.gz", np.ones((6, 7, 1), np.uint8), image)
    assert nibabel.load(tmp_path / "b.nii.gz").shape == (6, 7)
    nibabel.Nifti1Image(corpus.image((6, 7, 8, 2)), np.eye(4)).to_filename(tmp_path / "a.nii")
    write_label(tmp_path / "b.nii.gz", np.ones((6, 7, 8), np.uint8), read_image(tmp_path / "a.nii", channels=2))
    assert nibabel.load(tmp_path / "b.nii.gz").shape == (6, 7, 8)
    assert read_label(tmp_path / "b.nii.gz").array.all()


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_metaimage_in_nifti_out(tmp_path: Path, suffix: str) -> None:
    corpus.write_itk(tmp_path / f"a{suffix}", corpus.image())
    image = read_image(tmp_path / f"a{suffix}")
    write_label(tmp_path / "b.nii.gz", (image.array[0] > 0).astype(np.uint8), image)
    np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii.gz").affine, image.geometry.affine)


def test_pictures_and_stacks(tmp_path: Path) -> None:
    Image.fromarray(corpus.image((9, 12), np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    label = np.arange(108).reshape(9, 12) % 5
    for name in ("b.png", "b.tif"):
        write_label(tmp_path / name, label, image)
        np.testing.assert_array_equal(read_label(tmp_path / name).array[0], label)
        write_label(tmp_path / name, label * 200, image)
        np.testing.assert_array_equal(read_label(tmp_path / name).array[0], label * 200)
    with pytest.raises(UsageError):
        write_label(tmp_path / "b.nii.gz", label, image)
    with pytest.raises(UsageError, match="0 to 65535"):
        write_label(tmp_path / "c.png", label * 30000, image)
    with pytest.raises(UsageError), open_label_writer(tmp_path / "c.png", image) as writer:
        writer.write_slab(0, label[:, :3])
    assert not (tmp_path / "c.png").exists()
    tifffile.imwrite(tmp_path / "s.tif", corpus.image((4, 7, 5), np.uint8), photometric="minisblack")
    stack = read_image(tmp_path / "s.tif", dims=3)
    cube = (np.arange(5 * 7 * 4).reshape(5, 7, 4) % 3).astype(np.uint8)
    write_label(tmp_path / "t.tif", cube, stack)
    np.testing.assert_array_equal(read_label(tmp_path / "t.tif").array[0], cube)
    assert tifffile.imread(tmp_path / "t.tif").shape == (4, 7, 5)


def test_overlay_colours_and_outlines(tmp_path: Path) -> None:
    image = np.full((9, 9), 100, np.uint8)
    label = np.zeros((9, 9), np.uint8)
    label[2:7, 2:7], reference = 1, np.zeros((9, 9), np.uint8)
    reference[4:6, 4:6] = 1
    write_overlay(tmp_path / "a.png", image, label)
    shown = np.asarray(Image.open(tmp_path / "a.png"))
    assert shown.shape == (9, 9, 3)
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[2, 2].tolist() == [213, 94, 0]  # outline
    assert shown[4, 4].tolist() == [128, 98, 75]  # 0.75 of the image, 0.25 of the colour
    write_overlay(tmp_path / "b.png", np.stack([image] * 3).astype(np.float32), label, reference)
    assert np.asarray(Image.open(tmp_path / "b.png"))[4, 4].tolist() == [255, 255, 255]
    with pytest.raises(UsageError):
        write_overlay(tmp_path / "c.png", image[1:], label)
    for count in (2, 4):  # of channels that are no colours the first is shown
        write_overlay(tmp_path / "d.png", np.stack([image, *[255 - image] * (count - 1)]), label)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "d.png")), shown)


def test_a_full_disk_while_a_label_is_written(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nimport numpy as np\nfrom pathlib import Path\n"
        "from medseg.errors import ResourceError\nfrom medseg.volumes import read_image, write_label\n"
        "folder = Path(sys.argv[1])\nimage = read_image(folder / 'in.nii')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "label = np.random.default_rng(0).integers(0, 255, image.geometry.shape).astype(np.uint8)\n"
        "try:\n    write_label(folder / 'out' / 'a.nii.gz', label, image)\n"
        "except ResourceError as error:\n    print(error.code)\n"
    )
    volume(tmp_path, (30, 30, 30))
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "E501"
    assert os.listdir(tmp_path / "out") == []


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    image = volume(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError) as caught:
        write_label(tmp_path / "file" / "a.nii.gz", np.zeros((6, 7, 8), np.uint8), image)
    assert caught.value.code == "E502"


@pytest.mark.slow
def test_a_label_of_512_512_800_is_written_without_holding_it(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nimport numpy as np\nfrom pathlib import Path\n"
        "from medseg.volumes import Geometry, Volume, open_label_writer\n"
        "like = Volume(np.empty((1, 0, 0, 0)), Geometry.of((512, 512, 800), np.diag([0.7, 0.7, 1.0, 1.0])), Path('x'),"
        " 'dicom', {}, 1)\n"
        "slab = np.zeros((512, 512, 16), np.uint8)\nslab[100:300, 100:300] = 1\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open_label_writer(sys.argv[1], like) as writer:\n"
        "    for start in range(0, 800, 16):\n        writer.write_slab(start, slab)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    path = str(tmp_path / "a.nii.gz")
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 60  # MB; the volume has 210
    assert nibabel.load(path).shape == (512, 512, 800)

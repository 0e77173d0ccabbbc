"""The readers on real images, where they are at hand: the traps that their README names."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError
from medseg.volumes import case_id, check_pair, list_inputs, read_image, read_label, read_window, write_label

pytestmark = pytest.mark.data


def test_liver_ct_and_labels_written_back(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "Task03_Liver"
    for image_path in sorted((folder / "imagesTr").iterdir()):
        label_path = folder / "labelsTr" / image_path.name
        image = read_image(image_path, dims=3)
        label = read_label(label_path, dims=3, allowed={0, 1, 2})
        check_pair(image, label, case=case_id(image_path))
        reference = nibabel.load(label_path)
        np.testing.assert_array_equal(image.array[0], np.asarray(nibabel.load(image_path).dataobj))
        write_label(tmp_path / image_path.name, label.array[0], image)
        written = nibabel.load(tmp_path / image_path.name)
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(reference.dataobj))
        np.testing.assert_allclose(written.affine, reference.affine, rtol=0, atol=1e-5)


def test_hippocampus_labels_stored_as_float_are_exact(data_root: Path) -> None:
    folder = data_root / "Task04_Hippocampus"
    images = list_inputs([folder / "imagesTr"])
    assert len(images) == 201
    floats = 0
    for path in images:
        label = read_label(folder / "labelsTr" / path.name, allowed={0, 1, 2})
        stored = nibabel.load(folder / "labelsTr" / path.name)
        floats += stored.get_data_dtype().kind == "f"
        np.testing.assert_array_equal(label.array[0], np.asarray(stored.dataobj))
        check_pair(read_image(path), label)
        assert label.array.dtype == np.uint8
    assert floats == 2


def test_dicom_ct(data_root: Path) -> None:
    SimpleITK = pytest.importorskip("SimpleITK")
    folder = data_root / "dicom_ct"
    volume = read_image(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    other = reader.Execute()
    np.testing.assert_array_equal(volume.array[0], SimpleITK.GetArrayFromImage(other).transpose(2, 1, 0))
    assert volume.array.dtype == np.int16
    assert volume.geometry.spacing == pytest.approx(other.GetSpacing())
    origin = np.array(other.GetOrigin()) * (-1, -1, 1)
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], origin)
    assert list_inputs([folder]) == [folder]
    assert case_id(folder).startswith("dicom-")


def test_drive_lzw_tiffs_and_gif_labels(data_root: Path) -> None:
    folder = data_root / "DRIVE" / "training"
    for path in list_inputs([folder / "images"]):
        image = read_image(path, dims=2, colour="rgb")
        assert image.array.shape == (3, 584, 565)
        np.testing.assert_array_equal(np.moveaxis(image.array, 0, -1), np.asarray(Image.open(path)))
        window = (slice(100, 350), slice(17, 500))
        np.testing.assert_array_equal(read_window(path, window), image.array[(slice(None), *window)])
        number = path.name[:2]
        label = read_label(folder / "1st_manual" / f"{number}_manual1.gif", mapping={255: 1}, allowed={0, 1})
        mask = read_label(folder / "mask" / f"{number}_training_mask.gif", mapping={255: 1})
        check_pair(image, label)
        assert 0.02 < label.array.mean() < 0.2  # vessels, not their background
        assert 0.6 < mask.array.mean() < 0.75
        with pytest.raises(DataError, match="colour"):
            read_image(path, colour="grey")


def test_dsb_rgba_in_several_sizes(data_root: Path) -> None:
    folder = data_root / "dsb2018" / "stage1_train"
    sizes = set()
    for path in sorted(folder.glob("*/images/*.png")):
        image = read_image(path, colour="rgb")
        assert image.channels == 3
        assert image.array.dtype == np.uint8
        sizes.add(image.geometry.shape)
        mask = next((path.parent.parent / "masks").iterdir())
        check_pair(image, read_label(mask, mapping="nonzero"))
    assert {(256, 256), (520, 696)} < sizes


def test_chase_hela_isbi_and_slices(data_root: Path) -> None:
    for name, colour in (
        ("CHASE_DB1", "rgb"),
        ("DIC-C2DH-HeLa", "grey"),
        ("ISBI2012", "grey"),
        ("liver_slices", "grey"),
    ):
        folder = data_root / name
        paths = list_inputs([folder / "images"])[:10]
        for path in paths:
            read_image(path, dims=2, colour=colour)
        for path in list_inputs([folder / "labels"])[:10]:
            label = read_label(path, mapping="nonzero")
            assert set(np.unique(label.array)) <= {0, 1}

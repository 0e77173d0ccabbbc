"""Labels: exact whole numbers out of every type and palette, or a refusal that names value and count."""

from __future__ import annotations

from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
from PIL import Image
from test_volumes_pictures import palette_image, save

from medseg.errors import LabelError, UsageError
from medseg.volumes import read_label
from medseg.volumes_labels import check_values, value_counts

LABEL = (np.arange(12).reshape(3, 4) % 3).astype(np.uint8)


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
    # black and grey alone in use, of a palette with colours: indices, as in the other files of the set
    file = save(tmp_path / "d.png", palette_image(LABEL // 2 * 2, [(0, 0, 0), (128, 0, 0), (128, 128, 128)]))
    np.testing.assert_array_equal(read_label(file).array[0], LABEL // 2 * 2)
    np.testing.assert_array_equal(read_label(file, mapping={0: 0, 128: 1}).array[0], LABEL // 2)
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


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_masks_that_jpeg_blurred_are_no_numbers_of_objects(tmp_path: Path, quality: int) -> None:
    y, x = np.mgrid[:96, :96]
    mask = np.where((y - 40) ** 2 + (x - 50) ** 2 < 20**2, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=quality)
    blurred = save(tmp_path / "a.png", Image.open(tmp_path / "a.jpg"))
    with pytest.raises(LabelError) as caught:
        read_label(blurred)
    assert caught.value.code == "E330"
    above = np.asarray(Image.open(blurred)) > 127  # what the refusal says
    np.testing.assert_array_equal(above, mask > 0)
    np.testing.assert_array_equal(read_label(save(tmp_path / "b.png", Image.fromarray(above))).array[0], above)


def test_many_values_up_to_255_that_are_no_blurred_mask() -> None:
    cells = np.arange(256).repeat(50)  # numbered cells
    check_values(cells)
    check_values(np.where(cells < 224, cells % 20, 255 - cells % 2))  # classes, two kinds of void
    check_values(np.where(cells < 224, cells % 60, cells // 7 * 7 + 3).clip(0, 255))  # few of each end


def test_negative_labels_become_void_as_the_refusal_says() -> None:
    stored = np.array([-1, 0, 1])
    with pytest.raises(LabelError) as caught:
        check_values(stored)
    assert "`encoding: {-1: 255, 1: 1}` and `ignore: 255`" in str(caught.value.fix)
    found = check_values(stored, mapping={-1: 255, 1: 1}, ignore=255, allowed={0, 1})
    assert found.tolist() == [255, 0, 1]


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
    few = [np.random.default_rng(0).integers(-3, n, (20, 30)).astype(np.int8) for n in (-2, 5, 12, 13, 14, 60)]
    for array in (corpus.image((50, 40)), corpus.image((9, 9), np.int64) * 10**6, np.zeros((0,), np.int16), *few):
        for view in (array, array.T, array[::2]):
            values, counts = value_counts(view)
            expected = np.unique(view, return_counts=True)
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_array_equal(counts, expected[1])

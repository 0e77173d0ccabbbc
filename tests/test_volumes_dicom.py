"""DICOM series: the right grid, or a refusal that lists what is there; no patient data anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pydicom
import pytest
from test_volumes_geometry import oblique

from medseg.errors import DataError, FormatError, MedsegError, ResourceError, UsageError
from medseg.evaluation import evaluate
from medseg.volumes import case_id, list_inputs, read_geometry, read_image, write_label, write_segmentation

ARRAY = corpus.image((7, 6, 5), seed=3)  # columns, rows, slices


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [0.0, 15.0, -30.0])
def test_values_and_affine_of_straight_and_oblique_series(tmp_path: Path, axis: int, degrees: float) -> None:
    affine = oblique(degrees, axis) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    volume = read_image(corpus.series(tmp_path / "s", ARRAY, affine), dims=3)
    np.testing.assert_array_equal(volume.array[0], ARRAY)
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)
    assert volume.array.dtype == np.int16
    geometry, channels, dtype = read_geometry(tmp_path / "s")
    assert (geometry, channels, dtype) == (volume.geometry, 1, np.dtype(np.uint16))


def test_a_series_equals_simpleitk_and_the_same_image_as_nifti(tmp_path: Path) -> None:
    import SimpleITK

    affine = np.diag([-0.8, -0.9, 2.5, 1.0])
    affine[:3, 3] = (100, -20, 7)
    folder = corpus.series(tmp_path / "s", ARRAY, affine)
    nibabel.Nifti1Image(ARRAY, affine).to_filename(tmp_path / "a.nii.gz")
    volume, nifti = read_image(folder), read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, nifti.array)
    np.testing.assert_allclose(volume.geometry.affine, nifti.geometry.affine, atol=1e-5)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    other = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(other).transpose(2, 1, 0), ARRAY)
    np.testing.assert_allclose(other.GetOrigin(), (-100, 20, 7))


def test_slices_are_sorted_by_position_whatever_number_and_name_say(tmp_path: Path) -> None:
    def renumber(k: int, data: pydicom.Dataset) -> None:
        data.InstanceNumber = 99 - (k * 3) % 5

    np.testing.assert_array_equal(read_image(corpus.series(tmp_path / "s", ARRAY, edit=renumber)).array[0], ARRAY)
    downwards = np.diag([-0.8, -0.8, -2.0, 1.0])  # given from the top down, read from the bottom up
    volume = read_image(corpus.series(tmp_path / "t", ARRAY, downwards))
    np.testing.assert_array_equal(volume.array[0], ARRAY[:, :, ::-1])
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], (0, 0, -8))


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    def rescale(k: int, data: pydicom.Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = 1 + k, -1024 - k

    stored = ARRAY + 1024
    expected = np.stack([stored[..., k] * (1 + k) - 1024 - k for k in range(5)], axis=-1)
    np.testing.assert_array_equal(read_image(corpus.series(tmp_path / "s", ARRAY, edit=rescale)).array[0], expected)

    def halve(k: int, data: pydicom.Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = "0.5", 0

    volume = read_image(corpus.series(tmp_path / "t", ARRAY, edit=halve))
    np.testing.assert_array_equal(volume.array[0], stored * 0.5)
    assert volume.array.dtype == np.float32


def change(slices: set[int], **values: object) -> Callable[[int, pydicom.Dataset], None]:
    def edit(k: int, data: pydicom.Dataset) -> None:
        if k in slices:
            for name, value in values.items():
                if value is None:
                    delattr(data, name)
                else:
                    setattr(data, name, value)

    return edit


def shifted(millimetres: float) -> Callable[[int, pydicom.Dataset], None]:
    def edit(k: int, data: pydicom.Dataset) -> None:
        data.ImagePositionPatient = [0, k * millimetres, 2.0 * k]

    return edit


TURNED = [0, 1, 0, 0, 0, -1]
REFUSED = {
    "missing slice": (lambda k, data: k != 2, "E342", "4.000 mm between 2.00 and 6.00"),
    "changing spacing": (change({4}, ImagePositionPatient=[0, 0, 9.1]), "E342", "spacing"),
    "duplicate slice": (change({3}, ImagePositionPatient=[0, 0, 4.0]), "E343", "one place"),
    "mixed orientation": (change({1}, ImageOrientationPatient=TURNED), "E344", "4 slices at (1, 0, 0, 0, 1, 0)"),
    "gantry tilt": (shifted(0.4), "E345", "11.31 degrees"),
    "changing size": (change({1}, Rows=3), "E346", "7 x 3"),
    "changing pixel spacing": (change({1}, PixelSpacing=[0.8, 0.9]), "E346", "(0.8, 0.9)"),
    "no position": (change({0, 2}, ImagePositionPatient=None), "E347", "2 of them"),
    "no orientation": (change({0}, ImageOrientationPatient=None), "E347", "1 of them"),
    "no spacing": (change({0}, PixelSpacing=None), "E347", "1 of them"),
    "broken orientation": (change({*range(5)}, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "E344", "perpendicular"),
    "truncated pixels": (change({2}, PixelData=bytes(20)), "E348", "20 of 84 bytes"),
    "localizer": (change({0}, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "E349", "localizer"),
    "multi-frame": (change({0}, NumberOfFrames=3), "E349", "multi-frame"),
    "colour": (change({0}, SamplesPerPixel=3), "E314", "colour"),
    "zero pixel spacing": (change({*range(5)}, PixelSpacing=[0, 0.8]), "E32", "singular"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_irregular_series_are_refused_with_a_list(tmp_path: Path, name: str) -> None:
    edit, code, says = REFUSED[name]
    folder = corpus.series(tmp_path / "s", ARRAY, edit=edit)
    with pytest.raises(DataError) as caught:
        read_image(folder, case="c")
    assert caught.value.code.startswith(code), str(caught.value)
    assert says in str(caught.value)
    assert "case: c" in str(caught.value)
    assert "CANARY" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    def edit(k: int, data: pydicom.Dataset) -> None:
        change({0}, ImageType=["LOCALIZER"])(k, data)
        change({1}, Rows=3)(k, data)

    with pytest.raises(MedsegError) as caught:
        read_image(corpus.series(tmp_path / "s", ARRAY, edit=edit))
    assert {problem.code for problem in caught.value.problems} == {"E349", "E346"}


def test_several_series_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY, uid="1.2.3", number=4)
    corpus.series(folder, ARRAY[:, :, ::-1] + 1, uid="1.2.9", number=7, prefix="z")
    scout = change({*range(5)}, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    corpus.series(folder, ARRAY[:, :, :1], uid="1.2.77", number=1, prefix="a", edit=scout)
    with pytest.raises(DataError) as caught:
        read_image(folder)
    text = str(caught.value)
    assert caught.value.code == "E341"
    assert "number 4, CT, 5 images, 7x6" in text
    assert "CT LOCALIZER, 1 images" in text
    assert "1.2.9" not in text
    np.testing.assert_array_equal(read_image(folder, series=4).array[0], ARRAY)
    np.testing.assert_array_equal(read_image(folder, series="1.2.9").array[0], ARRAY[:, :, ::-1] + 1)
    ids = [part.split(" ")[0] for part in (caught.value.found or "").split("; ")]
    assert sum(1 for name in ids if name.startswith("dicom-")) == 3
    chosen = [part.split(" ")[0] for part in (caught.value.found or "").split("; ") if "number 7" in part]
    np.testing.assert_array_equal(read_image(folder, series=chosen[0]).array[0], ARRAY[:, :, ::-1] + 1)
    with pytest.raises(DataError, match="not there"):
        read_image(folder, series=55)
    with pytest.raises(DataError) as caught:
        read_image(folder, series=1)
    assert caught.value.code == "E349"


def test_folders_without_images_and_strange_files_in_them(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY)
    (folder / "README.txt").write_text("not an image")
    (folder / ".hidden").write_bytes(b"x")
    (folder / "empty").write_bytes(b"")
    np.testing.assert_array_equal(read_image(folder).array[0], ARRAY)
    (folder / "bad.dcm").write_text("no DICOM")
    with pytest.raises(FormatError) as caught:
        read_image(folder)
    assert caught.value.code == "E340"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "none")
    assert caught.value.code == "E340"
    with pytest.raises(DataError):
        case_id(tmp_path / "none")


def test_single_files_and_single_slices(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY[:, :, :1])
    volume = read_image(folder)
    assert volume.array.shape == (1, 7, 6, 1)
    assert volume.geometry.spacing[2] == 2.0
    assert any("single slice" in note for note in volume.notes)
    file = next(folder.iterdir())
    np.testing.assert_array_equal(read_image(file).array, volume.array)
    assert case_id(file) == case_id(folder)
    shutil.copy(file, tmp_path / "x.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "x.dcm").array, volume.array)


def test_compressed_pixels(tmp_path: Path) -> None:
    def rle(k: int, data: pydicom.Dataset) -> None:
        data.compress(pydicom.uid.RLELossless)

    folder = corpus.series(tmp_path / "s", ARRAY, edit=rle)
    np.testing.assert_array_equal(read_image(folder).array[0], ARRAY)
    file = sorted(folder.iterdir())[1]
    data = pydicom.dcmread(file)
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 10])
    data.save_as(file)
    with pytest.raises(FormatError) as caught:
        read_image(folder)
    assert caught.value.code == "E348"


def test_case_ids_are_keyed_hashes_that_do_not_depend_on_names(tmp_path: Path) -> None:
    one = corpus.series(tmp_path / "CANARY^NAME", ARRAY)
    two = corpus.series(tmp_path / "other", ARRAY, prefix="q")
    three = corpus.series(tmp_path / "third", ARRAY, uid="1.2.5")
    bare = corpus.series(tmp_path / "bare", ARRAY, edit=change({*range(5)}, SeriesInstanceUID=None))
    assert case_id(one) == case_id(two)
    assert len({case_id(one), case_id(three), case_id(bare)}) == 3
    for folder in (one, three, bare):
        assert case_id(folder).startswith("dicom-")
        assert len(case_id(folder)) == 18
        np.testing.assert_array_equal(read_image(folder).array[0], ARRAY)
    assert list_inputs([tmp_path / "third", tmp_path / "bare"]) == [tmp_path / "third", tmp_path / "bare"]
    with pytest.raises(UsageError, match="same case id"):
        list_inputs([tmp_path])


def test_no_patient_data_in_what_is_returned_or_written_or_said(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY)
    volume = read_image(folder)
    write_label(tmp_path / "out" / "label.nii.gz", (ARRAY > 0).astype(np.uint8), volume)
    write_label(tmp_path / "out" / "label.nii", (ARRAY > 0).astype(np.uint8), volume)
    told = repr((volume.header, volume.notes, volume.geometry, case_id(folder))).encode()
    for data in (told, *(file.read_bytes() for file in (tmp_path / "out").iterdir())):
        for canary in (b"CANARY", b"19000101", b"19000102", b"1.2.3.4"):
            assert canary not in data
    label = nibabel.load(tmp_path / "out" / "label.nii.gz")
    np.testing.assert_allclose(label.affine, volume.geometry.affine)
    assert (int(label.header["sform_code"]), int(label.header["qform_code"])) == (1, 1)


# ------------------------------------------------------------------------------------------------------- SEG


def test_segmentation_object_comes_back_where_it_belongs(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    affine = oblique(15.0, 0) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    volume = read_image(corpus.series(tmp_path / "s", ARRAY, affine))
    label = np.zeros(ARRAY.shape, np.uint8)
    label[1:4, 2:5, 1:3], label[5, 5, 4] = 1, 4
    write_segmentation(tmp_path / "seg.dcm", label, volume, {0: "background", 1: "liver", 4: "tumour", 9: "unused"})
    written = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [written.get_segment_description(n).segment_label for n in (1, 2)] == ["liver", "tumour"]
    uids = [str(pydicom.dcmread(volume.path / name).SOPInstanceUID) for name in volume.header["files"]]
    frames = written.get_pixels_by_source_instance(
        uids,
        combine_segments=True,
        segment_numbers=[1, 2],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), np.where(label == 4, 2, label))
    with pytest.raises(DataError, match="segmentation") as caught:
        read_geometry(tmp_path / "seg.dcm")
    assert (caught.value.code, "--format nifti" in (caught.value.fix or "")) == ("E349", True)
    for name in ("masks", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "seg.dcm").rename(tmp_path / "masks" / "a.dcm")
    write_label(tmp_path / "labels" / "a.nii.gz", label, volume)
    with pytest.raises(DataError) as caught:
        evaluate(tmp_path / "masks", tmp_path / "labels")
    assert "--format nifti" in (caught.value.fix or "")
    assert written.PatientName == "CANARY^NAME"  # the standard demands it, here and only here
    second = tmp_path / "again.dcm"
    write_segmentation(second, label, volume, {1: "liver", 4: "tumour"})
    assert pydicom.dcmread(second).SOPInstanceUID == written.SOPInstanceUID


def test_a_segmentation_in_which_nothing_was_found_says_so(tmp_path: Path) -> None:
    """An object with every segment, all of them empty, and not none: that would look like a case that failed."""
    highdicom = pytest.importorskip("highdicom")
    volume = read_image(corpus.series(tmp_path / "s", ARRAY))
    empty = np.zeros(ARRAY.shape, np.uint8)
    write_segmentation(tmp_path / "seg.dcm", empty, volume, {0: "background", 1: "liver", 4: "tumour"})
    written = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [written.get_segment_description(n).segment_label for n in (1, 2)] == ["liver", "tumour"]
    assert written.number_of_segments == 2
    assert written.pixel_array.size == 2 * ARRAY.size
    assert not written.pixel_array.any()


def test_segmentation_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("highdicom")
    volume = read_image(corpus.series(tmp_path / "s", ARRAY))
    label = np.ones(ARRAY.shape, np.uint8)
    for array, labels in ((label[:-1], {1: "a"}), (label, {2: "a"})):
        with pytest.raises(UsageError):
            write_segmentation(tmp_path / "a.dcm", array, volume, labels)
    bare = read_image(corpus.series(tmp_path / "b", ARRAY, edit=change({*range(5)}, FrameOfReferenceUID=None)))
    with pytest.raises(DataError, match="lacks"):
        write_segmentation(tmp_path / "a.dcm", label, bare, {1: "a"})
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(ResourceError) as caught:
        write_segmentation(tmp_path / "a.dcm", label, volume, {1: "a"})
    assert caught.value.code == "E506"
    assert not (tmp_path / "a.dcm").exists()


def test_big_claims_in_small_files_are_refused(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY, edit=change({*range(5)}, Rows=60000, Columns=60000))
    with pytest.raises(FormatError) as caught:
        read_image(folder)
    assert all(problem.code == "E348" for problem in caught.value.problems)


def test_a_header_that_ends_early(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY)
    file = sorted(folder.iterdir())[0]
    data = file.read_bytes()
    for length in (140, 200, 400, len(data) - 30):
        file.write_bytes(data[:length])
        with pytest.raises(DataError):
            read_image(folder)


def test_objects_that_are_no_images_lie_beside_a_series(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY)
    data = pydicom.dcmread(sorted(folder.iterdir())[0])
    for name in ("Rows", "Columns", "PixelData"):
        delattr(data, name)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
    data.save_as(folder / "structures", enforce_file_format=True)
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    data.save_as(folder / "DICOMDIR")
    np.testing.assert_array_equal(read_image(folder).array[0], ARRAY)


@pytest.mark.parametrize("name", ["DICOMDIR", "contents"])
def test_the_table_of_contents_of_a_cd_is_no_series(tmp_path: Path, name: str) -> None:
    folder = corpus.series(tmp_path / "cd" / "PAT0" / "SER0", ARRAY)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    data.save_as(tmp_path / "cd" / name, enforce_file_format=True)
    assert list_inputs([tmp_path / "cd"]) == [folder]


def test_series_of_one_number_can_be_told_apart(tmp_path: Path) -> None:
    folder = corpus.series(tmp_path / "s", ARRAY, uid="1.2.3")
    corpus.series(
        folder, ARRAY[:, :, :4], uid="1.2.9", prefix="z", edit=change({*range(4)}, ImageOrientationPatient=TURNED)
    )
    with pytest.raises(DataError) as caught:
        read_image(folder)
    listed = (caught.value.found or "").split("; ")
    assert any("number 1, CT, 5 images, 7x6, axial" in part for part in listed), listed
    assert any("4 images" in part and "axial" not in part for part in listed), listed
    assert f"--series {listed[0].split(' ')[0]}" in (caught.value.fix or "")

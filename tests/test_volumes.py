"""Reading: each bad input of the reliability table is refused, each good one is read to the value."""

from __future__ import annotations

import gzip
import os
import threading
import tracemalloc
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest

from medseg.errors import DataError, FormatError, GeometryError, MedsegError, UsageError
from medseg.volumes import read_geometry, read_image, read_label, read_window


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> list[corpus.Bad]:
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


def test_every_bad_image_of_the_corpus_is_refused_with_its_code(bad_files: list[corpus.Bad]) -> None:
    wrong = []
    for bad in bad_files:
        try:
            volume = read_image(bad.path, case="c1")
        except DataError as error:
            text = str(error)
            if error.code not in bad.codes or bad.says not in text or "case: c1" not in text or error.exit_code != 3:
                wrong.append((bad.row, bad.name, bad.codes, bad.says, text))
        else:
            wrong.append((bad.row, bad.name, "was read", volume.array.shape))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(bad_files) > 60


def test_every_bad_label_of_the_corpus_is_refused(bad_files: list[corpus.Bad]) -> None:
    for bad in bad_files:
        with pytest.raises(DataError):
            read_label(bad.path, allowed={0, 1})


def test_huge_sizes_are_refused_before_anything_is_allocated(bad_files: list[corpus.Bad]) -> None:
    for bad in bad_files:
        if "huge" in bad.name or "bomb" in bad.name:
            tracemalloc.start()
            with pytest.raises(FormatError):
                read_image(bad.path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 << 20, bad.name


def test_a_folder_in_place_of_a_file_and_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.nii").mkdir()
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.nii")
    assert caught.value.code in ("E308", "E340")
    file = tmp_path / "b.nii"
    file.write_bytes(corpus.nifti(corpus.image()))
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(FormatError, match="cannot be read"):
        read_image(file)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_types_and_byte_orders_are_read_to_the_value(tmp_path: Path, dtype: str, order: str) -> None:
    array = corpus.image(dtype=np.dtype(dtype))
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    nibabel.Nifti1Image(array, np.eye(4), header).to_filename(tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.dtype(dtype)
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array[0], array)


def test_plain_packed_and_several_members_give_the_same(tmp_path: Path) -> None:
    data, array = corpus.nifti(corpus.image()), corpus.image()
    cut = len(data) // 3
    variants = {
        "a.nii": data,
        "b.nii.gz": gzip.compress(data),
        "c.nii.gz": b"".join(gzip.compress(data[n : n + cut]) for n in range(0, len(data), cut)),
        "d.nii.gz": gzip.compress(data) + bytes(512),  # zero padding, as tapes and some tools leave it
        "e.nii.gz": gzip.compress(data + b"behind"),
        "f.nii": data + b"behind",
    }
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_image(tmp_path / name).array[0], array, err_msg=name)


def test_nifti_2(tmp_path: Path) -> None:
    nibabel.Nifti2Image(corpus.image(), np.diag([1.0, 2, 3, 1])).to_filename(tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array[0], corpus.image())
    assert volume.geometry.spacing == (1, 2, 3)


def test_slope_and_intercept_like_nibabel(tmp_path: Path) -> None:
    for slope, inter, kind in (
        (1.0, -1024.0, np.int16),
        (0.5, 0.25, np.float32),
        (2.0, 0.0, np.float32),
        (0.0, 9.0, None),
    ):
        (tmp_path / "a.nii").write_bytes(corpus.nifti(corpus.image(), scl_slope=slope, scl_inter=inter))
        volume = read_image(tmp_path / "a.nii")
        expected = corpus.image() * slope + inter if slope else corpus.image()
        np.testing.assert_allclose(volume.array[0], expected, rtol=1e-6)
        assert volume.array.dtype == (kind or np.int16)


def test_nan_policy_replaces_and_notes(tmp_path: Path) -> None:
    array = corpus.image(dtype=np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    volume = read_image(tmp_path / "a.nii", nan=-7.0)
    assert volume.array[0, 0, 0, 0] == -7
    assert volume.array[0, 1, 1, 1] == -7
    assert np.isfinite(volume.array).all()
    assert any(note.startswith("E311") and "2 of 336" in note for note in volume.notes)


def test_constant_image_is_read_and_noted(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(corpus.nifti(np.full((3, 3, 3), 5, np.int16)))
    assert any(note.startswith("E313") for note in read_image(tmp_path / "a.nii").notes)


def test_values_beyond_single_precision_are_infinite(tmp_path: Path) -> None:
    array = np.zeros((3, 4, 5))
    array[1, 2, 3] = -np.finfo(np.float64).max  # what some programs write where there is no value
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.nii")
    assert caught.value.code == "E311"
    assert "1 of 60 voxels, the first at (1, 2, 3)" in str(caught.value)
    assert read_image(tmp_path / "a.nii", nan=0.0).array.tolist() == np.zeros((1, 3, 4, 5)).tolist()


@pytest.mark.parametrize(
    ("low", "high", "dtype", "told"),
    [
        (3_000_000_000, 3_000_000_100, np.uint32, "at most 1 apart"),  # float32 steps by 256 there
        (2.0**31, 2.0**31 + 1024, np.float64, "at most 5 apart"),
        (1000.0, 1000.001, np.float64, "at most 17 apart"),  # by 2^-14
        (2**24, 2**24 + 600, np.int32, None),  # by 2: 300 steps
        (0, 100, np.int32, None),
        (-1e-12, 1e-12, np.float64, None),
        (1000.0, 1000.001, np.float32, None),  # nothing is lost
    ],
)
def test_values_that_single_precision_cannot_tell_apart_are_noted(tmp_path: Path, low, high, dtype, told) -> None:
    array = np.linspace(low, high, 27).astype(dtype).reshape(3, 3, 3)
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    volume = read_image(tmp_path / "a.nii")
    assert volume.array[0].tolist() == array.tolist()
    notes = [note for note in volume.notes if note.startswith("E328")]
    assert len(notes) == (told is not None)
    assert all(told in note for note in notes)


def test_four_dimensions(tmp_path: Path) -> None:
    array = corpus.image((4, 5, 6, 2))
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array))
    volume = read_image(tmp_path / "a.nii", channels=("T1", "T2"))
    assert volume.channels == 2
    assert volume.geometry.shape == (4, 5, 6)
    np.testing.assert_array_equal(volume.array[1], array[..., 1])
    with pytest.raises(DataError, match="channels"):
        read_image(tmp_path / "a.nii", channels=3)
    (tmp_path / "b.nii").write_bytes(corpus.nifti(array[..., :1]))
    assert read_image(tmp_path / "b.nii").array.shape == (1, 4, 5, 6)
    vector = corpus.nifti(array.reshape(4, 5, 6, 1, 2))
    (tmp_path / "c.nii").write_bytes(vector)
    np.testing.assert_array_equal(read_image(tmp_path / "c.nii", channels=2).array, volume.array)


def test_rgb_volume_where_the_set_says_so(tmp_path: Path) -> None:
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    bands = corpus.image((4, 5, 6, 3), np.uint8)
    array = np.ascontiguousarray(bands).view(dtype)[..., 0]
    nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii", colour="rgb").array, np.moveaxis(bands, -1, 0))
    with pytest.raises(DataError, match="colour"):
        read_image(tmp_path / "a.nii")


def test_affine_choice_and_fall_back_to_a_valid_sform(tmp_path: Path) -> None:
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    file = tmp_path / "a.nii"
    file.write_bytes(corpus.nifti(corpus.image(), srow_x=(0.8, 0, 0, 0)))
    np.testing.assert_allclose(read_image(file, affine="qform").geometry.affine, affine, atol=1e-6)
    assert read_image(file, affine="sform").geometry.affine[0, 0] == pytest.approx(0.8)
    with pytest.raises(UsageError):
        read_image(file, affine="best")
    file.write_bytes(corpus.nifti(corpus.image(), srow_x=(float("nan"),) * 4))
    np.testing.assert_allclose(read_image(file, affine="qform").geometry.affine, affine, atol=1e-6)
    with pytest.raises(GeometryError):
        read_image(file, affine="sform")
    file.write_bytes(corpus.nifti(corpus.image(), pixdim=(1.0, 0.0, float("nan"), -2.0, 0, 0, 0, 0)))
    volume = read_image(file)  # the sform is valid
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-6)
    assert any("pixdim" in note for note in volume.notes)


def test_pixdim_alone_is_nibabels_base_affine(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(corpus.nifti(corpus.image(), sform_code=0, qform_code=0))
    expected = nibabel.load(tmp_path / "a.nii").affine
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").geometry.affine, expected)


def test_micrometres_become_millimetres(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(corpus.nifti(corpus.image(), np.diag([50.0, 50, 80, 1]), xyzt_units=3))
    volume = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.geometry.spacing, (0.05, 0.05, 0.08), rtol=1e-6)
    assert volume.notes


def test_single_slice_and_two_dimensional_nifti(tmp_path: Path) -> None:
    for array in (corpus.image((6, 7, 1)), corpus.image((6, 7))):
        nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii")
        volume = read_image(tmp_path / "a.nii", dims=3)
        assert volume.array.shape == (1, 6, 7, 1)
        np.testing.assert_array_equal(volume.array[0, ..., 0], array.reshape(6, 7))
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.nii", dims=2)
    assert caught.value.code == "E310"


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medseg.volumes_nifti as module

    file = tmp_path / "a.nii.gz"
    file.write_bytes(corpus.packed(corpus.nifti(corpus.image())))
    unpack = module.unpack

    def slowly(*arguments: object) -> object:
        with file.open("ab") as more:
            more.write(b"x")
        return unpack(*arguments)

    monkeypatch.setattr(module, "unpack", slowly)
    with pytest.raises(FormatError) as caught:
        read_image(file)
    assert caught.value.code == "E309"


def test_header_only_reading_and_windows(tmp_path: Path) -> None:
    array = corpus.image((6, 7, 8))
    (tmp_path / "a.nii").write_bytes(corpus.nifti(array, scl_slope=1.0, scl_inter=-10.0))
    geometry, channels, dtype = read_geometry(tmp_path / "a.nii")
    assert (geometry.shape, channels, dtype) == ((6, 7, 8), 1, np.dtype(np.int16))
    window = (slice(1, 4), slice(None), slice(2, 7, 2))
    np.testing.assert_array_equal(read_window(tmp_path / "a.nii", window)[0], array[window] - 10)
    (tmp_path / "a.nii.gz").write_bytes(corpus.packed(corpus.nifti(array)))
    with pytest.raises(DataError, match="window"):
        read_window(tmp_path / "a.nii.gz", window)


def test_metaimage_and_nrrd_equal_simpleitk(tmp_path: Path) -> None:
    for suffix in (".mha", ".nrrd", ".mhd"):
        for compress in (False, True):
            file = tmp_path / f"a{compress}{suffix}"
            corpus.write_itk(file, corpus.image(), compress)
            volume = read_image(file)
            np.testing.assert_array_equal(volume.array[0], corpus.image())
            np.testing.assert_allclose(volume.geometry.affine[:3, 3], (10, -20, 30))
            assert volume.geometry.codes == ("L", "P", "S")
            geometry, channels, dtype = read_geometry(file)
            assert geometry == volume.geometry
            assert channels == 1
            assert dtype == np.int16


def test_reading_in_threads_gives_the_same(tmp_path: Path) -> None:
    files = []
    for n in range(4):
        files.append(tmp_path / f"{n}.nii.gz")
        files[-1].write_bytes(corpus.packed(corpus.nifti(corpus.image(seed=n))))
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: read_image(files[n]).array[0]})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        np.testing.assert_array_equal(results[n], corpus.image(seed=n))


def test_errors_survive_pickling(bad_files: list[corpus.Bad]) -> None:
    import pickle

    with pytest.raises(MedsegError) as caught:
        read_image(bad_files[0].path, case="c")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

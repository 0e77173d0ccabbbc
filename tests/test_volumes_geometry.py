"""Axis codes, oblique grids, pairs; expected values from geometry on paper and nibabel's orientation functions."""

from __future__ import annotations

import itertools
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import GeometryError, UsageError
from medseg.volumes import Geometry, axis_codes, check_pair, read_image, read_label, reorient, write_label
from medseg.volumes_geometry import check_affine, corner_shift, shear

CODES = [
    tuple(pair[bit] for pair, bit in zip(order, bits, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for bits in itertools.product((0, 1), repeat=3)
]


def oblique(degrees: float, axis: int = 2, spacing: tuple[float, ...] = (0.8, 0.9, 2.5)) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    a, b = [n for n in range(3) if n != axis]
    turn[a, a], turn[a, b], turn[b, a], turn[b, b] = cos, -sin, sin, cos
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 12.25, 700.0)
    return affine


def test_there_are_48_codes() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", CODES, ids="".join)
def test_every_orientation_round_trips_and_matches_nibabel(codes: tuple[str, ...]) -> None:
    array, affine = corpus.image((3, 4, 5)), oblique(15.0)
    turned, turned_affine = reorient(array, affine, codes)
    assert axis_codes(turned_affine) == codes
    want = nibabel.orientations.axcodes2ornt(codes)
    have = nibabel.orientations.io_orientation(affine)
    transform = nibabel.orientations.ornt_transform(have, want)
    np.testing.assert_array_equal(turned, nibabel.orientations.apply_orientation(array, transform))
    expected = affine @ nibabel.orientations.inv_ornt_aff(transform, array.shape)
    np.testing.assert_allclose(turned_affine, expected, atol=1e-9)
    back, back_affine = reorient(turned, turned_affine, axis_codes(affine))
    np.testing.assert_array_equal(back, array)
    np.testing.assert_allclose(back_affine, affine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("codes", CODES, ids="".join)
@pytest.mark.parametrize("degrees", [0.0, 15.0])
def test_labels_land_where_the_image_lies_in_every_orientation(
    tmp_path: Path, codes: tuple[str, ...], degrees: float
) -> None:
    array, affine = reorient(corpus.image((5, 4, 3)), oblique(degrees, axis=1), codes)
    nibabel.Nifti1Image(np.ascontiguousarray(array), affine).to_filename(tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    write_label(tmp_path / "b.nii.gz", (image.array[0] > 400).astype(np.uint8), image)
    before, after = nibabel.load(tmp_path / "a.nii.gz"), nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(np.asarray(after.dataobj), array > 400)
    for field in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b"):
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    check_pair(image, read_label(tmp_path / "b.nii.gz"))
    assert image.geometry.codes == codes


@given(st.permutations(range(3)), st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3), st.sampled_from(CODES))
@settings(max_examples=50, deadline=None)
def test_property_world_positions_never_move(order: list[int], signs: list[int], codes: tuple[str, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * np.array([0.7, 1.1, 3.0])
    affine[:3, 3] = (5, -6, 7)
    array = np.arange(2 * 3 * 4).reshape(1, 2, 3, 4)  # a channel axis in front
    turned, matrix = reorient(array, affine, codes)
    for index in np.ndindex(turned.shape[1:]):
        voxel = np.argwhere(array[0] == turned[(0, *index)])[0]
        np.testing.assert_allclose(matrix @ (*index, 1), affine @ (*voxel, 1), atol=1e-9)


def test_wrong_codes() -> None:
    for codes in ("RAX", "RA", "RLS", "RRS", "RASL"):
        with pytest.raises(UsageError):
            reorient(np.zeros((2, 2, 2)), np.eye(4), codes)
    with pytest.raises(UsageError):
        reorient(np.zeros((2, 2)), np.eye(4), "RAS")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_oblique_affines_are_read_and_kept_to_1e_5(tmp_path: Path, axis: int) -> None:
    affine = oblique(15.0, axis)
    nibabel.Nifti1Image(corpus.image(), affine).to_filename(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(image.geometry.affine, affine, atol=1e-4)
    write_label(tmp_path / "b.nii.gz", np.zeros(image.geometry.shape, np.uint8), image)
    before, after = nibabel.load(tmp_path / "a.nii"), nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_allclose(after.affine, before.affine, rtol=0, atol=1e-5)
    np.testing.assert_allclose(image.geometry.spacing, (0.8, 0.9, 2.5), rtol=1e-5)


def test_check_affine_names_what_is_wrong() -> None:
    assert check_affine(np.diag([1.0, 1, 5, 1])) is None
    assert check_affine(oblique(33)) is None
    assert "NaN" in (check_affine(np.full((4, 4), np.nan)) or "")
    assert "singular" in (check_affine(np.diag([1.0, 0, 1, 1])) or "")
    flat = np.eye(4)
    flat[:3, 2] = (1, 1, 0)
    assert "singular" in (check_affine(flat) or "")
    for size, good in ((0.001, True), (100.0, True), (0.0009, False), (101.0, False)):
        assert (check_affine(np.diag([1.0, 1.0, size, 1.0])) is None) == good
    sheared = np.eye(4)
    sheared[0, 1] = np.tan(np.radians(5))
    assert "85.00 degrees" in (check_affine(sheared) or "")
    assert shear(sheared) == pytest.approx(np.sin(np.radians(5)))


def moved(affine: np.ndarray, voxels: float, axis: int) -> np.ndarray:
    out = affine.copy()
    out[:3, 3] += out[:3, axis] * voxels
    return out


def test_pairs() -> None:
    affine, shape = oblique(10.0), (20, 30, 10)
    image = Geometry.of(shape, affine)
    check_pair(image, image)
    check_pair(image, Geometry.of(shape, moved(affine, 0.4, 2)))
    scaled = affine.copy()
    scaled[:3, :3] *= 1.0005
    check_pair(image, Geometry.of(shape, scaled))
    wrong = {
        "E320": Geometry.of((20, 30, 11), affine),
        "E327": Geometry.of(shape, reorient(np.zeros(shape), affine, "LPS")[1]),
        "E325": Geometry.of(shape, affine @ np.diag([1, 1, 1.002, 1])),
        "E326": Geometry.of(shape, moved(affine, 0.6, 1)),
    }
    for code, other in wrong.items():
        with pytest.raises(GeometryError) as caught:
            check_pair(image, other, case="liver_1")
        assert (caught.value.code, caught.value.case, caught.value.exit_code) == (code, "liver_1", 3)
    turn = Geometry.of(shape, oblique(13.0))  # 3 degrees about the origin move the far corner by more than half a voxel
    with pytest.raises(GeometryError) as caught:
        check_pair(image, turn)
    assert caught.value.code == "E326"


def test_a_label_with_another_axis_order_and_the_same_shape_is_refused(tmp_path: Path) -> None:
    array = corpus.image((6, 6, 6))
    affine = np.diag([-0.8, -0.8, 0.8, 1.0])
    nibabel.Nifti1Image(array, affine).to_filename(tmp_path / "image.nii.gz")
    turned, other = reorient((array > 0).astype(np.uint8), affine, "SLP")
    nibabel.Nifti1Image(np.ascontiguousarray(turned), other).to_filename(tmp_path / "label.nii.gz")
    with pytest.raises(GeometryError, match="axis orders"):
        check_pair(read_image(tmp_path / "image.nii.gz"), read_label(tmp_path / "label.nii.gz"))


def test_codes_near_45_degrees_do_not_refuse_equal_grids() -> None:
    one, two = oblique(45.0 - 1e-7), oblique(45.0 + 1e-7)
    assert axis_codes(one) != axis_codes(two)
    check_pair(Geometry.of((9, 9, 9), one), Geometry.of((9, 9, 9), two))
    # nor do origins a third of a voxel apart, on either side of zero: they say nothing of where the axes point
    one[:3, 3], two[:3, 3] = [0.15, -0.15, 0.15], [-0.15, 0.15, -0.15]
    check_pair(Geometry.of((9, 9, 9), one), Geometry.of((9, 9, 9), two))


def test_corner_shift_on_paper() -> None:
    one, two = np.eye(4), np.diag([1.0, 1.0, 2.0, 1.0])
    assert corner_shift((4, 4, 4), one, two) == pytest.approx(3.0)  # the corner at k = 3 moves from 3 to 6
    assert corner_shift((4, 4, 1), one, two) == 0.0


def test_a_grid_without_affine_or_with_an_axis_of_no_length() -> None:
    plain = Geometry.of((5, 4))
    np.testing.assert_array_equal(plain.affine, np.eye(4))
    assert (plain.kind, plain.unit, plain.spacing) == ("picture", "px", (1.0, 1.0))
    assert shear(np.diag([1.0, 2.0, 0.0, 1.0])) == 0.0
    check_pair(Geometry.of((5, 4, 3)), Geometry.of((5, 4, 3), np.diag([2.0, 2.0, 2.0, 1.0]), unit="px"))


def test_geometry_is_hashable_comparable_and_frozen() -> None:
    one, two = Geometry.of((2, 3)), Geometry.of((2, 3))
    assert one == two
    assert len({one, two}) == 1
    assert one != Geometry.of((2, 3, 1))
    assert one != "geometry"
    assert (one.kind, one.unit, one.spacing) == ("picture", "px", (1.0, 1.0))
    with pytest.raises(ValueError, match="read-only"):
        one.affine[0, 0] = 2

"""Where a prediction lands in space: a phantom that is defined in millimetres, through every format and orientation.

The phantom is evaluated at the voxel centres of each grid, and again at those of the written file, read by nibabel: no
code of medseg is between the definition and the comparison. Three balls of different radius fix position, handedness
and order of axes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from test_prediction import make_model, make_volume
from test_volumes_geometry import oblique

from medseg import volumes
from medseg.component import Component
from medseg.prediction import predict

BALLS = (
    (np.array([-14.0, 8.0, -22.0]), 11.0),
    (np.array([12.0, -9.0, 18.0]), 8.5),
    (np.array([13.0, 12.0, -20.0]), 7.0),
)
SHAPE, SPACING = (44, 40, 15), (1.5, 1.5, 7.5)  # slices five times as thick as pixels are wide
CENTRE = np.array([31.0, -47.0, 103.0])
STEPS = (Component("Orientationd", {"axcodes": "RAS"}), Component("Spacingd", {"pixdim": [1.7, 1.7, 2.5]}))


def phantom(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """0 outside of the balls, 1 to 3 inside."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3] - CENTRE
    result = np.zeros(shape, np.int16)
    for number, (centre, radius) in enumerate(BALLS, start=1):
        result[((world - centre) ** 2).sum(-1) < radius**2] = number
    return result


def grid(order: tuple[int, ...], signs: tuple[int, ...], turn: np.ndarray | None = None) -> tuple[np.ndarray, tuple]:
    """Affine and shape of a grid around CENTRE; its axes are the axes `order` of space, in the directions `signs`."""
    matrix = np.zeros((3, 3))
    for stored, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[axis, stored] = sign * SPACING[axis]
    shape = tuple(SHAPE[axis] for axis in order)
    if turn is not None:
        matrix = turn @ matrix
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = CENTRE - matrix @ ((np.array(shape) - 1) / 2) + 0.3
    return affine, shape


def turns() -> dict[str, tuple[np.ndarray, tuple]]:
    """48 axis codes, and 15 degrees around each axis."""
    grids = {}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine, shape = grid(order, signs)
            grids["".join(nibabel.aff2axcodes(affine))] = (affine, shape)
    for axis in range(3):
        turn = oblique(15.0, axis)[:3, :3]
        turn = turn / np.linalg.norm(turn, axis=0)
        grids[f"oblique{axis}"] = grid((0, 1, 2), (1, 1, 1), turn)
        grids[f"obliqueflipped{axis}"] = grid((1, 0, 2), (-1, 1, -1), turn)
    return grids


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import SimpleITK

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(sizes.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / sizes).ravel().tolist())
    SimpleITK.WriteImage(image, str(path))


def check(path: Path) -> None:
    """Every ball lies in the file where it lies in space."""
    written = nibabel.load(path)
    found = np.asanyarray(written.dataobj) > 0
    truth = phantom(written.affine, found.shape)
    parts, count = ndimage.label(found)
    assert count == 3, path.name
    for number in (1, 2, 3):
        expected = np.array(ndimage.center_of_mass(truth == number))
        part = parts == parts[tuple(np.rint(expected).astype(int))]
        assert not part[0, 0, 0], path.name  # the middle of the ball is foreground
        assert np.abs(np.array(ndimage.center_of_mass(part)) - expected).max() < 0.5, (path.name, number)
        overlap = 2 * (part & (truth == number)).sum() / (part.sum() + (truth == number).sum())
        assert overlap > 0.8, (path.name, number, overlap)


@pytest.mark.parametrize(
    "inference",
    [
        Component("OverlapTileInferer", {"tile": 14}),
        pytest.param(Component("GaussianTileInferer", {"roi_size": 16}), marks=pytest.mark.slow),
    ],
    ids=["exact", "gaussian"],
)
def test_a_phantom_lands_where_it_belongs_in_every_orientation(tmp_path, inference):
    source = tmp_path / "in"
    source.mkdir()
    for name, (affine, shape) in turns().items():
        suffix = ".nii" if name.startswith("L") else ".nii.gz"
        image = nibabel.Nifti1Image((phantom(affine, shape) > 0).astype(np.int16) * 200, affine)
        nibabel.save(image, source / f"{name}{suffix}")
    result = predict(make_model(preprocess=STEPS, inference=inference), source, tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    assert len(result.cases) == 54
    for case in result.cases:
        check(Path(case.output))
        original = nibabel.load(next(source.glob(f"{case.case}.*")))
        np.testing.assert_allclose(nibabel.load(case.output).affine, original.affine, atol=1e-5)


def test_a_phantom_lands_where_it_belongs_in_every_volume_format(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    grids = turns()
    for name in ("RAS", "LPS", "RAI", "oblique0", "oblique1", "oblique2", "obliqueflipped2"):
        affine, shape = grids[name]
        array = (phantom(affine, shape) > 0).astype(np.int16) * 200
        for suffix in (".mha", ".mhd", ".nrrd"):
            write_itk(source / f"{name}_{suffix[1:]}{suffix}", array, affine)
        uid = f"1.2.3.{len(list(source.iterdir()))}"
        corpus.series(source / f"{name}_series", array, affine, uid=uid)
    result = predict(make_model(preprocess=STEPS), source, tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    assert len(result.cases) == 28
    for case in result.cases:
        check(Path(case.output))


def test_pictures_and_stacks_keep_every_pixel_in_place(tmp_path):
    import tifffile

    source = tmp_path / "in"
    source.mkdir()
    affine, shape = grid((0, 1, 2), (1, 1, 1))
    array = (phantom(affine, shape) > 0).astype(np.uint8) * 200
    tifffile.imwrite(source / "stack.tif", array.transpose(2, 1, 0), photometric="minisblack")  # pages, rows, columns
    assert predict(make_model(), source, tmp_path / "volumes", progress=False).exit_code == 0
    assert np.array_equal(tifffile.imread(tmp_path / "volumes" / "stack.tif") > 0, array.transpose(2, 1, 0) > 0)
    (source / "stack.tif").unlink()
    picture = array[:, :, 4]  # rows, columns
    tifffile.imwrite(source / "a.tif", picture)
    tifffile.imwrite(source / "b.tif", picture, tile=(16, 16))
    Image.fromarray(picture).save(source / "c.png")
    Image.fromarray(picture).save(source / "d.gif")
    Image.fromarray(np.kron(picture, np.ones((8, 8), np.uint8))).save(source / "e.jpg", quality=100)
    result = predict(make_model(2, colour="grey"), source, tmp_path / "pictures", progress=False)
    assert result.exit_code == 0, result.text()
    for name in ("a.tif", "b.tif", "c.png", "d.png"):
        found = np.asarray(Image.open(tmp_path / "pictures" / name))
        assert np.array_equal(found > 0, picture > 0), name
    found = np.asarray(Image.open(tmp_path / "pictures" / "e.png"))
    assert np.array_equal(found[4::8, 4::8] > 0, picture > 0)


@pytest.mark.slow
@pytest.mark.data
def test_a_ct_as_nifti_and_as_the_series_written_from_it(data_root, tmp_path):
    original = volumes.read_image(data_root / "Task03_Liver" / "imagesTr" / "liver_1.nii.gz")
    affine = np.array(original.geometry.affine)
    array = np.rint(original.array[0]).astype(np.int16)
    corpus.series(tmp_path / "series", np.maximum(array, -1024), affine)
    nibabel.save(nibabel.Nifti1Image(np.maximum(array, -1024), affine), tmp_path / "ct.nii.gz")
    steps = (Component("Orientationd", {"axcodes": "RAS"}), Component("Spacingd", {"pixdim": [2.0, 2.0, 2.0]}))
    model = make_model(preprocess=steps, inference=Component("OverlapTileInferer", {}))
    result = predict(model, [tmp_path / "series", tmp_path / "ct.nii.gz"], tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    one, two = (nibabel.as_closest_canonical(nibabel.load(case.output)) for case in result.cases)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-3)  # DICOM keeps positions as 16 characters
    first, second = (np.asanyarray(image.dataobj) for image in (one, two))
    assert 0.01 < first.mean() < 0.5
    # interpolation at positions that differ by rounding of the header: a probability of one half may fall either way
    assert (first != second).mean() < 1e-5


def test_the_comparison_sees_a_shift_of_one_voxel(tmp_path):
    affine, shape = grid((0, 1, 2), (1, 1, 1))
    moved = np.roll(phantom(affine, shape) > 0, 1, axis=2).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(moved, affine), tmp_path / "a.nii.gz")
    with pytest.raises(AssertionError):
        check(tmp_path / "a.nii.gz")
    make_volume(tmp_path / "b.nii.gz")
    with pytest.raises(AssertionError):
        check(tmp_path / "b.nii.gz")

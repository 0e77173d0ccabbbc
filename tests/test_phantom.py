"""Phantoms look like the real thing where it matters, and the same seed draws the same."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medseg.errors import ResourceError, UsageError
from medseg.phantom import draw_ct, draw_fundus, draw_nuclei, draw_shapes, write_phantom


def centroid_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]


@pytest.mark.parametrize("seed", range(4))
def test_ct_has_the_anatomy_in_the_right_place_whatever_the_grid(seed):
    image, label, affine = draw_ct(np.random.default_rng(seed), oblique=seed % 2 == 1)
    assert image.dtype == np.int16
    assert set(np.unique(label)) == {0, 1, 2}
    body = image > -300
    liver = centroid_mm(label > 0, affine)
    bone = centroid_mm(image > 300, affine)
    middle = centroid_mm(body, affine)
    assert liver[0] > middle[0] + 20, "the liver lies to the patient's right, where world x (RAS) grows"
    assert bone[1] < middle[1] - 10, "the spine lies behind the middle"
    assert 80 < np.median(image[label == 1]) < 140, "liver in HU of the portal venous phase"
    assert np.median(image[label == 2]) < np.median(image[label == 1]) - 20, "tumours are darker"
    assert image[body].std() > 10
    assert np.median(image[~body]) < -950
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    assert spacing[2] > spacing[0]
    straight = np.count_nonzero(np.abs(affine[:3, :3]) > 1e-6) == 3
    assert straight == (seed % 2 == 0)
    volume_ml = (label > 0).sum() * np.prod(spacing) / 1000
    assert 600 < volume_ml < 2500, "an adult's liver has about 1.5 litres"


def test_fundus_has_vessels_only_in_the_field_of_view_and_darker_than_around():
    picture, vessels, view = draw_fundus(np.random.default_rng(1))
    assert picture.shape == (584, 565, 3)
    assert not (vessels & ~view).any()
    assert 0.05 < vessels.sum() / view.sum() < 0.2  # DRIVE has 0.127
    green = picture[..., 1].astype(float)
    assert green[vessels].mean() < green[view & ~vessels].mean() - 10
    assert picture[~view].max() <= 5


def test_nuclei_touch_and_none_covers_another():
    touching = 0
    for seed in range(5):
        picture, instances = draw_nuclei(np.random.default_rng(seed))
        assert picture[instances > 0].mean() > picture[instances == 0].mean() + 20
        assert set(np.unique(instances)) == set(range(instances.max() + 1)), "every nucleus has voxels"
        for axis in (0, 1):
            a, b = np.moveaxis(instances, axis, 0)[:-1], np.moveaxis(instances, axis, 0)[1:]
            touching += np.count_nonzero((a > 0) & (b > 0) & (a != b))
    assert touching > 20


def test_shapes_are_what_they_are_called_and_their_outlines_void():
    shares = {1: [], 2: [], 3: []}
    for seed in range(40):
        picture, label = draw_shapes(np.random.default_rng(seed))
        assert (picture.shape, label.shape, label.dtype) == ((128, 128, 3), (128, 128), np.uint8)
        assert set(np.unique(label)) <= {0, 1, 2, 3, 255}
        parts, _ = ndimage.label(label != 255)  # outlines part everything
        for part, box in enumerate(ndimage.find_objects(parts), start=1):
            inside = parts == part
            (kind,) = np.unique(label[inside])
            if inside.sum() > 50:  # of one colour: nothing but noise
                assert picture[inside].std(axis=0).max() < 10
            wide, high = (side.stop - side.start for side in box)
            alone = label[ndimage.binary_dilation(inside, iterations=4) & ~inside]
            if kind and set(np.unique(alone)) == {0, 255} and abs(wide - high) <= 2:  # whole, nothing over it
                shares[kind].append(inside.sum() / (wide * high))
    # of the square around it a circle fills pi / 4, a square all, and half a triangle as high as wide
    for kind, expected in ((1, np.pi / 4), (2, 1.0), (3, 0.5)):
        assert len(shares[kind]) > 5
        assert np.median(shares[kind]) == pytest.approx(expected, abs=0.05)


def test_written_layouts_are_the_published_ones(tmp_path):
    liver = write_phantom("liver", tmp_path, cases=3, seed=5)
    facts = json.loads((liver / "dataset.json").read_text())
    assert facts["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert len(facts["training"]) == facts["numTraining"] == 3
    straight = []
    for pair in facts["training"]:
        image, label = nib.load(liver / pair["image"]), nib.load(liver / pair["label"])
        assert np.allclose(image.affine, label.affine)
        assert image.header["qform_code"] == image.header["sform_code"] == 1
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        straight.append(np.count_nonzero(np.abs(image.affine[:3, :3]) > 1e-4) == 3)
    assert straight == [True, True, False]

    drive = write_phantom("drive", tmp_path, cases=1)
    assert sorted(p.relative_to(drive).as_posix() for p in drive.rglob("*.*")) == [
        "test/1st_manual/01_manual1.gif", "test/images/01_test.tif", "test/mask/01_test_mask.gif",
        "training/1st_manual/21_manual1.gif", "training/images/21_training.tif", "training/mask/21_training_mask.gif",
    ]  # fmt: skip
    mask = np.asarray(Image.open(drive / "training/1st_manual/21_manual1.gif").convert("L"))
    assert set(np.unique(mask)) == {0, 255}

    cell = write_phantom("cell", tmp_path, cases=2)
    for row in csv.DictReader((cell / "types.csv").open()):
        folder = cell / "stage1_train" / row["id"]
        masks = [np.asarray(Image.open(p)) for p in (folder / "masks").iterdir()]
        assert len(masks) == int(row["n_nuclei"]) > 0
        assert max(sum((m > 0).astype(int) for m in masks).ravel()) == 1
        assert np.asarray(Image.open(folder / "images" / f"{row['id']}.png")).shape == (256, 256, 4)

    shapes = write_phantom("shapes", tmp_path, cases=2)
    assert sorted(p.relative_to(shapes).as_posix() for p in shapes.rglob("*.png")) == [
        "images/0000.png", "images/0001.png", "labels/0000.png", "labels/0001.png",
    ]  # fmt: skip


def test_same_seed_same_bytes_and_more_cases_do_not_change_the_first(tmp_path):
    one = write_phantom("cell", tmp_path / "one", cases=1, seed=7)
    two = write_phantom("cell", tmp_path / "two", cases=2, seed=7)
    other = write_phantom("cell", tmp_path / "other", cases=1, seed=8)
    first = {p.relative_to(one): p.read_bytes() for p in one.rglob("*.png")}
    again = {p.relative_to(two): p.read_bytes() for p in two.rglob("*.png")}
    assert first.items() <= again.items()
    assert not first.keys() & {p.relative_to(other) for p in other.rglob("*.png")}


def test_bad_requests_are_refused_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(UsageError, match="unknown phantom"):
        write_phantom("kidney", tmp_path)
    with pytest.raises(UsageError, match="at least one case"):
        write_phantom("cell", tmp_path, cases=0)
    (tmp_path / "dsb2018").mkdir()
    (tmp_path / "dsb2018" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="already holds files"):
        write_phantom("cell", tmp_path)
    assert (tmp_path / "dsb2018" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("file", ["DATA", "DATA/DRIVE"])
def test_a_file_where_the_folder_is_to_be_is_called_one(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("x")
    with pytest.raises(ResourceError) as caught:
        write_phantom("drive", tmp_path / "DATA", cases=1)
    assert caught.value.code == "E502"
    assert (tmp_path / file).read_text() == "x"

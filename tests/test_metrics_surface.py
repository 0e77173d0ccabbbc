"""Surface distances against the definition written out, MONAI, SimpleITK, and geometry worked out on paper."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from medseg.errors import GeometryError, UsageError
from medseg.metrics import surface_distances
from medseg.metrics.nearest import offset_shells

SPACINGS = {2: [(1.0, 1.0), (0.5, 2.0)], 3: [(1.0, 1.0, 1.0), (0.7, 0.8, 5.0), (3.0, 1.0, 0.4)]}


def blob(shape, seed, sigma=2.0, threshold=0.02):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return gaussian_filter(noise, sigma) > threshold


def single(shape, *index):
    mask = np.zeros(shape, dtype=bool)
    mask[index] = True
    return mask


def thin(shape):
    mask = np.zeros(shape, dtype=bool)
    mask[(shape[0] // 2, *([slice(1, -1)] * (len(shape) - 1)))] = True
    mask[(slice(None), *([1] * (len(shape) - 1)))] = True
    return mask


def pairs(dims):
    shape = {2: (24, 31), 3: (14, 18, 11)}[dims]
    whole = np.ones(shape, dtype=bool)
    return {
        "blobs": (blob(shape, 1), blob(shape, 2)),
        "near": (blob(shape, 1), blob(shape, 1, threshold=0.05)),
        "thin": (thin(shape), np.roll(thin(shape), 2, axis=0)),
        "single voxels": (single(shape, *[2] * dims), single(shape, *[n - 1 for n in shape])),
        "one against many": (single(shape, *[0] * dims), blob(shape, 3)),
        "borders": (whole, blob(shape, 4)),
        "equal": (blob(shape, 5), blob(shape, 5)),
    }


def slow_distances(a, b, spacing):
    """The definition: all surface voxels against all others."""
    points = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing) for mask in (a, b)]
    table = cdist(*points)
    return table.min(axis=1), table.min(axis=0)


CASES = [
    pytest.param(dims, name, spacing, id=f"{dims}d-{name}-{spacing}")
    for dims in (2, 3)
    for name in pairs(dims)
    for spacing in SPACINGS[dims]
]


@pytest.mark.parametrize(("dims", "name", "spacing"), CASES)
def test_every_distance_equals_its_definition(dims, name, spacing):
    a, b = pairs(dims)[name]
    there, back = slow_distances(a, b, spacing)
    found = surface_distances(a, b, spacing)
    np.testing.assert_allclose(found.directed[0], there, rtol=1e-12)
    np.testing.assert_allclose(found.directed[1], back, rtol=1e-12)
    both = np.concatenate([there, back])
    assert found.hausdorff() == pytest.approx(both.max())
    assert found.hausdorff(95) == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert found.hausdorff(95, "pooled") == pytest.approx(np.percentile(both, 95))
    assert found.assd() == pytest.approx(both.mean())
    assert found.masd() == pytest.approx((there.mean() + back.mean()) / 2)
    assert found.rmsd() == pytest.approx(np.sqrt((both**2).mean()))
    assert found.status == "scored"


@pytest.mark.parametrize(("dims", "name", "spacing"), CASES)
def test_scores_equal_monai(dims, name, spacing):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    a, b = pairs(dims)[name]
    x, y = (torch.from_numpy(mask)[None, None].float() for mask in (a, b))
    found = surface_distances(a, b, spacing)
    same = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd = compute_hausdorff_distance(x, y, **same).item()
        hd95 = compute_hausdorff_distance(x, y, percentile=95, **same).item()
        assd = compute_average_surface_distance(x, y, symmetric=True, **same).item()
        dice = {
            t: compute_surface_dice(x, y, [t], use_subvoxels=True, **same).item() for t in (0.0, 0.7, 1.0, 2.0, 5.0)
        }
    assert found.hausdorff() == pytest.approx(hd, abs=1e-4)
    assert found.hausdorff(95) == pytest.approx(hd95, abs=1e-4)
    assert found.assd() == pytest.approx(assd, abs=1e-4)
    for tolerance, expected in dice.items():
        assert found.surface_dice(tolerance) == pytest.approx(expected, abs=1e-4), tolerance


@pytest.mark.parametrize("spacing", SPACINGS[3])
def test_hausdorff_equals_simpleitk(spacing):
    """ITK measures from all voxels of one mask to the other mask: the same maximum for masks without holes."""
    import SimpleITK as sitk

    axes = np.ogrid[-10:11, -10:11, -10:11]
    balls = [sum((axis - shift) ** 2 for axis in axes) <= 30 for shift in (0, 2)]
    images = []
    for ball in balls:
        image = sitk.GetImageFromArray(ball.astype(np.uint8))
        image.SetSpacing(tuple(reversed(spacing)))
        images.append(image)
    peer = sitk.HausdorffDistanceImageFilter()
    peer.Execute(*images)
    assert surface_distances(*balls, spacing).hausdorff() == pytest.approx(peer.GetHausdorffDistance(), abs=1e-4)


@pytest.fixture(scope="module")
def ball():
    axes = np.ogrid[-40:41, -40:41, -40:41]
    return sum(axis**2 for axis in axes)


def test_concentric_spheres(ball):
    found = surface_distances(ball <= 30**2, ball <= 32**2, spacing=1.0)
    assert 2.0 <= found.hausdorff() <= 2.5  # the radii differ by 2 mm; voxels blur it by less than half their diagonal
    assert found.assd() == pytest.approx(2.0, abs=0.15)
    assert found.surface_dice(0.9) < 0.05
    assert found.surface_dice(3.0) == 1.0


def test_half_sphere_tells_the_definitions_apart(ball):
    sphere = ball <= 30**2
    half = sphere.copy()
    half[:41] = False
    found = surface_distances(half, sphere)
    assert found.hausdorff(95) == pytest.approx(28.0, abs=1e-9)
    assert found.hausdorff(95, definition="pooled") == pytest.approx(26.0, abs=1e-9)
    assert found.hausdorff() == pytest.approx(31.0, abs=1e-9)


def test_empty_masks_follow_the_policy():
    shape, spacing = (10, 20, 30), (1.0, 2.0, 3.0)
    full, empty = np.ones(shape, bool), np.zeros(shape, bool)
    diagonal = math.sqrt(10**2 + 40**2 + 90**2)
    for status, a, b, distance, dice in (
        ("missed", empty, full, diagonal, 0.0),
        ("false_alarm", full, empty, diagonal, 0.0),
        ("both_empty", empty, empty, 0.0, 1.0),
    ):
        found = surface_distances(a, b, spacing)
        assert found.status == status
        assert found.surface_dice(1.0) == dice
        for value in (found.hausdorff(), found.hausdorff(95, "pooled"), found.assd(), found.masd(), found.rmsd()):
            assert value == pytest.approx(distance)


def test_a_miss_is_worse_than_any_prediction():
    shape, spacing = (8, 9), (2.0, 0.5)
    reference = single(shape, 0, 0)
    worst = surface_distances(single(shape, 7, 8), reference, spacing)
    missed = surface_distances(np.zeros(shape, bool), reference, spacing)
    assert missed.hausdorff() > worst.hausdorff()
    assert missed.assd() > worst.assd()


@pytest.mark.parametrize("dims", [2, 3])
def test_neither_memory_order_nor_dtype_nor_place_matters(dims):
    a, b = pairs(dims)["blobs"]
    spacing = SPACINGS[dims][1]
    expected = surface_distances(a, b, spacing)
    wide = [np.pad(mask, [(7, 3)] * dims) for mask in (a, b)]
    inner = tuple(slice(7, -3) for _ in range(dims))
    for x, y in (
        (np.asfortranarray(a), b),
        (a.astype(np.uint8), b.astype(np.float32)),
        (wide[0], wide[1]),
        (wide[0][inner], wide[1][inner]),
        (torch.from_numpy(a), torch.from_numpy(b)),
    ):
        found = surface_distances(x, y, spacing)
        assert found.hausdorff(95) == expected.hausdorff(95)
        assert found.assd() == pytest.approx(expected.assd(), rel=1e-12)
        assert found.surface_dice(1.0) == pytest.approx(expected.surface_dice(1.0), rel=1e-12)


def test_scores_are_symmetric_except_for_status():
    a, b = pairs(3)["blobs"]
    one, two = surface_distances(a, b, (1, 2, 3)), surface_distances(b, a, (1, 2, 3))
    assert one.hausdorff(95) == two.hausdorff(95)
    assert one.masd() == pytest.approx(two.masd())
    assert one.surface_dice(2) == pytest.approx(two.surface_dice(2))


def test_area_of_surfels_is_the_area_of_the_sphere(ball):
    found = surface_distances(ball <= 30**2, ball <= 30**2, spacing=0.5)
    areas = found._surfels[1][0]  # what surface Dice weighs with
    assert areas.sum() == pytest.approx(4 * math.pi * 15**2, rel=0.09)  # marching cubes on a binary mask is a bit rough


def test_three_steps_are_within_three_steps():
    reference = single((12, 12), 3, 3)
    found = surface_distances(np.roll(reference, 3, axis=0), reference, 0.1)
    assert found.surface_dice(0.3) == 1.0  # 3 * 0.1 > 0.3 in double precision


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.3, 2.0), (1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (10.0, 0.1, 1.0)])
def test_offset_shells_leave_nothing_out(spacing):
    shells = offset_shells(spacing)
    lengths = [length for length, _ in shells.groups]
    assert lengths == sorted(lengths)
    have = {tuple(offset) for _, offsets in shells.groups for offset in offsets.tolist()}
    last = lengths[-1]
    reach = [int(last // step) + 1 for step in spacing]
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        if math.dist([o * s for o, s in zip(offset, spacing, strict=True)], [0] * len(spacing)) < last - 1e-9:
            assert offset in have


@pytest.mark.parametrize(
    ("error", "a", "b", "spacing"),
    [
        (GeometryError, (3, 3), (3, 4), None),
        (UsageError, (3,), (3,), None),
        (UsageError, (2, 2, 2, 2), (2, 2, 2, 2), None),
        (UsageError, (3, 3), (3, 3), (1, 1, 1)),
        (UsageError, (3, 3), (3, 3), (1, 0)),
        (UsageError, (3, 3), (3, 3), (1, float("nan"))),
    ],
)
def test_bad_input_is_refused(error, a, b, spacing):
    with pytest.raises(error):
        surface_distances(np.ones(a, bool), np.ones(b, bool), spacing)


def test_bad_arguments_are_refused():
    found = surface_distances(np.ones((3, 3), bool), np.ones((3, 3), bool))
    for call in (lambda: found.hausdorff(101), lambda: found.hausdorff(95, "mean"), lambda: found.surface_dice(-1)):
        with pytest.raises(UsageError):
            call()

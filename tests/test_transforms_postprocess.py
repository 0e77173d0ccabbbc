"""Post-processing: components, holes, thresholds and single objects, on shapes counted by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.ndimage import label as connected
from skimage.graph import rag_boundary
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from medseg.component import build_component
from medseg.config import load_pipeline
from medseg.errors import UsageError
from medseg.metrics import label_components, membrane_curve
from medseg.transforms.membrane_cells import joined_basins
from medseg.transforms.postprocess import (
    CellsFromMembranes,
    FillHoles,
    InstancesFromProbability,
    KeepLargestComponent,
    RemoveSmallObjects,
    Threshold,
)


def discs(centres, radius, size=64) -> np.ndarray:
    at = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1)
    return np.array([((at - c) ** 2).sum(-1) <= radius**2 for c in centres]).any(axis=0)


def shares_of(mask: np.ndarray, inside=0.95, outside=0.05) -> np.ndarray:
    p = np.where(mask, inside, outside).astype(np.float32)
    return np.stack([1 - p, p])


@pytest.mark.parametrize("name", ["liver", "liver_attention"])
def test_a_liver_keeps_all_its_tumours(name):
    label = np.zeros((12, 12, 6), np.uint8)
    label[1:9, 1:9, 1:5] = 1
    label[2:4, 2:4, 2] = label[6, 6, 3] = label[7:9, 2, 1] = 2  # three tumours, of 4, 1 and 2 voxels
    expected = label.copy()
    label[11, 11, 5] = label[10, 1, 0] = 2  # and what lies beside the liver
    label[11, 9, 1:3] = 1
    for part in load_pipeline(name).postprocess:
        label = build_component(part, "postprocess")(label, spacing=(1, 1, 1))
    assert np.array_equal(label, expected)


def test_largest_component_of_each_label():
    label = np.zeros((10, 20), np.uint8)
    label[1:3, 1:3], label[1:3, 6:12] = 1, 1
    label[6:9, 1:4], label[6, 10] = 2, 2
    out = KeepLargestComponent()(label, spacing=(1, 1))
    assert (out == 1).sum() == 12
    assert (out == 2).sum() == 9
    assert label[1, 1] == 1  # the input is not changed
    only = KeepLargestComponent(labels=[1])(label, spacing=(1, 1))
    assert (only == 2).sum() == 10


def test_largest_component_of_organ_and_tumour_together():
    label = np.zeros((8, 20), np.uint8)
    label[2:6, 2:8], label[3:5, 8:10] = 1, 2  # the tumour at the organ's edge
    label[2:4, 15:17] = 2  # a false alarm far away
    out = KeepLargestComponent(together=True)(label, spacing=(1, 1))
    assert (out == 2).sum() == 4
    assert (out == 1).sum() == 24
    assert KeepLargestComponent()(np.zeros((4, 4), int), spacing=(1, 1)).sum() == 0


def test_small_objects_in_voxels_and_in_millimetres():
    label = np.zeros((4, 20, 20), np.uint8)
    label[0, :3, :3], label[2, 10:12, 10:12] = 1, 1
    assert (RemoveSmallObjects(5)(label, spacing=(2, 1, 1)) > 0).sum() == 9
    assert (RemoveSmallObjects(8, unit="mm3")(label, spacing=(2, 1, 1)) > 0).sum() == 13
    assert (RemoveSmallObjects(8.1, unit="mm3")(label, spacing=(2, 1, 1)) > 0).sum() == 9


def test_holes():
    label = np.zeros((9, 9), np.uint8)
    label[1:8, 1:8] = 1
    label[4, 4], label[2, 2], label[1, 5] = 0, 2, 0
    out = FillHoles()(label, spacing=(1, 1))
    assert out[4, 4] == 1
    assert out[2, 2] == 2  # another label is no hole
    assert out[1, 5] == 0  # open to the outside


def test_a_hole_within_nested_labels_is_the_innermost_ones():
    rng = np.random.default_rng(3)
    nested = 0
    for _ in range(20):
        label = np.zeros((18, 18), np.uint8)
        for depth, value in enumerate(rng.permutation([1, 2, 3])):  # rings within one another, some of them open
            (top, left), (bottom, right) = 3 * depth + rng.integers(0, 2, 2), 17 - 3 * depth - rng.integers(0, 2, 2)
            label[[top, bottom], left : right + 1] = label[top : bottom + 1, [left, right]] = value
            if rng.random() < 0.4:
                label[top, rng.integers(left, right + 1)] = 0
        expected = label.copy()
        for voxel in np.argwhere(label == 0):
            around = []
            for value in (1, 2, 3):  # what can be reached from here without crossing the label
                regions, _ = connected(label != value)
                reached = regions == regions[tuple(voxel)]
                if not (reached[[0, -1]].any() or reached[:, [0, -1]].any()):
                    around.append((reached.sum(), value))
            nested += len(around) > 1
            if around:
                expected[tuple(voxel)] = min(around)[1]
        assert np.array_equal(FillHoles()(label, spacing=(1, 1)), expected)
    assert nested > 100


def test_threshold():
    shares = np.stack([np.full((2, 2), 0.7), np.full((2, 2), 0.3)])
    label = np.zeros((2, 2), np.uint8)
    assert (Threshold(0.25)(label, probabilities=shares, spacing=(1, 1)) == 1).all()
    assert (Threshold(0.35)(label, probabilities=shares, spacing=(1, 1)) == 0).all()
    assert [Threshold(value).chosen_on for value in ("validation", "training", 0.5)] == ["validation", "training", None]
    assert (Threshold("validation")(label, probabilities=shares, spacing=(1, 1)) == 0).all()
    with pytest.raises(UsageError):
        Threshold(1.5)
    with pytest.raises(UsageError):
        Threshold()(label, spacing=(1, 1))
    with pytest.raises(UsageError):
        Threshold()(label, probabilities=np.zeros((3, 2, 2)), spacing=(1, 1))


def objects(mask, **arguments) -> np.ndarray:
    shares = shares_of(mask)
    return InstancesFromProbability(**arguments)(mask.astype(np.uint8), probabilities=shares, spacing=(1, 1))


def test_separate_discs_are_separate_and_complete():
    mask = discs([(15, 15), (15, 45), (45, 30)], 9)
    out = objects(mask)
    assert out.dtype == np.int32
    assert np.array_equal(out > 0, mask)
    assert sorted(np.unique(out)) == [0, 1, 2, 3]
    assert out[15, 15] == 1  # numbered in order of the first voxel


@pytest.mark.parametrize("distance", [16, 17, 18])
def test_touching_discs_are_parted_at_their_neck(distance):
    mask = discs([(32, 20), (32, 20 + distance)], 10)
    out = objects(mask)
    assert len(np.unique(out)) == 3
    left, right = out[32, 18], out[32, 22 + distance]
    assert left != right
    middle = 20 + distance / 2
    columns = np.arange(64)
    assert (out[:, columns < middle - 1][mask[:, columns < middle - 1]] == left).mean() > 0.98


def test_one_ellipse_is_not_broken():
    y, x = np.mgrid[:64, :64]
    mask = ((y - 32) / 9.0) ** 2 + ((x - 32) / 22.0) ** 2 <= 1
    assert objects(mask).max() == 1


def test_three_classes_use_the_interiors_as_seeds():
    mask = discs([(32, 22), (32, 38)], 9)
    interior = discs([(32, 22), (32, 38)], 6)
    shares = np.zeros((3, 64, 64), np.float32)
    shares[1], shares[2] = np.where(interior, 0.9, 0.03), np.where(mask & ~interior, 0.9, 0.03)
    shares[0] = 1 - shares[1] - shares[2]
    out = InstancesFromProbability()(mask.astype(np.uint8), probabilities=shares, spacing=(1, 1))
    assert len(np.unique(out)) == 3
    assert np.array_equal(out > 0, mask)


def test_small_objects_go_and_nothing_is_no_object():
    mask = discs([(20, 20)], 8)
    mask[50, 50] = True
    assert objects(mask, min_size=5).max() == 1
    assert objects(mask, min_size=1).max() == 2
    assert objects(np.zeros((20, 20), bool)).max() == 0
    assert objects(np.ones((20, 20), bool)).max() == 1


def test_growing_gives_back_the_gap():
    mask = discs([(32, 32)], 8)
    grown = objects(mask, grow=1)
    assert np.array_equal(grown > 0, discs([(32, 32)], 8) | (grown > 0))
    assert (grown > 0).sum() > mask.sum()


def test_volumes():
    z, y, x = np.mgrid[:20, :24, :44]
    mask = ((z - 10) ** 2 + (y - 12) ** 2 + (x - 13) ** 2 <= 64) | ((z - 10) ** 2 + (y - 12) ** 2 + (x - 27) ** 2 <= 64)
    out = InstancesFromProbability()(mask.astype(np.uint8), probabilities=shares_of(mask), spacing=(1, 1, 1))
    assert len(np.unique(out)) == 3


@pytest.mark.parametrize(
    "arguments", [{"threshold": 0}, {"seed": 1}, {"depth": -1}, {"min_size": 0}, {"grow": -1}, {"smooth": -1}]
)
def test_bad_arguments(arguments):
    with pytest.raises(UsageError):
        InstancesFromProbability(**arguments)
    with pytest.raises(UsageError):
        RemoveSmallObjects(0)
    with pytest.raises(UsageError):
        RemoveSmallObjects(1, unit="ml")


def rooms() -> tuple[np.ndarray, np.ndarray]:
    """Four cells parted by a cross of membrane 4 voxels wide, and the probability of cell that a network may give: two
    gaps in the membrane, and an organelle whose outline looks a little like membrane."""
    truth = np.ones((60, 80), bool)
    truth[28:32] = truth[:, 38:42] = False
    cell = np.where(truth, 0.95, 0.05)
    cell[28:32, 15:18] = 0.9
    cell[45:47, 38:42] = 0.8
    ring = discs([(14, 60)], 7, 80)[:60] & ~discs([(14, 60)], 5, 80)[:60]
    cell[ring] = 0.5
    return truth, np.stack([1 - cell, cell])


def test_a_gap_in_a_membrane_joins_no_cells():
    truth, shares = rooms()
    before = (shares[1] > 0.5).astype(np.uint8)
    assert label_components(before != 0).max() == 3  # three cells through two gaps; the fourth; the ring's inside
    found = CellsFromMembranes(threshold=0.25)(before, probabilities=shares, spacing=(1, 1))
    assert found.dtype == before.dtype
    numbers = label_components(found != 0)
    assert numbers.max() == 4
    # the definition: each true cell is one component, and no component lies in two cells
    cells = label_components(truth)
    assert [len(np.unique(numbers[(cells == k) & (found != 0)])) for k in range(1, 5)] == [1, 1, 1, 1]
    assert membrane_curve(found, truth).v_rand > 0.99
    # three of four equal cells in one segment: (4/16) / ((10/16 + 4/16) / 2), but for the ring
    assert membrane_curve(before, truth).v_rand == pytest.approx(4 / 7, abs=0.02)
    # what the threshold calls membrane stays membrane, and all that is taken away is a line in the gaps
    assert not (found.astype(bool) & (shares[1] <= 0.25)).any()
    assert ((shares[1] > 0.25) & (found == 0)).sum() <= 20


def test_borders_with_less_membrane_than_asked_for_are_none():
    _, shares = rooms()
    regions = [joined_basins(shares[1], smooth=2.0, depth=0.02, merge=merge) for merge in (0.01, 0.6, 0.999)]
    assert [int(r.max()) + 1 for r in regions][1:] == [4, 1]
    assert int(regions[0].max()) + 1 > 4  # every basin, the organelle too
    everything = CellsFromMembranes(merge=0.999)(shares[1] > 0, probabilities=shares, spacing=(1, 1))
    assert np.array_equal(everything, shares[1] > 0.5)


@pytest.mark.parametrize("merge", [0.4, 0.5, 0.6])
def test_regions_are_joined_from_the_weakest_border_on(merge):
    """The definition, slowly: of all borders between groups of basins, each the mean over all its pixels, the weakest
    goes first, until the weakest has `merge`."""
    cell = gaussian_filter(np.random.default_rng(1).random((70, 80)), 3)
    cell = (cell - cell.min()) / np.ptp(cell)
    basins = watershed(-cell, connected(h_maxima(cell, 0.02) > 0, np.ones((3, 3)))[0])
    borders = [
        (a, b, e["weight"], e["count"]) for a, b, e in rag_boundary(basins, 1 - cell, connectivity=1).edges.data()
    ]
    group = {k: k for k in np.unique(basins)}
    while True:
        sums: dict[tuple[int, int], np.ndarray] = {}
        for a, b, strength, count in borders:
            pair = (min(group[a], group[b]), max(group[a], group[b]))
            if pair[0] != pair[1]:
                sums[pair] = sums.get(pair, np.zeros(2)) + np.array([strength * count, count])
        pair = min(sums, key=lambda pair: sums[pair][0] / sums[pair][1], default=None)
        if pair is None or sums[pair][0] / sums[pair][1] >= merge:
            break
        group = {k: pair[0] if v == pair[1] else v for k, v in group.items()}
    assert 1 < len(set(group.values())) < len(group)
    expected = np.vectorize(group.get)(basins)
    found = joined_basins(cell, smooth=0, depth=0.02, merge=merge)
    # the same regions, however they are numbered
    assert len({*zip(expected.ravel(), found.ravel(), strict=True)}) == len(set(group.values())) == found.max() + 1


def test_cells_in_three_dimensions_and_pictures_without_any():
    _, shares = rooms()
    deep = np.repeat(shares[:, None], 9, axis=1)
    found = CellsFromMembranes(threshold=0.25)(deep[1] > 0, probabilities=deep, spacing=(1, 1, 1))
    assert label_components(found).max() == 4
    for value, expected in ((0.1, 0), (0.9, 1)):
        flat = np.full((2, 12, 12), value)
        flat[0] = 1 - value
        out = CellsFromMembranes()(np.zeros((12, 12), np.uint8), probabilities=flat, spacing=(1, 1))
        assert (out == expected).all()


def test_no_two_cells_touch_where_there_is_no_membrane():
    """All of the picture is above the threshold: what parts the cells is the gap alone."""
    cell = gaussian_filter(np.random.default_rng(0).random((40, 50)), 2)
    cell = 0.5 + 0.5 * (cell - cell.min()) / np.ptp(cell)
    regions = joined_basins(cell, smooth=0, depth=0.01, merge=0.2)
    found = CellsFromMembranes(0.4, merge=0.2, smooth=0, depth=0.01)(
        np.zeros(cell.shape, np.uint8), probabilities=np.stack([1 - cell, cell]), spacing=(1, 1)
    )
    assert regions.max() > 5
    for axis in range(2):
        size = regions.shape[axis]
        low, high = regions.take(range(size - 1), axis), regions.take(range(1, size), axis)
        both = found.take(range(size - 1), axis) & found.take(range(1, size), axis)
        assert not both[low != high].any()
    numbers, _ = connected(found, np.ones((3, 3)))  # corners count too
    assert all(len(np.unique(regions[numbers == k])) == 1 for k in range(1, numbers.max() + 1))
    assert set(np.unique(regions[found != 0])) == set(np.unique(regions))  # no cell is lost


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"merge": 1.0}, {"smooth": -1}, {"depth": 0}])
def test_wrong_arguments_of_membranes(wrong):
    with pytest.raises(UsageError):
        CellsFromMembranes(**wrong)
    with pytest.raises(UsageError, match="probabilities"):
        CellsFromMembranes()(np.zeros((4, 4)), spacing=(1, 1))


@pytest.mark.parametrize("step", [KeepLargestComponent(), RemoveSmallObjects(2)])
def test_memory_does_not_grow_with_the_number_of_labels(step):
    peaks = []
    for count in (2, 60):
        label = np.zeros((64, 32, 32), np.uint8)
        for value in range(1, count + 1):
            label[value, 2:30, 2:30] = value
        tracemalloc.start()
        assert np.array_equal(step(label, spacing=(1, 1, 1)), label)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]

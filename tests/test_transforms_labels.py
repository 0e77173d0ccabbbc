"""Labels: parting touching instances, targets from instances, renaming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.component import Component, build_component
from medseg.errors import LabelError, UsageError
from medseg.transforms import InstancesToLabeld, InteriorBorderLabeld, RemapLabelsd, part_instances


def touches(instances: np.ndarray) -> bool:
    """Whether any two different instances share a face, edge or corner: by comparing every pair of neighbours."""
    padded = np.pad(instances, 1)
    inner = tuple(slice(1, -1) for _ in range(instances.ndim))
    for offset in np.ndindex((3,) * instances.ndim):
        other = padded[tuple(slice(o, o + n) for o, n in zip(offset, instances.shape, strict=True))]
        here = padded[inner]
        if ((here != other) & (here > 0) & (other > 0)).any():
            return True
    return False


@pytest.mark.parametrize("shape", [(40, 40), (14, 15, 16)])
def test_nothing_touches_afterwards_and_nothing_disappears(shape):
    rng = np.random.default_rng(0)
    for _ in range(5):
        seeds = np.zeros(shape, int)
        places = rng.choice(seeds.size, 12, replace=False)
        seeds.flat[places] = rng.choice(np.arange(1, 60), 12, replace=False)
        # the image divided among its nearest seeds: everything touches
        nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        full = seeds[tuple(nearest)]
        parted, gap = part_instances(full)
        assert not touches(parted)
        assert set(np.unique(parted)) - {0} == set(np.unique(full))
        assert np.array_equal(parted, np.where(gap, 0, full))


def test_a_straight_border_gets_a_gap_of_one_voxel_from_the_larger():
    instances = np.repeat([[5] * 6 + [3] * 9], 4, axis=0)
    parted, gap = part_instances(instances)
    assert parted[0].tolist() == [5] * 6 + [0] + [3] * 8
    assert gap.sum() == 4


def test_apart_instances_are_left_alone():
    instances = np.array([[1, 1, 0, 2, 2]], np.uint16)
    parted, gap = part_instances(instances)
    assert np.array_equal(parted, instances)
    assert parted.dtype == np.uint16
    assert not gap.any()
    assert part_instances(np.zeros((0, 4), int))[0].shape == (0, 4)
    assert not part_instances(np.full((4, 4), 7))[1].any()


def test_sparse_and_large_numbers():
    instances = np.array([[2**40, 2**40, 7, 7, 7]])
    assert part_instances(instances)[0].tolist() == [[2**40, 2**40, 0, 7, 7]]


def test_an_instance_of_one_voxel_survives():
    instances = np.full((5, 5), 2)
    instances[2, 2] = 9
    parted, _ = part_instances(instances)
    assert parted[2, 2] == 9
    assert not touches(parted)


def test_an_instance_that_would_vanish_is_kept_where_none_is_lost_for_it():
    # single voxels in a row: the middle one gives way to the first, and the last need not
    assert part_instances(np.array([[1, 2, 3, 0]]))[0].tolist() == [[1, 0, 3, 0]]
    # a ring of one voxel's width around a smaller square would go altogether
    ring = np.zeros((9, 9), int)
    ring[2:7, 2:7], ring[3:6, 3:6] = 2, 1
    parted, _ = part_instances(ring)
    assert set(np.unique(parted)) == {0, 1, 2}
    assert not touches(parted)


def test_floats_are_refused():
    with pytest.raises(LabelError):
        part_instances(np.ones((3, 3)))


def test_label_of_instances_keeps_classes():
    sample = {
        "instances": torch.tensor([[[1, 1, 1, 2, 2, 0]]], dtype=torch.int32),
        "label": torch.tensor([[[3, 3, 3, 4, 4, 0]]], dtype=torch.uint8),
    }
    out = InstancesToLabeld()(sample)
    assert out["label"].tolist() == [[[3, 3, 0, 4, 4, 0]]]
    assert out["instances"].tolist() == [[[1, 1, 0, 2, 2, 0]]]
    whole = InstancesToLabeld(part=False)({"instances": sample["instances"]})
    assert whole["label"].tolist() == [[[1, 1, 1, 1, 1, 0]]]
    assert InstancesToLabeld()({"image": 1}) == {"image": 1}


def test_void_voxels_of_the_label_stay_void():
    # two touching objects; three void voxels: between them and the border, on an object, on the gap that parts them
    instances = torch.tensor([[[1, 1, 1, 2, 2, 0, 0]]], dtype=torch.int32)
    label = torch.tensor([[[1, 255, 255, 1, 1, 0, 255]]], dtype=torch.uint8)
    sample = {"instances": instances, "label": label}
    assert InstancesToLabeld(ignore=255)(sample)["label"].tolist() == [[[1, 255, 255, 1, 1, 0, 255]]]
    border = InteriorBorderLabeld(ignore=255)({key: values.repeat(1, 3, 1) for key, values in sample.items()})["label"]
    assert border[0, 1].tolist() == [1, 255, 255, 1, 1, 0, 255]
    # the program tells every transform the data set's own value
    made = build_component(Component("InstancesToLabeld"), "transform", ignore=255)
    assert made(sample)["label"].tolist() == [[[1, 255, 255, 1, 1, 0, 255]]]
    with pytest.raises(UsageError):
        InteriorBorderLabeld(ignore=2)


def test_interior_and_border():
    instances = torch.zeros(1, 9, 20, dtype=torch.int32)
    instances[0, 2:7, 2:8], instances[0, 2:7, 8:15] = 1, 2
    label = InteriorBorderLabeld()({"instances": instances})["label"][0].numpy()
    expected = np.zeros((9, 20), int)
    expected[2:7, 2:15] = 2
    expected[3:6, 3:7] = expected[3:6, 9:14] = 1
    assert np.array_equal(label, expected)
    wide = InteriorBorderLabeld(width=2)({"instances": instances})["label"][0].numpy()
    assert (wide == 1).sum() == 2 + 3


def test_interior_reaches_the_pictures_own_border():
    label = InteriorBorderLabeld()({"instances": torch.ones(1, 6, 6, dtype=torch.int32)})["label"]
    assert (label == 1).all()


def test_renaming():
    label = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    out = RemapLabelsd({2: 1, 255: 7})({"label": label, "other": 3})
    assert out["label"].tolist() == [[0, 1, 1, 7]]
    assert RemapLabelsd({1: 2, 2: 1})({"label": label})["label"].tolist() == [[0, 2, 1, 255]]  # all at once
    with pytest.raises(LabelError):
        RemapLabelsd({1: 2})({"label": torch.tensor([[0.5]])})
    with pytest.raises(LabelError):
        RemapLabelsd({1: 2})({"label": torch.tensor([[-1]])})
    with pytest.raises(UsageError):
        RemapLabelsd({1: 256})


@pytest.mark.parametrize("background", [True, False])
def test_high_numbers_of_instances_cost_no_memory(background, monkeypatch):
    # numbers that are hashes or colours: a place for each number up to the highest would take gigabytes
    low = np.zeros((1, 12, 20), np.int64)
    low[:, :, 3:9], low[:, :, 9:17] = 2, 1
    low = low if background else low[..., 3:17]
    high = np.array([0, 7, 10**6])[low]
    seen, find = [], ndimage.find_objects
    monkeypatch.setattr(ndimage, "find_objects", lambda array: seen.append(array.max()) or find(array))
    labels = [InteriorBorderLabeld()({"instances": torch.from_numpy(array)})["label"] for array in (low, high)]
    assert torch.equal(*labels)
    assert seen == [2, 2]


@pytest.mark.parametrize("transform", [InstancesToLabeld(), InteriorBorderLabeld()])
def test_instances_that_resampling_left_as_floats(transform):
    numbers = torch.tensor([[[1, 1, 1, 2, 2, 2]] * 3], dtype=torch.int32)
    expected = transform({"instances": numbers})["label"]
    assert torch.equal(transform({"instances": numbers.float()})["label"], expected)
    for wrong in (0.5, float("nan")):
        with pytest.raises(LabelError, match="whole numbers") as caught:
            transform({"instances": numbers + wrong})
        assert caught.value.field == "instances"


@pytest.mark.parametrize("make", [lambda: InstancesToLabeld(keys=("label",)), lambda: InteriorBorderLabeld(width=0)])
def test_bad_arguments(make):
    with pytest.raises(UsageError):
        make()

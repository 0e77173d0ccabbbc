"""Properties that hold for any input: transforms keep image and label together, scores do not see the axes' order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from scipy import ndimage

from medseg.component import Component, build_component
from medseg.component_table import _MONAI_SPATIAL, _table
from medseg.metrics import confusion, surface_distances

# every spatial transform that a pipeline may name, set so that it always does something
SPATIAL = {
    "CenterSpatialCropd": {"roi_size": [20, 14, 18]},
    "CropForegroundd": {},
    "Orientationd": {"axcodes": "PIR"},
    "RandAffined": {"prob": 1.0, "rotate_range": [0.3, 0.2, 0.1], "translate_range": [3, 2, 1], "scale_range": 0.1},
    "RandAxisFlipd": {"prob": 1.0},
    "RandElasticDeformationd": {"prob": 1.0, "sigma": 1.0, "rotate": 20, "flip": True},
    "RandFlipd": {"prob": 1.0, "spatial_axis": 1},
    "RandRotate90d": {"prob": 1.0, "max_k": 3},
    "RandRotated": {"prob": 1.0, "range_x": 0.4, "range_y": 0.2, "keep_size": True},
    "Resized": {"spatial_size": [31, 22, 18]},
    "Spacingd": {"pixdim": [1.3, 0.9, 1.5]},
}


def scene(seed: int) -> dict:
    """Blobs as image and as label: where an image says 1000 the label says 1, and 2000 where it says 2."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, (24, 20, 22)), indexing="ij"))
    label = np.zeros((24, 20, 22), np.uint8)
    for value in (1, 2):
        centre = rng.uniform(8.5, 11.5, 3)
        label[((grid - centre[:, None, None, None]) ** 2).sum(0) < (52, 30)[value - 1]] = value
    affine = torch.eye(4, dtype=torch.float64)
    return {
        "image": MetaTensor(torch.from_numpy(label[None] * 1000.0).float(), affine=affine),
        "label": MetaTensor(torch.from_numpy(label[None]), affine=affine),
        "case": "blobs",
    }


def test_every_spatial_transform_is_listed_here() -> None:
    own = {name for name in _table("transform") if name.startswith("Rand") and "Elastic" in name}
    assert set(SPATIAL) == set(_MONAI_SPATIAL) | own


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_spatial_transform_keeps_image_and_label_together(name: str, seed: int) -> None:
    transform, sample = build_component(Component(name, SPATIAL[name]), "transform"), scene(seed)
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(seed)
    before = np.asarray(sample["label"])
    found = transform(dict(sample))
    image, label = np.asarray(found["image"])[0], np.asarray(found["label"])[0]
    assert image.shape == label.shape
    assert set(np.unique(label)) <= set(np.unique(before)), "a label that was not there"
    assert not (label.shape == before.shape[1:] and np.array_equal(label, before[0])), "nothing was done"
    assert len(np.unique(label)) > 1
    # interpolation blurs the image at borders alone; thin tips of the label may fall between the points of nearest
    inside = ndimage.minimum_filter(label, 3) == ndimage.maximum_filter(label, 3)
    assert len(np.unique(label[inside])) > 1
    assert (np.abs(image / 1000 - label)[inside] > 1e-3).mean() < 0.03
    assert np.abs(np.subtract(ndimage.center_of_mass(image), ndimage.center_of_mass(label))).max() < 0.35, "voxels"
    assert np.allclose(np.asarray(found["image"].affine), np.asarray(found["label"].affine))


shapes = st.lists(st.integers(3, 7), min_size=2, max_size=3).map(tuple)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return tuple((rng.random(shape) < draw(st.sampled_from([0.1, 0.4, 0.8]))) for _ in range(2))  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(pairs(), st.data())
def test_scores_do_not_see_flips_and_axis_order(masks, data) -> None:
    one, two = masks
    spacing = tuple(data.draw(st.sampled_from([0.5, 1.0, 2.5])) for _ in range(one.ndim))
    order = data.draw(st.permutations(range(one.ndim)))
    flips = tuple(axis for axis in range(one.ndim) if data.draw(st.booleans()))
    turned = [np.flip(mask, flips).transpose(order) for mask in masks]
    assert confusion(*(mask.astype(np.uint8) for mask in turned), [1]) == confusion(
        one.astype(np.uint8), two.astype(np.uint8), [1]
    )
    first = surface_distances(one, two, spacing)
    other = surface_distances(*turned, [spacing[axis] for axis in order])
    for score in ("assd", "masd", "rmsd"):
        assert getattr(first, score)() == pytest.approx(getattr(other, score)(), rel=1e-9), score
    for percentile, definition in itertools.product((100, 95), ("max", "pooled")):
        hausdorff = [found.hausdorff(percentile=percentile, definition=definition) for found in (first, other)]
        assert hausdorff[0] == pytest.approx(hausdorff[1], rel=1e-9)
    # areas of surfels are single precision
    assert first.surface_dice(0.9) == pytest.approx(other.surface_dice(0.9), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(pairs(), st.randoms(use_true_random=False))
def test_removing_hits_never_raises_overlap(masks, random) -> None:
    prediction, reference = (mask.astype(np.uint8) for mask in masks)
    last = confusion(prediction, reference, [1])[1]
    hits = [tuple(index) for index in np.argwhere(prediction & reference)]
    random.shuffle(hits)
    for index in hits:
        prediction[index] = 0
        now = confusion(prediction, reference, [1])[1]
        assert now.dice < last.dice
        assert now.iou < last.iou
        assert now.sensitivity < last.sensitivity
        last = now


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([None, 3]), st.booleans())
def test_confusion_equals_brute_force(shape, seed, ignore, masked) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, 4, shape), rng.integers(0, 4, shape)
    mask = rng.random(shape) < 0.7 if masked else None
    found = confusion(prediction, reference, [1, 2], mask=mask, ignore=ignore)
    for label in (1, 2):
        counts = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
        for index in np.ndindex(*shape):
            if (ignore is not None and reference[index] == ignore) or (mask is not None and not mask[index]):
                continue
            hit, real = prediction[index] == label, reference[index] == label
            counts["tp" if hit and real else "fp" if hit else "fn" if real else "tn"] += 1
        assert {name: getattr(found[label], name) for name in counts} == counts

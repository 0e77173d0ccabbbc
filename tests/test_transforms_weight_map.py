"""The weight map against its definition, computed the slow way: one distance transform per instance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from scipy import ndimage

from medseg.errors import GeometryError, LabelError, MedsegError, UsageError
from medseg.transforms import BoundaryWeightMapd, boundary_weight_map, part_instances
from medseg.transforms.nearest_two import distance_to_other, distance_to_two


def slow_term(instances: np.ndarray, w0=10.0, sigma=5.0, spacing=None) -> np.ndarray:
    """Equation 2 of the paper as it is written."""
    values = [v for v in np.unique(instances) if v]
    if len(values) < 2:
        return np.zeros(instances.shape)
    distances = np.sort([ndimage.distance_transform_edt(instances != v, sampling=spacing) for v in values], axis=0)
    term = w0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    term[instances != 0] = 0
    return term


def slow_contour(label: np.ndarray, w0=10.0, sigma=5.0, spacing=None) -> np.ndarray:
    distance = np.full(label.shape, np.inf)
    for value in np.unique(label):
        inside = label == value
        if not inside.all():
            distance[inside] = ndimage.distance_transform_edt(inside, sampling=spacing)[inside]
    return w0 * np.exp(-(distance**2) / (2 * sigma**2))


def blobs(shape, count, seed=0, spacing=None) -> np.ndarray:
    """Separate instances: balls around random points, parted where they touch."""
    rng = np.random.default_rng(seed)
    step = np.ones(len(shape)) if spacing is None else np.asarray(spacing)
    at = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1) * step
    label = np.zeros(shape, np.int32)
    for number in range(1, count + 1):
        centre, radius = rng.random(len(shape)) * shape * step, rng.uniform(2, 5) * step.min()
        ball = ((at - centre) ** 2).sum(axis=-1) < radius**2
        label[ball & (label == 0)] = number
    return part_instances(label)[0]


def gap_of(width: int) -> np.ndarray:
    strip = np.zeros((31, 60), np.int32)
    strip[:, :20], strip[:, 20 + width :] = 1, 2
    return strip


@pytest.mark.parametrize(("width", "term"), [(1, 9.231), (2, 8.353), (4, 6.065), (8, 1.979)])
def test_straight_gaps_have_the_terms_worked_out_on_paper(width, term):
    weight = boundary_weight_map(gap_of(width))
    np.testing.assert_allclose(weight[:, 20 : 20 + width], 1 + term, atol=1e-3)


@pytest.mark.parametrize(("width", "term"), [(1, 9.231), (3, 10 * np.exp(-(16) / 50))])
def test_term_is_none_on_foreground(width, term):
    weight = boundary_weight_map(gap_of(width))
    assert (weight[gap_of(width) != 0] == 1).all()
    assert weight.dtype == np.float32


@pytest.mark.parametrize("instances", [np.zeros((9, 9), int), np.eye(9, dtype=int)[:, ::-1] * 4])
def test_fewer_than_two_instances_have_no_term(instances):
    assert (boundary_weight_map(instances) == 1).all()


@pytest.mark.parametrize(
    ("shape", "count", "spacing"),
    [
        ((120, 140), 40, None),
        ((120, 140), 3, None),
        ((90, 80), 30, (2.0, 0.7)),
        ((30, 40, 50), 25, None),
        ((14, 60, 50), 25, (5.0, 0.8, 0.8)),
        ((40, 30, 14), 12, (0.8, 0.9, 5.0)),
        ((200,), 8, None),
        ((8, 9, 10, 11), 5, None),
    ],
)
def test_separation_equals_the_definition(shape, count, spacing):
    for seed in range(3):
        instances = blobs(shape, count, seed, spacing)
        found = boundary_weight_map(instances, spacing=spacing)
        np.testing.assert_allclose(found, 1 + slow_term(instances, spacing=spacing), atol=1e-4)


@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 1.0), (100.0, 5.0), (0.5, 12.0), (10.0, 60.0)])
def test_separation_equals_the_definition_for_other_terms(w0, sigma):
    instances = blobs((100, 90), 12, 4)
    found = boundary_weight_map(instances, w0=w0, sigma=sigma)
    np.testing.assert_allclose(found, 1 + slow_term(instances, w0, sigma), atol=1e-4)


@pytest.mark.parametrize("spacing", [None, (2.5, 0.7), (1.5, 1.5)])
def test_contour_equals_the_definition_on_both_sides(spacing):
    instances = blobs((120, 100), 12, 1)
    found = boundary_weight_map(instances, mode="contour", spacing=spacing)
    np.testing.assert_allclose(found, 1 + slow_contour(instances, spacing=spacing), atol=1e-4)


def test_contour_in_three_dimensions_with_nested_labels():
    liver = np.zeros((12, 50, 60), np.uint8)
    liver[3:9, 10:40, 12:50] = 1
    liver[5:7, 20:28, 20:30] = 2  # touches: a tumour is not parted from its organ
    found = boundary_weight_map(liver, mode="contour", spacing=(5.0, 0.8, 0.8))
    np.testing.assert_allclose(found, 1 + slow_contour(liver, spacing=(5.0, 0.8, 0.8)), atol=1e-4)
    # distance 0.8 mm at the boundary's voxels, inside and outside
    near = 1 + 10 * np.exp(-(0.8**2) / 50)
    assert found[6, 24, 11] == pytest.approx(near, abs=1e-4)
    assert found[6, 24, 12] == pytest.approx(near, abs=1e-4)


def test_the_checks_themselves_tell_the_usual_mistakes_apart():
    # distances to the nearest contour, a leak into foreground, and spacing left out all differ by far more than 1e-4
    instances = blobs((14, 60, 50), 25, 0, (5.0, 0.8, 0.8))
    right = boundary_weight_map(instances, spacing=(5.0, 0.8, 0.8)) - 1
    nearest = ndimage.distance_transform_edt(instances == 0, sampling=(5.0, 0.8, 0.8))
    background = instances == 0
    assert np.abs(10 * np.exp(-((2 * nearest) ** 2) / 50) - right)[background].max() > 0.5
    assert np.abs(boundary_weight_map(instances) - 1 - right).max() > 0.5
    assert np.abs(10 * np.exp(-(nearest**2) / 50) - right)[~background].max() > 0.5


def test_touching_instances_are_parted_in_the_map():
    touching = np.repeat([[1] * 20 + [2] * 21], 31, axis=0)
    weight = boundary_weight_map(touching)
    np.testing.assert_allclose(weight[:, 20], 10.231, atol=1e-3)  # of the larger instance one column became the gap
    assert (np.delete(weight, 20, axis=1) == 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_any_integer_type_and_any_numbers(dtype):
    instances = blobs((60, 60), 9, 2)
    expected = boundary_weight_map(instances)
    assert np.array_equal(boundary_weight_map(instances.astype(dtype)), expected)
    if np.iinfo(dtype).max > 2**40:
        assert np.array_equal(boundary_weight_map(instances.astype(dtype) * dtype(2**36)), expected)


def test_many_instances_and_long_lines_take_the_wide_path():
    # more than 2^15 values: 32-bit numbers are needed
    instances = np.zeros((402, 402), np.int32)
    instances[1::2, 1::2] = np.arange(1, 201 * 201 + 1).reshape(201, 201)
    found = boundary_weight_map(instances)
    expected = boundary_weight_map(instances[:42, :42])  # the middle of it sees the same neighbours
    np.testing.assert_allclose(found[10:30, 10:30], expected[10:30, 10:30], atol=1e-4)
    assert found[100, 101] == pytest.approx(1 + 10 * np.exp(-4 / 50), abs=1e-4)


def test_disconnected_instances_count_as_one():
    instances = np.zeros((20, 60), int)
    instances[:, :10] = instances[:, 14:20] = 1
    assert (boundary_weight_map(instances) == 1).all()
    instances[:, 30:] = 2
    np.testing.assert_allclose(boundary_weight_map(instances), 1 + slow_term(instances), atol=1e-4)


def test_distance_functions_at_the_edges_of_their_reach():
    line = np.zeros((1, 30), int)
    line[0, 0], line[0, 29] = 1, 2
    assert (distance_to_two(line, (1, 1), 29.0)[0, 1:29] == 29).all()
    assert (distance_to_two(line, (1, 1), 20.0) >= 29).all()  # beyond the reach: the true value or infinity, never less
    assert np.isinf(distance_to_other(np.ones((4, 4), int), (1, 1), 5.0)).all()


# --- class weights ------------------------------------------------------------


def test_class_weights_given_and_balanced():
    instances = gap_of(4)
    given = boundary_weight_map(instances, w0=0.0, class_weights=[0.5, 2.0])
    assert set(np.unique(given)) == {0.5, 2.0}
    assert (given[instances == 0] == 0.5).all()
    balanced = boundary_weight_map(instances, w0=0.0, class_weights="balanced").astype(np.float64)
    assert balanced.mean() == pytest.approx(1.0, abs=1e-5)
    assert balanced[instances == 0].sum() == pytest.approx(balanced[instances != 0].sum(), rel=1e-5)
    added = boundary_weight_map(instances, class_weights=[0.5, 2.0])
    np.testing.assert_allclose(added - given, slow_term(instances), atol=1e-4)


@pytest.mark.parametrize("weights", ["balanced", {0: 1.0, 1: 1.0}])
def test_void_voxels_count_for_no_class(weights):
    label = torch.zeros((1, 10, 10), dtype=torch.uint8)
    label[:, :5], label[:, 5, :2] = 255, 1  # half void, 2 voxels of class 1, 48 of background
    transform = BoundaryWeightMapd(w0=0.0, mode="contour", class_weights=weights, ignore=255)
    weight = transform({"label": label})["weight"]
    assert bool((weight[label == 255] == 0).all())
    sums = [float(weight[label == value].sum()) for value in (0, 1)]
    assert sums == pytest.approx([25.0, 25.0] if weights == "balanced" else [48.0, 2.0])


def test_class_weights_by_class():
    classes = np.array([[0, 1, 2, 2]])
    found = boundary_weight_map((classes > 0).astype(int), w0=0.0, class_weights={0: 1, 1: 3, 2: 5}, classes=classes)
    assert found.tolist() == [[1, 3, 5, 5]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"instances": np.ones((4, 4))}, LabelError),
        ({"instances": np.array([[-1, 0]])}, LabelError),
        ({"spacing": (1.0,)}, GeometryError),
        ({"spacing": 2.0}, GeometryError),
        ({"spacing": (1.0, -1.0)}, GeometryError),
        ({"sigma": 0.0}, UsageError),
        ({"w0": -1.0}, UsageError),
        ({"w0": float("nan")}, UsageError),
        ({"mode": "border"}, UsageError),
        ({"class_weights": [1.0]}, UsageError),
        ({"class_weights": [1.0, float("nan")]}, UsageError),
        ({"class_weights": "equal"}, UsageError),
        ({"class_weights": 2.0}, UsageError),
        ({"class_weights": [1.0, "x"]}, UsageError),
        ({"class_weights": ["1", "2"]}, UsageError),
        ({"class_weights": "12"}, UsageError),
        ({"class_weights": {0: 1.0, 1: None}}, UsageError),
        ({"w0": "x"}, UsageError),
        ({"spacing": ["x", 1.0]}, GeometryError),
        ({"classes": np.zeros((3, 3), int), "class_weights": "balanced"}, GeometryError),
    ],
)
def test_bad_input_is_refused(arguments, error):
    with pytest.raises(error):
        boundary_weight_map(**{"instances": gap_of(2), **arguments})


def test_weights_of_classes_that_are_none_are_refused_before_the_first_image():
    for wrong in (2.0, [1.0, "x"], "equal"):
        with pytest.raises(UsageError, match="each class needs a weight") as caught:
            BoundaryWeightMapd(class_weights=wrong)
        assert (caught.value.field, caught.value.found) == ("class_weights", str(wrong))


# --- the transform ------------------------------------------------------------


def test_transform_parts_label_and_instances_alike_and_keeps_the_affine():
    affine = torch.diag(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    instances = torch.zeros(1, 20, 30, dtype=torch.int32)
    instances[0, :, :15], instances[0, :, 15:] = 1, 2
    sample = {"instances": MetaTensor(instances, affine=affine),
              "label": MetaTensor((instances > 0).to(torch.uint8), affine=affine)}  # fmt: skip
    out = BoundaryWeightMapd()(sample)
    assert (out["label"][0, :, 15] == 0).all()
    assert (out["instances"][0, :, 15] == 0).all()
    assert int(out["label"].sum()) == 20 * 29
    assert out["weight"].shape == (1, 20, 30)
    assert torch.equal(out["weight"].affine, out["label"].affine)
    np.testing.assert_allclose(out["weight"][0, :, 15].numpy(), 10.231, atol=1e-3)
    assert (sample["label"] == 1).all()  # the input is not changed


def test_transform_finds_components_without_instances():
    label = torch.zeros(1, 20, 40, dtype=torch.uint8)
    label[0, 5:15, 5:15], label[0, 5:15, 18:30] = 1, 1
    out = BoundaryWeightMapd()({"label": label})
    expected = 1 + slow_term(ndimage.label(label[0].numpy())[0])
    np.testing.assert_allclose(out["weight"][0].numpy(), expected, atol=1e-4)
    assert torch.equal(out["label"], label)


def test_a_thin_oblique_structure_is_one_component_and_stays_whole():
    label = torch.eye(30, dtype=torch.uint8)[None]
    out = BoundaryWeightMapd()({"label": label})
    assert torch.equal(out["label"], label)
    assert (out["weight"] == 1).all()


def test_transform_gives_ignored_voxels_no_weight():
    label = torch.zeros(1, 20, 40, dtype=torch.uint8)
    label[0, 5:15, 5:15] = 1
    label[0, :, 30:] = 255
    for mode in ("separation", "contour"):
        out = BoundaryWeightMapd(mode=mode, ignore=255)({"label": label})
        assert (out["weight"][0, :, 30:] == 0).all()
        assert (out["weight"][0, :, :30] >= 1).all()
        assert (out["label"][0, :, 30:] == 255).all()


def test_transform_uses_spacing_when_asked():
    label = torch.zeros(1, 9, 40, dtype=torch.uint8)
    label[0, :, 10:30] = 1
    sample = {"label": MetaTensor(label, affine=torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0])))}
    out = BoundaryWeightMapd(mode="contour", use_spacing=True)(sample)["weight"]
    expected = 1 + slow_contour(label[0].numpy(), spacing=(1.0, 3.0))
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-4)


def test_prediction_sample_passes_and_bad_ones_do_not():
    sample = {"image": torch.rand(1, 5, 5)}
    assert BoundaryWeightMapd()(sample).keys() == {"image"}
    with pytest.raises(LabelError, match="whole numbers"):
        BoundaryWeightMapd()({"label": torch.full((1, 5, 5), 0.5)})
    with pytest.raises(MedsegError):
        BoundaryWeightMapd(mode="edge")
    with pytest.raises(MedsegError):
        BoundaryWeightMapd(sigma=0)

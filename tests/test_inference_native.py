"""Labels come back where they belong: every orientation exactly, other grids as scipy interpolates them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medseg.errors import GeometryError
from medseg.inference import GaussianTileInferer, OverlapTileInferer, predict_case
from medseg.inference.resampling import SlabBuffer
from medseg.inference.slices import SliceBlocks
from medseg.volumes import Geometry


class Identity(torch.nn.Module):
    exact_under_tiling = True

    def __init__(self, dims=3):
        super().__init__()
        self.spatial_dims, self.context, self.divisor = dims, (3,) * dims, (2,) * dims

    def forward(self, images):
        return images


def one_hot(label, classes=3):
    return torch.nn.functional.one_hot(torch.from_numpy(np.array(label, np.int64)), classes).movedim(-1, 0) * 20.0 - 10


def turned(degrees):
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def affine_of(spacing, degrees=0.0, origin=(-5.0, 3.0, 9.0)):
    affine = np.eye(4)
    affine[:3, :3] = turned(degrees) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
@pytest.mark.parametrize("degrees", [0, 15])
def test_all_48_orientations_come_back_exactly(order, signs, degrees):
    native = np.random.default_rng(0).integers(0, 3, (9, 7, 6))
    affine = affine_of((0.7, 0.7, 3.5), degrees)
    orientation = np.array(list(zip(order, signs, strict=True)))
    turned_label = nibabel.orientations.apply_orientation(native, orientation)
    turned_affine = affine @ nibabel.orientations.inv_ornt_aff(orientation, native.shape)
    for inferer in (OverlapTileInferer(tile=10), GaussianTileInferer(4)):
        planes = []
        result = predict_case(
            [Identity()],
            one_hot(turned_label),
            inferer=inferer,
            affine_pre=turned_affine,
            native=Geometry.of(native.shape, affine),
            sink=lambda start, slab, planes=planes: planes.append((start, slab.copy())),
        )
        assert np.array_equal(result, native)
        assert [start for start, _ in planes] == list(np.cumsum([0, *(s.shape[-1] for _, s in planes)])[:-1])
        assert np.array_equal(np.concatenate([slab for _, slab in planes], -1), native)


def test_forward_slabs_are_told_as_they_finish():
    native = np.random.default_rng(0).integers(0, 3, (8, 8, 60))
    planes = []
    predict_case(
        [Identity()],
        one_hot(native),
        inferer=OverlapTileInferer(tile=(8, 8, 14)),
        affine_pre=np.eye(4),
        native=Geometry.of(native.shape),
        sink=lambda start, slab: planes.append(start),
    )
    assert planes == list(range(0, 60, 8))[: len(planes)] or len(planes) > 4


def test_cropped_and_padded_grids_are_exact():
    native = np.random.default_rng(1).integers(0, 3, (12, 10, 9))
    affine = affine_of((1, 1, 3))
    shifted = affine.copy()
    shifted[:3, 3] = (affine @ [2, -3, 4, 1])[:3]
    inside = np.zeros((7, 16, 4), int)
    inside[:, 3:13] = native[2:9, :, 4:8]
    expected = np.zeros_like(native)
    expected[2:9, :, 4:8] = native[2:9, :, 4:8]
    result = predict_case(
        [Identity()],
        one_hot(inside),
        inferer=OverlapTileInferer(tile=10),
        affine_pre=shifted,
        native=Geometry.of(native.shape, affine),
    )
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("degrees", [0, 15])
@pytest.mark.parametrize("flipped", [False, True])
def test_other_grids_equal_scipy(classes, degrees, flipped):
    generator = torch.Generator().manual_seed(classes)
    image = torch.nn.functional.avg_pool3d(torch.randn((1, classes, 24, 22, 26), generator=generator), 5, 1, 2)[0] * 20
    affine = affine_of((1.1, 1.1, -5 if flipped else 5), degrees, (-12, -11, 12 if flipped else -13))
    before = np.diag([-1.5, 1.5, -1.5, 1.0])
    before[:3, 3] = 18, -16, 18
    shape = (30, 28, 7)
    matrix = np.linalg.inv(before) @ affine
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    position = matrix[:3, :3] @ grid + matrix[:3, 3:]
    outside = ((position < -0.5) | (position > np.array(image.shape[1:])[:, None] - 0.5)).any(0)
    soft = image.softmax(0).numpy()
    expected = np.stack([map_coordinates(channel, position, order=1, mode="nearest") for channel in soft])
    expected[:, outside] = 0
    expected[0, outside] = 1
    for inferer in (OverlapTileInferer(tile=16), GaussianTileInferer(12)):
        planes = []
        options = {"inferer": inferer, "affine_pre": before, "native": Geometry.of(shape, affine)}
        label, found = predict_case(
            [Identity()],
            image,
            want_probabilities=True,
            **options,
            sink=lambda start, slab, planes=planes: planes.append(slab.copy()),
        )
        assert np.abs(found.reshape(classes, -1) - expected).max() < 1e-4
        sure = np.sort(expected, 0)[-1] - np.sort(expected, 0)[-2] > 1e-3
        assert np.array_equal(label.ravel()[sure], expected.argmax(0)[sure])
        assert np.array_equal(np.concatenate(planes, -1), label)
        assert np.array_equal(predict_case([Identity()], image, **options), label)


def ball(shape, affine, centre, radius):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    return np.linalg.norm(world - centre, axis=-1) <= radius


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("degrees", [0, 15])
def test_a_phantom_lands_within_half_a_voxel(codes, degrees):
    # a ball drawn in world millimetres on both grids; 5:1 anisotropy on the native one
    shape, spacing = (50, 48, 12), (0.8, 0.8, 4.0)
    affine = affine_of(spacing, degrees, (-20, -19, -22))
    centre = (affine @ [*(np.array(shape) / 2), 1])[:3]
    before = affine_of((1.0, 1.0, 1.0), 0, centre - 28)
    label, before_label = (ball(s, a, centre, 13) for s, a in ((shape, affine), ((56, 56, 56), before)))
    target = nibabel.orientations.axcodes2ornt(tuple(codes))
    now = nibabel.io_orientation(before)
    change = nibabel.orientations.ornt_transform(now, target)
    turned_label = nibabel.orientations.apply_orientation(before_label.astype(int), change)
    turned_affine = before @ nibabel.orientations.inv_ornt_aff(change, before_label.shape)
    result = predict_case(
        [Identity()],
        one_hot(turned_label, 2),
        inferer=OverlapTileInferer(tile=24),
        affine_pre=turned_affine,
        native=Geometry.of(shape, affine),
    )
    found, wanted = (np.argwhere(mask).mean(0) for mask in (result, label))
    assert np.abs(found - wanted).max() < 0.5
    assert 2 * (label & (result > 0)).sum() / (label.sum() + result.sum()) > 0.95


def test_pictures_and_slices():
    picture = np.random.default_rng(3).integers(0, 3, (20, 31))
    geometry = Geometry.of(picture.shape)
    result = predict_case(
        [Identity(2)], one_hot(picture), inferer=OverlapTileInferer(tile=12), affine_pre=np.eye(4), native=geometry
    )
    assert np.array_equal(result, picture)
    volume = np.random.default_rng(4).integers(0, 3, (20, 13, 7))
    for affine in (np.eye(4), np.diag([1.0, 1.0, -1.0, 1.0])):
        turned_back = predict_case(
            [Identity(2)],
            one_hot(volume),
            inferer=OverlapTileInferer(tile=12),
            affine_pre=np.eye(4) @ affine,
            native=Geometry.of(volume.shape, affine),
        )
        assert np.array_equal(turned_back, volume)


def test_a_network_on_neighbouring_slices():
    class Slices(Identity):
        """Class 1 where the sum over the slices, weighted by 1, 10, 100 ..., is above 0: gives the sum itself."""

        in_channels = 6

        def forward(self, windows):
            weights = 10.0 ** torch.arange(6).reshape(1, 6, 1, 1)
            return torch.cat([torch.zeros_like(windows[:, :1]), (windows * weights).sum(1, keepdim=True)], dim=1)

    image = torch.from_numpy(np.random.default_rng(5).integers(0, 9, (2, 9, 12, 4))).float()
    blocks = SliceBlocks(OverlapTileInferer(tile=12)).blocks(image, [Slices(2)])
    found = np.full((9, 12, 4), np.nan)
    for block in blocks:
        if block.values is not None:
            found[tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))] = block.values[1]
    for k, (below, above) in enumerate([(1, 1), (0, 2), (1, 3), (2, 2)]):
        order = [image[c, ..., place] for c in (0, 1) for place in (below, k, above)]
        assert np.array_equal(found[..., k], sum(10.0**n * plane for n, plane in enumerate(order)))
    with pytest.raises(GeometryError, match="another number of channels"):
        list(SliceBlocks(OverlapTileInferer(tile=12)).blocks(image[:, :, :, :1].repeat(2, 1, 1, 1), [Slices(2)]))


def test_mask_threshold_and_postprocess():
    label = np.zeros((16, 16), int)
    label[2:6, 2:6] = label[10:13, 10:13] = 1
    geometry = Geometry.of(label.shape)
    options = {"inferer": OverlapTileInferer(tile=12), "affine_pre": np.eye(4), "native": geometry}
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[:, :8] = 1
    assert np.array_equal(predict_case([Identity(2)], one_hot(label, 2), mask=mask, **options), label * mask[0])
    # sigmoid(0) = 0.5: foreground at a threshold of 0.5, not above
    flat = torch.zeros(1, 16, 16)
    assert predict_case([Identity(2)], flat, **options).all()
    assert not predict_case([Identity(2)], flat, threshold=0.6, **options).any()
    two = torch.stack([torch.zeros(16, 16), torch.full((16, 16), -1.0)])  # probability 0.27
    assert predict_case([Identity(2)], two, threshold=0.2, **options).all()
    assert not predict_case([Identity(2)], two, **options).any()
    seen = {}

    def step(array, *, probabilities, spacing):
        seen.update(probabilities=probabilities, spacing=spacing)
        return array * 7

    planes = []
    result = predict_case(
        [Identity(2)], one_hot(label, 2), postprocess=[step], sink=lambda start, slab: planes.append(slab), **options
    )
    assert np.array_equal(result, label * 7)
    assert np.array_equal(planes[0], result)
    assert seen["probabilities"] is None
    step.needs_probabilities = True
    predict_case([Identity(2)], one_hot(label, 2), postprocess=[step], **options)
    assert seen["probabilities"].shape == (2, 16, 16)


def test_many_classes_and_wrong_geometry():
    label = np.arange(300).reshape(20, 15)
    options = {"inferer": OverlapTileInferer(), "affine_pre": np.eye(4)}
    result = predict_case([Identity(2)], one_hot(label, 300), native=Geometry.of((20, 15)), **options)
    assert result.dtype == np.int16
    assert np.array_equal(result, label)
    with pytest.raises(GeometryError):
        predict_case([Identity(2)], one_hot(label, 300), native=Geometry.of((20, 15, 3)), **options)
    options["affine_pre"] = np.diag([0.0, 1, 1, 1])
    with pytest.raises(GeometryError, match="singular"):
        predict_case([Identity(2)], one_hot(label, 300), native=Geometry.of((20, 15)), **options)


def test_resampling_after_out_of_memory_is_the_same():
    class Greedy(Identity):
        limit = 10**9

        def forward(self, images):
            if images.device.type != "meta" and images.numel() > self.limit:
                raise MemoryError
            return images

    image = torch.randn((2, 16, 16, 60), generator=torch.Generator().manual_seed(5))
    options = {"affine_pre": np.eye(4), "native": Geometry.of((10, 12, 44), affine_of((1.5, 1.3, 1.35), 0, (0, 0, 0)))}
    expected = predict_case([Identity()], image, inferer=OverlapTileInferer(), **options)
    network = Greedy()
    inferer = OverlapTileInferer(max_ram=16 * 16 * 30 * 10)
    done = []
    inferer.progress = lambda count, total: (done.append(count), setattr(network, "limit", 5000 if count else 10**9))
    assert np.array_equal(predict_case([network], image, inferer=inferer, **options), expected)
    assert len(done) > 2


@pytest.mark.parametrize("turn", [0, 10], ids=["straight", "turned"])
@pytest.mark.parametrize("step", [1.35, -1.35], ids=["forward", "backward"])
@pytest.mark.parametrize("inside", [(0, 10), (25, 32), (50, 60), (0, 60)])
def test_what_lies_outside_a_mask_is_background_on_a_resampled_grid(inside, step, turn, monkeypatch):
    image = torch.randn((1, 16, 16, 60), generator=torch.Generator().manual_seed(5)) - 1
    network = lambda windows: torch.cat([windows, -windows], 1)  # noqa: E731
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    mask[..., slice(*inside)] = True
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    affine = np.diag([1.5, 1.3, step, 1]) @ np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])
    affine[2, 3] = 1.0 if step > 0 else 58.0
    options = {"affine_pre": np.eye(4), "native": Geometry.of((10, 12, 42), affine)}
    held = []
    extend = SlabBuffer.extend
    monkeypatch.setattr(
        SlabBuffer, "extend", lambda self, *given: (extend(self, *given), held.append(self.values.shape[-1]))
    )
    inferer = OverlapTileInferer(tile=10, context=0, divisor=1)
    found = predict_case([network], image, inferer=inferer, mask=mask, **options)
    most = max(held)
    # the same with an image that is background outside the mask, without one
    whole = predict_case([network], torch.where(mask, image, 50.0), inferer=OverlapTileInferer(), **options)
    assert np.array_equal(found, whole)
    assert found.any()
    if not turn:
        assert most <= 35  # a few rows of 10, not the 60 of the volume


def test_a_mapped_label_is_put_aside_after_each_piece(tmp_path, monkeypatch):
    out = np.memmap(tmp_path / "label", np.uint8, "w+", shape=(40, 30, 20))
    seen = []
    monkeypatch.setattr("medseg.inference.native.put_aside", lambda array: seen.append(np.shares_memory(array, out)))
    image = torch.randn((1, 40, 30, 20), generator=torch.Generator().manual_seed(3))
    for native, pieces in ((np.eye(4), 4), (np.diag([1.0, 1.0, 1.01, 1.0]), 1)):  # 2 x 2 tiles; interpolated
        seen.clear()
        options = {
            "affine_pre": np.eye(4),
            "native": SimpleNamespace(shape=out.shape, affine=native, spacing=(1, 1, 1)),
        }
        network = lambda windows: torch.cat([windows, -windows], 1)  # noqa: E731
        inferer = OverlapTileInferer(tile=20, context=0, divisor=1)
        labels = predict_case([network], image, inferer=inferer, out=out, **options)
        assert labels is out
        assert len(seen) >= pieces
        assert all(seen)
        assert 0.3 < out.mean() < 0.7

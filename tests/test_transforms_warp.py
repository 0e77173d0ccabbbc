"""RandElasticDeformationd: one resampling equals scipy's, all keys move together, same seed same result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from scipy import ndimage

from medseg.errors import GeometryError, UsageError
from medseg.precision import kept_precision
from medseg.transforms import RandElasticDeformationd
from medseg.transforms.elastic_field import draw_field, evaluate
from medseg.transforms.warp import Warp, warp_positions, warp_sample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_warp(image: np.ndarray, warp: Warp, order: int, context: tuple[int, ...] | None = None) -> np.ndarray:
    """The definition by scipy: image(flip(c + A (x + u(x) - c))), mirrored at the border voxels' centres; with a
    context c, u and x are the patch's, and the image is mirrored where it ends itself."""
    beside = np.array(context or (0,) * image.ndim)
    shape = np.array(image.shape) - 2 * beside
    centre = (shape - 1) / 2
    x = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")).astype(np.float64)
    if warp.field is not None:
        x = x + evaluate(warp.field.coefficients[None], warp.field.matrices)[0].numpy()
    column = centre.reshape(-1, *[1] * image.ndim)
    at = np.einsum("ab,b...->a...", np.eye(image.ndim) if warp.affine is None else warp.affine, x - column)
    at[list(warp.flips)] *= -1
    at = at + column + beside.reshape(column.shape)
    return ndimage.map_coordinates(image.astype(np.float64), at, order=order, mode="mirror")


@pytest.mark.parametrize("shape", [(48, 61), (21, 34, 27)])
@pytest.mark.parametrize("form", ["grid", "simard"])
def test_one_resampling_equals_scipys(shape, form):
    deform = RandElasticDeformationd(
        sigma=9.0, rotate=40, scale=[0.6, 1.6], shear=0.2, flip=True, form=form, smooth=5.0, flip_prob=0.6
    )
    image = torch.rand(1, *shape, generator=seeded())
    # a label that is constant in blocks, so that ties between voxels do not decide
    label = torch.randint(0, 4, (1, *[n // 6 + 1 for n in shape]), generator=seeded(1))
    for axis, n in enumerate(shape):
        label = label.repeat_interleave(6, dim=axis + 1).narrow(axis + 1, 0, n)
    for seed in range(4):
        warp = deform.draw(shape, seeded(seed), spacing=(2.0, 1.0, 0.7)[: len(shape)])
        out = deform.apply({"image": image, "label": label.to(torch.uint8)}, warp)
        np.testing.assert_allclose(out["image"][0], reference_warp(image[0].numpy(), warp, 1), atol=1e-3)
        nearest = reference_warp(label[0].numpy(), warp, 0)
        assert (out["label"][0].numpy() != nearest).mean() < 1e-3


def test_a_checkerboard_and_its_label_stay_aligned():
    board = (torch.arange(96)[:, None] // 8 + torch.arange(96) // 8) % 2
    sample = {"image": board[None].float(), "label": board[None].to(torch.uint8), "weight": 1 + 9 * board[None].float()}
    out = RandElasticDeformationd(rotate=30, scale=[0.8, 1.2], flip=True).set_random_state(3)(sample)
    assert not torch.equal(out["label"], sample["label"])
    torch.testing.assert_close(out["weight"], 1 + 9 * out["image"], atol=1e-4, rtol=0)
    # the linear image is above a half just where the nearest label is 1, up to interpolation at the corners of squares
    assert float(((out["image"] > 0.5) != (out["label"] == 1)).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_no_new_label_appears_and_types_stay(dtype):
    values = torch.tensor([0, 1]) if dtype == torch.bool else torch.tensor([0, 3, 7, 100])
    for shape in ((64, 64), (20, 24, 28)):
        label = values[torch.randint(0, len(values), (1, *shape), generator=seeded())].to(dtype)
        out = RandElasticDeformationd(rotate=45).set_random_state(0)({"label": label})["label"]
        assert out.dtype == dtype
        assert set(out.unique().tolist()) <= set(label.unique().tolist())


def test_large_instance_numbers_are_exact():
    number = 2**24 + 1  # not a float32
    out = RandElasticDeformationd().set_random_state(0)(
        {"instances": torch.full((1, 32, 32), number, dtype=torch.int32)}
    )
    assert out["instances"].unique().tolist() == [number]


def test_flips_alone_are_exact_and_cost_no_interpolation():
    sample = {"image": torch.rand(2, 20, 30), "label": torch.randint(0, 9, (1, 20, 30))}
    deform = RandElasticDeformationd(prob=0.0, flip=[1], flip_prob=1.0)
    out = deform.set_random_state(0)(sample)
    assert torch.equal(out["image"], sample["image"].flip(2))
    assert torch.equal(out["label"], sample["label"].flip(2))


def test_flips_within_a_resampling_equal_flips_before_it():
    field = draw_field((40, 50), generator=seeded())
    image = torch.rand(1, 1, 40, 50, generator=seeded())
    joint = warp_sample({"image": image}, [Warp((40, 50), field, flips=(0,))], linear=("image",))["image"]
    apart = warp_sample({"image": image.flip(2)}, [Warp((40, 50), field)], linear=("image",))["image"]
    torch.testing.assert_close(joint, apart, atol=1e-4, rtol=0)


def test_rotation_by_90_degrees_turns_the_picture():
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    image = torch.rand(1, 1, 31, 31)
    out = warp_sample({"image": image}, [Warp((31, 31), affine=quarter)], linear=("image",))["image"]
    torch.testing.assert_close(out, torch.rot90(image, 1, (3, 2)), atol=1e-4, rtol=0)


def test_rotation_happens_in_millimetres():
    # voxels of 2 x 1 mm: a quarter turn maps (y, x) voxels to (x/2, -2y) voxels
    deform = RandElasticDeformationd(sigma=0.0, rotate=180, unit="mm")
    for seed in range(5):
        affine = deform.draw((40, 80), seeded(seed), spacing=(2.0, 1.0)).affine
        turn = np.diag([2.0, 1.0]) @ affine @ np.diag([0.5, 1.0])
        np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-12)


def test_displacements_are_isotropic_in_space():
    deform = RandElasticDeformationd(sigma=2.0, unit="voxel")
    drawn = [deform.draw((60, 200), seeded(i), spacing=(4.0, 1.0)).field.coefficients for i in range(800)]
    sd = torch.stack(drawn).std(dim=(0, 2, 3))
    assert float(sd[1]) == pytest.approx(2.0, rel=0.05)
    assert float(sd[0]) == pytest.approx(0.5, rel=0.05)


def test_spacing_is_read_from_the_affine():
    affine = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    sample = {"image": MetaTensor(torch.rand(1, 60, 60), affine=affine)}
    deform = RandElasticDeformationd(sigma=2.0).set_random_state(5)
    out = deform(sample)
    assert isinstance(out["image"], MetaTensor)
    assert torch.equal(out["image"].affine, affine.to(out["image"].affine))
    bare = RandElasticDeformationd(sigma=2.0).set_random_state(5)
    bare({"image": torch.rand(1, 60, 60)})
    torch.testing.assert_close(deform.warp.field.coefficients[0] * 3.0, bare.warp.field.coefficients[0])


def test_positions_are_mirrored_however_far_they_lie():
    far = Warp((16, 16), affine=np.diag([7.3, 1.0]))
    positions = warp_positions([far])
    assert float(positions.abs().max()) <= 1
    image = torch.rand(16, 16)
    out = warp_sample({"image": image[None, None]}, [far], linear=("image",))["image"][0, 0]
    np.testing.assert_allclose(out, reference_warp(image.numpy(), far, 1), atol=1e-3)


def test_constant_image_stays_constant():
    for shape in ((50, 50), (20, 20, 20)):
        out = RandElasticDeformationd(rotate=90).set_random_state(1)({"image": torch.full((1, *shape), 3.0)})
        torch.testing.assert_close(out["image"], torch.full((1, *shape), 3.0), atol=1e-5, rtol=0)


# --- random numbers ------------------------------------------------------------


def test_same_seed_same_result_also_within_compose():
    sample = {"image": torch.rand(1, 40, 40), "label": torch.randint(0, 3, (1, 40, 40))}
    first = RandElasticDeformationd(rotate=10).set_random_state(7)
    second = RandElasticDeformationd(rotate=10).set_random_state(7)
    one = [first(sample)["image"] for _ in range(3)]
    two = [second(sample)["image"] for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])
    chain = Compose([RandElasticDeformationd()])
    chain.set_random_state(1)
    again = Compose([RandElasticDeformationd()])
    again.set_random_state(1)
    assert torch.equal(chain(sample)["image"], again(sample)["image"])


def test_a_drawn_warp_can_be_replayed():
    sample = {"image": torch.rand(1, 40, 40)}
    deform = RandElasticDeformationd(flip=True).set_random_state(0)
    out = deform(sample)
    assert torch.equal(deform.apply(sample, deform.warp)["image"], out["image"])


@pytest.mark.parametrize("shape", [(40, 44), (16, 18, 20)])
def test_batch_equals_its_samples(shape):
    deform = RandElasticDeformationd(rotate=20, scale=[0.8, 1.2], flip=True, prob=0.6)
    batch = {
        "image": torch.rand(5, 2, *shape),
        "label": torch.randint(0, 4, (5, 1, *shape)),
        "weight": torch.rand(5, 1, *shape),
        "other": torch.arange(5),
    }
    out = deform.apply_batch(batch, [1, 2, 3, 4, 5])
    assert torch.equal(out["other"], batch["other"])
    for b, seed in enumerate((1, 2, 3, 4, 5)):
        alone = deform.apply_batch({k: v[b : b + 1] for k, v in batch.items()}, [seed])
        torch.testing.assert_close(out["image"][b], alone["image"][0], atol=1e-5, rtol=0)
        assert torch.equal(out["label"][b], alone["label"][0])
        warp = deform.draw(shape, seeded(seed))
        torch.testing.assert_close(deform.apply({"image": batch["image"][b]}, warp)["image"], out["image"][b])


def padded_by_numpy(array: torch.Tensor, context: tuple[int, ...]) -> np.ndarray:
    return np.pad(array.numpy(), [(0, 0), (0, 0), *((c, c) for c in context)], mode="reflect")


@pytest.mark.parametrize(("shape", "context"), [((40, 44), (12, 0)), ((12, 14, 10), (3, 5, 4))])
@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_with_context_the_image_is_turned_in_and_not_its_mirror_image(shape, context, prob):
    deform = RandElasticDeformationd(sigma=3.0, rotate=60, scale=[0.8, 1.2], flip=True, prob=prob)
    seeds, size = [1, 2, 3, 4], [n + 2 * c for n, c in zip(shape, context, strict=True)]
    image = torch.rand(4, 2, *size, generator=seeded())
    blocks = torch.randint(0, 4, (4, 1, *[n // 6 + 1 for n in size]), generator=seeded(1))
    for axis, n in enumerate(size):
        blocks = blocks.repeat_interleave(6, dim=axis + 2).narrow(axis + 2, 0, n)
    out = deform.apply_batch({"image": image, "label": blocks.to(torch.uint8)}, seeds, context=context)
    assert out["image"].shape == (4, 2, *shape)
    assert out["label"].shape == (4, 1, *shape)
    for b, seed in enumerate(seeds):
        warp = deform.draw(shape, seeded(seed))  # the same as without a context
        wanted = reference_warp(image[b, 1].numpy(), warp, 1, context)
        np.testing.assert_allclose(out["image"][b, 1], wanted, atol=1e-3)
        assert (out["label"][b, 0].numpy() != reference_warp(blocks[b, 0].numpy(), warp, 0, context)).mean() < 2e-3


def test_where_nothing_looks_beyond_the_border_context_changes_nothing():
    deform = RandElasticDeformationd(sigma=0.0, scale=[1.2, 1.5], rotate=5)
    assert deform.reach((64, 64)) == (0, 0)
    batch = {"image": torch.rand(3, 1, 64, 64, generator=seeded())}
    wider = {"image": torch.from_numpy(padded_by_numpy(batch["image"], (7, 9)))}
    out = deform.apply_batch(wider, [1, 2, 3], context=(7, 9))["image"]
    torch.testing.assert_close(out, deform.apply_batch(batch, [1, 2, 3])["image"], atol=1e-4, rtol=0)


def test_how_far_a_patch_looks_beyond_its_border():
    def reach(shape=(101, 51), spacings=(), **options):
        return RandElasticDeformationd(**{"sigma": 0.0, **options}).reach(shape, spacings)

    assert reach() == reach(flip=True) == reach(rotate=90, prob=0.0) == (0, 0)
    # the corners lie sqrt(50^2 + 25^2) = 55.9 from the centre, and so far along each axis when turned to it
    assert reach(rotate=180) == (6, 31)
    # by 10 degrees: 50 cos + 25 sin = 53.6 and 25 cos + 50 sin = 33.3
    assert reach(rotate=10) == (4, 9)
    assert reach(scale=[0.5, 2.0]) == (50, 25)
    # rows twice as far apart: 100 mm and 25 mm from the centre; 103.1 mm are 51.5 rows
    assert reach(rotate=180, spacings=[(2.0, 1.0)]) == (2, 79)
    assert reach(rotate=180, spacings=[(2.0, 1.0), (1.0, 1.0)]) == (6, 79)
    assert reach((400, 400), sigma=5.0) == (15, 15)  # three standard deviations
    # about the last axis alone: 20 sqrt(2) = 28.3
    assert reach((41, 41, 41), rotate=[0, 0, 90]) == (9, 9, 0)


def test_an_option_does_not_change_what_the_others_draw():
    plain = RandElasticDeformationd().draw((64, 64), seeded(3)).field.coefficients
    turned = RandElasticDeformationd(rotate=30, flip=True).draw((64, 64), seeded(3)).field.coefficients
    assert torch.equal(plain, turned)


def test_probability():
    sample = {"image": torch.rand(1, 16, 16)}
    deform = RandElasticDeformationd(prob=0.3).set_random_state(0)
    changed = sum(not torch.equal(deform(sample)["image"], sample["image"]) for _ in range(300))
    assert 60 < changed < 120


@pytest.mark.gpu
@pytest.mark.parametrize("context", [(), (2, 0, 4)])
def test_gpu_equals_cpu(context):
    batch = {"image": torch.rand(2, 1, 24, 24, 24), "label": torch.randint(0, 4, (2, 1, 24, 24, 24))}
    deform = RandElasticDeformationd(rotate=20, flip=True)
    with kept_precision():
        torch.set_float32_matmul_precision("high")  # as training does; positions are no less exact
        there = deform.apply_batch({k: v.cuda() for k, v in batch.items()}, [1, 2], context=context)
    here = deform.apply_batch(batch, [1, 2], context=context)
    torch.testing.assert_close(there["image"].cpu(), here["image"], atol=1e-4, rtol=0)
    assert float((there["label"].cpu() != here["label"]).float().mean()) < 1e-3


# --- what it refuses, and kinds of arrays ------------------------------------------------------------


def test_numpy_comes_back_as_numpy_and_missing_keys_pass():
    out = RandElasticDeformationd().set_random_state(0)(
        {"image": np.random.default_rng(0).random((1, 20, 20)), "case": "a"}
    )
    assert isinstance(out["image"], np.ndarray)
    assert out["case"] == "a"


def test_a_sample_that_stays_is_exact_whatever_its_neighbours_do():
    shape = (12, 17, 14)
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    warps = [Warp(shape), Warp(shape, affine=turn), Warp(shape, flips=(1,))]
    arrays = {"image": 100 * torch.randn((3, 2, *shape), generator=seeded())}
    moved = warp_sample(arrays, warps, linear=["image"])["image"]
    assert torch.equal(moved[0], arrays["image"][0])
    assert torch.equal(moved[2], arrays["image"][2].flip(2))
    assert not torch.equal(moved[1], arrays["image"][1])


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_a_single_slice_cannot_be_turned_in_space(sigma):
    transform = RandElasticDeformationd(sigma=sigma, grid=4, rotate=15).set_random_state(0)
    with pytest.raises(UsageError, match="on this shape"):
        transform({"image": torch.zeros(1, 1, 20, 20), "label": torch.zeros(1, 1, 20, 20, dtype=torch.uint8)})


def test_shapes_that_differ_are_refused():
    with pytest.raises(GeometryError, match="differ in shape"):
        RandElasticDeformationd().set_random_state(0)({"image": torch.rand(1, 20, 20), "label": torch.zeros(1, 20, 21)})


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prob": 1.5}, "prob"),
        ({"rotate": -1}, "rotate"),
        ({"rotate": [1, 2]}, "rotate"),
        ({"scale": [1.2, 0.8]}, "scale"),
        ({"scale": [0.0, 1.0]}, "scale"),
        ({"shear": -0.1}, "shear"),
        ({"mode": "cubic"}, "mode"),
        ({"form": "x"}, "form"),
        ({"unit": "cm"}, "unit"),
        ({"sigma": -1}, "sigma"),
        ({"flip_prob": 2}, "flip_prob"),
    ],
)
def test_bad_constructor_arguments_are_named(arguments, field):
    with pytest.raises(UsageError) as caught:
        RandElasticDeformationd(**arguments)
    assert caught.value.field == field


def test_patch_smaller_than_the_grid_is_refused():
    with pytest.raises(UsageError, match="smaller than the control grid"):
        RandElasticDeformationd(grid=5).set_random_state(0)({"image": torch.rand(1, 4, 40)})


def test_number_of_seeds_must_fit():
    with pytest.raises(UsageError, match="one seed per sample"):
        RandElasticDeformationd().apply_batch({"image": torch.rand(2, 1, 16, 16)}, [1])

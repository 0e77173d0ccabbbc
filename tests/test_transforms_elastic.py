"""Elastic deformation: its field against scipy and torch, its law, and that it never folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from medseg.errors import UsageError
from medseg.transforms import RandElasticDeformationd, elastic_displacement
from medseg.transforms.elastic_field import draw_field, draw_fields, evaluate, largest_sigma


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smallest_jacobian(displacement: torch.Tensor) -> float:
    """Least determinant of I + du/dx by central differences of numpy, independent of the package's own check."""
    u = displacement.numpy().astype(np.float64)
    dims = len(u)
    rows = [np.stack(np.gradient(u[a])) if dims > 1 else np.gradient(u[a])[None] for a in range(dims)]
    jacobian = np.moveaxis(np.stack(rows), (0, 1), (-2, -1)) + np.eye(dims)
    return float(np.linalg.det(jacobian).min())


def test_the_applied_sigma_is_the_spread_of_the_control_points():
    transform = RandElasticDeformationd(sigma=3.0, grid=5, prob=1.0)
    # control points 39/4 voxels apart on the first axis: 10/63.5 of it; coarse voxels count more on the second
    assert transform.applied_sigma((40, 400), (1.0, 2.0)) == pytest.approx((10 / 63.5 * 39 / 4, 1.5))
    drawn = torch.stack(
        [transform.draw((40, 400), seeded(n), (1.0, 2.0)).field.coefficients.std(dim=(1, 2)) for n in range(60)]
    )
    # B-spline coefficients spread more than the values at the points, by the same factor on both axes
    ratio = drawn.mean(0) / torch.tensor(transform.applied_sigma((40, 400), (1.0, 2.0)))
    assert float(ratio[0] / ratio[1]) == pytest.approx(1.0, abs=0.08)
    noise = RandElasticDeformationd(sigma=9.0, form="simard", smooth=10.0)
    assert noise.applied_sigma((64, 64)) == pytest.approx((2.83, 2.83), abs=0.01)


# --- the field ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 47), (9, 12, 17)])
def test_bspline_equals_scipys_mirrored_spline_through_the_control_points(shape):
    field = draw_field(shape, sigma=3.0, generator=seeded())
    found = evaluate(field.coefficients[None], field.matrices)[0].numpy()
    for control, values in zip(field.coefficients.numpy(), found, strict=True):
        at = np.meshgrid(*[np.linspace(0, 2, n) for n in shape], indexing="ij")
        expected = ndimage.map_coordinates(control.astype(np.float64), at, order=3, mode="mirror")
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_bicubic_equals_torchs():
    field = draw_field((40, 56), grid=5, sigma=3.0, generator=seeded(), mode="bicubic")
    found = evaluate(field.coefficients[None], field.matrices)
    expected = F.interpolate(field.coefficients[None], size=(40, 56), mode="bicubic", align_corners=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["bspline", "bicubic"])
def test_control_points_lie_on_the_corners_and_are_passed_through(mode):
    field = draw_field((65, 129), sigma=4.0, generator=seeded(), mode=mode)
    found = evaluate(field.coefficients[None], field.matrices)[0]
    torch.testing.assert_close(found[:, ::32, ::64], field.coefficients, atol=1e-4, rtol=1e-4)


def test_statistics_at_the_control_points_are_the_definitions():
    drawn = torch.stack([draw_field((256, 256), sigma=10.0, generator=seeded(i)).coefficients for i in range(3000)])
    # 54 000 numbers of N(0, 100): sd of the mean 0.043, of the sd 0.030
    assert abs(float(drawn.mean())) < 0.18
    assert abs(float(drawn.std()) - 10.0) < 0.13
    flat = drawn.reshape(len(drawn), -1).T
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(correlation.abs().max()) < 0.09  # independent: sd 0.018 each, 153 pairs


def test_statistics_between_control_points_follow_from_the_interpolation():
    u = elastic_displacement((129, 129), sigma=5.0, batch=1500, generator=seeded())
    field = draw_field((129, 129), sigma=5.0)
    along = field.matrices[0].double()
    # a sum of independent normals: var = sigma^2 |row of y|^2 |row of x|^2, correlation = products of normalised rows
    deviation = 5.0 * along.norm(dim=1)[:, None] * along.norm(dim=1)
    ratio = u[:, :, ::8, ::8].std(dim=(0, 1)) / deviation[::8, ::8]
    assert float((ratio - 1).abs().max()) < 0.09
    unit = along / along.norm(dim=1, keepdim=True)
    found = torch.corrcoef(u[:, 0, 64, ::16].T)
    expected = (unit[::16] @ unit[::16].T).float()
    torch.testing.assert_close(found, expected.to(found), atol=0.1, rtol=0)


def test_at_the_limit_redrawing_lowers_the_deviation_by_less_than_two_per_cent():
    drawn = torch.stack([draw_field((128, 128), generator=seeded(i)).coefficients for i in range(3000)])
    assert 9.8 < float(drawn.std()) < 10.1


def test_noise_form_has_the_law_of_smoothed_white_noise():
    # correlation exp(-r^2 / (4 smooth^2)) at every place and direction; sd sigma at every voxel
    fields = [draw_field((48, 48), sigma=1.5, mode="noise", smooth=6.0, generator=seeded(i)) for i in range(1500)]
    u = evaluate(torch.stack([field.coefficients for field in fields]), fields[0].matrices)
    ratio = u[:, :, ::6, ::6].std(dim=(0, 1)) / 1.5
    assert float((ratio - 1).abs().max()) < 0.08  # borders included
    centre, lags = u[:, :, 24, 10], (0, 3, 6, 12, 24)
    for lag in lags:
        found = float((centre * u[:, :, 24, 10 + lag]).mean() / 1.5**2)
        assert abs(found - np.exp(-(lag**2) / 144)) < 0.08


@pytest.mark.parametrize("shape", [(128, 128), (128, 200), (256, 256), (64, 64), (40, 100), (24, 32, 40)])
def test_never_folds_at_the_papers_setting(shape):
    for seed in range(60):
        assert smallest_jacobian(elastic_displacement(shape, generator=seeded(seed))) > 0


def test_folds_without_its_guard():
    # the guard is needed: plain normal numbers fold within these seeds
    least = [
        smallest_jacobian(elastic_displacement((128, 128), generator=seeded(s), fold_free=False)) for s in range(200)
    ]
    assert min(least) < 0


@pytest.mark.parametrize("grid", [5, 8])
def test_finer_grids_do_not_fold_either(grid):
    for seed in range(20):
        assert smallest_jacobian(elastic_displacement((128, 128), grid=grid, generator=seeded(seed))) > 0


def test_fields_drawn_together_are_those_drawn_alone():
    shape, seeds = (40, 40, 40), range(60)
    together = draw_fields(shape, [seeded(s) for s in seeds], sigma=30.0)
    limit = largest_sigma(shape, (3, 3, 3))[0]
    redrawn = 0
    for seed, field in zip(seeds, together, strict=True):
        assert torch.equal(field.coefficients, draw_field(shape, sigma=30.0, generator=seeded(seed)).coefficients)
        unguarded = draw_field(shape, sigma=limit, generator=seeded(seed), fold_free=False).coefficients
        redrawn += not torch.equal(field.coefficients, unguarded)
    assert 0 < redrawn < 30  # 11 in 100 fold at this steepness


def test_a_field_that_folds_whatever_is_drawn_is_scaled_down(monkeypatch):
    monkeypatch.setattr("medseg.transforms.elastic_field._ATTEMPTS", 0)
    shape, limit, shrunk = (40, 40, 40), largest_sigma((40, 40, 40), (3, 3, 3))[0], 0
    for field, seed in zip(draw_fields(shape, [seeded(s) for s in range(60)], sigma=30.0), range(60), strict=True):
        first = draw_field(shape, sigma=limit, generator=seeded(seed), fold_free=False).coefficients
        ratio = float((field.coefficients / first).mean())
        steps = np.log(ratio) / np.log(0.9)
        assert steps == pytest.approx(round(steps), abs=1e-3)
        assert smallest_jacobian(evaluate(field.coefficients[None], field.matrices)[0]) > 0
        shrunk += steps > 0.5
    assert shrunk > 0


def test_sigma_is_scaled_down_on_small_patches_and_on_short_axes_alone():
    assert largest_sigma((128, 64), (3, 3)) == pytest.approx([10.0, 10.0 * 63 / 127])
    drawn = torch.stack([draw_field((256, 32), generator=seeded(i)).coefficients for i in range(1500)])
    assert float(drawn[:, 0].std()) == pytest.approx(10.0, rel=0.03)
    assert float(drawn[:, 1].std()) == pytest.approx(10.0 * 31 / 127, rel=0.04)


def test_spacing_turns_millimetres_into_voxels():
    plain = draw_field((300, 300), sigma=4.0, generator=seeded()).coefficients
    thick = draw_field((300, 300), sigma=4.0, spacing=(2.0, 0.5), generator=seeded()).coefficients
    torch.testing.assert_close(thick[0] * 2.0, plain[0])
    torch.testing.assert_close(thick[1] * 0.5, plain[1])


def test_sigma_zero_is_the_identity():
    assert elastic_displacement((32, 32), sigma=0.0, generator=seeded()).abs().max() == 0
    sample = {"image": torch.rand(1, 32, 32), "label": torch.randint(0, 5, (1, 32, 32))}
    out = RandElasticDeformationd(sigma=0.0).set_random_state(0)(sample)
    assert torch.equal(out["image"], sample["image"])
    assert torch.equal(out["label"], sample["label"])


def test_batch_of_fields_equals_fields_one_by_one():
    batch = elastic_displacement((40, 40), batch=3, generator=seeded())
    source = seeded()
    single = torch.stack([elastic_displacement((40, 40), generator=source) for _ in range(3)])
    torch.testing.assert_close(batch, single)
    assert elastic_displacement((40, 40), batch=0).shape == (0, 2, 40, 40)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shape": (2, 40)}, "grid"),
        ({"shape": (1, 40)}, "shape"),
        ({"grid": 1}, "grid"),
        ({"grid": (3, 3, 3)}, "grid"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"spacing": (1.0,)}, "spacing"),
        ({"spacing": (1.0, 0.0)}, "spacing"),
        ({"mode": "linear"}, "mode"),
    ],
)
def test_bad_arguments_are_named(change, field):
    with pytest.raises(UsageError) as caught:
        elastic_displacement(**{"shape": (40, 40), **change})
    assert caught.value.field == field


@pytest.mark.parametrize(("scale", "widths"), [(2.0, (9, 10, 11)), (0.5, (2, 3))])
def test_a_scale_above_one_magnifies(scale, widths):
    """A square of 5 voxels is drawn with 10, or 2.5, about the centre, where it lies."""
    label = torch.zeros(1, 41, 41, dtype=torch.uint8)
    label[:, 18:23, 18:23] = 1
    found = RandElasticDeformationd(sigma=0.0, scale=[scale, scale])({"label": label})["label"]
    middle = found[0, 10:31, 10:31]  # beyond what is mirrored at the border
    assert {int(middle[10].sum()), int(middle[:, 10].sum())} <= {*widths}

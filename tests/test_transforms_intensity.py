"""Intensity changes: each one alone against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from scipy import ndimage

from medseg.errors import UsageError
from medseg.transforms import RandIntensityd
from medseg.transforms.intensity import _apply, _Change


def image(shape=(1, 40, 50), seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def test_contrast_and_brightness():
    x = image()
    found = _apply(x, _Change(contrast=1.5, brightness=-0.4))
    expected = (x - x.mean()) * 1.5 + x.mean() - 0.4 * x.std(correction=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gamma_keeps_mean_and_deviation_and_order():
    x = image()
    found = _apply(x, _Change(gamma=2.0))
    torch.testing.assert_close(
        torch.stack([found.mean(), found.std()]), torch.stack([x.mean(), x.std()]), atol=1e-4, rtol=0
    )
    assert torch.equal(found.flatten().argsort(), x.flatten().argsort())
    bent = ((x - x.min()) / (x.max() - x.min())) ** 2
    assert torch.corrcoef(torch.stack([found.flatten(), bent.flatten()]))[0, 1] > 0.99999


@pytest.mark.parametrize("shape", [(2, 40, 50), (1, 14, 20, 24)])
@pytest.mark.parametrize("sigma", [0.5, 1.3])
def test_blur_equals_scipys(shape, sigma):
    x = image(shape)
    found = _apply(x, _Change(blur=sigma))
    radius = int(np.ceil(3 * sigma))
    expected = np.stack([ndimage.gaussian_filter(c, sigma, mode="mirror", radius=radius) for c in x.numpy()])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_low_resolution_equals_torchs():
    x = image((1, 40, 50))
    small = F.interpolate(x[None], size=(20, 25), mode="nearest-exact")
    expected = F.interpolate(small, size=(40, 50), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(_apply(x, _Change(zoom=0.5)), expected)
    assert _apply(image((1, 8, 9, 10)), _Change(zoom=0.4)).shape == (1, 8, 9, 10)


def test_noise_has_the_deviation_asked_for():
    x = image((1, 200, 200))
    difference = _apply(x, _Change(noise=0.3, seed=4)) - x
    assert float(difference.std() / x.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(difference.mean())) < 0.01


def test_constant_patch_is_safe():
    x = torch.full((1, 10, 10), 2.0)
    everything = _Change(blur=1.0, zoom=0.5, gamma=0.7, contrast=1.3, brightness=0.5, noise=0.2)
    torch.testing.assert_close(_apply(x, everything), x)


def test_same_seed_same_result_and_batch_equals_samples():
    change = RandIntensityd(
        brightness=0.3, contrast=[0.7, 1.4], gamma=[0.7, 1.5], noise=0.2, blur=[0.5, 1.0], low_resolution=0.5, prob=0.5
    )
    x = image((3, 1, 24, 24))
    out = change.apply_batch({"image": x, "label": x}, [5, 6, 7])
    assert out["label"] is x
    for b, seed in enumerate((5, 6, 7)):
        assert torch.equal(out["image"][b], _apply(x[b], change.draw(torch.Generator().manual_seed(seed))))
    one, two = change.set_random_state(1)({"image": x[0]}), change.set_random_state(1)({"image": x[0]})
    assert torch.equal(one["image"], two["image"])


def test_ranges_and_probability():
    change = RandIntensityd(brightness=0.3, contrast=[0.5, 2.0], prob=0.25)
    drawn = [change.draw(torch.Generator().manual_seed(s)) for s in range(2000)]
    factors = np.array([d.contrast for d in drawn if d.contrast is not None])
    assert 420 < len(factors) < 580
    assert factors.min() >= 0.5
    assert factors.max() <= 2.0
    assert abs(np.log(factors).mean()) < 0.07  # as often halved as doubled
    assert all(d.noise is None and d.blur is None for d in drawn)


def test_kinds_of_arrays():
    affine = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0]))
    change = RandIntensityd(brightness=0.3, prob=1.0).set_random_state(0)
    out = change({"image": MetaTensor(image(), affine=affine)})["image"]
    assert isinstance(out, MetaTensor)
    assert torch.equal(out.affine, affine.to(out.affine))
    assert isinstance(change({"image": image().numpy()})["image"], np.ndarray)
    assert change({"image": torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8)})["image"].dtype == torch.float32
    assert change({"case": "a"}) == {"case": "a"}


@pytest.mark.parametrize(
    "arguments",
    [{"prob": 2}, {"brightness": -1}, {"contrast": [0, 1]}, {"gamma": [2, 1]}, {"blur": [1]}, {"low_resolution": 0},
     {"noise": float("inf")}],
)  # fmt: skip
def test_bad_arguments(arguments):
    with pytest.raises(UsageError) as caught:
        RandIntensityd(**arguments)
    assert caught.value.field == next(iter(arguments))


def test_number_of_seeds_must_fit():
    with pytest.raises(UsageError, match="one seed per sample"):
        RandIntensityd().apply_batch({"image": image((2, 1, 8, 8))}, [1])


def test_factors_of_low_resolution_are_uniform_from_the_least_to_one():
    change = RandIntensityd(low_resolution=0.6, prob=1.0)
    found = [change.draw(torch.Generator().manual_seed(seed)).zoom for seed in range(400)]
    assert 0.6 <= min(found) < 0.62
    assert 0.98 < max(found) <= 1.0
    assert abs(sum(found) / len(found) - 0.8) < 0.02  # 3.5 standard errors of 0.4 / sqrt(12) / sqrt(400)

"""Random changes of intensity in one transform: brightness, contrast, gamma, blur, low resolution, noise.

Fixed normalisation (clipping, percentiles, mean and deviation) is MONAI's: ScaleIntensityRanged, NormalizeIntensityd
and so on.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform

from medseg.errors import UsageError
from medseg.transforms.arrays import like, plain

__all__ = ["RandIntensityd"]

_NARROW = 3.0  # in sd: where the Gaussian of `blur` is cut off


@dataclass(frozen=True)
class _Change:
    """What was drawn for one patch; None: this change is not made."""

    blur: float | None = None
    zoom: float | None = None
    gamma: float | None = None
    contrast: float | None = None
    brightness: float | None = None
    noise: float | None = None
    seed: int = 0


class RandIntensityd(RandomizableTransform, MapTransform):
    """Blur, low resolution, gamma, contrast, brightness and noise, in this order, each with probability `prob`.

    Sizes are relative to the patch itself (its standard deviation over all channels), so that the same numbers do for
    CT, MR and microscopy, however they were normalised. A constant patch stays constant but for blur and noise of 0.

    Args:
        keys: keys of the images.
        brightness: largest shift, in standard deviations, uniform in both directions; 0: none.
        contrast: [least, most] factor about the mean, uniform in its logarithm; None: none.
        gamma: [least, most] exponent, uniform in its logarithm, applied between the patch's least and largest value,
            whose mean and standard deviation are then restored; None: none.
        noise: largest standard deviation of Gaussian noise, in standard deviations of the patch, uniform from 0; 0:
            none.
        blur: [least, most] sd of a Gaussian in voxels, uniform; None: none.
        low_resolution: least factor, uniform to 1, by which the patch is shrunk (nearest) and brought back (linear);
            None: none.
        prob: probability of each change by itself.
        allow_missing_keys: whether keys may be missing.

    Arrays are (C, *spatial) with 2 or 3 spatial axes; the result is float32 of the same shape. A batch is (B, C,
    *spatial) through `apply_batch`; on a GPU the noise is drawn there, and differs from the CPU's.

    Raises:
        UsageError: an argument makes no sense.

    >>> change = RandIntensityd(brightness=0.5, noise=0.1, prob=1.0).set_random_state(0)
    >>> change({"image": torch.rand(1, 8, 8)})["image"].shape
    torch.Size([1, 8, 8])
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        brightness: float = 0.0,
        contrast: Sequence[float] | None = None,
        gamma: Sequence[float] | None = None,
        noise: float = 0.0,
        blur: Sequence[float] | None = None,
        low_resolution: float | None = None,
        prob: float = 0.3,
        allow_missing_keys: bool = True,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        if not 0 <= prob <= 1:
            raise UsageError("not a probability", field="prob", expected="0 to 1", found=prob)
        for name, value in (("brightness", brightness), ("noise", noise)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"wrong {name}", field=name, expected="0 or more", found=value)
        for name, pair in (("contrast", contrast), ("gamma", gamma), ("blur", blur)):
            if pair is not None and not (len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf):
                raise UsageError(
                    f"wrong range of {name}", field=name, expected="[least, most], more than 0", found=pair
                )
        if low_resolution is not None and not 0 < low_resolution <= 1:
            raise UsageError(
                "wrong low_resolution", field="low_resolution", expected="0 < r <= 1", found=low_resolution
            )
        self.brightness, self.contrast, self.gamma, self.noise = brightness, contrast, gamma, noise
        self.blur, self.low_resolution, self.chance = blur, low_resolution, prob
        self.change = _Change()

    def draw(self, generator: torch.Generator) -> _Change:
        """Draw everything that is random for one patch (of the noise, its seed)."""
        # all numbers are drawn whether used or not: one option does not change what another draws
        made = (torch.rand(6, generator=generator) < self.chance).tolist()
        at = torch.rand(6, generator=generator).tolist()
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
        return _Change(
            blur=_between(self.blur, at[0]) if made[0] and self.blur else None,
            zoom=self.low_resolution + at[1] * (1 - self.low_resolution) if made[1] and self.low_resolution else None,
            gamma=_geometric(self.gamma, at[2]) if made[2] and self.gamma else None,
            contrast=_geometric(self.contrast, at[3]) if made[3] and self.contrast else None,
            brightness=self.brightness * (2 * at[4] - 1) if made[4] and self.brightness else None,
            noise=self.noise * at[5] if made[5] and self.noise else None,
            seed=seed,
        )

    def randomize(self, data: Any = None) -> None:
        """Draw for one sample: `self.change`."""
        self.change = self.draw(torch.Generator().manual_seed(int(self.R.randint(2**31 - 1))))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change one sample of arrays (C, *spatial); each array comes back as the kind (tensor, numpy) that it was."""
        self.randomize()
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = like(_apply(plain(sample[key]), self.change), sample[key])
        return sample

    def apply_batch(
        self, batch: Mapping[Hashable, Any], generators: Sequence[int | torch.Generator]
    ) -> dict[Hashable, Any]:
        """Change a batch of (B, C, *spatial) tensors on their device, each sample by its own seed or CPU generator."""
        sample = dict(batch)
        sources = [g if isinstance(g, torch.Generator) else torch.Generator().manual_seed(int(g)) for g in generators]
        changes = [self.draw(source) for source in sources]
        for key in self.key_iterator(sample):
            values = plain(sample[key])
            if len(values) != len(changes):
                raise UsageError(
                    "one seed per sample is needed", field=str(key), expected=len(values), found=len(changes)
                )
            changed = torch.stack([_apply(v, change) for v, change in zip(values, changes, strict=True)])
            sample[key] = like(changed, sample[key])
        return sample


def _between(pair: Sequence[float], at: float) -> float:
    return pair[0] + at * (pair[1] - pair[0])


def _geometric(pair: Sequence[float], at: float) -> float:
    return pair[0] * (pair[1] / pair[0]) ** at


def _apply(values: torch.Tensor, change: _Change) -> torch.Tensor:
    values = values.float()
    if change.blur is not None:
        values = _blurred(values, change.blur)
    if change.zoom is not None:
        values = _coarse(values, change.zoom)
    if change.gamma is not None:
        values = _bent(values, change.gamma)
    if change.contrast is not None or change.brightness is not None:
        # one pass for both: contrast (v - mean) + mean + brightness sd
        deviation, mean = torch.std_mean(values, correction=0)
        factor = change.contrast if change.contrast is not None else 1.0
        values = values * factor + (mean * (1 - factor) + (change.brightness or 0.0) * deviation)
    if change.noise is not None:
        generator = torch.Generator(values.device).manual_seed(change.seed)
        noise = torch.randn(values.shape, generator=generator, device=values.device)
        values = torch.addcmul(values, noise, change.noise * values.std(correction=0))
    return values


def _blurred(values: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = max(1, math.ceil(_NARROW * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    for axis in range(1, values.ndim):
        n = values.shape[axis]
        if n <= radius:
            continue  # an axis thinner than the kernel is left as it is (a single slice has no neighbours to blur with)
        # mirrored at the border voxel's centre; sums of shifted views are faster than a convolution with one channel
        ends = torch.cat(
            [values.narrow(axis, 1, radius).flip(axis), values, values.narrow(axis, n - 1 - radius, radius).flip(axis)],
            axis,
        )
        blurred = values * (taps[0] / total)
        for i in range(1, radius + 1):
            blurred.add_(ends.narrow(axis, radius - i, n), alpha=taps[i] / total)
            blurred.add_(ends.narrow(axis, radius + i, n), alpha=taps[i] / total)
        values = blurred
    return values


def _coarse(values: torch.Tensor, zoom: float) -> torch.Tensor:
    size = tuple(values.shape[1:])
    small = [max(1, round(n * zoom)) for n in size]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    coarse = F.interpolate(values[None], size=small, mode="nearest-exact")
    return F.interpolate(coarse, size=size, mode=mode, align_corners=False)[0]


def _bent(values: torch.Tensor, gamma: float) -> torch.Tensor:
    low, high = torch.aminmax(values)
    deviation, mean = torch.std_mean(values, correction=0)
    flat = high <= low  # a constant patch stays as it is; asking whether it is one would make a GPU wait
    bent = ((values - low) / torch.where(flat, 1.0, high - low)).pow_(gamma)
    new_deviation, new_mean = torch.std_mean(bent, correction=0)
    factor = torch.where(flat, 0.0, deviation / new_deviation)
    return bent.sub_(new_mean).mul_(factor).add_(torch.where(flat, low, mean))

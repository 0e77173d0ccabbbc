"""Random elastic deformation with rotation, scaling, shear and flips: one resampling for image, label and weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform, RandomizableTransform

from medseg.errors import UsageError
from medseg.transforms.arrays import like, plain, spacing_of
from medseg.transforms.elastic_field import STEEPEST_NOISE, draw_fields, elastic_displacement, largest_sigma
from medseg.transforms.warp import Warp, warp_sample

__all__ = ["RandElasticDeformationd", "elastic_displacement"]

_KEYS = ("image", "label", "weight", "fov", "instances")
_FORMS = {"grid": None, "simard": "noise"}


class RandElasticDeformationd(RandomizableTransform, MapTransform):
    """Elastic deformation of the U-Net paper, composed with rotation, scaling, shear and flips into one resampling.

    All keys move together: those in `linear` by linear interpolation, the others (label, field of view, instances) by
    the nearest voxel, so that no new label appears. Positions beyond the border are mirrored there. The position of
    output voxel x in the input is `c + A (x + u(x) - c)`, with c the centre, u the displacement, A rotation, scaling,
    shear and flips. The affine of a MetaTensor is kept: the patch keeps its place.

    Voxels need not be cubes: rotation, scaling and shear act in the space that the affine's spacing spans, and
    displacements are isotropic there.

    Args:
        keys: keys of the sample; those that it does not have are passed over.
        sigma: standard deviation of the control points' displacement, see `elastic_displacement` (limited on small
            patches); 0 for none. For `form="simard"`, of every voxel's displacement.
        grid: control points per axis.
        prob: probability that the sample is deformed, rotated, scaled and sheared at all (flips have their own).
        rotate: largest angle in degrees, uniform in both directions; in 3-D one for all or one per axis of rotation.
        scale: [least, most] magnification, uniform in its logarithm, the same along all axes; None for none.
        shear: largest tangent of the angle of shear, uniform in both directions, for each pair of axes.
        flip: True mirrors along every axis, a list along those axes (0 is the first spatial axis), each with
            `flip_prob`.
        flip_prob: probability of each mirror.
        mode: "bspline" or "bicubic", see `elastic_displacement`.
        form: "grid" (the paper's) or "simard" (dense noise smoothed by a Gaussian, Simard 2003).
        smooth: standard deviation of that Gaussian, in the unit of `sigma`; form "simard" alone uses it.
        unit: of `sigma` and `smooth`: "voxel" (of the axis with the smallest spacing) or "mm".
        linear: keys interpolated linearly.
        allow_missing_keys: whether keys may be missing.

    Raises:
        UsageError: an argument makes no sense, or the patch is smaller than the control grid.
        GeometryError: arrays of the sample differ in shape.

    References:
        Ronneberger, Fischer, Brox 2015, doi:10.1007/978-3-319-24574-4_28, section 3.1.
        Simard, Steinkraus, Platt 2003, doi:10.1109/ICDAR.2003.1227801.

    >>> deform = RandElasticDeformationd(rotate=15, scale=[0.9, 1.1], flip=True).set_random_state(0)
    >>> out = deform({"image": torch.rand(1, 128, 128), "label": torch.ones(1, 128, 128, dtype=torch.uint8)})
    >>> out["image"].shape, out["label"].unique()
    (torch.Size([1, 128, 128]), tensor([1], dtype=torch.uint8))
    """

    def __init__(
        self,
        keys: KeysCollection = _KEYS,
        sigma: float = 10.0,
        grid: int | Sequence[int] = 3,
        prob: float = 1.0,
        rotate: float | Sequence[float] = 0.0,
        scale: Sequence[float] | None = None,
        shear: float = 0.0,
        flip: bool | Sequence[int] = False,
        flip_prob: float = 0.5,
        mode: str = "bspline",
        form: str = "grid",
        smooth: float = 16.0,
        unit: str = "voxel",
        linear: Sequence[str] = ("image", "weight"),
        allow_missing_keys: bool = True,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        _check(sigma=sigma, prob=prob, rotate=rotate, scale=scale, shear=shear, flip_prob=flip_prob)
        for name, value, allowed in (
            ("mode", mode, ("bspline", "bicubic")), ("form", form, tuple(_FORMS)), ("unit", unit, ("voxel", "mm")),
        ):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"unknown {name}", field=name, expected=", ".join(allowed), found=value)
        self.sigma, self.grid, self.smooth = sigma, grid, smooth
        self.rotate, self.scale, self.shear = rotate, scale, shear
        self.flip, self.flip_prob = flip, flip_prob
        self.mode, self.form, self.unit = mode, form, unit
        self.linear = tuple(linear)
        self.warp: Warp | None = None

    def draw(self, shape: Sequence[int], generator: torch.Generator, spacing: Sequence[float] | None = None) -> Warp:
        """Draw everything that is random for one patch; the same numbers whatever the device and the number of workers.

        Args:
            shape: voxels of the patch per axis.
            generator: source of all random numbers.
            spacing: size of a voxel per axis in mm; cubes of 1 when None.
        """
        return self.draw_batch(shape, [generator], spacing)[0]

    def draw_batch(
        self, shape: Sequence[int], generators: Sequence[torch.Generator], spacing: Sequence[float] | None = None
    ) -> list[Warp]:
        """One `draw` for each generator, in a fraction of the time: the fields are looked at for folds together."""
        size = tuple(int(n) for n in shape)
        step = np.ones(len(size)) if spacing is None else np.asarray(spacing, dtype=np.float64)
        if step.shape != (len(size),) or not (np.isfinite(step).all() and (step > 0).all()):
            raise UsageError("wrong spacing", field="spacing", expected=f"{len(size)} positive numbers", found=spacing)
        if self.unit == "voxel":
            step = step / step.min()
        axes = range(len(size)) if self.flip is True else [int(a) % len(size) for a in self.flip or ()]
        warps, deformed = [], []
        for number, generator in enumerate(generators):
            # every number is drawn whether used or not, so that one option does not change what another draws
            chance = torch.rand(1 + len(size), generator=generator, device=generator.device).tolist()
            affine = self._draw_affine(step, generator)
            flips = tuple(a for a in axes if chance[1 + a] < self.flip_prob)
            moves = chance[0] < self.prob
            warps.append(Warp(size, affine=affine if moves else None, flips=flips))
            if moves and self.sigma > 0:
                deformed.append(number)
        fields = draw_fields(
            size, [generators[i] for i in deformed], grid=self.grid, sigma=self.sigma, spacing=step.tolist(),
            mode=_FORMS[self.form] or self.mode, smooth=self.smooth,
        ) if deformed else []  # fmt: skip
        for number, field in zip(deformed, fields, strict=True):
            warps[number] = dataclasses.replace(warps[number], field=field)
        return warps

    def applied_sigma(self, shape: Sequence[int], spacing: Sequence[float] | None = None) -> tuple[float, ...]:
        """Standard deviation of the displacements that a patch of this shape really gets, in voxels of each axis.

        Smaller than `sigma` where the control points are so close that the field would fold (`largest_sigma`).

        >>> [round(s, 2) for s in RandElasticDeformationd(sigma=3.0, grid=4).applied_sigma((40, 128))]
        [2.05, 3.0]
        """
        step = np.ones(len(shape)) if spacing is None else np.asarray(spacing, dtype=np.float64)
        step = step / step.min() if self.unit == "voxel" else step
        if self.form == "simard":
            return tuple(min(self.sigma, STEEPEST_NOISE * self.smooth) / s for s in step.tolist())
        grid = (self.grid,) * len(shape) if isinstance(self.grid, int) else tuple(self.grid)
        reach = largest_sigma(shape, grid)
        return tuple(min(self.sigma / s, r) for s, r in zip(step.tolist(), reach, strict=True))

    def reach(self, shape: Sequence[int], spacings: Sequence[Sequence[float]] = ()) -> tuple[int, ...]:
        """Voxels per side of each axis by which a patch of this shape looks beyond its border, at most.

        What 256 draws of rotation, scaling and shear reach, and three standard deviations of displacement: with that
        much context in `apply_batch`, next to nothing of a patch is mirrored.

        Args:
            shape: voxels of the patch per axis.
            spacings: sizes of voxels that may come; cubes when there are none.

        >>> RandElasticDeformationd(sigma=0, rotate=90).reach((101, 101)), RandElasticDeformationd().reach((64, 64))
        ((21, 21), (15, 15))
        """
        if self.prob == 0:
            return (0,) * len(shape)
        half = (np.array(shape) - 1) / 2
        draws = (self._draw_affine(np.ones(len(shape)), torch.Generator().manual_seed(k)) for k in range(256))
        turns = np.stack([np.eye(len(shape)) if draw is None else draw for draw in draws])
        furthest = half
        for spacing in spacings or [(1.0,) * len(shape)]:
            step = np.asarray(spacing, dtype=np.float64)
            far = half + 3 * np.array(self.applied_sigma(shape, spacing))
            furthest = np.maximum(furthest, (np.abs(turns * step[None, :] / step[:, None]) @ far).max(axis=0))
        return tuple(int(n) for n in np.ceil(furthest - half))

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        """Draw for one sample: `self.warp`."""
        first = next((data[key] for key in self.key_iterator(dict(data))), None)
        self._do_transform = first is not None
        if first is None:
            return
        generator = torch.Generator().manual_seed(int(self.R.randint(2**31 - 1)))
        self.warp = self.draw(first.shape[1:], generator, spacing_of(first))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Deform one sample of arrays (C, *spatial); each array comes back as the kind (tensor, numpy) that it was."""
        self.randomize(data)
        return self.apply(data, self.warp) if self._do_transform and self.warp is not None else dict(data)

    def apply(self, data: Mapping[Hashable, Any], warp: Warp) -> dict[Hashable, Any]:
        """Apply what was drawn: no random number is used here, so that a sample can be replayed."""
        sample = dict(data)
        arrays = {key: plain(sample[key])[None] for key in self.key_iterator(sample)}
        for key, array in warp_sample(arrays, [warp], linear=self.linear).items():
            sample[key] = like(array[0], sample[key])
        return sample

    def apply_batch(
        self,
        batch: Mapping[Hashable, Any],
        generators: Sequence[int | torch.Generator],
        spacing: Sequence[float] | None = None,
        context: Sequence[int] = (),
    ) -> dict[Hashable, Any]:
        """Deform a batch of (B, C, *spatial) tensors on their device, each sample by its own seed.

        Args:
            batch: key -> tensor; other entries and missing keys pass.
            generators: B seeds, or B generators on the CPU.
            spacing: of all samples; that of the first array when it is a MetaTensor, else cubes.
            context: voxels per side of each axis by which the arrays reach beyond the patches that come out: what is
                turned in there is the image itself, and only what lies beyond that is mirrored. See `reach`.

        Returns:
            The same keys, without the context. Sample b is what `draw` and `apply` give for its seed.
        """
        sample = dict(batch)
        arrays = {key: plain(sample[key]) for key in self.key_iterator(sample)}
        if not arrays:
            return sample
        key, first = next(iter(arrays.items()))
        if first.shape[0] != len(generators):
            raise UsageError(
                "one seed per sample is needed", field=str(key), expected=first.shape[0], found=len(generators)
            )
        if spacing is None and isinstance(sample[key], MetaTensor):
            spacing = spacing_of(sample[key], dims=first.ndim - 2)
        sources = [g if isinstance(g, torch.Generator) else torch.Generator().manual_seed(int(g)) for g in generators]
        around = tuple(context) or (0,) * (first.ndim - 2)
        shape = [n - 2 * c for n, c in zip(first.shape[2:], around, strict=True)]
        warps = [dataclasses.replace(w, context=around) for w in self.draw_batch(shape, sources, spacing)]
        for key, array in warp_sample(arrays, warps, linear=self.linear).items():
            sample[key] = like(array, sample[key])
        return sample

    def _draw_affine(self, step: np.ndarray, generator: torch.Generator) -> np.ndarray | None:
        dims = len(step)
        angles = [self.rotate] * 3 if isinstance(self.rotate, int | float) else list(self.rotate)
        if dims == 3 and len(angles) != 3:
            raise UsageError("wrong angles", field="rotate", expected="one number or three", found=self.rotate)
        numbers = torch.rand(4 + dims * dims, generator=generator, device=generator.device, dtype=torch.float64).numpy(
            force=True
        )
        signed = 2 * numbers - 1
        if not (any(angles) or self.scale is not None or self.shear):
            return None
        matrix = np.eye(dims)
        planes = [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)] if dims == 3 else []
        for (i, j), angle, number in zip(planes, angles, signed[:3], strict=False):
            turn, radians = np.eye(dims), math.radians(angle) * number
            turn[[i, i, j, j], [i, j, i, j]] = (
                math.cos(radians),
                -math.sin(radians),
                math.sin(radians),
                math.cos(radians),
            )
            matrix = matrix @ turn
        if self.shear:
            skew = self.shear * signed[4:].reshape(dims, dims)
            matrix = matrix @ (np.eye(dims) + np.triu(skew, 1))
        if self.scale is not None:
            low, high = self.scale
            matrix = matrix / (low * (high / low) ** numbers[3])  # magnification makes the sampled region smaller
        return matrix * step[None, :] / step[:, None]


def _check(*, sigma: float, prob: float, rotate: Any, scale: Any, shear: float, flip_prob: float) -> None:
    for name, value in (("prob", prob), ("flip_prob", flip_prob)):
        if not 0 <= value <= 1:
            raise UsageError("not a probability", field=name, expected="0 to 1", found=value)
    for name, value in (("sigma", sigma), ("shear", shear)):
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"wrong {name}", field=name, expected="0 or more", found=value)
    angles = [rotate] if isinstance(rotate, int | float) else list(rotate)
    if len(angles) not in (1, 3) or any(not 0 <= a <= 180 for a in angles):
        raise UsageError("wrong angles", field="rotate", expected="one number or three, 0 to 180 degrees", found=rotate)
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        raise UsageError("wrong range of scales", field="scale", expected="[least, most], more than 0", found=scale)

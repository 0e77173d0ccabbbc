"""Smooth random displacement fields from a few random numbers: drawn once, evaluated by small matrix products.

A field is `coefficients` (D, m_0, ..., m_{D-1}) times one matrix per axis (n_a, m_a): separable, so that every voxel
costs a handful of multiplications. Drawing (random numbers, on the CPU) and evaluating (any device) are apart, so
that the same seed gives the same field everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medseg.errors import UsageError
from medseg.precision import full_precision
from medseg.transforms.splines import noise_matrix, spline_matrix

__all__ = ["Field", "draw_field", "draw_fields", "elastic_displacement", "evaluate", "largest_sigma"]

# The paper's setting (sigma 10, three points over 128 px) is the steepest that is used: sigma / distance of control
# points.
STEEPEST = 10.0 / 63.5
# ... and for the smoothed-noise form: sigma / smooth; the slope's sd is then 1/5, a fold is an event beyond 5 sd.
STEEPEST_NOISE = math.sqrt(2) / 5
_LEAST_JACOBIAN = 0.05  # a field is kept when the Jacobian's determinant is above this at every point checked
_ATTEMPTS = 20  # redraws before a folding field is scaled down instead
_CHECKS = 8  # points per control cell and axis at which the Jacobian is checked


@dataclass(frozen=True)
class Field:
    """A displacement field before it is evaluated.

    Attributes:
        shape: voxels of the patch per axis.
        coefficients: float32 CPU tensor (D, m_0, ..., m_{D-1}), displacements in voxels; component a moves along axis
            a.
        matrices: per axis a, float32 CPU tensor (n_a, m_a).
    """

    shape: tuple[int, ...]
    coefficients: torch.Tensor
    matrices: tuple[torch.Tensor, ...]


def elastic_displacement(
    shape: Sequence[int],
    *,
    grid: int | Sequence[int] = 3,
    sigma: float = 10.0,
    spacing: Sequence[float] | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    mode: str = "bspline",
    fold_free: bool = True,
) -> torch.Tensor:
    """Random smooth displacements, as in the U-Net paper: Gaussian vectors on a coarse grid, bicubic in between.

    `grid` points per axis span the patch, the first and last lie on its corner voxels. Each carries a vector whose
    components are drawn from N(0, sigma^2); a cubic interpolates them at every voxel, passing through them. The
    deformed image is `image(x + displacement(x))`.

    So that the deformation does not fold (its Jacobian's determinant stays positive), `sigma` is limited along axis a
    to 10/63.5 of the distance of neighbouring control points on that axis, which is the paper's setting on 128 px: a
    patch of 128 px or more keeps sigma 10, one of 64 px gets 4.96. A draw that folds all the same (2 % of them in
    2-D, 12 % in 3-D, at the limit; none below about half of it) is drawn again. At the limit this lowers the standard
    deviation at the control points by 0.5 % (2-D) and 0.9 % (3-D), and nowhere else. Should 20 draws in a row fold
    (more than 3 points per axis), the last is scaled down until it does not.

    Args:
        shape: voxels per axis (D values; D = 1, 2 or 3); at least `grid` along each axis.
        grid: control points per axis, at least 2; one number or one per axis.
        sigma: standard deviation of a control point's displacement along each axis, in the unit of `spacing`.
        spacing: size of a voxel per axis; voxels (1.0) when None.
        batch: None for one field, else the number of independent fields.
        generator: source of random numbers (torch's default when None). The numbers are the same for any `device`.
        device: where the field is evaluated; the CPU when None.
        mode: "bspline", the interpolating cubic B-spline with mirrored ends (twice differentiable); or "bicubic", the
            convolution of Keys 1981 with a = -0.75 and repeated ends, which is torch's and OpenCV's bicubic.
        fold_free: False switches limit and redraws off: plain N(0, sigma^2).

    Returns:
        float32 (D, *shape), or (batch, D, *shape); voxels, component a along axis a.

    Raises:
        UsageError: shape, grid, sigma, spacing or mode do not make sense, or the patch is smaller than the grid.

    References:
        Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, section 3.1, doi:10.1007/978-3-319-24574-4_28.
        Unser: Splines, a perfect fit for signal and image processing, IEEE SPM 1999, doi:10.1109/79.799930.

    >>> u = elastic_displacement((128, 128), generator=torch.Generator().manual_seed(0))
    >>> u.shape, u.dtype
    (torch.Size([2, 128, 128]), torch.float32)
    """
    count = 1 if batch is None else batch
    # one after the other, not `draw_fields`: they share a generator
    fields = [
        draw_field(shape, grid=grid, sigma=sigma, spacing=spacing, generator=generator, mode=mode, fold_free=fold_free)
        for _ in range(count)
    ]
    if not fields:
        return torch.zeros((0, len(shape), *shape), device=device)
    coefficients = torch.stack([field.coefficients for field in fields]).to(device or "cpu")
    values = evaluate(coefficients, [m.to(coefficients.device) for m in fields[0].matrices])
    return values[0] if batch is None else values


def draw_field(
    shape: Sequence[int],
    *,
    grid: int | Sequence[int] = 3,
    sigma: float = 10.0,
    spacing: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    mode: str = "bspline",
    fold_free: bool = True,
    smooth: float = 16.0,
) -> Field:
    """Draw the numbers of one field without evaluating it; arguments as `elastic_displacement`.

    Mode "noise" is the form of Simard 2003: dense Gaussian noise smoothed by a Gaussian of `smooth` (unit of
    spacing), scaled to standard deviation `sigma` at every voxel; its correlation is exp(-r^2 / (4 smooth^2)). The
    noise lies on a lattice of smooth/1.5, because denser noise gives the same law to 1e-9. `fold_free` then limits
    sigma to 0.283 smooth.

    References:
        Simard, Steinkraus, Platt: Best practices for convolutional neural networks, ICDAR 2003,
            doi:10.1109/ICDAR.2003.1227801.
    """
    return draw_fields(
        shape, [generator], grid=grid, sigma=sigma, spacing=spacing, mode=mode, fold_free=fold_free, smooth=smooth
    )[0]


def draw_fields(
    shape: Sequence[int],
    generators: Sequence[torch.Generator | None],
    *,
    grid: int | Sequence[int] = 3,
    sigma: float = 10.0,
    spacing: Sequence[float] | None = None,
    mode: str = "bspline",
    fold_free: bool = True,
    smooth: float = 16.0,
) -> list[Field]:
    """One field for each generator, the same as `draw_field` gives for it: they are looked at for folds together.

    The generators must not be one another: a field that folds is drawn again after the first draws of all.
    """
    size, points, step = _checked(shape, grid, spacing, sigma, mode, smooth)
    if mode == "noise":
        limit = min(sigma, STEEPEST_NOISE * smooth) if fold_free else sigma
        matrices = tuple(noise_matrix(n, smooth / s) for n, s in zip(size, step, strict=True))
        width = _column([limit / s for s in step])
        lattice = (len(size), *(m.shape[1] for m in matrices))
        return [Field(size, _normal(lattice, generator) * width, matrices) for generator in generators]
    matrices = tuple(spline_matrix(n, g, mode)[0] for n, g in zip(size, points, strict=True))
    reach = largest_sigma(size, points)
    sigmas = [min(sigma / s, r) if fold_free else sigma / s for s, r in zip(step, reach, strict=True)]
    scale = _column(sigmas)
    controls = [_normal((len(size), *points), generator) * scale for generator in generators]
    if fold_free and any(5 * v > r for v, r in zip(sigmas, reach, strict=True)):
        folding, attempt = _folding(range(len(controls)), controls, size, mode), 1
        while folding:
            for i in folding:
                draw = attempt <= _ATTEMPTS
                controls[i] = _normal((len(size), *points), generators[i]) * scale if draw else controls[i] * 0.9
            folding, attempt = _folding(folding, controls, size, mode), attempt + 1
    return [Field(size, control, matrices) for control in controls]


def largest_sigma(shape: Sequence[int], grid: Sequence[int]) -> list[float]:
    """Largest standard deviation per axis, in voxels, that `elastic_displacement` uses on a patch of that shape.

    >>> [round(v, 2) for v in largest_sigma((128, 64), (3, 3))]
    [10.0, 4.96]
    """
    return [STEEPEST * (n - 1) / (g - 1) for n, g in zip(shape, grid, strict=True)]


@full_precision()
def evaluate(coefficients: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the products: (B, D, m_0, ...) and one (n_a, m_a) per axis -> (B, D, n_0, ...).

    >>> evaluate(torch.ones(1, 1, 2), [torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])])
    tensor([[[1., 1., 1.]]])
    """
    values = coefficients
    for axis, matrix in enumerate(matrices):
        values = _along(values, matrix, axis)
    return values.contiguous()


def _along(values: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.matmul(values.movedim(2 + axis, -1), matrix.T).movedim(-1, 2 + axis)


def _normal(size: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    device = generator.device if generator is not None else "cpu"
    return torch.randn(tuple(size), generator=generator, device=device).cpu()


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, *[1] * len(values))


def _folding(which: Sequence[int], controls: Sequence[torch.Tensor], size: tuple[int, ...], mode: str) -> list[int]:
    """Those of `which` whose field, of control points (D, *points), folds somewhere."""
    if not which:
        return []
    control = torch.stack([controls[i] for i in which])
    points = control.shape[2:]
    # in units of the control distance, on a fixed lattice: what folds there folds on a patch of any size
    plain = control / _column([(n - 1) / (g - 1) for n, g in zip(size, points, strict=True)])
    slopes: list[torch.Tensor] = []  # d/dx_b of each component, for the axes b so far
    for axis, g in enumerate(points):
        value, slope = spline_matrix((g - 1) * _CHECKS + 1, g, mode)
        slopes = [_along(s, value, axis) for s in slopes] + [_along(plain, slope, axis)]
        plain = _along(plain, value, axis)
    rows = [[column[:, a] + float(a == b) for b, column in enumerate(slopes)] for a in range(len(points))]
    least = _determinant(rows).flatten(1).amin(dim=1)
    return [i for i, jacobian in zip(which, least.tolist(), strict=True) if jacobian < _LEAST_JACOBIAN]


def _determinant(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    # written out: torch.linalg.det of thousands of 3x3 matrices factorises each of them
    if len(rows) == 1:
        return rows[0][0]
    minors = [_determinant([row[:b] + row[b + 1 :] for row in rows[1:]]) for b in range(len(rows))]
    terms = [entry * minor for entry, minor in zip(rows[0], minors, strict=True)]
    total = terms[0]
    for b, term in enumerate(terms[1:], start=1):
        total = total - term if b % 2 else total + term
    return total


def _checked(
    shape: Sequence[int],
    grid: int | Sequence[int],
    spacing: Sequence[float] | None,
    sigma: float,
    mode: str,
    smooth: float,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    size = tuple(int(n) for n in shape)
    dims = len(size)
    if dims not in (1, 2, 3) or any(n < 2 for n in size):
        raise UsageError(
            "no field on this shape", field="shape", expected="1 to 3 axes of 2 or more voxels", found=tuple(shape)
        )
    points = (int(grid),) * dims if isinstance(grid, int) else tuple(int(g) for g in grid)
    if len(points) != dims or any(g < 2 for g in points):
        raise UsageError(
            "wrong control grid", field="grid", expected=f"2 or more points, one number or {dims}", found=grid
        )
    if mode != "noise" and any(n < g for n, g in zip(size, points, strict=True)):
        raise UsageError(
            "the patch is smaller than the control grid", field="grid", expected=f"at most {size}", found=points,
            fix="use a larger patch or fewer control points",
        )  # fmt: skip
    step = (1.0,) * dims if spacing is None else tuple(float(s) for s in spacing)
    if len(step) != dims or not all(math.isfinite(s) and s > 0 for s in step):
        raise UsageError("wrong spacing", field="spacing", expected=f"{dims} positive numbers", found=spacing)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise UsageError("wrong sigma", field="sigma", expected="0 or more", found=sigma)
    if mode not in ("bspline", "bicubic", "noise"):
        raise UsageError("unknown mode of interpolation", field="mode", expected="bspline, bicubic", found=mode)
    if not (math.isfinite(smooth) and smooth > 0):
        raise UsageError("wrong smoothing", field="smooth", expected="more than 0", found=smooth)
    return size, points, step

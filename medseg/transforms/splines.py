"""The matrices that take the few numbers of a displacement field to the voxels of one axis."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

__all__ = ["noise_matrix", "spline_matrix"]

_NOISE_STEP = 1.5  # lattice points per `smooth`: denser noise gives the same law to 1e-9
_NOISE_REACH = 4.5  # in units of `smooth`: where the Gaussian is cut off


@lru_cache(maxsize=256)
def spline_matrix(n: int, points: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and slopes (per control distance) of the cardinal functions at `n` voxels: two (n, points) matrices."""
    at = np.linspace(0.0, points - 1.0, n)
    if mode == "bspline":
        from scipy.interpolate import CubicSpline

        # mirrored ends are ends of slope zero
        spline = CubicSpline(np.arange(points), np.eye(points), bc_type="clamped")
        values, slopes = spline(at), spline(at, 1)
    else:
        values, slopes = np.zeros((n, points)), np.zeros((n, points))
        base = np.minimum(np.floor(at).astype(int), points - 2)
        for offset in range(-1, 3):
            r = at - base - offset
            columns = np.clip(base + offset, 0, points - 1)
            np.add.at(values, (np.arange(n), columns), _keys(np.abs(r)))
            np.add.at(slopes, (np.arange(n), columns), np.sign(r) * _keys_slope(np.abs(r)))
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(slopes.astype(np.float32))


def _keys(r: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * r**3 - (a + 3) * r**2 + 1
    return np.where(r <= 1, near, np.where(r < 2, a * (r**3 - 5 * r**2 + 8 * r - 4), 0.0))


def _keys_slope(r: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = 3 * (a + 2) * r**2 - 2 * (a + 3) * r
    return np.where(r <= 1, near, np.where(r < 2, a * (3 * r**2 - 10 * r + 8), 0.0))


@lru_cache(maxsize=64)
def noise_matrix(n: int, smooth: float) -> torch.Tensor:
    """(n, m): unit noise on a finer lattice to `n` voxels, smoothed by a Gaussian of `smooth` voxels to variance 1."""
    step = smooth / _NOISE_STEP
    margin = _NOISE_REACH * smooth
    lattice = np.arange(-margin, n - 1 + margin + step, step)
    values = np.exp(-0.5 * ((np.arange(n)[:, None] - lattice) / smooth) ** 2)
    values /= np.sqrt((values**2).sum(axis=1, keepdims=True))  # unit variance at every voxel
    return torch.from_numpy(values.astype(np.float32))

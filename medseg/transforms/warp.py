"""One resampling for everything spatial: a displacement field, an affine map and flips become one set of positions.

The identity and the affine map ride on the displacement field's own matrix products as two further columns per axis, so
that composing them costs nothing. Positions beyond the border of the input (which may reach beyond the patch that comes
out, so that there is something to be turned in) are mirrored at the border voxels' centres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from medseg.errors import GeometryError, UsageError
from medseg.precision import full_precision
from medseg.transforms.elastic_field import Field
from medseg.transforms.sampling import resample

__all__ = ["Warp", "warp_positions", "warp_sample"]

_SLAB = 2**17  # voxels whose positions are held at a time on a CPU: about a megabyte, which stays in its cache


@dataclass(frozen=True)
class Warp:
    """What was drawn for one patch: the output at x is the input at `flip(affine @ (x + displacement(x)))`.

    Attributes:
        shape: voxels of the patch per axis.
        field: displacement, or None.
        affine: (D, D) matrix about the patch's centre, voxel to voxel, or None.
        flips: axes that are mirrored.
        context: voxels per side of each axis by which the input reaches beyond the patch; () for none.
    """

    shape: tuple[int, ...]
    field: Field | None = None
    affine: np.ndarray | None = None
    flips: tuple[int, ...] = ()
    context: tuple[int, ...] = ()

    @property
    def source(self) -> tuple[int, ...]:
        """Voxels of the input per axis: the patch and its context."""
        return tuple(n + 2 * c for n, c in zip(self.shape, self.context or (0,) * len(self.shape), strict=True))

    @property
    def moves(self) -> bool:
        """Whether anything is interpolated (flips are not)."""
        return self.field is not None or self.affine is not None


@full_precision()  # training lets a GPU round products
def warp_positions(warps: Sequence[Warp], device: torch.device | str | None = None) -> torch.Tensor:
    """Where each output voxel looks in the input: -1 is the first voxel's centre, 1 the last's, mirrored into [-1, 1].

    Args:
        warps: one per sample, all of one shape.
        device: where the positions are computed.

    Returns:
        float32 (B, D, *shape); component 0 belongs to the last spatial axis, as `torch.nn.functional.grid_sample` has
        it.

    >>> warp_positions([Warp((3, 5))])[0, :, 0, 0]
    tensor([-1., -1.])
    """
    return _Positions(warps, device).slab(0, warps[0].shape[0])


def warp_sample(
    arrays: Mapping[Any, torch.Tensor], warps: Sequence[Warp], *, linear: Sequence[Any]
) -> dict[Any, torch.Tensor]:
    """Warp all arrays of a batch alike: those named in `linear` linearly, the others by nearest neighbour.

    Args:
        arrays: key -> (B, C, *spatial), all of the warps' spatial shape and their context, on one device.
        warps: B of them, of one shape and context.
        linear: keys that are interpolated linearly; integer arrays among them become float32.

    Raises:
        GeometryError: the arrays' shapes differ.
        UsageError: the number of warps is not that of the samples.
    """
    if not warps:
        return dict(arrays)
    source = warps[0].source
    for key, array in arrays.items():
        found = tuple(array.shape[2:])
        if found != source:
            raise GeometryError("arrays of one sample differ in shape", field=str(key), expected=source, found=found)
        if array.shape[0] != len(warps):
            raise UsageError("one warp per sample is needed", field=str(key), expected=array.shape[0], found=len(warps))
    out = {k: a.float() if k in linear and not a.is_floating_point() else a for k, a in arrays.items()}
    if not any(warp.moves for warp in warps):
        return {key: _flip_only(array, warps) for key, array in out.items()}
    first = next(iter(out.values()))
    if first.device.type != "cpu":
        positions = warp_positions(warps, first.device)
        done = {key: resample(array, positions, linear=key in linear) for key, array in out.items()}
    else:
        done = _by_slabs(out, warps, linear)
    for b, warp in enumerate(warps):
        if not warp.moves:  # exactly, whatever its neighbours in the batch do
            for key, array in out.items():
                done[key][b : b + 1] = _flip_only(array[b : b + 1], [warp])
    return done


@full_precision()
def _by_slabs(
    arrays: Mapping[Any, torch.Tensor], warps: Sequence[Warp], linear: Sequence[Any]
) -> dict[Any, torch.Tensor]:
    """The samples that move, slab by slab: positions and indices stay in the CPU's cache."""
    shape = warps[0].shape
    done = {key: array.new_empty((*array.shape[:2], *shape)) for key, array in arrays.items()}
    thick = max(1, _SLAB * shape[0] // math.prod(shape))
    for b, warp in enumerate(warps):
        if not warp.moves:
            continue
        plan = _Positions([warp])
        sources = {key: array[b : b + 1].contiguous() for key, array in arrays.items()}
        for start in range(0, shape[0], thick):
            positions = plan.slab(start, start + thick)
            for key, source in sources.items():
                done[key][b : b + 1, :, start : start + thick] = resample(source, positions, linear=key in linear)
    return done


class _Positions:
    """The positions of a batch, all but the last matrix product done; slabs of them are evaluated when needed."""

    def __init__(self, warps: Sequence[Warp], device: torch.device | str | None = None) -> None:
        self.shape, dims = warps[0].shape, len(warps[0].shape)
        pieces = [_coefficients(warp) for warp in warps]
        # one sample may have fewer columns than another (no elastic part): zeros take up the rest
        matrices = max((m for _, m in pieces), key=lambda m: m[0].shape[1])
        total = torch.zeros((len(warps), dims, *(m.shape[1] for m in matrices)))
        for slot, (coefficients, own) in zip(total, pieces, strict=True):
            slot[(slice(None), *(slice(0, m.shape[1]) for m in own))] = coefficients
        self.bound = _bound(total, matrices)
        # a plain copy to a GPU would wait for all that it has still to do
        self.lines = total.to(device or "cpu", non_blocking=True)
        *first, last = [m.to(self.lines.device, non_blocking=True) for m in matrices]
        for axis, matrix in enumerate(first):
            self.lines = torch.matmul(self.lines.movedim(2 + axis, -1), matrix.T).movedim(-1, 2 + axis)
        self.lines = self.lines.contiguous()
        self.last = last

    def slab(self, start: int, stop: int) -> torch.Tensor:
        """(B, D, stop - start, *shape[1:])."""
        if len(self.shape) == 1:
            return _mirror(torch.matmul(self.lines, self.last[start:stop].T), self.bound)
        return _mirror(torch.matmul(self.lines[:, :, start:stop], self.last.T), self.bound)


def _flip_only(array: torch.Tensor, warps: Sequence[Warp]) -> torch.Tensor:
    if any(warps[0].context):
        middle = (slice(c, c + n) for c, n in zip(warps[0].context, warps[0].shape, strict=True))
        array = array[(..., *middle)].contiguous()
    if not any(warp.flips for warp in warps):
        return array
    return torch.stack([a.flip([1 + f for f in w.flips]) if w.flips else a for a, w in zip(array, warps, strict=True)])


def _coefficients(warp: Warp) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Coefficients (D, m_0, ..., m_{D-1}) of the positions, and the matrices they go with."""
    shape, dims = warp.shape, len(warp.shape)
    matrix = np.eye(dims) if warp.affine is None else np.asarray(warp.affine, dtype=np.float64)
    signs = np.ones(dims)
    signs[list(warp.flips)] = -1
    # position = 2 / (n - 1) * (voxel - centre), n of the input, so an affine map about the centre has no constant term
    if min(shape) < 2:
        raise UsageError(
            "no rotation or scaling on this shape", field="shape", expected="axes of 2 or more voxels", found=shape
        )
    matrix = (2 * signs / (np.array(warp.source) - 1))[:, None] * matrix
    if warp.field is None:
        total = np.zeros((dims,) + (2,) * dims)
        matrices = [_linear_columns(n) for n in shape]
    else:
        displacement = warp.field.coefficients.numpy().astype(np.float64)
        total = np.zeros((dims, *(m + 2 for m in displacement.shape[1:])))
        total[(slice(None),) + (slice(2, None),) * dims] = np.einsum("ab,b...->a...", matrix, displacement)
        matrices = [_with_linear(n, m) for n, m in zip(shape, warp.field.matrices, strict=True)]
    for axis in range(dims):
        # of each axis, column 0 is one and column 1 the voxel's distance from the centre
        total[(slice(None), *(int(a == axis) for a in range(dims)))] = matrix[:, axis]
    return torch.from_numpy(total[::-1].astype(np.float32)), matrices


@lru_cache(maxsize=64)
def _linear_columns(n: int) -> torch.Tensor:
    return torch.stack([torch.ones(n), torch.arange(n) - (n - 1) / 2], dim=1)


@lru_cache(maxsize=64)
def _with_linear(n: int, matrix: torch.Tensor) -> torch.Tensor:
    # keyed by the matrix's identity: elastic_field keeps one per length, so patches of one shape share it
    return torch.cat([_linear_columns(n), matrix], dim=1)


def _bound(coefficients: torch.Tensor, matrices: Sequence[torch.Tensor]) -> float:
    """A number that no position exceeds in size: linear and elastic part, each bounded by itself."""
    dims = len(matrices)
    total = torch.zeros(coefficients.shape[:2])
    for axis, m in enumerate(matrices):
        at = (slice(None), slice(None), *(int(a == axis) for a in range(dims)))
        total += coefficients[at].abs() * m[-1, 1]
    elastic = coefficients[(slice(None), slice(None)) + (slice(2, None),) * dims]
    if elastic.numel():
        gain = math.prod(float(m[:, 2:].abs().sum(dim=1).max()) for m in matrices)
        total += gain * elastic.abs().flatten(2).amax(dim=2)
    return float(total.max())


def _mirror(positions: torch.Tensor, bound: float) -> torch.Tensor:
    """Fold positions into [-1, 1], as mirrors at -1 and 1 do."""
    if bound > 3:  # more than one reflection: a triangle wave
        positions.add_(1).remainder_(4).sub_(2).abs_().neg_().add_(1)
    # one reflection: p -> 2 - p beyond 1, -2 - p below -1; no rounding error is left outside
    return positions.clamp(-1, 1).mul_(2).sub_(positions)

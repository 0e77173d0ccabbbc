"""On what grids a network was trained, and what to tell of images on others: it knows voxels, not millimetres."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medseg.volumes_geometry import axis_codes, voxel_size

__all__ = ["mixed_grids", "seen_grids", "unlike_grid"]

_BEYOND = 1.5  # times the largest voxel of training, or 1 / 1.5 of the smallest: more than augmentation scales
_MIXED = 2.0  # largest / smallest voxel along an axis


def seen_grids(affines: Iterable[np.ndarray]) -> dict[str, Any]:
    """Plain values of preprocessed volumes: `axes`, how often they run so, and `spacing`, smallest and largest voxel.

    >>> seen_grids([np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([-1.0, 1.0, 3.0, 1.0])])
    {'axes': {'RAS': 1, 'LAS': 1}, 'spacing': [[1.0, 1.0, 2.0], [1.0, 1.0, 3.0]]}
    """
    affines = list(affines)
    sizes = np.array([voxel_size(affine) for affine in affines])
    axes = Counter("".join(axis_codes(affine)) for affine in affines)
    return {"axes": dict(axes), "spacing": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()]}


def unlike_grid(affine: np.ndarray, seen: Mapping[str, Any] | None) -> list[str]:
    """Notes on a preprocessed volume whose axes run as in no training image, or whose voxels have another size.

    >>> unlike_grid(np.diag([1.0, 1.0, 2.0, 1.0]), {"axes": {"RAS": 9}, "spacing": [[1, 1, 2], [1, 1, 3]]})
    []
    """
    if not seen:
        return []
    codes, size, (low, high) = "".join(axis_codes(affine)), voxel_size(affine), np.array(seen["spacing"])
    notes = []
    if codes not in seen["axes"]:
        notes.append(
            f"its axes run {codes}, in training {' or '.join(seen['axes'])}: the network may find little; "
            "turn the image, or train with Orientationd in preprocess"
        )
    elif ((size < low / _BEYOND) | (size > high * _BEYOND)).any():
        notes.append(
            f"its voxels are {_shown(size, size)} mm, in training {_shown(low, high)} mm: the network may find little; "
            "resample the image, or train with Spacingd in preprocess"
        )
    return notes


def mixed_grids(seen: Mapping[str, Any]) -> list[str]:
    """Notices on training volumes that preprocessing leaves on unlike grids."""
    low, high = np.array(seen["spacing"])
    told = []
    if len(seen["axes"]) > 1:
        counts = ", ".join(f"{codes} in {count}" for codes, count in seen["axes"].items())
        told.append(f"the images' axes run differently ({counts}): Orientationd in preprocess turns all alike")
    if (high > _MIXED * low).any():
        told.append(f"the images have voxels of {_shown(low, high)} mm: Spacingd in preprocess gives all the same")
    return told


def _shown(low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray) -> str:
    pairs = ((f"{a:.3g}", f"{b:.3g}") for a, b in zip(low, high, strict=True))
    return " x ".join(a if a == b else f"{a}-{b}" for a, b in pairs)

"""What every format's reader returns, before colour, labels and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.volumes_geometry import Geometry

__all__ = ["Raw"]


@dataclass(frozen=True)
class Raw:
    """An image as a format's reader returns it.

    Attributes:
        array: (*spatial) for kind "grey" and "palette" (indices); (*spatial, n) for "colour" and "axis".
        geometry: the grid.
        format: as Volume.format.
        header: as Volume.header.
        kind: "grey", "palette", "colour" (bands of one pixel) or "axis" (a fourth dimension of a volume).
        palette: (n, 3) uint8 for "palette".
        bits: per stored value.
        notes: as Volume.notes.
        segments: of a segmentation of 3D Slicer what its numbers are called.
    """

    array: np.ndarray
    geometry: Geometry
    format: str
    header: Any
    kind: str = "grey"
    palette: np.ndarray | None = None
    bits: int = 0
    notes: tuple[str, ...] = ()
    segments: Mapping[int, str] = field(default_factory=dict)

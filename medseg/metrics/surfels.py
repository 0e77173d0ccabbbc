"""Area of the surface inside every 2 x 2 x 2 neighbourhood of voxels (2-D: length of the contour in 2 x 2 pixels).

Each neighbourhood is one of 256 (16) patterns, its *code*; marching cubes gives every pattern a piece of surface, a
*surfel*, whose area depends on the code and the spacing only. Definition and numbers of the table are those of Google
DeepMind's `surface-distance` (Nikolov et al., 2021, doi:10.2196/26151), in the form in which MONAI has them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def surfel_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Area (2-D: length) of the surface for each neighbourhood code.

    Args:
        spacing: size of a voxel on each axis, 2 or 3 values.

    Returns:
        float64, 16 or 256 values in unit^(D-1); 0 for the empty and the full neighbourhood.

    >>> table = surfel_areas((2.0, 3.0))
    >>> [float(table[code]) for code in (0b0000, 0b0101, 0b0011, 0b1111)]  # contour along the first axis, the second
    [0.0, 2.0, 3.0, 0.0]
    """
    from monai.metrics.utils import get_code_to_measure_table  # seconds to import: not before it is needed

    table, _ = get_code_to_measure_table(tuple(spacing))
    areas = np.asarray(table, dtype=np.float64).reshape(-1).copy()
    areas.setflags(write=False)
    return areas


def neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Code of the neighbourhood that begins at each element: its 2^D elements as bits, the first one highest.

    Args:
        mask: boolean or 0/1 uint8, C-contiguous, 2-D or 3-D; false on its outermost layer.

    Returns:
        uint8 of the same shape; 0 in the last layer of each axis, where no neighbourhood begins.
    """
    code = mask.astype(np.uint8).ravel()
    bits = 1
    for axis in reversed(range(mask.ndim)):
        # the outermost layer is false: what a flat shift carries over from the next row is 0
        shift = int(np.prod(mask.shape[axis + 1 :], dtype=np.int64))
        following = code[shift:].copy()
        np.left_shift(code, bits, out=code)
        np.bitwise_or(code[:-shift], following, out=code[:-shift])
        bits *= 2
    return code.reshape(mask.shape)

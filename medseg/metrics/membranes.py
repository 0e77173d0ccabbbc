"""Scores of cells that membranes part, which do not care how wide the membranes are: V_rand and V_info after thinning.

The scores of the ISBI 2012 challenge: the prediction is thresholded, its cells are numbered, membranes are thinned
until the cells meet, and only pixels of the reference's cells are compared. Arganda-Carreras et al. 2015,
doi:10.3389/fnana.2015.00142.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import UsageError
from medseg.metrics.matching import label_components
from medseg.metrics.overlap import check_same_shape

__all__ = ["MembraneCurve", "membrane_curve", "thin_membranes", "v_info", "v_rand"]

THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))


@dataclass(frozen=True, eq=False)
class MembraneCurve:
    """Sums of V_rand and V_info over images, at each threshold. Addition pools images.

    The score of one or several images is the best mean over thresholds, as in the challenge.
    """

    thresholds: tuple[float, ...]
    rand: np.ndarray
    info: np.ndarray
    images: int = 1

    def __add__(self, other: MembraneCurve) -> MembraneCurve:
        if self.thresholds != other.thresholds:
            raise UsageError(
                "images were measured at other thresholds", expected=self.thresholds, found=other.thresholds
            )
        return MembraneCurve(
            self.thresholds, self.rand + other.rand, self.info + other.info, self.images + other.images
        )

    @property
    def v_rand(self) -> float:
        """Best mean V_rand over the thresholds."""
        return float(self.rand.max() / self.images)

    @property
    def v_info(self) -> float:
        """Best mean V_info over the thresholds."""
        return float(self.info.max() / self.images)

    @property
    def best_threshold(self) -> float:
        """Threshold with the best mean V_rand."""
        return self.thresholds[int(np.argmax(self.rand))]


def membrane_curve(
    prediction: np.ndarray, reference: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> MembraneCurve:
    """V_rand and V_info of one image at each threshold of the prediction, after thinning.

    Args:
        prediction: (*spatial) probability of *cell* (not of membrane), or a mask that is true in cells; a mask is
            measured once and counts for every threshold.
        reference: (*spatial) mask that is true in cells, or numbered cells; 0 is membrane.
        thresholds: a pixel is cell where its probability is at least this.

    Raises:
        GeometryError: shapes differ.

    >>> cells = np.zeros((8, 17)); cells[1:7, 1:8] = cells[1:7, 9:16] = 0.9  # and a membrane of one pixel between them
    >>> curve = membrane_curve(cells, cells > 0.5, thresholds=(0.5, 0.95))  # at 0.95 there is no cell left
    >>> [round(float(value), 3) for value in curve.rand]
    [1.0, 0.0]
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    check_same_shape(prediction, reference)
    truth = label_components(reference) if reference.dtype == bool or reference.max(initial=0) <= 1 else reference
    masks = [prediction != 0] if prediction.dtype.kind in "biu" else [prediction >= value for value in thresholds]
    scores = [_scores(thin_membranes(mask), truth) for mask in masks]
    scores *= len(thresholds) // len(scores)
    return MembraneCurve(tuple(thresholds), *np.asarray(scores, dtype=np.float64).T)


def thin_membranes(cells: np.ndarray) -> np.ndarray:
    """Number the cells of a mask and let them grow until they meet: membranes of no width.

    This is the watershed of the distance to the nearest cell, flooded from the cells: every membrane pixel goes to the
    cell nearest to it.

    Args:
        cells: (*spatial) boolean, true in cells. Cells are parted by face neighbours (4 in 2-D), so that a membrane
            that is connected through corners parts them.

    Returns:
        int32 of the same shape, all pixels numbered; all 0 if there is no cell.

    >>> import numpy as np
    >>> thin_membranes(np.array([[True, False, False, False, False, True]]))
    array([[1, 1, 1, 2, 2, 2]], dtype=int32)
    """
    from scipy.ndimage import distance_transform_edt

    numbered = label_components(cells)
    if not numbered.any():
        return numbered
    nearest = np.zeros((numbered.ndim, *numbered.shape), dtype=np.int32)
    distance_transform_edt(numbered == 0, return_distances=False, return_indices=True, indices=nearest)
    return numbered[tuple(nearest)]


def v_rand(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Foreground-restricted Rand score: sum p_ij^2 / (half sum s_i^2 + half sum t_j^2) over the reference's cells.

    p_ij is the share of foreground pixels in predicted segment i and real cell j, s and t its sums. Splits and mergers
    weigh the same. No thinning here: see `membrane_curve`.

    Args:
        prediction: (*spatial) numbered segments.
        reference: (*spatial) numbered cells; pixels where it is 0 are left out.

    Returns:
        0 to 1. Without predicted segments 0, or 1 if the reference has none either; without real cells 0 if segments
        were predicted.

    >>> import numpy as np
    >>> v_rand(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 2, 2]]))  # a merger: (1/4 + 1/4) / (1/2 + 1/4)
    0.6666666666666666
    """
    return _scores(prediction, reference)[0]


def v_info(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Foreground-restricted information score: mutual information / mean entropy, over the reference's cells.

    Args:
        prediction: (*spatial) numbered segments.
        reference: (*spatial) numbered cells; pixels where it is 0 are left out.

    Returns:
        0 to 1; 1 if both hold a single segment. Empty images as for `v_rand`.

    >>> import numpy as np
    >>> v_info(np.array([[1, 1, 2, 2]]), np.array([[5, 5, 7, 7]]))
    1.0
    >>> v_info(np.array([[1, 2, 1, 2]]), np.array([[5, 5, 7, 7]]))
    0.0
    """
    return _scores(prediction, reference)[1]


def _scores(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """V_rand and V_info from one table of shares."""
    table = _joint(prediction, reference)
    if table is None:
        both = 1.0 if not prediction.any() and not reference.any() else 0.0
        return both, both
    joint, s, t = table
    rand = float((joint**2).sum() / (0.5 * (s**2).sum() + 0.5 * (t**2).sum()))
    together, first, second = (float(-(p * np.log(p)).sum()) for p in (joint, s, t))
    entropy = (first + second) / 2
    return rand, max(0.0, (first + second - together) / entropy) if entropy > 0 else 1.0


def _joint(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Shares of foreground pixels: of every pair of segments, every predicted one, every real one. None without any."""
    check_same_shape(prediction, reference)
    inside = reference != 0
    if not inside.any() or not prediction.any():
        return None
    p, r = _renumber(prediction[inside]), _renumber(reference[inside])
    columns = int(r.max()) + 1
    pairs = p * columns + r
    size = (int(p.max()) + 1) * columns
    # counting in place is ten times faster than sorting; sorting is for tables larger than the image
    joint = np.bincount(pairs, minlength=size) if size <= 4 * len(pairs) else np.unique(pairs, return_counts=True)[1]
    joint = joint[joint > 0]
    return joint / len(p), np.bincount(p) / len(p), np.bincount(r) / len(r)


def _renumber(values: np.ndarray) -> np.ndarray:
    """The same groups as numbers 0, 1, 2 ... without gaps, int64."""
    if values.dtype.kind not in "bui" or int(values.min()) < 0 or int(values.max()) > 4 * len(values):
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    values = values.astype(np.int64)
    there = np.bincount(values) > 0
    return (np.cumsum(there) - 1)[values]

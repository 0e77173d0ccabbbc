"""Scores of thin trees: ROC area from probabilities, the choice of a threshold, and clDice along centre lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import UsageError
from medseg.metrics.overlap import check_same_shape

__all__ = ["ProbabilityCounts", "auc", "best_threshold", "cldice", "probability_counts"]

_PART = 1 << 22  # pixels that are sorted at once


@dataclass(frozen=True, eq=False)
class ProbabilityCounts:
    """How often each probability was given to pixels inside and outside the structure. Addition pools images.

    Attributes:
        values: distinct probabilities, ascending, float64 (n,).
        inside: pixels of the reference with that probability, int64 (n,).
        outside: the other pixels, int64 (n,).
    """

    values: np.ndarray
    inside: np.ndarray
    outside: np.ndarray

    def __add__(self, other: ProbabilityCounts) -> ProbabilityCounts:
        return _pooled([self, other])

    @property
    def auc(self) -> float:
        """Area under the ROC curve: chance that a pixel inside has a higher probability than one outside, ties half.

        Where one of the two kinds is missing the area is undefined; the policy for empty masks decides at a probability
        of 0.5: 1 if nothing is there and nothing was predicted, else 0; 1 if everything is inside and predicted.
        Mann and Whitney 1947; Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
        """
        positives, negatives = int(self.inside.sum()), int(self.outside.sum())
        if positives == 0:
            return 0.0 if bool((self.values >= 0.5).any()) else 1.0
        if negatives == 0:
            return 0.0 if bool((self.values < 0.5).any()) else 1.0
        below = np.cumsum(self.outside) - self.outside
        return float((self.inside * (below + 0.5 * self.outside)).sum() / (positives * negatives))

    def best_threshold(self) -> float:
        """The probability from which on a pixel is best called inside; see the function `best_threshold`."""
        if int(self.inside.sum()) == 0:
            raise UsageError("no pixel of the structure to choose a threshold by", field="reference")
        inside = np.cumsum(self.inside[::-1])[::-1]  # pixels of the structure at or above each value
        outside = np.cumsum(self.outside[::-1])[::-1]
        dice = 2 * inside / (inside + outside + self.inside.sum())
        best = int(np.argmax(dice))
        # between two probabilities that occurred, so that rounding in a file does not move pixels across
        return float(self.values[best] if best == 0 else (self.values[best - 1] + self.values[best]) / 2)


def probability_counts(
    probability: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None
) -> ProbabilityCounts:
    """Count the probabilities of pixels inside and outside the structure.

    Args:
        probability: (*spatial) floats, of the structure.
        reference: (*spatial), non-zero inside.
        mask: (*spatial), pixels where it is 0 are left out (field of view).

    Raises:
        GeometryError: shapes differ.
        UsageError: NaN among the probabilities.

    >>> counts = probability_counts(np.array([0.1, 0.9, 0.9]), np.array([0, 0, 1]))
    >>> counts.values.tolist(), counts.inside.tolist(), counts.outside.tolist()
    ([0.1, 0.9], [0, 1], [1, 1])
    """
    probability, reference = np.asarray(probability), np.asarray(reference)
    check_same_shape(probability, reference, mask)
    # part by part: sorting takes some 30 bytes for each pixel, and stored (half precision) probabilities are few
    rows = max(1, _PART * len(probability) // max(1, probability.size))
    parts = []
    for first in range(0, max(1, len(probability)), rows):
        part = slice(first, first + rows)
        given, inside = probability[part], reference[part] != 0
        if mask is not None:
            kept = np.asarray(mask[part]) != 0
            given, inside = given[kept], inside[kept]
        if np.isnan(given).any():
            raise UsageError("probabilities hold NaN", field="probabilities")
        values, where = np.unique(given.ravel(), return_inverse=True)
        hits = np.bincount(where.ravel(), weights=inside.ravel(), minlength=len(values)).astype(np.int64)
        total = np.bincount(where.ravel(), minlength=len(values))
        parts.append(ProbabilityCounts(values.astype(np.float64), hits, total - hits))
    return parts[0] if len(parts) == 1 else _pooled(parts)


def _pooled(parts: Sequence[ProbabilityCounts]) -> ProbabilityCounts:
    values, where = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
    inside, outside = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    np.add.at(inside, where, np.concatenate([part.inside for part in parts]))
    np.add.at(outside, where, np.concatenate([part.outside for part in parts]))
    return ProbabilityCounts(values, inside, outside)


def auc(probability: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Area under the ROC curve of probabilities, exact with ties; see `ProbabilityCounts.auc`.

    Args:
        probability: (*spatial) floats, of the structure.
        reference: (*spatial), non-zero inside.
        mask: (*spatial), pixels where it is 0 are left out.

    >>> import numpy as np
    >>> auc(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[0, 0, 1, 1]]))
    0.75
    """
    return probability_counts(probability, reference, mask).auc


def best_threshold(counts: ProbabilityCounts | Iterable[ProbabilityCounts]) -> float:
    """Threshold of the probability (inside where p >= t) with the highest Dice over all given images' pixels.

    Choose it on training images, store it, and apply it to the others: chosen on the images that are scored, it
    would flatter the score.

    Args:
        counts: of one image, or of several, which are pooled.

    Raises:
        UsageError: no images, or no pixel of the structure in them.

    >>> import numpy as np
    >>> best_threshold(probability_counts(np.array([0.1, 0.3, 0.4, 0.9]), np.array([0, 0, 1, 1])))
    0.35
    """
    parts = [counts] if isinstance(counts, ProbabilityCounts) else list(counts)
    if not parts:
        raise UsageError("no images to choose a threshold by", field="counts")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.best_threshold()


def cldice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Centre-line Dice: harmonic mean of the share of each mask's skeleton that lies in the other mask.

    Args:
        prediction: (*spatial) boolean, 2-D or 3-D.
        reference: the same shape.

    Returns:
        0 to 1; 1 if both are empty, 0 if exactly one is. Skeletons are those of scikit-image (Zhang 2-D, Lee 3-D).

    Raises:
        GeometryError: shapes differ.

    Source: Shit et al. 2021, doi:10.1109/CVPR46437.2021.01629.

    >>> import numpy as np
    >>> bar = np.zeros((9, 30), bool); bar[3:6, 2:28] = True
    >>> cldice(bar, bar), cldice(bar & False, bar)
    (1.0, 0.0)
    """
    from skimage.morphology import skeletonize

    prediction, reference = np.asarray(prediction) != 0, np.asarray(reference) != 0
    check_same_shape(prediction, reference)
    if not prediction.any() or not reference.any():
        return 1.0 if prediction.any() == reference.any() else 0.0
    thin_prediction, thin_reference = (skeletonize(mask) != 0 for mask in (prediction, reference))
    # a blob of few voxels can be thinned away altogether: it is its own centre line then
    thin_prediction = thin_prediction if thin_prediction.any() else prediction
    thin_reference = thin_reference if thin_reference.any() else reference
    precision = np.count_nonzero(thin_prediction & reference) / np.count_nonzero(thin_prediction)
    sensitivity = np.count_nonzero(thin_reference & prediction) / np.count_nonzero(thin_reference)
    return float(2 * precision * sensitivity / (precision + sensitivity)) if precision + sensitivity else 0.0

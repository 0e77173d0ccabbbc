"""Which predicted object is which real one: the table of shared voxels, and the one-to-one match of objects.

Objects are integers in an image, 0 is background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medseg.errors import UsageError
from medseg.metrics.overlap import check_same_shape, whole_numbers

__all__ = [
    "InstanceMatch",
    "InstanceOverlap",
    "instance_overlap",
    "label_components",
    "match_instances",
    "merge_touching",
    "overlap_table",
]


@dataclass(frozen=True)
class InstanceOverlap:
    """Voxels that each pair of objects shares; the base of every object score.

    Attributes:
        predicted: ids of predicted objects, ascending; `predicted_size` their voxels.
        present: ids of reference objects, ascending; `present_size` their voxels.
        pairs: (P, 2) int64, positions (predicted, present) of the pairs that touch; `shared` their common voxels.
    """

    predicted: np.ndarray
    predicted_size: np.ndarray
    present: np.ndarray
    present_size: np.ndarray
    pairs: np.ndarray
    shared: np.ndarray

    @cached_property
    def union(self) -> np.ndarray:
        """Voxels in either object of each pair."""
        return self.predicted_size[self.pairs[:, 0]] + self.present_size[self.pairs[:, 1]] - self.shared

    @cached_property
    def iou(self) -> np.ndarray:
        """Intersection over union of each pair, float64."""
        return self.shared / self.union

    @property
    def status(self) -> str:
        """scored | missed | false_alarm | both_empty, by whether there are objects."""
        if len(self.predicted) and len(self.present):
            return "scored"
        if len(self.present):
            return "missed"
        return "false_alarm" if len(self.predicted) else "both_empty"


@dataclass(frozen=True)
class InstanceMatch:
    """One-to-one match of predicted and real objects.

    Attributes:
        pairs: (n, 2) int64, ids (predicted, present), by descending IoU.
        iou: (n,) float64, of the pairs.
        missed: ids of real objects without a partner.
        extra: ids of predicted objects without a partner.
        threshold: the IoU that pairs exceed.
    """

    pairs: np.ndarray
    iou: np.ndarray
    missed: np.ndarray
    extra: np.ndarray
    threshold: float

    @property
    def tp(self) -> int:
        """Pairs."""
        return len(self.pairs)

    @property
    def fp(self) -> int:
        """Predicted objects without a partner."""
        return len(self.extra)

    @property
    def fn(self) -> int:
        """Real objects without a partner."""
        return len(self.missed)

    @property
    def precision(self) -> float:
        """TP / (TP + FP); without predicted objects 1 if there is nothing to find, else 0."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); without real objects 1 if nothing was predicted, else 0."""
        return self._ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 if there are no objects at all."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 1.0 if self.tp + self.fp + self.fn == 0 else 0.0


def match_instances(
    prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None, threshold: float = 0.5
) -> InstanceMatch:
    """Match predicted with real objects, one to one, where their IoU is greater than `threshold`.

    From 0.5 on the match is unique (an object can share more than half with one other only). Below, the match with the
    most pairs is taken, and among those the one with the largest sum of IoU.

    Args:
        prediction: (*spatial) integers, 0 background; or an InstanceOverlap, then `reference` is left out.
        reference: the same shape.
        threshold: IoU that a pair must exceed (strictly), 0 to below 1; 0 means that any overlap is enough.

    Returns:
        InstanceMatch.

    Raises:
        GeometryError: shapes differ.
        UsageError: threshold out of range; images that do not hold whole numbers 0 or more.

    >>> import numpy as np
    >>> reference = np.array([[1, 1, 1, 1, 0, 2, 2, 0]])
    >>> prediction = np.array([[7, 7, 7, 0, 0, 0, 9, 9]])
    >>> match = match_instances(prediction, reference)  # IoU 3/4 and 1/3
    >>> match.pairs.tolist(), match.iou.tolist(), match.missed.tolist(), match.extra.tolist()
    ([[7, 1]], [0.75], [2], [9])
    >>> match_instances(prediction, reference, threshold=0).f1
    1.0
    """
    if not 0 <= threshold < 1:
        raise UsageError("threshold out of range", field="threshold", expected="0 to below 1", found=threshold)
    table = overlap_table(prediction, reference)
    good = table.iou > threshold
    pairs, iou = table.pairs[good], table.iou[good]
    if threshold < 0.5 and len(pairs):
        chosen = _assign(pairs, iou, len(table.predicted), len(table.present))
        pairs, iou = pairs[chosen], iou[chosen]
    order = np.argsort(-iou, kind="stable")
    pairs, iou = pairs[order], iou[order]
    return InstanceMatch(
        pairs=np.stack([table.predicted[pairs[:, 0]], table.present[pairs[:, 1]]], axis=1),
        iou=iou,
        missed=np.delete(table.present, pairs[:, 1]),
        extra=np.delete(table.predicted, pairs[:, 0]),
        threshold=threshold,
    )


def instance_overlap(prediction: np.ndarray, reference: np.ndarray) -> InstanceOverlap:
    """Count the voxels that objects of two images share.

    Args:
        prediction: (*spatial) integers 0 or more, 0 background.
        reference: the same shape.

    Raises:
        GeometryError: shapes differ.
        UsageError: negative or broken numbers.
    """
    prediction, reference = whole_numbers(prediction, "prediction"), whole_numbers(reference, "reference")
    check_same_shape(prediction, reference)
    inside = (prediction != 0) | (reference != 0)
    p, r = prediction[inside].astype(np.int64), reference[inside].astype(np.int64)
    if len(p) and min(p.min(), r.min()) < 0:
        raise UsageError("objects are numbered from 1", field="instances", found="negative numbers")
    predicted, p = np.unique(np.r_[0, p], return_inverse=True)
    present, r = np.unique(np.r_[0, r], return_inverse=True)
    keys, counts = np.unique(p.astype(np.int64) * len(present) + r, return_counts=True)
    rows, columns = np.divmod(keys, len(present))
    touching = (rows > 0) & (columns > 0)
    return InstanceOverlap(
        predicted=predicted[1:],
        predicted_size=np.bincount(rows, counts, len(predicted))[1:].astype(np.int64),
        present=present[1:],
        present_size=np.bincount(columns, counts, len(present))[1:].astype(np.int64),
        pairs=np.stack([rows, columns], axis=1)[touching] - 1,
        shared=counts[touching].astype(np.int64),
    )


def merge_touching(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber objects so that all that hang together by overlaps count as one predicted and one real object.

    Real objects that one predicted object touches become one, and so do predicted objects that touch one real object,
    on and on: the correspondence of the LiTS challenge, which takes a split or merged lesion as found if the pieces
    together overlap enough (Bilic et al. 2023, doi:10.1016/j.media.2022.102680). Both get the same number.

    Args:
        prediction: (*spatial) integers, 0 background.
        reference: the same shape.

    Returns:
        Both, int32, numbered from 1.

    >>> import numpy as np
    >>> merged = merge_touching(np.array([[1, 1, 1, 1, 1, 0, 2]]), np.array([[5, 5, 0, 6, 6, 0, 0]]))
    >>> [image.tolist() for image in merged]
    [[[1, 1, 1, 1, 1, 0, 2]], [[1, 1, 0, 1, 1, 0, 0]]]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    table = instance_overlap(prediction, reference)
    first, count = len(table.predicted), len(table.predicted) + len(table.present)
    links = coo_matrix((np.ones(len(table.pairs)), (table.pairs[:, 0], first + table.pairs[:, 1])), (count, count))
    group = connected_components(links, directed=False)[1] + 1
    merged = []
    for image, ids, own in ((prediction, table.predicted, group[:first]), (reference, table.present, group[first:])):
        new = np.zeros(int(ids.max(initial=0)) + 1, np.int32)
        new[ids] = own
        merged.append(new[image])
    return merged[0], merged[1]


def label_components(mask: np.ndarray) -> np.ndarray:
    """Number the connected components of a mask from 1; int32. Voxels connect through faces (4 or 6 neighbours).

    >>> label_components(np.array([[1, 1, 0], [0, 0, 1]])).tolist()  # a corner does not connect
    [[1, 1, 0], [0, 0, 2]]
    """
    from scipy.ndimage import label

    numbered = np.zeros(np.shape(mask), dtype=np.int32)
    label(np.asarray(mask) != 0, output=numbered)
    return numbered


def overlap_table(prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None) -> InstanceOverlap:
    """The table of two images, or the given table itself.

    Raises:
        UsageError: an image without a reference.
    """
    if isinstance(prediction, InstanceOverlap):
        return prediction
    if reference is None:
        raise UsageError("a reference is needed beside the prediction", field="reference")
    return instance_overlap(prediction, reference)


def _assign(pairs: np.ndarray, iou: np.ndarray, predicted: int, present: int) -> np.ndarray:
    """Positions of the pairs of a one-to-one match with the most pairs, and among those the largest sum of IoU."""
    from scipy.optimize import linear_sum_assignment

    # each pair is worth more than all IoU together, so that the number of pairs goes first
    value = np.zeros((predicted, present))
    value[pairs[:, 0], pairs[:, 1]] = 1 + iou / (1 + min(predicted, present))
    rows, columns = linear_sum_assignment(value, maximize=True)
    position = np.full((predicted, present), -1, dtype=np.int64)
    position[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    chosen = position[rows, columns]
    return chosen[chosen >= 0]

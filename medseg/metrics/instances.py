"""Scores of objects, from one table of overlaps: average precision, panoptic quality, AJI, SEG of cell tracking."""

from __future__ import annotations

import numpy as np

from medseg.metrics.matching import InstanceOverlap, match_instances, overlap_table

__all__ = [
    "aggregated_jaccard",
    "average_precision",
    "ctc_seg",
    "mean_average_precision",
    "panoptic_quality",
    "seg_terms",
]

AP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # 0.50, 0.55 ... 0.95


def average_precision(
    prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None, threshold: float = 0.5
) -> float:
    """TP / (TP + FP + FN) of the objects matched at an IoU above `threshold`; 1 if there are no objects at all.

    This is what the 2018 Data Science Bowl calls precision (Caicedo et al., doi:10.1038/s41592-019-0612-7).

    >>> import numpy as np
    >>> average_precision(np.array([[0, 0]]), np.array([[0, 1]]))
    0.0
    """
    match = match_instances(prediction, reference, threshold)
    objects = match.tp + match.fp + match.fn
    return match.tp / objects if objects else 1.0


def mean_average_precision(prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None) -> float:
    """Mean of `average_precision` at IoU above 0.50, 0.55 ... 0.95. Caicedo et al., doi:10.1038/s41592-019-0612-7.

    >>> import numpy as np
    >>> mean_average_precision(np.array([[1, 1, 1, 0]]), np.array([[1, 1, 1, 1]]))  # IoU 0.75: above 5 of the 10
    0.5
    """
    table = overlap_table(prediction, reference)
    return float(np.mean([average_precision(table, threshold=threshold) for threshold in AP_THRESHOLDS]))


def panoptic_quality(prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None) -> float:
    """Sum of the IoU of pairs above 0.5, divided by TP + FP/2 + FN/2; 1 if there are no objects at all.

    Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963.

    >>> import numpy as np
    >>> panoptic_quality(np.array([[1, 1, 1, 0, 2]]), np.array([[1, 1, 1, 1, 0]]))  # 0.75 / (1 + 0.5)
    0.5
    """
    match = match_instances(prediction, reference, 0.5)
    weight = match.tp + (match.fp + match.fn) / 2
    return float(match.iou.sum() / weight) if weight else 1.0


def aggregated_jaccard(prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None) -> float:
    """Aggregated Jaccard index (AJI): each real object with the predicted one of highest IoU; intersections by unions.

    Predicted objects that no real object chose, and real ones that touch none, add to the unions. 1 if there are no
    objects at all. Kumar et al. 2017, doi:10.1109/TMI.2017.2677499.

    >>> import numpy as np
    >>> aggregated_jaccard(np.array([[1, 1, 0, 2]]), np.array([[1, 0, 0, 0]]))  # 1 / (2 + 1)
    0.3333333333333333
    """
    table = overlap_table(prediction, reference)
    best = _best_pair(table.pairs[:, 1], table.iou, len(table.present))
    chosen = best[best >= 0]
    shared, union = int(table.shared[chosen].sum()), int(table.union[chosen].sum())
    union += int(table.present_size[best < 0].sum())
    union += int(np.delete(table.predicted_size, np.unique(table.pairs[chosen, 0])).sum())
    return shared / union if union else 1.0


def seg_terms(table: InstanceOverlap) -> np.ndarray:
    """For each real object its IoU with the predicted one that covers more than half of it, else 0."""
    best = _best_pair(table.pairs[:, 1], table.shared, len(table.present))
    terms = np.zeros(len(table.present))
    found = best >= 0
    pairs = best[found]
    covered = 2 * table.shared[pairs] > table.present_size[found]
    terms[found] = np.where(covered, table.iou[pairs], 0.0)
    return terms


def ctc_seg(prediction: np.ndarray | InstanceOverlap, reference: np.ndarray | None = None) -> float:
    """SEG of the Cell Tracking Challenge: mean over real objects of their IoU with the predicted one that matches.

    A predicted object matches if it covers strictly more than half of the real one; without one the object counts 0.
    Predicted objects that match nothing cost nothing, by definition. Without real objects: 1 if nothing was predicted,
    else 0. Maška et al. 2014, doi:10.1093/bioinformatics/btu080.

    >>> import numpy as np
    >>> ctc_seg(np.array([[1, 1, 0, 0]]), np.array([[3, 3, 3, 3]]))  # exactly half
    0.0
    >>> ctc_seg(np.array([[1, 1, 1, 0]]), np.array([[3, 3, 3, 3]]))
    0.75
    """
    table = overlap_table(prediction, reference)
    if len(table.present) == 0:
        return 0.0 if len(table.predicted) else 1.0
    return float(seg_terms(table).mean())


def _best_pair(key: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """For each key the position of the pair with the largest value (the first of equals), -1 where it has none."""
    best = np.full(count, -1, dtype=np.int64)
    order = np.lexsort((np.arange(len(key)), -np.asarray(value, dtype=np.float64), key))
    keys, first = np.unique(key[order], return_index=True)
    best[keys] = order[first]
    return best

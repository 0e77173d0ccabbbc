"""Counts of voxels that two label images agree on, and the scores that follow: Dice, IoU, sensitivity, precision...

Counts of several cases add up (`a + b`), which gives the pooled ("global") scores: Dice of all voxels of all cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import GeometryError, UsageError

__all__ = ["Confusion", "check_same_shape", "confusion", "confusion_of_masks", "scored_voxels"]

_CHUNK = 1 << 22  # voxels counted at a time: bounds the memory at 8 bytes each


@dataclass(frozen=True)
class Confusion:
    """Voxels of one label: true and false positives, false and true negatives. Addition pools cases.

    Where a ratio is 0/0 the policy for empty masks decides: nothing in both prediction and reference is perfect (1),
    nothing in exactly one of them is the worst (0).

    >>> c = Confusion(tp=6, fp=2, fn=4, tn=88)
    >>> c.dice, c.sensitivity, c.precision, c.status
    (0.6666666666666666, 0.6, 0.75, 'scored')
    >>> missed = Confusion(tp=0, fp=0, fn=10, tn=90)
    >>> missed.dice, missed.precision, missed.status
    (0.0, 0.0, 'missed')
    >>> (c + missed).dice
    0.42857142857142855
    """

    tp: int
    fp: int
    fn: int
    tn: int

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def predicted(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp

    @property
    def present(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def status(self) -> str:
        """scored | missed (only the reference has it) | false_alarm (only the prediction has it) | both_empty."""
        if self.predicted and self.present:
            return "scored"
        if self.present:
            return "missed"
        return "false_alarm" if self.predicted else "both_empty"

    @property
    def dice(self) -> float:
        """2 |A and B| / (|A| + |B|). Dice 1945, doi:10.2307/1932409."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard index): |A and B| / |A or B|."""
        return self._ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """Share of the reference that was found (recall): TP / (TP + FN)."""
        return self._ratio(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> float:
        """Share of the prediction that is right: TP / (TP + FP)."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def specificity(self) -> float:
        """Share of what is not the structure that was left out: TN / (TN + FP); 1 if the reference fills the image."""
        return self.tn / (self.tn + self.fp) if self.tn + self.fp else 1.0

    @property
    def accuracy(self) -> float:
        """Share of voxels labelled right: (TP + TN) / all; 1 if there are no voxels at all."""
        total = self.tp + self.fp + self.fn + self.tn
        return (self.tp + self.tn) / total if total else 1.0

    @property
    def mcc(self) -> float:
        """Matthews correlation coefficient, -1 to 1; 0 where a row or column is empty, except when both agree (1).

        Matthews 1975, doi:10.1016/0005-2795(75)90109-9.
        """
        if self.fp == 0 and self.fn == 0:
            return 1.0
        product = (self.tp + self.fp) * (self.tp + self.fn) * (self.tn + self.fp) * (self.tn + self.fn)
        return (self.tp * self.tn - self.fp * self.fn) / product**0.5 if product else 0.0

    @property
    def voe(self) -> float:
        """Volumetric overlap error: 1 - IoU. Heimann et al. 2009, doi:10.1109/TMI.2009.2013851."""
        return 1.0 - self.iou

    @property
    def rvd(self) -> float:
        """Relative volume difference (|A| - |B|) / |B|, signed: -1 when missed.

        A false alarm (reference empty) has no finite one: it counts the prediction against one voxel, |A|.
        """
        return (self.predicted - self.present) / max(self.present, 1)

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 1.0 if self.status == "both_empty" else 0.0


def confusion(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Iterable[int],
    mask: np.ndarray | None = None,
    ignore: int | None = None,
) -> dict[int, Confusion]:
    """Count, for each label, the voxels on which prediction and reference agree and disagree.

    Args:
        prediction: (*spatial) integers or booleans.
        reference: the same shape.
        labels: the values to count, each against all others. Other values in the images count as "not this label".
        mask: (*spatial); voxels where it is 0 are left out (field of view).
        ignore: value of the reference whose voxels are left out (void).

    Returns:
        {label: Confusion}, in the order of `labels`.

    Raises:
        GeometryError: shapes differ.
        UsageError: floating-point images that are not whole numbers; negative labels.

    >>> import numpy as np
    >>> counts = confusion(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]), labels=[1, 2])
    >>> counts[1], counts[2].dice
    (Confusion(tp=1, fp=1, fn=0, tn=2), 0.6666666666666666)
    """
    prediction, reference = whole_numbers(prediction, "prediction"), whole_numbers(reference, "reference")
    check_same_shape(prediction, reference, mask)
    wanted = [int(label) for label in labels]
    if any(label < 0 for label in wanted):
        raise UsageError("labels are 0 or more", field="labels", found=wanted)
    valid = scored_voxels(reference, mask, ignore)
    # F-ordered arrays (NIfTI) are read in their own order; `valid` may lie otherwise, which costs a copy, not a fault
    order = "F" if prediction.flags.f_contiguous and reference.flags.f_contiguous else "C"
    p, r = prediction.reshape(-1, order=order), reference.reshape(-1, order=order)
    v = None if valid is None else valid.reshape(-1, order=order)
    keys = np.unique(np.asarray(wanted, dtype=np.int64))
    size = len(keys) + 1  # the wanted labels, and one for every other value
    joint = np.zeros(size * size, dtype=np.int64)
    for start in range(0, len(p), _CHUNK):
        part = slice(start, start + _CHUNK)
        a, b = p[part], r[part]
        if v is not None:
            a, b = a[v[part]], b[v[part]]
        joint += np.bincount(_ranks(a, keys) * size + _ranks(b, keys), minlength=size * size)
    table = joint.reshape(size, size)
    total = int(table.sum())
    result = {}
    for label in wanted:
        rank = int(np.searchsorted(keys, label))
        tp = int(table[rank, rank])
        fp, fn = int(table[rank].sum()) - tp, int(table[:, rank].sum()) - tp
        result[label] = Confusion(tp, fp, fn, total - tp - fp - fn)
    return result


def confusion_of_masks(prediction: np.ndarray, reference: np.ndarray, valid: np.ndarray | None = None) -> Confusion:
    """Count two boolean masks of the same shape, inside `valid` where it is given.

    >>> import numpy as np
    >>> confusion_of_masks(np.array([[True, False]]), np.array([[True, True]]))
    Confusion(tp=1, fp=0, fn=1, tn=0)
    """
    check_same_shape(prediction, reference, valid)
    if valid is not None:
        prediction, reference = prediction & valid, reference & valid
    total = int(prediction.size if valid is None else np.count_nonzero(valid))
    tp = int(np.count_nonzero(prediction & reference))
    fp, fn = int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp
    return Confusion(tp, fp, fn, total - tp - fp - fn)


def scored_voxels(reference: np.ndarray, mask: np.ndarray | None, ignore: int | None) -> np.ndarray | None:
    """Boolean voxels that count: inside the mask and not void; None if all of them do."""
    valid = None if mask is None else np.asarray(mask) != 0
    if ignore is not None:
        kept = reference != ignore
        if not kept.all():
            valid = kept if valid is None else valid & kept
    return valid


def check_same_shape(prediction: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Refuse arrays that do not lie on one grid.

    Raises:
        GeometryError: with both shapes.
    """
    for name, other in (("reference", reference), ("mask", mask)):
        if other is not None and other.shape != prediction.shape:
            raise GeometryError(
                f"prediction and {name} differ in shape", field=name, expected=prediction.shape, found=other.shape
            )


def whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """The array as booleans or integers.

    Raises:
        UsageError: floating-point values that are not whole (probabilities, for instance).
    """
    array = np.asarray(array)
    if array.dtype.kind in "biu":
        return array
    whole = array.astype(np.int32)
    if not np.array_equal(whole, array):
        raise UsageError(f"{name} must hold labels, that is whole numbers", field=name, found=str(array.dtype))
    return whole


def pool(counts: Sequence[Mapping[int, Confusion]]) -> dict[int, Confusion]:
    """Sum of the counts of several cases, label by label: the "global" scores.

    >>> pool([{1: Confusion(1, 0, 0, 9)}, {1: Confusion(0, 0, 4, 6)}])[1].dice
    0.3333333333333333
    """
    total: dict[int, Confusion] = {}
    for case in counts:
        for label, count in case.items():
            total[label] = total[label] + count if label in total else count
    return total


def _ranks(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Position of each value among the keys, len(keys) where it is none of them."""
    if values.dtype.itemsize == 1 and values.dtype.kind != "i":  # bool and uint8, nearly all labels: one table look-up
        table = np.full(256, len(keys), dtype=np.intp)
        small = keys[keys < 256]
        table[small] = np.arange(len(small))
        return table[values.view(np.uint8)]
    ranks = np.searchsorted(keys, values)
    found = keys[np.minimum(ranks, len(keys) - 1)] == values if len(keys) else np.zeros(values.shape, dtype=bool)
    return np.where(found, ranks, len(keys))

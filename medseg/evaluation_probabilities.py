"""The probabilities that `predict --save-probabilities` stored, read a piece at a time, and their calibration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from medseg.errors import FormatError, UsageError
from medseg.evaluation_pairs import Pair, Reading
from medseg.metrics.views import is_one_structure

__all__ = ["StoredProbabilities", "calibration", "calibration_counts"]

BINS = 10  # of the reliability diagram
_BOX = 64  # voxels on each axis of a box, the chunks that predict stores


class StoredProbabilities:
    """(K, *spatial), float32 when a part of it is read: all classes at once may need more memory than there is.

    Args:
        pair: the case.
        size: (*spatial) of its reference.

    Raises:
        FormatError: they cannot be read.
        UsageError: they lie on another grid.
    """

    def __init__(self, pair: Pair, size: tuple[int, ...]) -> None:
        self.pair = pair
        self._stored: Any = self._guarded(self._open)
        self.shape = tuple(self._stored.shape)
        if self.shape[1:] != size:
            raise UsageError(
                "probabilities have another shape", field="probabilities", case=pair.case,
                expected=f"(K, *{size})", found=self.shape,
            )  # fmt: skip

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: Any) -> np.ndarray:
        return self._guarded(lambda: np.asarray(self._stored[place], np.float32))

    def _open(self) -> Any:
        import zarr

        return zarr.open_array(str(self.pair.probabilities), mode="r")

    def _guarded(self, action: Any) -> Any:
        try:
            return action()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FormatError(
                "stored probabilities cannot be read", case=self.pair.case, file=self.pair.probabilities, found=error
            ) from error


def calibration(
    probabilities: StoredProbabilities, reference: np.ndarray, reading: Reading, fov: np.ndarray | None
) -> dict[int, np.ndarray]:
    """`calibration_counts` of a whole case, box by box."""
    total: dict[int, np.ndarray] = {}
    for corner in itertools.product(*(range(0, n, _BOX) for n in reference.shape)):
        box = tuple(slice(start, start + _BOX) for start in corner)
        part = probabilities[:, *box]
        found = calibration_counts(part, reference[box], reading, None if fov is None else fov[box])
        total = {label: total.get(label, 0) + counts for label, counts in found.items()}
    return total


def calibration_counts(
    probabilities: np.ndarray, reference: np.ndarray, reading: Reading, fov: np.ndarray | None
) -> dict[int, np.ndarray]:
    """Per label: for each of ten bins of probability the voxels, the sum of their probabilities, and how many are
    right.

    Voxels with a probability below 0.001 are left out: they are the background far away, and would hide all others.
    """
    valid = np.ones(reference.shape, bool) if fov is None else np.asarray(fov) != 0
    if reading.ignore is not None:
        valid &= reference != reading.ignore
    counts = {}
    whole = is_one_structure(len(probabilities), reading.labels)
    for index in reading.labels:
        row = index if len(probabilities) > index else 0 if len(probabilities) == 1 else None
        if row is None:
            continue
        p = np.asarray(1 - probabilities[0] if whole else probabilities[row], np.float32)
        keep = valid & (p >= 0.001)
        p, right = p[keep], reference[keep] == index
        place = np.minimum((p * BINS).astype(np.intp), BINS - 1)
        counts[index] = np.stack([np.bincount(place, w, BINS) for w in (None, p, right)]).astype(np.float64)
    return counts

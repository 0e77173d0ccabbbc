"""Whether predictions and references number their labels alike: scores alone only say that they are bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["count_overlaps", "numbering_notes"]

_VOXELS = 1 << 22  # counted at once
_LARGEST = 127  # label number; with larger ones the table of pairs of each case would be large
_MOST = 0.8  # of the voxels of a label that both sides mark: they are another label on the other side, and no third one


def count_overlaps(prediction: np.ndarray | None, reference: np.ndarray, labels: Iterable[int]) -> np.ndarray | None:
    """Voxels by number in the reference and number in the prediction, where both have a label; None for one label.

    >>> count_overlaps(np.array([0, 2, 2, 1]), np.array([1, 1, 1, 2]), (1, 2)).tolist()
    [[0, 0, 0], [0, 0, 2], [0, 1, 0]]
    """
    known = set(labels)
    top = max(known, default=0) + 1
    if prediction is None or len(known) < 2 or top > _LARGEST + 1:
        return None
    counts = np.zeros(top * top, np.int64)
    for part, other in zip(_slabs(prediction), _slabs(reference), strict=True):
        both = (part > 0) & (part < top) & (other > 0) & (other < top)
        counts += np.bincount(other[both].astype(np.int64) * top + part[both], minlength=top * top)
    return counts.reshape(top, top)


def _slabs(array: np.ndarray) -> list[np.ndarray]:
    """Views of some million voxels each: eight bytes for each pair of a whole CT would be a gigabyte."""
    return np.array_split(array, max(1, min(len(array), array.size // _VOXELS)))


def numbering_notes(
    volumes: Sequence[Mapping[str, Any]],
    overlaps: Iterable[np.ndarray | None],
    labels: Mapping[int, str],
    *,
    folder: bool,
) -> list[str]:
    """Notes where labels may be numbered differently: one is in references alone and another in predictions alone (of a
    `folder` of references), or labels lie where the other side has other ones.

    Args:
        volumes: of the summary.
        overlaps: of each case, see `count_overlaps`.
        labels: number -> name.
        folder: the references are a folder, which does not say what its numbers mean.
    """
    notes = []
    sides = [{v["label"] for v in volumes if v[side]} for side in ("reference", "prediction")]
    referred, predicted = sorted(sides[0] - sides[1]), sorted(sides[1] - sides[0])
    if folder and referred and predicted:
        notes.append(
            f"No prediction has {', '.join(referred)}, no reference {', '.join(predicted)}: the two may be numbered "
            "differently. A model's masks are numbered by its data set: give --run RUN, or the set's name as reference."
        )
    counts = [one for one in overlaps if one is not None]
    if notes or not counts:
        return notes
    total = np.sum(counts, axis=0)
    rows, columns = total.sum(axis=1), total.sum(axis=0)
    moved = [
        f"{labels[one]} where the references have {labels[two]}"
        for two, one in zip(*np.nonzero(total), strict=True)
        if one != two and total[two, one] > _MOST * max(rows[two], columns[one])
    ]
    if moved:
        notes.append(
            f"The predictions have {', '.join(moved)}: the two may be numbered differently, or left and right mixed up."
        )
    return notes

"""What a case without a prediction scores: everything in it is missed, and nowhere is it right."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from medseg.metrics import measure_case, parse_metrics
from medseg.metrics.overlap import scored_voxels
from medseg.metrics.scoring import CaseResult, structures_of

__all__ = ["measure_missing"]


def measure_missing(
    reference: np.ndarray,
    *,
    labels: Mapping[int, str],
    metrics: Sequence[Any],
    regions: Mapping[str, Sequence[int]] | None = None,
    fov: np.ndarray | None = None,
    ignore: int | None = None,
    objects: np.ndarray | None = None,
    probabilities: bool = False,
    **facts: Any,
) -> CaseResult:
    """Scores of a case without a prediction, and its terms of the pooled ones.

    Each structure is scored against an empty prediction. Where none of its voxels count, that would be perfect: there
    the one voxel that counts is predicted wrongly, the mirror image of a miss. The probability of a structure is 0 on
    its voxels and 1 on all others.

    Args:
        reference, labels, metrics, regions, fov, ignore: as for `measure_case`.
        objects: (*spatial) numbered objects of the reference, or None.
        probabilities: score what needs probabilities too.
        facts: its spacing, unit, case and patient.
    """
    counted = scored_voxels(reference, fov, ignore)
    valid = np.ones(reference.shape, bool) if counted is None else counted
    reference = np.where(valid, reference, 0)
    wanted = parse_metrics(metrics)
    parts = []
    for name, values in structures_of(labels, regions).items():
        own = [(m.name, given) for m, given in wanted if m.over == "label" and given.get("region") in (None, name)]
        present = np.isin(reference, values)
        prediction = np.zeros(reference.shape, bool)
        prediction.flat[0] = not present.any()
        fov = valid if present.any() else prediction
        if own:
            parts.append(
                measure_case(
                    prediction, present, labels={1: name}, metrics=own, fov=fov, skip=True,
                    probabilities=(~present).astype(np.float32) if probabilities else None, **facts,
                )
            )  # fmt: skip
    for by_objects in (False, True):
        whole = [(m.name, given) for m, given in wanted if m.over == "case" and (m.needs == "instances") == by_objects]
        if not whole:
            continue
        # a wrong voxel beside real objects would pass for an object, and be counted as one
        prediction = _wrong(reference, valid, () if by_objects and reference.any() else labels)
        parts.append(
            measure_case(
                prediction, reference, labels=labels, metrics=whole, regions=regions,
                fov=valid | (prediction != 0), skip=True,
                instances=(None, None if objects is None else np.where(valid, objects, 0)), **facts,
            )
        )  # fmt: skip
    return CaseResult(
        facts.get("case", ""),
        tuple(score for part in parts for score in part.scores),
        {key: terms for part in parts for key, terms in part.terms.items()},
        tuple(dict.fromkeys(name for part in parts for name in part.skipped)),
    )


def _wrong(reference: np.ndarray, valid: np.ndarray, labels: Collection[int]) -> np.ndarray:
    """A voxel of each label that the reference lacks, among those that count: where it has nothing, if it has that."""
    prediction = np.zeros(reference.shape, np.int32)
    absent = [label for label in labels if label and not (reference == label).any()]
    counted = valid if valid.any() else ~valid
    free, taken = (np.flatnonzero(counted & part)[: len(absent)] for part in (reference == 0, reference != 0))
    for place, label in zip([*free, *taken], absent, strict=False):
        prediction.flat[place] = label
    return prediction

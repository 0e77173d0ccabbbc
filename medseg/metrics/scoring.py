"""Score a case: choose metrics by name, measure each structure once, give one line per structure and score."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.errors import LabelError, UsageError
from medseg.metrics.catalogue import parse_metrics
from medseg.metrics.metric import Score
from medseg.metrics.overlap import check_same_shape, scored_voxels, whole_numbers
from medseg.metrics.surface import check_spacing
from medseg.metrics.views import CaseView, is_one_structure

__all__ = ["ALL_CASES", "ALL_LABELS", "CaseResult", "measure_case", "pool_scores", "score_case"]

ALL_CASES = "all cases"  # the case of pooled scores
ALL_LABELS = "all"  # the label of scores of the case as a whole


@dataclass(frozen=True)
class CaseResult:
    """Scores of one case, and its terms of the scores that are computed once over all cases. Pickles.

    Attributes:
        scores: one per structure and score.
        terms: (label, shown metric) -> what adds up.
        skipped: names of the scores that need what this case does not have (probabilities).
    """

    case: str
    scores: tuple[Score, ...]
    terms: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Mapping[int, str],
    metrics: Sequence[Any] = ("Dice",),
    **options: Any,
) -> list[Score]:
    """Score one case; see `measure_case` for the arguments. Scores over all cases (`Pooled...`) are left out.

    >>> import numpy as np
    >>> reference = np.zeros((8, 8), np.uint8); reference[2:6, 2:6] = 1
    >>> prediction = np.zeros_like(reference); prediction[2:6, 2:5] = 1
    >>> for s in score_case(prediction, reference, labels={0: "background", 1: "liver"}, spacing=(2, 2),
    ...                     metrics=["Dice", "HD95"], case="liver_1"):
    ...     print(s.case, s.label, s.metric, round(s.value, 3), s.unit, s.status)
    liver_1 liver Dice 0.857 1 scored
    liver_1 liver HD95 2.0 mm scored
    """
    return list(measure_case(prediction, reference, labels=labels, metrics=metrics, **options).scores)


def measure_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Mapping[int, str],
    metrics: Sequence[Any] = ("Dice",),
    spacing: float | Sequence[float] | None = None,
    case: str = "",
    patient: str = "",
    unit: str = "mm",
    fov: np.ndarray | None = None,
    ignore: int | None = None,
    probabilities: Any = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    instances: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    skip: bool = False,
) -> CaseResult:
    """Score one case and keep what pooled scores need.

    Args:
        prediction: (*spatial) labels, 2-D or 3-D.
        reference: the same shape.
        labels: value -> name; value 0 is background and has no score of its own.
        metrics: names, or names with arguments; see `parse_metrics`.
        spacing: size of a voxel on each axis; 1 when None.
        case: id, for the lines.
        patient: whose case it is, for scores that put a patient's cases together; each case its own when empty.
        unit: of spacing, "mm" or "px".
        fov: (*spatial), voxels where it is 0 are left out (field of view).
        ignore: value of the reference whose voxels are left out (void).
        probabilities: (K, *spatial), channel k the probability of value k; (1, *spatial) or (*spatial) that of value 1;
            where 1 is the only label, all channels but the first together are (`InteriorBorderLabeld`).
            An array, or what has `shape` (K, *spatial) and reads from a file when it is indexed.
        regions: name -> values, when structures are unions of labels (`{"liver": (1, 2)}`); each label alone when None.
            Regions of which `labels` has no value are left out, and so are the scores that ask for them.
        instances: (of the prediction, of the reference): (*spatial) numbered objects, or None for components.
        skip: leave out scores that need probabilities when there are none (named in `.skipped`) instead of refusing.

    Returns:
        CaseResult.

    Raises:
        GeometryError: shapes differ.
        LabelError: a value in prediction or reference that `labels` does not have.
        UsageError: unknown scores or arguments, missing probabilities, spacing that does not fit.

    >>> measure_case(np.array([[0, 1, 1]]), np.array([[0, 1, 0]]), labels={1: "cell"}).scores[0].value
    0.6666666666666666
    """
    wanted = parse_metrics(metrics)
    prediction, reference = whole_numbers(prediction, "prediction"), whole_numbers(reference, "reference")
    check_same_shape(prediction, reference, fov)
    for name, numbered in zip(("prediction", "reference"), instances, strict=True):
        if numbered is not None and numbered.shape != reference.shape:
            raise UsageError(f"instances of the {name} have another shape", field="instances", found=numbered.shape)
    step = check_spacing(spacing, prediction.ndim)
    check_labels(prediction, labels, None, "prediction", case)
    check_labels(reference, labels, ignore, "reference", case)
    structures = structures_of(labels, regions)
    absent = [name for name in regions or () if name not in structures]  # none of its labels is in this data
    for metric, arguments in wanted:
        if arguments.get("region") not in (None, *structures, *absent):
            raise UsageError(
                f"{metric.name} is asked for a region that there is not",
                field=f"metrics.{metric.name}.region",
                expected=", ".join(structures),
                found=arguments["region"],
            )
    wanted = [(m, arguments) for m, arguments in wanted if not set(map(str, arguments.values())) & set(absent)]
    view = CaseView(
        prediction,
        reference,
        scored_voxels(reference, fov, ignore),
        structures,
        instances,
        _channels(probabilities, prediction, labels),
        step,
        unit,
        patient or case,
    )
    skipped = [metric.name for metric, _ in wanted if metric.needs == "probabilities" and probabilities is None]
    if skipped and not skip:
        raise UsageError(f"{skipped[0]} needs probabilities", field="probabilities", case=case or None)
    wanted = [(metric, arguments) for metric, arguments in wanted if metric.name not in skipped]
    scores: list[Score] = []
    terms: dict[tuple[str, str], Any] = {}

    def add(part: Any, label: str, over: str) -> None:
        asked = set()  # one score may be asked for by two entries, for all structures and for one
        for metric, given in wanted:
            if metric.over == over and given.get("region") in (None, label):
                arguments = {name: value for name, value in given.items() if name != "region"}
                score = (metric.name, *sorted(arguments.items()))
                if score in asked:
                    continue
                asked.add(score)
                shown = metric.shown(unit, **arguments)
                if metric.terms is not None:
                    terms[label, shown] = metric.terms(part, **arguments)
                else:
                    value = metric(part, **arguments)
                    scores.append(
                        Score(
                            case,
                            label,
                            shown,
                            value,
                            metric.unit_shown(unit, len(step)),
                            part.status,
                            metric.definition,
                            metric.better,
                        )
                    )

    for name in structures:
        add(view.region(name), name, "label")
    add(view, ALL_LABELS, "case")
    return CaseResult(case, tuple(scores), terms, tuple(skipped))


def pool_scores(
    results: Sequence[CaseResult], metrics: Sequence[Any], *, unit: str = "mm", dims: int = 3
) -> list[Score]:
    """Scores over all cases together, from the terms that each case kept.

    Args:
        results: of `measure_case`, for the same metrics.
        metrics: the same as there.
        unit: of spacing.
        dims: 2 or 3.

    Returns:
        One Score for each pooled metric and structure, with case `all cases`.

    >>> import numpy as np
    >>> labels, metrics = {0: "background", 1: "cell"}, ["Dice", "PooledDice"]
    >>> full, empty = np.ones((4, 4), int), np.zeros((4, 4), int)
    >>> cases = [measure_case(p, full, labels=labels, metrics=metrics) for p in (full, empty)]
    >>> [(s.label, s.metric, round(s.value, 3)) for s in pool_scores(cases, metrics)]
    [('cell', 'PooledDice', 0.667)]
    """
    pooled, done = [], set()
    for metric, given in parse_metrics(metrics):
        if metric.terms is None:
            continue
        arguments = {name: value for name, value in given.items() if name != "region"}
        shown = metric.shown(unit, **arguments)
        names = dict.fromkeys(label for result in results for label, name in result.terms if name == shown)
        for label in (name for name in names if given.get("region") in (None, name)):
            if (label, shown) in done:
                continue
            done.add((label, shown))
            parts = [result.terms[label, shown] for result in results if (label, shown) in result.terms]
            total = functools.reduce(operator.add, parts)
            value = metric(total, **arguments)
            status = getattr(total, "status", "scored")
            pooled.append(
                Score(
                    ALL_CASES,
                    label,
                    shown,
                    value,
                    metric.unit_shown(unit, dims),
                    status,
                    metric.definition,
                    metric.better,
                )
            )
    return pooled


def check_labels(image: np.ndarray, labels: Mapping[int, str], ignore: int | None, name: str, case: str = "") -> None:
    """Refuse values that are no labels.

    Raises:
        LabelError: with the values and how many voxels hold them.
    """
    if image.dtype == bool:
        return
    values, counts = _value_counts(image)
    strange = {
        int(v): int(n)
        for v, n in zip(values, counts, strict=True)
        if int(v) not in labels and int(v) not in (0, ignore)
    }
    if strange:
        shown = ", ".join(f"{value} ({count} voxels)" for value, count in list(strange.items())[:5])
        raise LabelError(
            f"{name} has values that are no labels",
            code="E331",
            case=case or None,
            expected=", ".join(str(value) for value in labels),
            found=shown,
        )


def _value_counts(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if image.size == 0 or int(image.min()) < 0 or int(image.max()) > 0xFFFF:
        return np.unique(image, return_counts=True)
    # a histogram is much faster than sorting; in parts, because it works on 8 bytes a voxel
    flat = image.reshape(-1, order="F" if image.flags.f_contiguous else "C")
    bins = int(image.max()) + 1
    counts = np.zeros(bins, dtype=np.int64)
    for start in range(0, len(flat), 1 << 22):
        counts += np.bincount(flat[start : start + (1 << 22)], minlength=bins)
    values = np.flatnonzero(counts)
    return values, counts[values]


def structures_of(labels: Mapping[int, str], regions: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """What is scored: name -> values, of each region that has some among the labels; each label alone without any."""
    if regions is None:
        return {name: (value,) for value, name in labels.items() if value != 0}
    known = {name: tuple(int(v) for v in values if int(v) in labels) for name, values in regions.items()}
    return {name: values for name, values in known.items() if values}


def _channels(probabilities: Any, prediction: np.ndarray, labels: Mapping[int, str]) -> Any:
    if probabilities is None:
        return None
    in_file = hasattr(probabilities, "shape") and not hasattr(probabilities, "__array__")
    array = probabilities if in_file else np.asarray(probabilities)
    if array.shape == prediction.shape:
        array = array[None]
    if array.shape[1:] != prediction.shape:
        raise UsageError(
            "probabilities have another shape",
            field="probabilities",
            expected=f"(K, *{prediction.shape})",
            found=array.shape,
        )
    if len(array) == 1:
        return np.stack([1 - array[0], array[0]])
    if is_one_structure(len(array), labels):
        background = np.asarray(array[0])
        return np.stack([background, 1 - background])
    return array

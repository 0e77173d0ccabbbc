"""Scores of all cases together: each case gives terms that add up, and the score is computed once from their sum."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from medseg.errors import UsageError
from medseg.metrics.instances import seg_terms
from medseg.metrics.matching import match_instances
from medseg.metrics.membranes import MembraneCurve
from medseg.metrics.metric import Metric
from medseg.metrics.object_scores import membranes_of, titled_by_mask
from medseg.metrics.overlap import Confusion
from medseg.metrics.views import CaseView, RegionView

__all__ = ["POOLED", "Terms"]

_LITS = "Bilic et al. 2023, doi:10.1016/j.media.2022.102680"
_BLIND = "; says nothing of cases that were missed: read it beside the sensitivity"
_RELOADED = "Maier-Hein, Reinke et al. 2024, doi:10.1038/s41592-023-02151-z"


@dataclass(frozen=True)
class Terms:
    """A mean that adds up over cases.

    Attributes:
        total: sum of the values.
        count: how many values.
        empty: what the score is worth if no case has a value: one number per case that has none, the extremes kept.
        largest: the largest value.
    """

    total: float
    count: int
    empty: tuple[float, float]
    largest: float = 0.0

    def __add__(self, other: Terms) -> Terms:
        empty = (min(self.empty[0], other.empty[0]), max(self.empty[1], other.empty[1]))
        return Terms(self.total + other.total, self.count + other.count, empty, max(self.largest, other.largest))

    def mean(self, better: str) -> float:
        """Mean value; without any the worst of `empty`: lowest if higher is better, farthest from 0 if signed."""
        if self.count:
            return self.total / self.count
        if better == "none":
            return max(self.empty, key=abs)
        return self.empty[0] if better == "higher" else self.empty[1]


@dataclass(frozen=True)
class ByPatient:
    """Counts of cases, each with its patient; those of one patient are put together when the score is asked for.

    Attributes:
        counts: (patient, counts) of each case; a case without a patient ("") is one by itself.
    """

    counts: tuple[tuple[str, Confusion], ...]

    def __add__(self, other: ByPatient) -> ByPatient:
        return ByPatient(self.counts + other.counts)

    @property
    def dice(self) -> float:
        """Mean over the patients."""
        patients: dict[str | int, Confusion] = {}
        for number, (patient, counts) in enumerate(self.counts):
            key = patient or number
            patients[key] = patients[key] + counts if key in patients else counts
        return math.fsum(counts.dice for counts in patients.values()) / len(patients)

    @property
    def status(self) -> str:
        """Of all cases together: scored | missed | false_alarm | both_empty."""
        return reduce(operator.add, (counts for _, counts in self.counts)).status


def check_iou(iou: Any, merge: Any = False) -> None:
    """Refuse what is no threshold of IoU, and no yes or no for `merge`.

    Raises:
        UsageError: not a number from 0 to below 1; not true or false.
    """
    if not isinstance(merge, bool):
        raise UsageError("merge is yes or no", field="metrics.merge", expected="true or false", found=merge)
    if not isinstance(iou, int | float) or isinstance(iou, bool) or not 0 <= iou < 1:
        raise UsageError("IoU out of range", field="metrics.iou", expected="0 to below 1", found=iou)


def at_iou(name: str) -> Callable[..., str]:
    """Title of a score that takes `iou` and `merge`: the name alone for 0, any overlap, and lesions as they are."""
    return lambda unit, iou, merge: (name if iou == 0 else f"{name}@{iou:g}") + merge * " (merged)"


def _lesion_counts(view: RegionView, iou: float = 0.0, merge: bool = False) -> Confusion:
    match = match_instances(view.lesions_and_overlap(merge)[2], threshold=iou)
    return Confusion(match.tp, match.fp, match.fn, 0)


def _detected(view: RegionView, score: str, iou: float, merge: bool) -> Terms:
    predicted, present, overlap = view.lesions_and_overlap(merge)
    match = match_instances(overlap, threshold=iou)
    values = [
        _lesion_score(RegionView(predicted == first, present == second, None, view.spacing, view.unit), score)
        for first, second in match.pairs
    ]
    diagonal = float(np.hypot.reduce([n * s for n, s in zip(predicted.shape, view.spacing, strict=True)]))
    if view.lesion_overlap.status == "both_empty":
        value = 1.0 if score == "Dice" else 0.0
    else:  # lesions, but none detected
        value = {"Dice": 0.0, "VOE": 1.0, "RVD": -1.0}.get(score, diagonal)
    return Terms(math.fsum(values), len(values), (value, value))


def _lesion_score(view: RegionView, score: str) -> float:
    if score in ("Dice", "VOE", "RVD"):
        return getattr(view.counts, score.lower())
    return view.surface.hausdorff() if score == "HD" else getattr(view.surface, score.lower())()


def _seg(view: CaseView) -> Terms:
    values = seg_terms(view.objects)
    empty = 0.0 if len(view.objects.predicted) else 1.0
    return Terms(float(values.sum()), len(values), (empty, empty))


def _share(view: CaseView, part: str, whole: str) -> Terms:
    predicted, present = view.volume_share(part, whole)
    error = abs(predicted - present)
    return Terms(error**2, 1, (0.0, 0.0), error)


def _pooled() -> list[Metric]:
    def counts(name: str, text: str, attribute: str | None = None, blind: bool = False, **more: Any) -> Metric:
        name_of = attribute or name.lower()
        return Metric(
            f"Pooled{name}",
            lambda total: getattr(total, name_of),
            "1",
            "higher",
            f"{text}, of the voxels of all cases together" + (_BLIND if blind else ""),
            terms=lambda view: view.counts,
            source=_RELOADED,
            **more,
        )

    by_patient = Metric(
        "PatientDice",
        operator.attrgetter("dice"),
        "1",
        "higher",
        "mean over the patients of the Dice of all voxels of all cases (slices) of a patient together; a case of which "
        "no patient is known is one by itself",
        terms=lambda view: ByPatient(((view.patient, view.counts),)),
        source=_LITS,
    )

    def lesions(name: str, attribute: str, text: str) -> Metric:
        title = f"PooledLesion{name}"
        return Metric(
            title,
            lambda total, iou, merge: getattr(total, attribute),
            "1",
            "higher",
            f"{text}, over the lesions of all cases; connected components (face neighbours) matched one to one at "
            "IoU above the given one, 0 if not given; with merge, those that overlaps connect count as one"
            + (_BLIND if name == "Precision" else ""),
            terms=_lesion_counts,
            title=at_iou(title),
            check=check_iou,
            source=_LITS,
        )

    def shares(name: str, measure: Callable[..., float], text: str) -> Metric:
        return Metric(
            name,
            measure,
            "1",
            "lower",
            f"{text} error over cases of the share of one region's volume in another's (tumour burden)",
            terms=_share,
            over="case",
            source=_LITS,
            title=lambda unit, part, whole: f"{name}({part}/{whole})",
        )

    pixels = Metric(
        "PixelAccuracy", lambda total: total.mean("higher"), "1", "higher",
        "voxels with the reference's label, background among the labels, over all voxels of all cases" + _BLIND,
        terms=lambda view: Terms(*view.right_voxels(), empty=(1.0, 1.0)), over="case",
        source="Long, Shelhamer, Darrell 2015, doi:10.1109/CVPR.2015.7298965",
    )  # fmt: skip
    membranes = "over the reference's cells, after thinning; mean over images at the threshold where it is best"
    return [
        counts("Dice", "2 |A and B| / (|A| + |B|), the global Dice"),
        by_patient,
        counts("IoU", "|A and B| / |A or B|", "iou"),
        counts("Sensitivity", "TP / (TP + FN)"),
        counts("Specificity", "TN / (TN + FP)", blind=True),
        counts("Precision", "TP / (TP + FP)", blind=True),
        counts("Accuracy", "(TP + TN) / all", blind=True),
        counts("MCC", "Matthews correlation coefficient", "mcc", bounds=(-1.0, 1.0)),
        Metric(
            "PooledAUC",
            lambda total: total.auc,
            "1",
            "higher",
            "area under the ROC curve of the pixels of all cases together",
            needs="probabilities",
            terms=lambda view: view.probability_counts,
            source="Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747",
        ),
        lesions("Precision", "precision", "matched / predicted lesions"),
        lesions("Recall", "sensitivity", "matched / real lesions"),
        lesions("F1", "dice", "2 matched / (predicted + real lesions)"),
        *(
            Metric(
                f"DetectedLesion{score}",
                _mean_for(better),
                unit,
                better,
                f"mean {score} of the lesions that were detected (IoU above the given one, 0.5 if not given), "
                "over all cases; says nothing of the others: read it beside the recall; worst if none was detected; "
                "with merge, lesions that overlaps connect count as one",
                terms=_detected_terms(score),
                title=_detected_title(f"DetectedLesion{score}"),
                check=check_iou,
                source=_LITS,
                bounds=bounds,
            )
            for score, unit, better, bounds in (
                ("Dice", "1", "higher", (0.0, 1.0)),
                ("VOE", "1", "lower", (0.0, 1.0)),
                ("RVD", "1", "none", (-1.0, math.inf)),
                ("HD", "length", "lower", (0.0, math.inf)),
                ("ASSD", "length", "lower", (0.0, math.inf)),
                ("RMSD", "length", "lower", (0.0, math.inf)),
            )
        ),
        Metric(
            "PooledSEG",
            lambda total: total.mean("higher"),
            "1",
            "higher",
            "mean over the real objects of all cases of the IoU with "
            "the predicted one that covers more than half of it, else 0",
            needs="instances",
            terms=_seg,
            over="case",
            source="Maška et al. 2014, doi:10.1093/bioinformatics/btu080",
        ),
        pixels,
        shares("ShareRMSE", lambda total, part, whole: math.sqrt(total.total / total.count), "root mean square"),
        shares("ShareMaximum", lambda total, part, whole: total.largest, "largest"),
        *(
            Metric(
                f"Pooled{name}",
                partial(_best_of_curve, name.lower()),
                "1",
                "higher",
                f"{name}, {membranes}, or of the written masks with `mask: true`",
                needs="instances",
                thresholds=True,
                terms=membranes_of,
                title=titled_by_mask(f"Pooled{name}"),
                over="case",
                source="Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142",
            )
            for name in ("V_rand", "V_info")
        ),
    ]


def _best_of_curve(attribute: str, total: MembraneCurve, mask: bool = False) -> float:
    return getattr(total, attribute)


def _mean_for(better: str) -> Callable[..., float]:
    return lambda total, iou, merge: total.mean(better)


def _detected_title(name: str) -> Callable[..., str]:
    return lambda unit, iou, merge: (name if iou == 0.5 else f"{name}@{iou:g}") + merge * " (merged)"


def _detected_terms(score: str) -> Callable[..., Terms]:
    return lambda view, iou=0.5, merge=False: _detected(view, score, iou, merge)


POOLED: tuple[Metric, ...] = tuple(_pooled())

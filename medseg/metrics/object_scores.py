"""Scores of one case as a whole: its objects, its membranes, the share of one structure in another."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from medseg.metrics.instances import (
    aggregated_jaccard,
    average_precision,
    ctc_seg,
    mean_average_precision,
    panoptic_quality,
)
from medseg.metrics.membranes import MembraneCurve
from medseg.metrics.metric import Metric
from medseg.metrics.views import CaseView

__all__ = ["OBJECT_SCORES", "membranes_of", "titled_by_mask"]

_CAICEDO = "Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7"
_ISBI = "Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142"
_LENGTH = (0.0, math.inf)


def _ap(threshold: float) -> Callable[[CaseView], float]:
    return lambda view: average_precision(view.objects, threshold=threshold)


def _share_error(view: CaseView, part: str, whole: str) -> float:
    predicted, present = view.volume_share(part, whole)
    return abs(predicted - present)


def _scores() -> list[Metric]:
    def objects(name: str, measure: Callable[..., float], text: str, source: str, **more: Any) -> Metric:
        return Metric(name, measure, "1", "higher", text, over="case", needs="instances", source=source, **more)

    none = "; 1 if there are no objects at all"
    return [
        *(
            objects(
                f"AP{round(100 * iou)}",
                _ap(iou),
                f"TP / (TP + FP + FN) of objects matched at IoU above {iou:g}{none}",
                _CAICEDO,
            )
            for iou in (0.5, 0.75)
        ),
        objects(
            "mAP",
            lambda view: mean_average_precision(view.objects),
            f"mean of TP / (TP + FP + FN) at IoU above 0.50, 0.55 ... 0.95{none}",
            _CAICEDO,
        ),
        objects(
            "PQ",
            lambda view: panoptic_quality(view.objects),
            f"sum of IoU of pairs above 0.5 / (TP + FP/2 + FN/2){none}",
            "Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963",
        ),
        objects(
            "AJI",
            lambda view: aggregated_jaccard(view.objects),
            "aggregated Jaccard index: intersections over unions of each "
            f"real object with its best predicted one, unused ones added to the unions{none}",
            "Kumar et al. 2017, doi:10.1109/TMI.2017.2677499",
        ),
        objects(
            "SEG",
            lambda view: ctc_seg(view.objects),
            "mean over real objects of the IoU with the predicted one that covers more than half of it, else 0",
            "Maška et al. 2014, doi:10.1093/bioinformatics/btu080",
        ),
        Metric(
            "CountError",
            lambda view: abs(len(view.objects.predicted) - len(view.objects.present)),
            "objects",
            "lower",
            "absolute difference of the numbers of objects",
            over="case",
            needs="instances",
            source=_CAICEDO,
            bounds=_LENGTH,
        ),
        *(
            objects(
                name,
                partial(_of_membranes, attribute),
                f"{text}, over the reference's cells, after thinning "
                "the predicted membranes; best of the thresholds 0.1 to 0.9 if there are probabilities, unless "
                "`mask: true` asks for the written mask",
                _ISBI,
                thresholds=True,
                title=titled_by_mask(name),
            )
            for name, attribute, text in (
                ("V_rand", "v_rand", "Rand score: sum p_ij^2 / mean of sum s_i^2 and sum t_j^2"),
                ("V_info", "v_info", "information score: mutual information / mean entropy"),
            )
        ),
        Metric(
            "ShareError",
            _share_error,
            "1",
            "lower",
            "absolute error of the share of one region's volume in another's (tumour burden)",
            over="case",
            source="Bilic et al. 2023, doi:10.1016/j.media.2022.102680",
            title=lambda unit, part, whole: f"ShareError({part}/{whole})",
        ),
    ]


def _of_membranes(attribute: str, view: CaseView, mask: bool = False) -> float:
    return getattr(membranes_of(view, mask), attribute)


def membranes_of(view: CaseView, mask: bool = False) -> MembraneCurve:
    """The case's curve: of the written mask, or of the probabilities where there are any."""
    return view.mask_membranes if mask else view.membranes


def titled_by_mask(name: str) -> Callable[..., str]:
    """Names in tables of a score that may be taken of the written mask although there are probabilities."""
    return lambda unit, mask=False: name + mask * " (mask)"


OBJECT_SCORES: tuple[Metric, ...] = tuple(_scores())

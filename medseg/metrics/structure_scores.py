"""Scores of one structure of one case: overlap, volume, surface distances, lesions, vessels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from medseg.errors import UsageError
from medseg.metrics.matching import match_instances
from medseg.metrics.metric import Metric
from medseg.metrics.pooling import at_iou, check_iou
from medseg.metrics.vessels import cldice
from medseg.metrics.views import RegionView

__all__ = ["STRUCTURE_SCORES"]

_RELOADED = "Maier-Hein, Reinke et al. 2024, doi:10.1038/s41592-023-02151-z"
_HEIMANN = "Heimann et al. 2009, doi:10.1109/TMI.2009.2013851"
_CAICEDO = "Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7"
_ISBI = "Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142"
_EMPTY = "; 1 if both are empty, 0 if exactly one is"
_FAR = "; 0 if both are empty, the image's diagonal if exactly one is"
_SURFACE = "surface = voxels with a face neighbour outside"
_LENGTH = (0.0, math.inf)


def _hd(view: RegionView) -> float:
    return view.surface.hausdorff()


def _hd95(view: RegionView, definition: str = "max") -> float:
    return view.surface.hausdorff(95, definition)


def _hd95_title(unit: str, definition: str) -> str:
    return "HD95" if definition == "max" else f"HD95 ({definition})"


def _check_hd95(definition: str) -> None:
    if definition not in ("max", "pooled"):
        raise UsageError(
            "unknown definition", field="metrics.HD95.definition", expected="max or pooled", found=definition
        )


def _surface_dice(view: RegionView, tolerance: float = 1.0) -> float:
    return view.surface.surface_dice(tolerance)


def _surface_dice_title(unit: str, tolerance: float) -> str:
    return f"SurfaceDice@{tolerance:g}{unit}"


def _check_tolerance(tolerance: Any) -> None:
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(
            "tolerance out of range", field="metrics.SurfaceDice.tolerance", expected="0 or more", found=tolerance
        )


def _volume_error(view: RegionView) -> float:
    return (view.counts.predicted - view.counts.present) * view.voxel_volume


def _unless_missed(score: Callable[[RegionView], float]) -> Callable[[RegionView], float]:
    # background is most of an image: these would be near 1 for a structure that was not found at all
    def measure(view: RegionView) -> float:
        return 0.0 if view.status == "missed" else score(view)

    return measure


def _lesions(score: str) -> Callable[..., float]:
    def measure(view: RegionView, iou: float = 0.0, merge: bool = False) -> float:
        return getattr(match_instances(view.lesions_and_overlap(merge)[2], threshold=iou), score)

    return measure


def _scores() -> list[Metric]:
    def counts(name: str, attribute: str, text: str, source: str = _RELOADED, **more: Any) -> Metric:
        return Metric(
            name,
            lambda view: getattr(view.counts, attribute),
            "1",
            more.pop("better", "higher"),
            text,
            source=source,
            **more,
        )

    def surface(name: str, method: str, text: str, source: str) -> Metric:
        return Metric(
            name,
            lambda view: getattr(view.surface, method)(),
            "length",
            "lower",
            f"{text}; {_SURFACE}{_FAR}",
            source=source,
            bounds=_LENGTH,
        )

    lesion = (
        "connected components (face neighbours) matched one to one at IoU above the given one, 0 if not given; with "
        "merge, those that overlaps connect count as one"
    )
    return [
        counts("Dice", "dice", "2 |A and B| / (|A| + |B|)" + _EMPTY, "Dice 1945, doi:10.2307/1932409"),
        counts("IoU", "iou", "|A and B| / |A or B| (Jaccard)" + _EMPTY),
        counts("Sensitivity", "sensitivity", "TP / (TP + FN), also called recall" + _EMPTY),
        counts("Precision", "precision", "TP / (TP + FP)" + _EMPTY),
        Metric(
            "Specificity",
            _unless_missed(lambda view: view.counts.specificity),
            "1",
            "higher",
            "TN / (TN + FP); 0 if the structure was missed, which by itself would give 1",
            source=_RELOADED,
        ),
        Metric(
            "Accuracy",
            _unless_missed(lambda view: view.counts.accuracy),
            "1",
            "higher",
            "(TP + TN) / all voxels; 0 if the structure was missed",
            source=_RELOADED,
        ),
        counts(
            "MCC",
            "mcc",
            "Matthews correlation coefficient, -1 to 1; 1 if all voxels agree, 0 if prediction or reference is empty",
            "Matthews 1975, doi:10.1016/0005-2795(75)90109-9",
            bounds=(-1.0, 1.0),
        ),
        counts("VOE", "voe", "volumetric overlap error, 1 - IoU", _HEIMANN, better="lower"),
        counts(
            "RVD",
            "rvd",
            "relative volume difference (|A| - |B|) / |B|, signed; against one voxel if the reference is empty",
            _HEIMANN,
            better="none",
            bounds=(-1.0, math.inf),
        ),
        Metric(
            "VolumeError",
            _volume_error,
            "volume",
            "none",
            "predicted minus real volume, signed",
            source=_RELOADED,
            bounds=(-math.inf, math.inf),
        ),
        Metric(
            "AbsoluteVolumeError",
            lambda view: abs(_volume_error(view)),
            "volume",
            "lower",
            "absolute difference of predicted and real volume",
            source=_RELOADED,
            bounds=_LENGTH,
        ),
        Metric(
            "HD",
            _hd,
            "length",
            "lower",
            f"Hausdorff distance, the largest distance between the surfaces; {_SURFACE}{_FAR}",
            source="Huttenlocher et al. 1993, doi:10.1109/34.232073",
            bounds=_LENGTH,
        ),
        Metric(
            "HD95",
            _hd95,
            "length",
            "lower",
            "95th percentile of surface distances: the larger of the two directions (max), "
            f"or of both together (pooled); {_SURFACE}{_FAR}",
            source=_RELOADED,
            bounds=_LENGTH,
            title=_hd95_title,
            check=_check_hd95,
        ),
        surface(
            "ASSD", "assd", "average symmetric surface distance, mean over both surfaces' voxels together", _HEIMANN
        ),
        surface("MASD", "masd", "mean average surface distance, mean of the two directed means", _RELOADED),
        surface(
            "RMSD", "rmsd", "root mean square symmetric surface distance, over both surfaces' voxels together", _HEIMANN
        ),
        Metric(
            "SurfaceDice",
            _surface_dice,
            "1",
            "higher",
            "share of both surfaces, by area of marching-cubes surfels, within "
            "the tolerance of the other (NSD)" + _EMPTY,
            source="Nikolov et al. 2021, doi:10.2196/26151",
            title=_surface_dice_title,
            check=_check_tolerance,
        ),
        Metric(
            "clDice",
            lambda view: cldice(view.prediction, view.reference),
            "1",
            "higher",
            "harmonic mean of the shares of each skeleton inside the other mask" + _EMPTY,
            source="Shit et al. 2021, doi:10.1109/CVPR46437.2021.01629",
        ),
        Metric(
            "AUC",
            lambda view: view.probability_counts.auc,
            "1",
            "higher",
            "area under the ROC curve of the probabilities, ties "
            "count half; with one kind of voxel only, 1 if the probabilities agree at 0.5, else 0",
            needs="probabilities",
            source="Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747",
        ),
        *(
            Metric(
                f"Lesion{name}",
                _lesions(attribute),
                "1",
                "higher",
                f"{text}; {lesion}{_EMPTY}",
                title=at_iou(f"Lesion{name}"),
                check=check_iou,
                source=_RELOADED,
            )
            for name, attribute, text in (
                ("Precision", "precision", "matched / predicted lesions"),
                ("Recall", "recall", "matched / real lesions"),
                ("F1", "f1", "2 matched / (predicted + real lesions)"),
            )
        ),
    ]


STRUCTURE_SCORES: tuple[Metric, ...] = tuple(_scores())

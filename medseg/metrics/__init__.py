"""Scores: overlap, surfaces, objects, vessels, membranes; official protocols; intervals and tests.

`score_case` gives every score by name; the functions below give single ones from arrays. Each score has one definition,
with a value for empty masks too: nothing is ever NaN, and a missed structure never helps.
"""

from __future__ import annotations

from medseg.metrics.catalogue import METRICS, parse_metrics
from medseg.metrics.instances import (
    aggregated_jaccard,
    average_precision,
    ctc_seg,
    mean_average_precision,
    panoptic_quality,
)
from medseg.metrics.matching import InstanceMatch, InstanceOverlap, label_components, match_instances
from medseg.metrics.membranes import MembraneCurve, membrane_curve, thin_membranes, v_info, v_rand
from medseg.metrics.metric import Metric, Score
from medseg.metrics.overlap import Confusion, confusion
from medseg.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from medseg.metrics.scoring import CaseResult, measure_case, pool_scores, score_case
from medseg.metrics.surface import SurfaceDistances, surface_distances
from medseg.metrics.vessels import ProbabilityCounts, auc, best_threshold, cldice, probability_counts

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "CaseResult",
    "Confusion",
    "InstanceMatch",
    "InstanceOverlap",
    "MembraneCurve",
    "Metric",
    "ProbabilityCounts",
    "Protocol",
    "Score",
    "SurfaceDistances",
    "aggregated_jaccard",
    "auc",
    "average_precision",
    "best_threshold",
    "cldice",
    "confusion",
    "ctc_seg",
    "get_protocol",
    "label_components",
    "match_instances",
    "mean_average_precision",
    "measure_case",
    "membrane_curve",
    "panoptic_quality",
    "parse_metrics",
    "pool_scores",
    "probability_counts",
    "score_case",
    "surface_distances",
    "thin_membranes",
    "v_info",
    "v_rand",
]

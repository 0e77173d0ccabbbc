"""Every score by name: METRICS. A pipeline names them (`metrics: [Dice, {SurfaceDice: {tolerance: 2}}]`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from medseg.errors import UsageError
from medseg.metrics.metric import Metric
from medseg.metrics.object_scores import OBJECT_SCORES
from medseg.metrics.pooling import POOLED
from medseg.metrics.structure_scores import STRUCTURE_SCORES

__all__ = ["METRICS", "parse_metrics"]

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*STRUCTURE_SCORES, *OBJECT_SCORES, *POOLED)}


def parse_metrics(metrics: Iterable[Any]) -> list[tuple[Metric, dict[str, Any]]]:
    """Look up scores by name and check their arguments.

    Args:
        metrics: each a name, `{name: {argument: value}}`, `(name, arguments)`, or an object with `.name` and
            `.arguments`. Scores of structures also take `region`, the name of the one structure to score.

    Returns:
        (metric, all its arguments), in the order given.

    Raises:
        UsageError: an unknown score (the nearest names are given), an unknown or impossible argument, or no scores.

    >>> [(metric.name, arguments) for metric, arguments in parse_metrics(["Dice", {"SurfaceDice": {"tolerance": 2}}])]
    [('Dice', {}), ('SurfaceDice', {'tolerance': 2})]
    """
    parsed = []
    for entry in metrics:
        name, arguments = _name_and_arguments(entry)
        if name not in METRICS:
            near = get_close_matches(name, METRICS, n=3, cutoff=0.5)
            raise UsageError(
                f"there is no score named {name}", field="metrics", expected=" or ".join(near or list(METRICS))
            )
        parsed.append((METRICS[name], METRICS[name].checked(arguments)))
    if not parsed:
        raise UsageError("no scores were asked for", field="metrics")
    return parsed


def _name_and_arguments(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, arguments = next(iter(entry.items()))
        if arguments is None or isinstance(arguments, Mapping):
            return str(name), arguments or {}
    if isinstance(entry, tuple) and len(entry) == 2:
        return entry[0], entry[1]
    if hasattr(entry, "name") and hasattr(entry, "arguments"):
        return entry.name, dict(entry.arguments)
    raise UsageError("a score is a name, or a name with arguments", field="metrics", found=repr(entry))

"""What a score is: its name, unit, direction, definition in words, source, and the function that measures it."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medseg.errors import UsageError

__all__ = ["STATUSES", "Metric", "Score"]

STATUSES = ("scored", "missed", "false_alarm", "both_empty")


@dataclass(frozen=True)
class Score:
    """One line of cases.csv.

    Attributes:
        case: id of the case, or `all cases` for a pooled score.
        label: name of the structure; `all` for scores of objects or of the case as a whole.
        metric: name of the score with those arguments that matter, such as `SurfaceDice@2mm`.
        value: a finite number.
        unit: "1" for ratios, "mm", "px", "mL", "objects" ...
        status: scored | missed | false_alarm | both_empty.
        definition: how the number was computed, in words.
        better: "higher", "lower" or "none" (signed errors).
    """

    case: str
    label: str
    metric: str
    value: float
    unit: str
    status: str
    definition: str
    better: str


@dataclass(frozen=True)
class Metric:
    """A kind of score.

    Attributes:
        name: as written in a pipeline.
        measure: (view, **arguments) -> float; for pooled scores the function of the summed terms.
        unit: "1", "length" (that of spacing), "volume" (mL, mm² or voxels) or "objects".
        better: "higher", "lower" or "none".
        definition: in words; ends without a full stop.
        over: what is measured: each structure ("label") or the case as a whole ("case").
        needs: "label", "instances" or "probabilities".
        thresholds: the score finds its own threshold where there are probabilities; labels alone give one at a fixed
            threshold.
        source: paper, DOI.
        bounds: smallest and largest possible value.
        terms: of scores that are computed once over all cases: (view, **arguments) -> something that adds up.
        title: (unit, **arguments) -> the name in tables, when arguments matter.
        check: (**arguments), raises UsageError for impossible ones.
    """

    name: str
    measure: Callable[..., float]
    unit: str
    better: str
    definition: str
    over: str = "label"
    needs: str = "label"
    thresholds: bool = False
    source: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)
    terms: Callable[..., Any] | None = None
    title: Callable[..., str] | None = None
    check: Callable[..., None] = field(default=lambda **_: None)

    def __call__(self, view: Any, **arguments: Any) -> float:
        """Measure; never NaN or infinite.

        Raises:
            UsageError: an argument that the score does not have; probabilities that are missing.
        """
        value = float(self.measure(view, **arguments))
        assert math.isfinite(value), f"{self.name} is {value}"  # every definition has a value for empty masks
        return value

    @property
    def uses_probabilities(self) -> bool:
        """Whether the score is another one, or only there, when probabilities are given."""
        return self.thresholds or self.needs == "probabilities"

    @property
    def level(self) -> str:
        """ "label" (a value per structure and case), "case" (per case) or "pooled" (one over all cases)."""
        return self.over if self.terms is None else "pooled"

    def arguments(self) -> dict[str, Any]:
        """Names and defaults of the arguments that the score takes."""
        function = self.terms or self.measure
        if isinstance(function, operator.attrgetter):  # has no signature; takes the view alone
            return {}
        parameters = list(inspect.signature(function).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of the score: the given ones, defaults for the rest.

        Scores of structures also take `region`, the name of the only structure to score; it is kept if given.

        Raises:
            UsageError: unknown, missing or impossible arguments.
        """
        known = self.arguments()
        given, arguments = arguments, {name: value for name, value in arguments.items() if name != "region"}
        unknown = [name for name in given if name not in known and not (name == "region" and self.over == "label")]
        if unknown:
            raise UsageError(
                f"{self.name} has no argument {', '.join(unknown)}", field=f"metrics.{self.name}",
                expected=", ".join(known) or "no arguments",
            )  # fmt: skip
        full = {**known, **arguments}
        empty = [name for name, value in full.items() if value is inspect.Parameter.empty]
        if empty:
            raise UsageError(f"{self.name} needs {', '.join(empty)}", field=f"metrics.{self.name}")
        self.check(**full)
        return {**full, "region": given["region"]} if self.over == "label" and "region" in given else full

    def shown(self, unit: str = "mm", **arguments: Any) -> str:
        """The name in tables, with those arguments that differ from the usual."""
        return self.title(unit, **arguments) if self.title else self.name

    def unit_shown(self, unit: str, dims: int) -> str:
        """The unit in tables, given the unit of spacing."""
        if self.unit == "length":
            return unit
        if self.unit == "volume":
            return ("mL" if dims == 3 else "mm²") if unit == "mm" else ("voxel" if dims == 3 else "px")
        return self.unit

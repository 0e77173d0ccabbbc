"""Validation as in use: whole images, tiled, brought back to their own grid, scored against the stored reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg.component import Component, build_component
from medseg.config import DatasetSpec, Pipeline
from medseg.distributed import Group
from medseg.hardware import Hardware
from medseg.inference import predict_case
from medseg.metrics import measure_case, parse_metrics, pool_scores

__all__ = ["Validation", "Validator", "split_objects"]

# bytes for the windows of one pass: by itself the inferer takes half of what is free, beside the memory of training
WINDOWS_RAM = 2 * 2**30


@dataclass
class Validation:
    """What one validation found.

    Attributes:
        score: of the metric that picks the best weights, turned so that higher is better; NaN if it cannot be computed.
        scores: "metric label" -> mean over the cases.
        cases: how many were scored.
        picture: (image (C, row, column), label, prediction), one slice of the first case, for the overlay.
    """

    score: float
    scores: dict[str, float] = field(default_factory=dict)
    cases: int = 0
    picture: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class Validator:
    """Scores a network on stored cases.

    Args:
        pipeline: its inference, postprocess, metrics and best.
        spec: the data set's facts.
        stored: id -> stored validation case.
        hardware: device and number type.
        patients: id -> whose case it is, for scores that put a patient's cases together.

    During training only what picks the best weights is measured, and the Dice of each label.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        spec: DatasetSpec,
        stored: Mapping[str, Any],
        hardware: Hardware,
        patients: Mapping[str, str] | None = None,
    ) -> None:
        self.pipeline, self.spec, self.stored, self.hardware = pipeline, spec, dict(stored), hardware
        self.patients = dict(patients or {})
        self.use(pipeline)
        chosen = [part for part in pipeline.metrics if part.name == pipeline.best]
        self.best = chosen[:1]
        wanted = [*self.best, *([] if pipeline.best == "Dice" else [Component("Dice")])]
        parsed = parse_metrics(wanted)
        self.metrics = wanted
        self.metric, arguments = parsed[0]
        self.shown = self.metric.shown(spec.unit, **arguments)
        # lower is better for distances
        self.sign = -1.0 if self.metric.better == "lower" else 1.0
        self.labels = dict(spec.labels)

    def use(self, pipeline: Pipeline) -> None:
        """Take the post-processing of `pipeline` (the same, with a threshold that is known by now)."""
        self.postprocess = [build_component(part, "postprocess") for part in pipeline.postprocess]

    def choose(self, count: int | None) -> list[str]:
        """`count` of the cases, evenly spread over the sorted ids; all when None."""
        names = sorted(self.stored)
        if count is None or count >= len(names):
            return names
        return [names[int(i)] for i in np.linspace(0, len(names) - 1, count).round()]

    def __call__(
        self,
        network: nn.Module,
        *,
        cases: Sequence[str] | None = None,
        group: Group | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Validation:
        """Predict and score.

        Args:
            network: in any mode; it is put back into it.
            cases: ids; all when None.
            group: the processes that share the work; every one of them gets the result.
            check_stop: called between cases, equally often in all processes; may raise.
        """
        group = group or Group()
        names = list(cases if cases is not None else self.stored)
        # scores that add up over cases hold more than numbers: one process measures them all, and tells the result
        pooled = self.metric.terms is not None
        mine = names if pooled or group.world == 1 else names[group.rank :: group.world]
        mine = [] if pooled and group.rank > 0 else mine
        results, picture = [], None
        for turn in range(len(names) if pooled else -(-len(names) // group.world)):
            check_stop()  # by all processes, also by one that has no case left
            if turn >= len(mine):
                continue
            name = mine[turn]
            label, probabilities = self.predict(network, name)
            results.append(self.measure(name, label, probabilities))
            if picture is None:
                picture = self._picture(name, label)
        sums, counts = _total(results, self._columns())
        if pooled:
            for score in pool_scores(results, self.best, unit=self.spec.unit, dims=self.spec.dims) if results else []:
                sums[self._columns().index((score.metric, score.label))] = score.value
                counts[self._columns().index((score.metric, score.label))] = 1
        shared = group.add(torch.tensor([*sums, *counts], dtype=torch.float64)).tolist()
        half = len(shared) // 2
        means = {
            column: total / number if number else math.nan
            for column, total, number in zip(self._columns(), shared[:half], shared[half:], strict=True)
        }
        # a column that nobody filled (the score has no value per structure) is none
        best = [value for (metric, _), value in means.items() if metric == self.shown and not math.isnan(value)]
        score = self.sign * sum(best) / len(best) if best else math.nan
        scores = {f"{metric} {label}": value for (metric, label), value in means.items() if not math.isnan(value)}
        return Validation(score, scores, len(names), picture)

    def predict(
        self,
        network: nn.Module,
        name: str,
        *,
        probabilities: bool = False,
        exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Label of one case on its own grid, and probabilities if they are asked for or the best score needs them.

        Args:
            network: the network.
            name: id of a stored case.
            probabilities: return them in any case.
            exact: in the number type of `medseg predict` (fp32 unless the pipeline says otherwise), not of training.
        """
        stored = self.stored[name]
        facts: dict[str, Any] = {} if exact else {"precision": self.hardware.precision}
        if "max_ram" not in self.pipeline.inference.arguments:
            facts["max_ram"] = WINDOWS_RAM
        inferer = build_component(self.pipeline.inference, "inferer", **facts)
        wanted = probabilities or any(m.uses_probabilities for m, _ in parse_metrics(self.metrics))
        options: dict[str, Any] = {"want_probabilities": True} if wanted else {}
        training = network.training
        network.eval()
        try:
            with torch.inference_mode():
                found = predict_case(
                    [network],
                    torch.from_numpy(stored.read("image")),
                    inferer=inferer,
                    affine_pre=stored.affine,
                    native=stored.native,
                    mask=stored.read("fov") if "fov" in stored.arrays else None,
                    postprocess=self.postprocess,
                    device=self.hardware.device,
                    **options,
                )
        finally:
            network.train(training)
        return found if isinstance(found, tuple) else (found, None)

    def measure(self, name: str, prediction: np.ndarray, probabilities: np.ndarray | None) -> Any:
        """The scores of one case (`medseg.metrics.CaseResult`)."""
        label, objects = split_objects(prediction, self.labels)
        reference, fov, instances = self.references(name)
        return measure_case(
            label,
            reference,
            labels=self.labels,
            metrics=self.metrics,
            spacing=None if self.spec.unit == "px" else self.stored[name].native.spacing,
            case=name,
            patient=self.patients.get(name, ""),
            unit=self.spec.unit,
            fov=fov,
            ignore=self.spec.ignore,
            probabilities=probabilities,
            instances=(objects, instances),
            skip=True,
        )

    def references(self, name: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Label, field of view and instances (None where there is none) of a case, (*spatial) on its own grid."""
        stored = self.stored[name]

        def native(kind: str) -> np.ndarray | None:
            return stored.read(f"native_{kind}")[0] if f"native_{kind}" in stored.arrays else None

        label = native("label")
        assert label is not None
        return label, native("fov"), native("instances")

    def _columns(self) -> list[tuple[str, str]]:
        """(metric, label) of all numbers that a validation may give."""
        names = [name for index, name in self.labels.items() if index != 0] + ["all"]
        shown = [metric.shown(self.spec.unit, **arguments) for metric, arguments in parse_metrics(self.metrics)]
        return [(metric, name) for metric in shown for name in names]

    def _picture(self, name: str, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        stored = self.stored[name]
        label = stored.read("native_label")[0]
        image = stored.read("image")
        if prediction.ndim == 2:
            same = image.shape[1:] == prediction.shape
            return (image, label, prediction) if same else None
        if image.shape[1:] != prediction.shape:
            # the preprocessed grid is another: show its own slice, with the label found there
            label, prediction = stored.read("label")[0], np.zeros(image.shape[1:], np.uint8)
        areas = (label > 0).sum(axis=(0, 1))
        k = int(areas.argmax()) if areas.any() else label.shape[-1] // 2
        return image[..., k], label[..., k], prediction[..., k]


def split_objects(prediction: np.ndarray, labels: Mapping[int, str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels and numbered objects of a prediction that post-processing may have turned into numbered objects.

    With a single structure, values other than the labels' are numbers of objects.

    >>> split_objects(np.array([0, 1, 7]), {0: "background", 1: "nucleus"})
    (array([0, 1, 1], dtype=uint8), array([0, 1, 7]))
    """
    structures = [index for index in labels if index != 0]
    if len(structures) == 1 and prediction.size and int(prediction.max()) > structures[0]:
        return (prediction > 0).astype(np.uint8) * np.uint8(structures[0]), prediction
    return prediction, None


def _total(results: Sequence[Any], columns: Sequence[tuple[str, str]]) -> tuple[list[float], list[float]]:
    sums, counts = [0.0] * len(columns), [0.0] * len(columns)
    for score in _scores(results):
        if (score.metric, score.label) in columns:
            position = columns.index((score.metric, score.label))
            sums[position] += score.value
            counts[position] += 1
    return sums, counts


def _scores(results: Sequence[Any]) -> Iterator[Any]:
    for result in results:
        yield from result.scores

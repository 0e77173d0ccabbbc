"""The scoring of one case: files in, rows of cases.csv and what pools over cases out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.errors import GeometryError
from medseg.evaluation_numbers import count_overlaps
from medseg.evaluation_pairs import Pair, Reading
from medseg.evaluation_probabilities import StoredProbabilities, calibration
from medseg.tables import ScoreRow
from medseg.volumes import Geometry, check_pair, read_label

__all__ = ["Arrays", "CaseScores", "Scoring", "collect_rows", "label_values", "read_arrays", "score_pair"]


@dataclass(frozen=True)
class Scoring:
    """What is measured: metrics as `medseg.metrics` takes them, regions (name -> labels), unit, whether scores that
    need probabilities may be left out where there are none, whether any case has some; of `metrics` the one (name and
    arguments) that stands for the others, None: a usual one."""

    metrics: tuple[Any, ...]
    regions: Mapping[str, Sequence[int]] | None = None
    unit: str | None = None
    skip: bool = False
    instances: bool = False
    stored: bool = True
    main: tuple[str, Mapping[str, Any]] | None = None

    def main_shown(self, unit: str) -> str | None:
        """The main score's name in tables."""
        from medseg.metrics import METRICS

        return METRICS[self.main[0]].shown(unit, **self.main[1]) if self.main else None


@dataclass(frozen=True)
class Arrays:
    """One case in memory, on the reference's grid; `prediction` is None when there is none."""

    prediction: np.ndarray | None
    reference: np.ndarray
    geometry: Geometry
    instances: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    fov: np.ndarray | None = None


@dataclass(frozen=True)
class CaseScores:
    """What scoring a case gives.

    Attributes:
        case: id.
        rows: lines of cases.csv.
        result: what `medseg.metrics.pool_scores` takes.
        better: metric -> direction.
        volumes: label -> (volume of the prediction, of the reference, unit).
        calibration: label -> (voxels, sum of probabilities, right ones) per bin.
        dims: 2 or 3.
        unit: of spacing.
        overlaps: see `count_overlaps`.
    """

    case: str
    rows: tuple[ScoreRow, ...]
    result: Any
    better: Mapping[str, str]
    volumes: Mapping[str, tuple[float, float, str]]
    calibration: Mapping[int, np.ndarray] = field(default_factory=dict)
    dims: int = 3
    unit: str = "mm"
    overlaps: np.ndarray | None = None


def read_arrays(pair: Pair, reading: Reading, *, instances: bool = False) -> Arrays:
    """Prediction and reference of a case on the reference's grid.

    A prediction on another grid is brought to it by nearest neighbour; `check_grids` has refused it before where that
    was not asked for. With `instances`, an image with other values than the labels is taken as numbered objects of
    label 1.

    Raises:
        MedsegError: a file is refused.
    """
    fov = objects = None
    if pair.source is not None:
        from medseg.data import read_reference

        found, _ = read_reference(pair.source, reading.spec, None)
        reference, geometry = found["label"][0], read_geometry_of(pair, reading)
        objects = found["instances"][0] if instances and "instances" in found else None
    else:
        reference, objects, geometry = _read(
            pair.reference, reading, reading.encoding, pair.case, reading.ignore, instances
        )
    if pair.fov is not None:
        fov = read_label(pair.fov, mapping="nonzero", affine=reading.affine, case=pair.case).array[0]
    if pair.prediction is None:
        return Arrays(None, reference, geometry, (None, objects), fov)
    array, own, grid = _read(pair.prediction, reading, reading.prediction_encoding, pair.case, None, instances)
    if not _same(geometry, grid):
        array = _resample(array, grid, geometry)
        own = None if own is None else _resample(own, grid, geometry)
    return Arrays(array, reference, geometry, (own, objects), fov)


def read_geometry_of(pair: Pair, reading: Reading) -> Geometry:
    """The grid of a case's reference."""
    from medseg.volumes import read_geometry

    return read_geometry(pair.reference, affine=reading.affine)[0]


def _read(
    path: Any, reading: Reading, encoding: Any, case: str, ignore: int | None, instances: bool
) -> tuple[np.ndarray, np.ndarray | None, Geometry]:
    mapping = None if encoding == "index" else encoding
    allowed = {0, *reading.labels} | ({ignore} if ignore is not None else set())
    if instances and len(reading.labels) == 1 and mapping is None:
        volume = read_label(path, ignore=ignore, palette="index", affine=reading.affine, case=case)
        array = volume.array[0]
        values = set(np.unique(array).tolist()) - {0, ignore}
        label = next(iter(reading.labels))
        if len(values) > 1 or not values <= {label}:
            void = array == ignore if ignore is not None else np.zeros((), bool)
            semantic = np.where(void, array, (array != 0) * label).astype(np.int32)
            return semantic, np.where(void, 0, array) if len(values) > 1 else None, volume.geometry
        return array, None, volume.geometry
    volume = read_label(
        path, allowed=allowed, ignore=ignore, mapping=mapping, affine=reading.affine, names=reading.labels, case=case
    )
    return volume.array[0], None, volume.geometry


def _same(one: Geometry, two: Geometry) -> bool:
    """Whether `check_grids` takes the two for one grid: what it calls another one is resampled."""
    try:
        check_pair(one, two)
    except GeometryError:
        return False
    return True


def _resample(array: np.ndarray, own: Geometry, target: Geometry) -> np.ndarray:
    from scipy import ndimage

    resample: Any = ndimage.affine_transform  # its annotation says that an offset is one number
    if own.kind == "picture":  # pictures are laid over one another edge to edge
        scale = np.array(own.shape) / np.array(target.shape)
        return resample(array, scale, tuple((scale - 1) / 2), target.shape, order=0, mode="nearest")
    way = np.linalg.inv(own.affine) @ target.affine
    # "constant" would end at the centres of the border voxels; a voxel reaches half of its size further
    return resample(array, way[:3, :3], tuple(way[:3, 3]), target.shape, order=0, mode="grid-constant", cval=0)


def score_pair(pair: Pair, reading: Reading, scoring: Scoring) -> CaseScores:
    """Score one case. A missing prediction is scored as an empty one and counts as missed for every label.

    Where the reference does not have a label either, an empty prediction would be perfect; a missing one is not, see
    `measure_missing`.

    Raises:
        MedsegError: a file is refused.
    """
    from medseg.evaluation_missing import measure_missing
    from medseg.metrics import measure_case, parse_metrics

    arrays = read_arrays(pair, reading, instances=scoring.instances)
    missing = arrays.prediction is None
    stored = None if missing or pair.probabilities is None else StoredProbabilities(pair, arrays.reference.shape)
    unit = scoring.unit or arrays.geometry.unit
    facts: dict[str, Any] = {
        "labels": {0: "background", **reading.labels}, "metrics": scoring.metrics, "regions": scoring.regions,
        "fov": arrays.fov, "ignore": reading.ignore, "case": pair.case, "patient": pair.group or "",
        "spacing": None if unit == "px" else arrays.geometry.spacing, "unit": unit,
    }  # fmt: skip
    if arrays.prediction is None:
        # where no case has probabilities, this one alone would make the mean of the scores that need them
        asked = scoring.stored or not scoring.skip
        result = measure_missing(arrays.reference, objects=arrays.instances[1], probabilities=asked, **facts)
    else:
        used = any(metric.uses_probabilities for metric, _ in parse_metrics(scoring.metrics))
        result = measure_case(
            arrays.prediction, arrays.reference, probabilities=stored if used else None, instances=arrays.instances,
            skip=scoring.skip, **facts,
        )  # fmt: skip
    rows = [
        ScoreRow(
            pair.case,
            s.label,
            s.metric,
            s.value,
            "" if s.unit == "1" else s.unit,
            "missed" if missing else s.status,
            s.definition,
        )
        for s in result.scores
    ]
    counts = {} if stored is None else calibration(stored, arrays.reference, reading, arrays.fov)
    return CaseScores(
        pair.case, tuple(rows), result, {s.metric: s.better for s in result.scores},
        _volumes(arrays, reading, unit, scoring.regions), counts,
        arrays.reference.ndim, unit, count_overlaps(arrays.prediction, arrays.reference, reading.labels),
    )  # fmt: skip


def collect_rows(results: Sequence[CaseScores], metrics: Sequence[Any]) -> tuple[list[ScoreRow], dict[str, str]]:
    """Rows of all cases and of the scores over all of them; and the direction of each score."""
    from medseg.metrics import pool_scores

    rows = [row for result in results for row in result.rows]
    better = {metric: way for result in results for metric, way in result.better.items()}
    for s in pool_scores([r.result for r in results], metrics, unit=results[0].unit, dims=results[0].dims):
        unit = "" if s.unit == "1" else s.unit
        rows.append(ScoreRow(s.case, s.label, s.metric, s.value, unit, s.status, s.definition))
        better[s.metric] = s.better
    return rows, better


def _volumes(
    arrays: Arrays, reading: Reading, unit: str, regions: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[float, float, str]]:
    from medseg.metrics.overlap import scored_voxels

    dims = arrays.reference.ndim
    size = float(np.prod(arrays.geometry.spacing)) if unit == "mm" else 1.0
    name = {(3, "mm"): "mL", (2, "mm"): "mm²", (2, "px"): "px"}.get((dims, unit), "voxel")
    size = size / 1000 if name == "mL" else size
    valid = scored_voxels(arrays.reference, arrays.fov, reading.ignore)
    volumes = {}
    for label, values in (regions or {label: (index,) for index, label in reading.labels.items()}).items():
        counted = []
        for array in (arrays.prediction, arrays.reference):
            mask = np.zeros((), bool) if array is None else np.isin(array, values)
            counted.append(float(np.count_nonzero(mask if valid is None else mask & valid)) * size)
        volumes[label] = (counted[0], counted[1], name)
    return volumes


def label_values(path: Any, reading: Reading) -> dict[int, str | None]:
    """The values other than 0 that occur in a label image, with their names where the file tells them."""
    volume = read_label(path, mapping=None, affine=reading.affine, names=reading.labels)
    return {int(v): volume.segments.get(int(v)) for v in np.unique(volume.array) if v}

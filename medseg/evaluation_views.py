"""Which cases the report shows, their pictures, and the calibration of stored probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from medseg.errors import MedsegError
from medseg.evaluation_pairs import Pair, Reading
from medseg.evaluation_scoring import CaseScores, read_arrays
from medseg.tables import POOLED, ScoreRow, main_metric
from medseg.views import View, make_view, write_view
from medseg.volumes import Geometry, check_pair, read_image

__all__ = ["calibration_entries", "choose_cases", "said", "write_views"]


def choose_cases(
    rows: Sequence[ScoreRow], better: Mapping[str, str], wanted: str | None = None
) -> tuple[list[tuple[str, str, float]], str]:
    """The best, the median and the three worst cases by the mean over labels of the main score, and that score's name.

    `wanted` is the main score where there is such a one, see `main_metric`.

    Returns:
        [(case, role, value)], best first; fewer when there are fewer cases, none twice.
    """
    rows = [row for row in rows if row.case != POOLED]
    metric = main_metric((row.metric for row in rows), wanted)
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.metric == metric:
            values.setdefault(row.case, []).append(row.value)
    sign = 1 if better.get(metric or "") == "lower" else -1
    ranked = sorted(values, key=lambda case: (sign * fmean(values[case]), case))
    roles: dict[int, str] = {}
    places = [(0, "best"), ((len(ranked) - 1) // 2, "median"), *((len(ranked) - n, "worst") for n in (3, 2, 1))]
    for place, role in places:
        if 0 <= place < len(ranked):
            roles.setdefault(place, role)
    return [(ranked[n], role, fmean(values[ranked[n]])) for n, role in sorted(roles.items())], metric or ""


def write_views(
    folder: Path,
    chosen: Sequence[tuple[str, str, float]],
    metric: str,
    pairs: Sequence[Pair],
    reading: Reading,
    instances: bool,
    attention: Callable[[Any], dict[str, np.ndarray]] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the pictures of the chosen cases; returns what summary.json says about them, and notes.

    `attention` gives the attention maps of a data set's case, see `AttentionMaps`. Whatever cannot be shown becomes a
    note: nothing here is worth losing the scores.
    """
    by_case = {pair.case: pair for pair in pairs}
    entries, notes = [], []
    for number, (case, role, value) in enumerate(chosen):
        pair, maps = by_case[case], None
        if attention is not None and pair.source is not None:
            try:
                maps = attention(pair.source)
            except Exception as error:
                notes.append(f"The pictures of {case} show no attention maps: {said(error)}.")
        try:
            view, problem = _view(pair, reading, instances, maps=maps, role=role, score=value, metric=metric)
            write_view(folder, view, number)
        except Exception as error:
            notes.append(f"There are no pictures of {case}: {said(error)}.")
            continue
        if problem:
            notes.append(f"The pictures of {case} show no image: {problem}.")
        entries.append({"case": case, "role": role, "metric": metric, "value": value})
    return entries, notes


def said(error: Exception) -> str:
    """What went wrong, in one line without a place on this machine."""
    if isinstance(error, MedsegError):
        return error.message
    return f"{type(error).__name__}: {error.strerror if isinstance(error, OSError) else error}".splitlines()[0]


def _view(pair: Pair, reading: Reading, instances: bool, **facts: Any) -> tuple[View, str]:
    arrays = read_arrays(pair, reading, instances=instances)
    own, objects = arrays.instances
    prediction = np.zeros_like(arrays.reference) if arrays.prediction is None else arrays.prediction
    reference = arrays.reference
    if reading.ignore is not None:  # void voxels are neither right nor wrong
        void = reference == reading.ignore
        prediction, reference = (np.where(void, 0, array) for array in (prediction, reference))
    geometry = arrays.geometry
    image, problem = _image(pair, reading, geometry)
    view = make_view(
        pair.case, prediction=prediction if own is None else own, reference=reference if objects is None else objects,
        image=image, affine=geometry.affine if geometry.kind == "volume" else None,
        spacing=geometry.spacing, unit=geometry.unit, **facts,
    )  # fmt: skip
    return view, problem


def _image(pair: Pair, reading: Reading, geometry: Geometry) -> tuple[np.ndarray | None, str]:
    # a picture without its image still shows the outlines: an image that cannot be read is not worth losing the scores
    if not pair.images:
        return None, ""
    try:
        spec, dims = reading.spec, len(geometry.shape)
        if spec is None:
            volume = read_image(pair.images[0], dims=dims, case=pair.case, affine=reading.affine)
        else:
            channels = spec.in_channels if len(pair.images) == 1 else 1
            colour = "rgb" if spec.colour in ("rgb", "grey", "luma") and spec.dims == 2 else None
            volume = read_image(
                pair.images[0], dims=dims, channels=None if colour else channels, colour=colour, nan=spec.nan,
                affine=spec.affine,
            )  # fmt: skip
        if volume.geometry.kind == geometry.kind == "volume":
            check_pair(volume.geometry, geometry)
    except MedsegError as error:
        return None, f"{pair.images[0].name}: {error.message}"
    if volume.geometry.shape != geometry.shape:
        sizes = (" x ".join(map(str, one.shape)) for one in (volume.geometry, geometry))
        return None, "{} has {} voxels, its labels have {}".format(pair.images[0].name, *sizes)
    return volume.array, ""


def calibration_entries(results: Sequence[CaseScores], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Reliability of the probabilities, per label, over all cases: bins and the expected calibration error."""
    entries = []
    for index, label in labels.items():
        counts = [r.calibration[index] for r in results if index in r.calibration]
        if not counts:
            continue
        voxels, total, right = np.sum(counts, axis=0)
        if not voxels.sum():
            continue
        bins = [
            {"probability": float(t / v) if v else 0.0, "frequency": float(r / v) if v else 0.0, "count": int(v)}
            for v, t, r in zip(voxels, total, right, strict=True)
        ]
        entries.append({"label": label, "error": float(np.abs(total - right).sum() / voxels.sum()), "bins": bins})
    return entries

"""A second observer's labels, scored against the first's by the same code as predictions: what a human reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from medseg.errors import DataError
from medseg.evaluation_names import match_names, shorter_names
from medseg.evaluation_pairs import Pair, Reading, check_grids, find_predictions
from medseg.evaluation_plan import Plan
from medseg.evaluation_pool import map_cases
from medseg.evaluation_scoring import collect_rows, score_pair
from medseg.tables import write_cases

__all__ = ["find_observer", "score_observer"]


def find_observer(
    pairs: Sequence[Pair], observer: str | Path, data: str | Path | None, *, affine: str = "auto"
) -> list[Pair]:
    """The cases that a second observer labelled too, with those labels in the place of the prediction.

    Args:
        pairs: the cases.
        observer: a folder of label images named as the cases or their images, or so with one text around all; or a path
            with `{id}` for the case's id, below the working folder or the data root.
        data: the data root, or None.
        affine: which one of a NIfTI counts, see `Reading`.

    Raises:
        DataError: no case has such a label, or the grids differ; a file is named as the images of several cases.
    """
    text = str(observer)
    roots = [Path(), *([Path(data)] if data is not None else [])]
    if "{id}" in text:
        files = {pair.case: _first(roots, text.replace("{id}", pair.case)) for pair in pairs}
    else:
        present = find_predictions(_first(roots, text) or text, "a second observer's labels", "--observer")
        if not present.keys() & (cases := {pair.case for pair in pairs}):  # `a1_2ndHO` for `a1`
            short = shorter_names(present, cases)
            present = {short.get(name, name): path for name, path in present.items()}
        names = match_names({pair.case: pair.images for pair in pairs}, present)
        files = {case: None if name is None else present[name] for case, name in names.items()}
    found = [replace(pair, prediction=files[pair.case], probabilities=None) for pair in pairs if files[pair.case]]
    if not found:
        raise DataError(
            "no case has a label of the second observer", code="E350", field="--observer", file=text,
            expected=f"a file for {', '.join(pair.case for pair in pairs[:3])} ...",
            fix="give a folder whose files are named as the cases, or a path with {id}",
        )  # fmt: skip
    check_grids(found, resample=False, affine=affine)
    return found


def score_observer(
    folder: Path,
    plan: Plan,
    reading: Reading,
    pairs: Sequence[Pair],
    *,
    scores: Callable[..., list[dict[str, Any]]],
    workers: int,
    progress: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Score the second observer, write observer.csv, and give what summary.json and its notes say.

    Args:
        folder: for observer.csv.
        plan: of the evaluation.
        reading: how its labels are read; the observer's files are read as the references are.
        pairs: of `find_observer`.
        scores: `summarise_rows` with the evaluation's groups and seed.
        workers, progress: as in `evaluate`.
    """
    spec = reading.spec
    encoding: Any = reading.encoding if spec is None else spec.encoding
    if spec is not None and spec.colours:
        encoding = {tuple(rgb): index for index, rgb in spec.colours.items()}
    work = partial(
        score_pair,
        reading=replace(reading, prediction_encoding=encoding),
        scoring=replace(plan.scoring, skip=True),  # labels have no probabilities
    )
    results = map_cases(work, pairs, workers=workers, progress=progress, title="scoring the second observer")
    rows, better = collect_rows(results, plan.scoring.metrics)
    write_cases(folder / "observer.csv", rows)
    lacking = len(plan.pairs) - len(pairs)
    notes = [f"{lacking} cases have no label of the second observer, whose lines are over the other {len(pairs)}."]
    return {"cases": len(pairs), "scores": scores(rows, better=better)}, notes if lacking else []


def _first(roots: Sequence[Path], name: str) -> Path | None:
    return next((root / name for root in roots if (root / name).exists()), None)

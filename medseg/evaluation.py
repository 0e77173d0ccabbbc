"""Evaluation: predictions against references, every case scored, nothing left out, with intervals.

Writes cases.csv (one line per case, label and score), summary.json (means, intervals, what was missing), views/
(pictures for the report) and, when asked for, scores.md and scores.tex. Schemas: docs/cases_csv.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from medseg import __version__
from medseg.errors import UsageError
from medseg.errors_arguments import checked
from medseg.evaluation_folder import results_folder
from medseg.evaluation_labels import settle_labels
from medseg.evaluation_numbers import numbering_notes
from medseg.evaluation_observer import find_observer, score_observer
from medseg.evaluation_pairs import Reading, check_grids, without_probabilities
from medseg.evaluation_plan import Plan, make_plan
from medseg.evaluation_pool import count_workers, largest_reference, map_cases
from medseg.evaluation_scoring import CaseScores, collect_rows, score_pair
from medseg.evaluation_sources import tell_other_images
from medseg.evaluation_views import calibration_entries, choose_cases, said, write_views
from medseg.files import probe_writable, write_text
from medseg.run import RunFolder, seen_before
from medseg.tables import (
    POOLED,
    SCHEMA,
    ScoreRow,
    all_scores,
    read_cases,
    read_summary,
    summarise_rows,
    write_cases,
    write_summary,
)
from medseg.tables_text import latex_table, markdown_table, table_lines  # fmt: skip

__all__ = ["Evaluation", "evaluate", "pool_runs"]

_FORMATS = {"markdown": ("scores.md", markdown_table), "latex": ("scores.tex", latex_table)}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        folder: where cases.csv and summary.json are.
        rows: the lines of cases.csv.
        summary: the content of summary.json.
        missing: cases without a prediction, counted as missed.
        extra: predictions without a reference, not scored.
    """

    folder: Path
    rows: tuple[ScoreRow, ...] = field(repr=False)
    summary: Mapping[str, Any] = field(repr=False)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 4 when predictions are missing."""
        return 4 if self.missing else 0

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines of the printed table."""
        return table_lines(all_scores(self.summary))

    def as_dict(self) -> dict[str, Any]:
        """The summary with the folder, for `--json`."""
        return {"folder": str(self.folder), "exit_code": self.exit_code, **self.summary}


@checked
def evaluate(
    predictions: str | Path,
    reference: str | Path | None = None,
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    run: str | Path | None = None,
    part: str = "test",
    protocol: str | Mapping[str, Any] | None = None,
    metrics: str | Sequence[Any] | None = None,
    labels: str | Mapping[int, str] | None = None,
    ignore: int | None = None,
    resample: bool = False,
    observer: str | Path | None = None,
    workers: int | None = None,
    formats: str | Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Score predictions against references.

    A reference without a prediction is scored as missed. A prediction on another grid, a value that is no label, a
    broken file: the evaluation is refused as a whole, with all problems told, since a mean over the rest would not be
    honest.

    Args:
        predictions: folder of label images; or a run, whose validation cases are scored (`reference` None).
        reference: folder of label images of the same names, or the name of a data set.
        output: folder for the results; `scores` inside `predictions`, or the run's `validation`, when None.
        data: data root, when the reference is a data set or a run's validation part; MEDSEG_DATA when None.
        images: folder of the images, for the report's pictures, when the reference is a folder.
        run: run whose label names and scores are used with a reference folder. A folder of runs stands for its newest,
            here and as `predictions`.
        part: part of the data set: "training", "validation", "test".
        protocol: named set of scores ("msd", "msd: {tolerance: 7}"); the data set's own when None.
        metrics: names of scores, or components with arguments ("Dice, SurfaceDice: {tolerance: 7}" in one text too);
            they come before any protocol. For a run they need an `output`, so that its own scores stay.
        labels: index -> name, also as text "1=liver,2=tumour"; for a folder the values that occur when None. One label
            alone may be stored as any value (0 and 255); a note says so.
        ignore: value of void voxels in a folder of references. A run and a data set know their own labels: both
            arguments are refused for a run, this one for a data set.
        resample: bring predictions on other grids to the reference's by nearest neighbour, instead of refusing them.
        observer: a second observer's labels, scored by the same code beside the predictions: a folder with the cases'
            names, or a pattern such as `labels/{id}_2ndHO.png` (below the working folder or the data root).
        workers: processes; as many as cores and memory allow when None.
        formats: "markdown", "latex": tables to write beside.
        seed: of the bootstrap.
        progress: show a bar on standard error, or without a terminal a line now and then.

    Returns:
        Evaluation; its `exit_code` is 4 when predictions are missing.

    Raises:
        UsageError: wrong arguments, unknown score or protocol.
        DataError: no pair is found, grids differ, values are wrong, files are broken.
        ResourceError: the output cannot be written.

    >>> import tempfile
    >>> import numpy as np
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, columns in (("masks", 4), ("labels", 6)):
    ...     (folder / name).mkdir()
    ...     Image.fromarray(np.uint8(np.arange(8) < columns)[None].repeat(4, 0)).save(folder / name / "a.png")
    >>> evaluate(folder / "masks", folder / "labels", metrics="Dice", labels="1=cell").rows[0].value  # 32 / (16 + 24)
    0.8
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    for name in formats:
        if name not in _FORMATS:
            raise UsageError("unknown format of table", field="formats", expected=", ".join(_FORMATS), found=name)
    started = time.time()
    plan = make_plan(
        predictions, reference, output=output, data=data, images=images, run=run, part=part, protocol=protocol,
        metrics=metrics, labels=labels, ignore=ignore,
    )  # fmt: skip
    watched = None if observer is None else find_observer(plan.pairs, observer, data, affine=plan.reading.affine)
    probe_writable(plan.output)
    resampled = check_grids(plan.pairs, resample=resample, affine=plan.reading.affine)
    pairs, told = without_probabilities(plan.pairs, resampled)
    plan = replace(plan, pairs=pairs, notes=[*plan.notes, *told, *tell_other_images(pairs)])
    largest = 0 if workers else largest_reference(plan.pairs, affine=plan.reading.affine)  # not read in vain
    count = count_workers(workers, len(plan.pairs), largest)
    reading, notes = settle_labels(plan, workers=count, progress=progress)
    scoring = replace(plan.scoring, stored=any(pair.probabilities for pair in plan.pairs))
    work = partial(score_pair, reading=reading, scoring=scoring)
    results = map_cases(work, plan.pairs, workers=count, progress=progress, title="scoring")
    rows, better = collect_rows(results, plan.scoring.metrics)
    summary = _summarise(plan, reading, rows, better, results, seed, [*plan.notes, *notes])
    summary["cases"]["resampled"] = resampled
    chosen, metric = choose_cases(rows, better, summary["main_score"])
    attention = None
    if plan.run is not None:
        from medseg.evaluation_attention import AttentionMaps

        try:
            attention = AttentionMaps(plan.run)
        except Exception as error:  # the scores are worth more than what the report shows beside them
            summary["notes"].append(f"There are no attention maps: {said(error)}.")
    with results_folder(plan.output) as folder:
        if watched is not None:
            scores = partial(summarise_rows, groups=summary["groups"], seed=seed)
            more = score_observer(folder, plan, reading, watched, scores=scores, workers=count, progress=progress)
            summary["observer"], note = more
            summary["notes"] += note
        summary["views"], more_notes = write_views(
            folder / "views", chosen, metric, plan.pairs, reading, plan.scoring.instances, attention
        )
        summary["notes"] += more_notes
        summary["seconds"] = round(time.time() - started, 1)
        return _write(folder, plan.output, rows, summary, formats)


def pool_runs(runs: Sequence[str | Path], *, output: str | Path | None = None, seed: int = 0) -> Evaluation:
    """Scores of several folds together: every case was predicted by the one model that had not seen it.

    Args:
        runs: run folders (or folders with cases.csv) of the same data set, scored before.
        output: folder; `cross_validation` beside the first run when None.
        seed: of the bootstrap.

    Raises:
        UsageError: no runs, or a case occurs in two of them.
        DataError: a run has no scores.
    """
    folders = [
        next((p for p in (Path(run) / "validation", Path(run)) if (p / "cases.csv").is_file()), Path(run))
        for run in runs
    ]
    if not folders:
        raise UsageError("no runs to put together", field="runs")
    rows: list[ScoreRow] = []
    seen: dict[str, Path] = {}
    summaries = []
    for folder in folders:
        own = [row for row in read_cases(folder / "cases.csv") if row.case != POOLED]
        for case in dict.fromkeys(row.case for row in own):
            if case in seen:
                both, expected = f"{seen[case]}, {folder}", "folds, which share no case"
                raise UsageError("a case is in two runs", case=case, expected=expected, found=both)
            seen[case] = folder
        rows += own
        summaries.append(read_summary(folder / "summary.json"))
    first = summaries[0]
    better = {s["metric"]: s["better"] for summary in summaries for s in summary["scores"]}
    groups = {case: group for summary in summaries for case, group in summary.get("groups", {}).items()}
    if groups:  # of a fold in which each case is a patient by itself none are written
        groups = {case: groups.get(case, case) for case in seen}
    joined = {
        name: [v for s in summaries for v in s["cases"].get(name, [])] for name in ("missing", "extra", "resampled")
    }
    known = [note for run in runs for note in seen_before(RunFolder(run).read_json("split.json") or {})]
    summary = {
        **{k: first.get(k) for k in ("schema", "kind", "medseg", "dataset", "protocol", "main_score", "labels")},
        "unit": first.get("unit"), "title": f"{len(folders)} folds together: {first.get('title', '')}",
        "created": _now(),
        "runs": [Path(run).resolve().name for run in runs], "cases": {"count": len(seen), **joined}, "groups": groups,
        "volumes": [v for s in summaries for v in s.get("volumes", [])], "views": [], "calibration": [],
        "bootstrap": _bootstrap(groups, seed), "scores": summarise_rows(rows, better=better, groups=groups, seed=seed),
        "notes": ["Scores that are computed over all cases at once are not put together from folds.", *known],
    }  # fmt: skip
    target = Path(output) if output is not None else Path(runs[0]).parent / "cross_validation"
    with results_folder(target) as folder:
        return _write(folder, target, rows, summary, ())


def _summarise(
    plan: Plan, reading: Reading, rows: Sequence[ScoreRow], better: Mapping[str, str], results: Sequence[CaseScores],
    seed: int, notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    groups = {pair.case: pair.group for pair in plan.pairs if pair.group}
    groups = groups if len(set(groups.values())) < len(groups) else {}  # every case its own patient: nothing to group
    skipped = sorted({name for result in results for name in result.result.skipped})
    if skipped and plan.scoring.skip:
        notes.append(
            f"Not scored, since no probabilities are stored: {', '.join(skipped)} (predict with --save-probabilities)."
        )
    volumes = [
        {"case": r.case, "label": label, "prediction": p, "reference": v, "unit": unit}
        for r in results for label, (p, v, unit) in r.volumes.items()
    ]  # fmt: skip
    overlaps = [result.overlaps for result in results]
    notes += numbering_notes(volumes, overlaps, reading.labels, folder=plan.dataset is None)
    return {
        "schema": SCHEMA, "kind": "evaluation", "title": plan.title, "created": _now(), "medseg": __version__,
        "predictions": plan.predictions, "references": plan.references, "dataset": plan.dataset,
        "protocol": plan.protocol, **({"threshold": plan.threshold} if plan.threshold else {}),
        "main_score": plan.scoring.main_shown(results[0].unit),
        "labels": {str(k): v for k, v in reading.labels.items()}, "unit": results[0].unit,
        "cases": {
            "count": len(plan.pairs), "missing": [pair.case for pair in plan.pairs if pair.prediction is None],
            "extra": plan.extra,
        },
        "groups": groups, "bootstrap": _bootstrap(groups, seed),
        "scores": summarise_rows(rows, better=better, groups=groups, seed=seed),
        "volumes": volumes, "calibration": calibration_entries(results, reading.labels), "notes": notes,
    }  # fmt: skip


def _bootstrap(groups: Mapping[str, str], seed: int) -> dict[str, Any]:
    return {"level": 0.95, "n": 2000, "seed": seed, "by": "patients" if groups else "cases"}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def _write(
    folder: Path, final: Path, rows: Sequence[ScoreRow], summary: dict[str, Any], formats: Sequence[str]
) -> Evaluation:
    write_cases(folder / "cases.csv", rows)
    write_summary(folder / "summary.json", summary)
    for name in formats:
        file, make = _FORMATS[name]
        write_text(folder / file, make(all_scores(summary)))
    cases = summary["cases"]
    return Evaluation(final, tuple(rows), summary, tuple(cases["missing"]), tuple(cases["extra"]))

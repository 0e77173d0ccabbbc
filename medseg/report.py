"""The report: one HTML file that tells what was run and how good it is, to anyone who opens it on any screen, offline.

It is drawn from the files of a run or of an evaluation folder alone: cases.csv, summary.json and views/, and for a run
also pipeline.yaml, split.json, provenance.json, status.json and log.csv. Everything that comes from files (names of
cases and labels, log text) is escaped by the template engine; a content security policy forbids every load from the
network.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medseg import __version__
from medseg.errors import DataError
from medseg.files import write_text
from medseg.report_facts import hide_paths, read_log, read_plain_json, run_facts, training_curves
from medseg.report_pictures import COLOURS, ERROR_COLOURS, draw_planes, shows_objects
from medseg.report_scores import score_sections
from medseg.tables import ScoreRow, read_cases, read_summary, summarise_rows
from medseg.views import read_views

__all__ = ["find_scores", "write_report"]


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run or of an evaluation.

    Args:
        folder: a run folder (with or without scores in `validation/`), or a folder with cases.csv.
        output: file to write; `folder/report.html` when None; a folder gets `report.html` inside.

    Returns:
        The path of the page. It is self-contained: no remote address, no second file.

    Raises:
        DataError: the folder does not exist or holds neither scores nor a training log.
        FormatError: cases.csv, summary.json or a view is broken.
        ResourceError: the page cannot be written.
    """
    folder = Path(folder)
    scores = find_scores(folder)
    is_run = (folder / "pipeline.yaml").is_file() or (folder / "log.csv").is_file()
    if scores is None and not is_run:
        raise DataError(
            "there is nothing to report", code="E302", file=folder,
            expected="cases.csv, or a run with pipeline.yaml or log.csv",
            found="a folder without them" if folder.is_dir() else "no such folder", fix="run `medseg evaluate` first",
        )  # fmt: skip
    target = folder / "report.html" if output is None else Path(output)
    target = target / "report.html" if target.is_dir() else target
    write_text(target, render(folder, scores))
    return target


def find_scores(folder: str | Path) -> Path | None:
    """The folder that holds cases.csv: the folder itself, or a run's `validation/`; None if there is none."""
    folder = Path(folder)
    return next((p for p in (folder, folder / "validation") if (p / "cases.csv").is_file()), None)


def render(folder: Path, scores: Path | None) -> str:
    """The page as text; `scores` as `find_scores` returns it."""
    notes: list[str] = []
    rows: list[ScoreRow] = []
    summary: dict[str, Any] = {}
    if scores is not None:
        rows = read_cases(scores / "cases.csv")
        if (scores / "summary.json").is_file():
            summary = read_summary(scores / "summary.json")
        else:  # written by another program: the means are computed here, without what only an evaluation knows
            summary = {"scores": summarise_rows(rows, better={})}
            notes.append(
                "There is no summary.json beside cases.csv: the means were computed for this page, "
                "cases without scores are not known."
            )
    status, provenance, split, threshold = (
        read_plain_json(folder / f"{name}.json", notes) for name in ("status", "provenance", "split", "threshold")
    )
    pipeline = _read_text(folder / "pipeline.yaml", notes)
    columns = read_log(folder / "log.csv", notes)
    # the page is sent to others: where the files lay is none of their business
    folders = [str(provenance.get("data") or ""), os.path.expanduser("~"), str(folder.resolve()), str(Path.cwd())]
    status, provenance, summary, pipeline, notes = (
        hide_paths(part, folders) for part in (status, provenance, summary, pipeline, notes)
    )
    page = score_sections(rows, summary)
    if split and not split.get("validation") and not rows:
        page["sentences"] = ["No case was kept for validation: this run was trained on all of them and scores none."]
    # without the summary that names them they may be of another evaluation, which was killed before it wrote its own
    page["cases"] = _pictures(scores, summary) if scores and (scores / "summary.json").is_file() else []
    page["cases_hint"] = _pictures_hint(page["cases"])
    page["sliders"] = any(len(plane.captions) > 1 for case in page["cases"] for plane in case["planes"])
    objects = any(case["objects"] for case in page["cases"])
    errors = [(name if not objects else name.replace("label", "object"), c) for name, c in ERROR_COLOURS.items()]
    page["swatches"] = [*([] if objects else _label_swatches(summary)), *errors]
    page["curves"] = training_curves(columns)
    page["training_hint"] = _training_hint(columns)
    if notes:
        page["alerts"].append({"kind": "warn", "title": "Notes on this page", "lines": notes})
    # the summary tells the threshold that was used; of a run that scores nothing the run itself does
    facts = summary or ({"threshold": threshold} if threshold else {})
    page["facts"] = run_facts([_summary_facts(facts), provenance, _split_facts(split), status])
    page["facts"].append(("Page written", time.strftime("%Y-%m-%d %H:%M %Z")))
    page["texts"] = [("The pipeline, as it ran", pipeline)] if pipeline else []
    page["title"] = _title(folder, summary, pipeline)
    page["subtitle"] = _subtitle(summary, split)
    page["sections"] = [(i, n) for i, n in _SECTIONS if page.get(_NEEDS.get(i, "title"))]
    return _environment().get_template("report.html.j2").render(page)


_SECTIONS = (
    ("scores", "Scores"), ("pooled", "Together"), ("spread", "Every case"), ("agreement", "Volumes"),
    ("cases", "Pictures"), ("calibration", "Calibration"), ("training", "Training"), ("table", "All cases"),
    ("run", "What was run"), ("words", "Words"),
)  # fmt: skip
_NEEDS = {
    "scores": "scores", "pooled": "pooled", "spread": "strips", "agreement": "agreement", "cases": "cases",
    "calibration": "calibration", "training": "curves", "table": "wide",
}  # fmt: skip


def _environment() -> Any:
    import jinja2

    place = resources.files("medseg") / "resources" / "report"

    def load(name: str) -> str:
        return (place / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(load),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = load("style.css"), load("script.js")
    environment.globals |= {
        "version": __version__,
        "style": Markup(style),  # our own files, named by their hash in the policy
        "script": Markup(script),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "calibration": [],
    }
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return ""


def _pictures(scores: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    labels = {int(k): v for k, v in summary.get("labels", {}).items()}
    shown = []
    for number, view in enumerate(read_views(scores / "views")):
        size = " × ".join(f"{v:.3g}" for v in view.spacing)
        score = f"{view.metric} {view.score:.3f}. " if view.score is not None else ""
        spacing = f"Drawn with voxels of {size} {view.unit}" if view.unit != "px" else ""
        text = score + ". ".join(part for part in (view.part[:1].upper() + view.part[1:], spacing) if part) + "."
        objects = shows_objects(view, labels)
        facts = {"planes": draw_planes(view, labels, objects=objects), "objects": objects}
        shown.append({"number": number, "role": view.role, "name": view.case, "text": text, **facts})
    return shown


def _pictures_hint(cases: list[dict[str, Any]]) -> str:
    if not cases:
        return ""
    roles = "The best case, the one in the middle and the worst ones" if len(cases) > 1 else "The only case"
    if any(case["objects"] for case in cases):
        roles += ". A predicted object has the colour of the object in the reference that it shares most with"
    if any(len(case["planes"]) > 1 for case in cases):
        return (
            f"{roles}. The patient's right (R) is at the left of the picture, as on a viewing station; A front, P "
            "back, S head, I feet. Not for diagnosis: grey values are set by the picture's own range."
        )
    return f"{roles}. Grey values are set by the picture's own range."


def _label_swatches(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, COLOURS[(int(index) - 1) % len(COLOURS)]) for index, name in list(summary.get("labels", {}).items())[:12]
    ]


def _training_hint(columns: Mapping[str, list[tuple[float, float]]]) -> str:
    if not columns:
        return ""
    count = max(len(points) for points in columns.values())
    text = f"{count} line{'s' * (count != 1)} of log.csv. The loss is what training makes small"
    scored = bool(columns.get("score"))
    return text + ("; the validation score is measured on cases that were not trained on." if scored else ".")


def _summary_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    facts = {k: v for k, v in summary.items() if k not in ("cases", "scores")}
    threshold = summary.get("threshold")
    if isinstance(threshold, Mapping):
        facts["threshold"] = (
            f"{threshold.get('value', 0):.4g}, chosen on the {threshold.get('cases')} {threshold.get('chosen_on')} "
            f"cases ({threshold.get('rule')})"
        )
    bootstrap = summary.get("bootstrap")
    if isinstance(bootstrap, Mapping):
        facts["intervals"] = (
            f"bootstrap of {bootstrap.get('by', 'cases')}, {bootstrap.get('n')} draws, seed {bootstrap.get('seed')}"
        )
    return facts


def _split_facts(split: Mapping[str, Any]) -> dict[str, Any]:
    if not split:
        return {}
    kept = list(map(str, split.get("validation", [])))  # with their number: a name may be a number too
    named = f"{len(kept)}: {', '.join(kept[:12])}{' ...' * (len(kept) > 12)}" if kept else ""
    return {
        "split": _fold(split, f" of {split.get('folds')}, seed {split.get('seed')}"),
        "training cases": len(split.get("training", [])), "validation cases": named,
    }  # fmt: skip


def _fold(split: Mapping[str, Any], more: str = "") -> str:
    """`more` only where there are folds: after `--fold none` nothing was drawn."""
    return f"fold {split['fold']}{more}" if split.get("fold") is not None else "no validation"


def _title(folder: Path, summary: Mapping[str, Any], pipeline: str) -> str:
    if summary.get("title"):
        return str(summary["title"])
    head = pipeline.lstrip("\ufeff").splitlines()[0].lstrip("# ").strip() if pipeline.startswith("#") else ""
    return head or f"Scores of {folder.resolve().name}"


def _subtitle(summary: Mapping[str, Any], split: Mapping[str, Any]) -> str:
    parts = [
        f"Data: {summary['dataset']}" if summary.get("dataset") else "",
        str(summary.get("created", ""))[:16].replace("T", " "),
    ]
    if split:
        parts.append(
            f"{_fold(split)}: {len(split.get('training', []))} cases trained on, "
            f"{len(split.get('validation', []))} held out"
        )
    return " · ".join(part for part in parts if part)

"""What was run: facts of a run or an evaluation folder, and its training curves, as the report shows them.

Only files inside the folder are read; a file that is missing leaves its lines out, a broken one is named.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medseg.errors import listed
from medseg.report_figures import curve_plot

__all__ = ["hide_paths", "read_log", "read_plain_json", "run_facts", "training_curves"]

_HIDDEN = {
    "schema",
    "scores",
    "cases",
    "groups",
    "views",
    "labels",
    "calibration",
    "observer",
    "volumes",
    "files",
    "bootstrap",
    "hashes",
    "data_hashes",
    "environment",
}
_LONG = 400
_LINES = 6  # in one figure
_ABSOLUTE = re.compile(r"(?:/|~/|[A-Za-z]:[/\\]|\\\\)")
_ADDRESS = re.compile(r"[a-z]+://")
# an absolute path inside a text: it begins where no word, address or relative path goes on
_PATH = re.compile(r"(?<![\w./:\\])(?:/|~/|[A-Za-z]:[/\\]|\\\\)[^\s,;'\"<>()]+")


def read_plain_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file; a broken file is told in `notes`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def run_facts(parts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Name and text of every plain fact in the given JSON objects, nested ones as `outer: inner`; later ones win."""
    facts: dict[str, str] = {}
    for part in parts:
        for name, value in part.items():
            if name in _HIDDEN or value in (None, "", [], {}):
                continue
            if name == "command" and isinstance(value, list):
                facts[_title(name)] = shlex.join(map(str, value))  # whole, to be copied
            elif isinstance(value, Mapping):
                if len(value) > 24 or any(isinstance(v, Mapping | list) for v in value.values()):
                    facts[_title(name)] = f"{len(value)} entries"
                else:
                    facts[_title(name)] = ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v not in (None, ""))
            else:
                facts[_title(name)] = _text(value)
    return list(facts.items())


def hide_paths(value: Any, folders: Sequence[str] = ()) -> Any:
    """`value` with every absolute path in its texts shortened to its last part: a report is sent to others.

    Args:
        value: text, or lists and mappings of such values; others are given back as they are.
        folders: folders whose names are known to occur, blanks included (the data root, the home folder).

    >>> hide_paths(["--data", "/home/jane doe/ct", "liver.yaml", "see /srv/runs/liver/log.csv, https://x.org/a"])
    ['--data', 'ct', 'liver.yaml', 'see log.csv, https://x.org/a']
    """
    if isinstance(value, Mapping):
        return {key: hide_paths(part, folders) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths(part, folders) for part in value]
    if not isinstance(value, str):
        return value
    if _ABSOLUTE.match(value) and not _ADDRESS.search(value) and "\n" not in value and "," not in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "folder"
    for folder in sorted((f for f in folders if len(f) > 3), key=len, reverse=True):
        folder = folder.rstrip("/\\")
        # what follows the folder is what names a file; the folder itself only where nothing follows
        value = re.sub(re.escape(folder) + r"[/\\](?=[^\s])", "/", value)
        value = value.replace(folder, "/" + re.split(r"[/\\]", folder)[-1])
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)


def read_log(path: Path, notes: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Columns of log.csv as points over the epoch (or the first column); cells without a number are left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = [name for name in reader.fieldnames or () if name]
    over = next((n for n in ("epoch", "iteration", "step") if n in names), None)
    columns: dict[str, list[tuple[float, float]]] = {name: [] for name in names if name != over}
    for number, line in enumerate(reader, start=1):
        x = _number(line.get(over)) if over else float(number)
        for name, points in columns.items():
            value = _number(line.get(name))
            if value is not None and x is not None:
                points.append((x, value))
    return {name: points for name, points in columns.items() if points}


def training_curves(columns: Mapping[str, list[tuple[float, float]]]) -> list[Markup]:
    """Losses, scores and learning rate, each as one figure."""
    loss, rate, scores = {}, {}, {}
    for name, points in columns.items():
        low = name.lower()
        if low == "score" or low.startswith("val"):  # first: a label may be called "bone loss"
            scores[name] = points
        elif "loss" in low:
            loss[name] = points
        elif low in ("lr", "rate") or "learning" in low:
            rate[name] = points
    figures = []
    for series, label in ((loss, "loss"), (scores, "validation score"), (rate, "learning rate")):
        if series:
            told = label if len(series) <= _LINES else f"{label} ({_LINES} of {len(series)}; log.csv has all)"
            figures.append(curve_plot(dict(list(series.items())[:_LINES]), x_label="epoch", y_label=told))
    return figures


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _title(name: str) -> str:
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return listed(map(_text, value), 12)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    text = str(value)
    return text if len(text) <= _LONG else text[:_LONG] + "…"

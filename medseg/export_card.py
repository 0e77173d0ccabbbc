"""The model card: what a model is for, what it was trained on, how well it does, and what it must not be used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medseg import __version__
from medseg.errors import MedsegError
from medseg.run import known_before, newest_run
from medseg.tables import read_summary
from medseg.tables_text import markdown_table

__all__ = ["model_card"]


def model_card(model: Any, run: str | Path) -> str:
    """Markdown. Scores with intervals come from the run's validation/summary.json, where there is one."""
    spec, pipeline = model.dataset, model.pipeline
    folder = newest_run(run)
    folder = folder if folder.is_dir() else folder.parent
    split, summary = _json(folder / "split.json"), _summary(folder)
    labels = ", ".join(f"{index} {_plain(name)}" for index, name in spec.labels.items())
    size = sum(p.numel() for p in model.network.parameters())
    lines = [
        f"# {_plain(pipeline.title or spec.title)}", "",
        "**Not a medical device. Research use only: not for diagnosis, treatment or any decision about a patient.**",
        "",
        "## Model", "",
        f"- Network: {pipeline.network.name}, {size:,} parameters, {len(pipeline.train.patch)}-D",
        f"- Input: {_plain(spec.modality)}, channels {', '.join(map(_plain, spec.channels))}",
        f"- Output: a label image on the input's grid: {labels}",
        f"- Written by medseg {__version__}", "",
        "## Data", "",
        f"- Set: {_plain(spec.title)}",
        f"- Licence of the data: {_plain(spec.licence)}. Whether the model inherits its terms is for you to find out.",
    ]  # fmt: skip
    if spec.citation:
        lines.append(f"- Cite: {_plain(spec.citation)}")
    if split:
        lines.append(
            f"- Split: fold {split.get('fold')} of {split.get('folds')}, seed {split.get('seed')}, by "
            f"{spec.split.unit}: "
            f"{len(split.get('training', []))} cases trained on, {len(split.get('validation', []))} held out"
            if split.get("validation")
            else f"- Split: none, all {len(split.get('training', []))} cases were trained on"
        )
    lines += ["", "## Scores on the held-out cases", ""]
    if summary:
        lines += [
            markdown_table(summary["scores"]),
            "Intervals: 95 %, bootstrap. Missed structures and false alarms are part of every mean.",
        ]
        lines += [
            "The held-out cases also chose the best checkpoint, so these scores are somewhat too good for new data.",
        ]
        # how many, not which: ids may be names of people
        if known := known_before(split):
            lines.append(f"Of them {len(known)} had trained the weights that training began with: no test of these.")
    else:
        lines += ["None are stored with this model: `medseg evaluate` on cases of your own before any use."]
    lines += [
        "", "## Limits", "",
        "- It was tried on images like those above only: it may fail silently with other scanners, people or "
        "diseases.",
        "- It always answers; it does not know what it has not seen. Every result has to be looked at.",
        "- Scores are means: single cases can be much worse. See the three worst cases in the run's report.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _plain(text: Any) -> str:
    return "".join("\\" + c if c in r"\`*_[]<>#|" else c for c in " ".join(str(text).split()))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return read_summary(folder / "validation" / "summary.json")
    except MedsegError:
        return {}

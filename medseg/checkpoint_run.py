"""Whether a checkpoint is of the run in whose folder it lies, by that folder's pipeline.yaml and split.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.config import Pipeline, load_pipeline
from medseg.errors import CheckpointError, ConfigError

__all__ = ["FREE", "check_run", "choices_of"]

# of `train`, what may be changed while a run goes on: pipeline.yaml then tells the new value before a checkpoint does
FREE = frozenset(
    {"epochs", "iterations", "minutes", "patience", "workers", "validate_every", "keep_every", "save_minutes",
     "keep_on_device"}
)  # fmt: skip
_NAMES = ("name", "title")  # of the file, not of the experiment


def check_run(state: Mapping[str, Any], file: Path) -> bool:
    """Refuse a checkpoint whose pipeline or split is not that of the folder.

    Without it a file of another run would be continued under this run's name, with that run's settings and, worse,
    with cases in training that this run validates on.

    Args:
        state: what `read_state` gave.
        file: where it was read from; pipeline.yaml and split.json lie beside it.

    Returns:
        Whether there was anything to compare with.

    Raises:
        CheckpointError: E366, with the settings that differ.
    """
    differences, compared = [], False
    for name, ours, theirs in (
        ("pipeline.yaml", choices_of(file.with_name("pipeline.yaml")), _pipeline_in(state)),
        ("split.json", _read_json(file.with_name("split.json")), state.get("split")),
    ):
        if isinstance(ours, dict) and isinstance(theirs, Mapping):
            compared = True
            both = [key for key in ours if key in theirs]
            differences += [(name, key, ours[key], theirs[key]) for key in both if ours[key] != theirs[key]]
    if differences:
        name, key, ours, theirs = differences[0]
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            "the checkpoint is of another run than the folder",
            code="E366",
            file=file,
            field=f"{key}{more}",
            expected=f"{_short(ours)} ({name})",
            found=_short(theirs),
            fix="put the run's own last.pt back; where the checkpoint is the right one, move pipeline.yaml and "
            "split.json away",
        )
    return compared


def choices_of(path: Path) -> dict[str, Any] | None:
    """What a run's pipeline.yaml chose, but for what may change while it goes on; None where it cannot be read."""
    try:
        return _flat(load_pipeline(path, check=False))
    except ConfigError:  # missing or unreadable: nothing to compare with
        return None


def _pipeline_in(state: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return _flat(Pipeline.from_dict(state["pipeline"]))
    except (KeyError, TypeError, ConfigError):  # of another version: told by who needs the pipeline
        return None


def _flat(pipeline: Pipeline) -> dict[str, Any]:
    plain = pipeline.to_dict()
    train = {f"train.{key}": value for key, value in plain.pop("train").items() if key not in FREE}
    return {key: value for key, value in plain.items() if key not in _NAMES} | train


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

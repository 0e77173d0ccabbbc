"""Which stored values stand for which label: decided for all files together before the first one is scored.

A folder of label images does not say how its values are meant. Where one label alone is scored, images that hold 0 and
one other value are masks of it, whatever that value is; a run's data set says how its own references are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from medseg.entry_labels import may_be_objects
from medseg.errors import LabelError, MedsegError, UsageError
from medseg.evaluation_pairs import Reading
from medseg.evaluation_plan import Plan
from medseg.evaluation_pool import map_cases
from medseg.evaluation_scoring import label_values
from medseg.volumes_labels import WHITE

__all__ = ["settle_labels"]

_COLOURED = ("colours",)  # of a file that holds colours instead of values


def settle_labels(plan: Plan, *, workers: int, progress: bool) -> tuple[Reading, list[str]]:
    """How the plan's files are read: names of labels where none were given, masks of any value, a run's encoding.

    Args:
        plan: what is scored.
        workers, progress: as in `evaluate`.

    Returns:
        The reading, and notes on every value that was taken for another.

    Raises:
        UsageError: no labels were named and all references are empty.
        MedsegError: no labels were named and references cannot be read. With named labels such files are left to the
            scoring, which tells of all of them.
    """
    reading, names = plan.reading, dict(plan.reading.labels)
    if reading.spec is not None:
        return reading, []
    if plan.scoring.instances:  # objects may have any number
        return (reading if names else Reading({1: "object"}, ignore=reading.ignore)), []
    if len(names) > 1 and plan.encoding is None:
        return reading, []
    look = partial(_look, workers=workers, progress=progress, title="looking at labels")
    stored = look([pair.reference for pair in plan.pairs], reading, strict=not names)
    if stored is None:
        return reading, []
    notes: list[str] = []
    if plan.encoding is not None:
        table, notes = _stored_as(plan.encoding, stored, names, reading.ignore)
        reading = replace(reading, encoding=table)
    values = _values(stored, reading.ignore)
    if not names and (called := _called(stored)):
        return replace(reading, labels=called), notes
    if not names and not values:
        fix = "name them: --labels 1=liver"
        raise UsageError("all references are empty, so there are no labels to score", field="labels", fix=fix)
    if not names and len(values) > 1:
        return _as_stored(reading, values), _may_be_objects(stored, values)
    if len(names) > 1:
        return reading, notes
    label = next(iter(names), 1)
    if reading.encoding is None and values != {label} and values:
        if not _is_mask(stored, label, {label, *values}, reading.ignore):
            return reading if names else _as_stored(reading, values), notes
        reading = replace(reading, encoding=dict.fromkeys(values, label))
        notes.append(_told("references", values, label, names.get(label)))
    predicted = look([pair.prediction for pair in plan.pairs if pair.prediction], reading, strict=False)
    found = set() if predicted is None else _values(predicted)
    if predicted is None or not _is_mask(predicted, label, {label, *values}):
        # for the message of a prediction with several values, the references' value is the label that was expected
        return reading if names else _as_stored(plan.reading, values), notes if names else []
    if found - {label}:
        reading = replace(reading, prediction_encoding=dict.fromkeys(found, label))
        notes.append(_told("predictions", found, label, names.get(label)))
    if not names:
        names = {1: "label 1" if values == {1} else "foreground"}
    return replace(reading, labels=names), notes


def _called(found: Iterable[Any]) -> dict[int, str]:
    """The names of the values where the files tell them (3D Slicer), and all the same.

    Raises:
        UsageError: E101, a value is called so in one file and otherwise in another, or has no name in one.
    """
    told = {(value, name or "") for one in found if isinstance(one, dict) for value, name in one.items()}
    values, names = {value for value, _ in told}, {name for _, name in told}
    if not any(names):
        return {}
    if "" not in names and len(values) == len(names) == len(told):
        return dict(sorted(told))
    listed = ", ".join(f"{value} = {name or 'no name'}" for value, name in sorted(told)[:8])
    raise UsageError(
        "the numbers of segments do not mean the same in all references", field="labels", found=listed,
        fix="name the labels, numbered as in the predictions: --labels 1=liver,2=tumour; or --run RUN",
    )  # fmt: skip


def _look(files: list[Path], reading: Reading, *, strict: bool, **how: Any) -> list[Any] | None:
    """The values of each file, or `_COLOURED`; None where one cannot be read and that is not to be told here."""
    found = map_cases(partial(_values_of, reading=reading, strict=strict), files, **how)
    return None if None in found else found


def _values_of(path: Path, reading: Reading, strict: bool) -> Any:
    try:
        return label_values(path, reading)
    except MedsegError as error:
        if strict:
            raise
        return _COLOURED if isinstance(error, LabelError) and error.code == "E334" else None


def _values(found: Iterable[Any], ignore: int | None = None) -> set[int]:
    return {value for one in found for value in one if one != _COLOURED} - {ignore}


def _is_mask(found: list[Any], label: int, known: set[int], ignore: int | None = None) -> bool:
    """Whether each file holds one value at most, and these can only stand for the one label."""
    values = _values(found, ignore)
    single = all(one != _COLOURED and len(set(one) - {ignore}) <= 1 for one in found)
    white = label in WHITE and values <= WHITE
    return single and (white or (len(values) <= 1 and values <= known))


def _may_be_objects(found: list[Any], values: set[int]) -> list[str]:
    """A note where the values may be the numbers of single objects, by the rule of `data add`."""
    counts = {len(set(one) & values) for one in found}
    if not may_be_objects(len(values), counts):
        return []
    return [
        f"The references hold {min(counts)} to {max(counts)} values each, which were scored as classes. If they are "
        "the numbers of single objects, ask for scores of objects: --metric AP50,PQ,AJI."
    ]


def _as_stored(reading: Reading, values: set[int]) -> Reading:
    return replace(reading, labels={value: f"label {value}" for value in sorted(values)})


def _stored_as(encoding: Any, stored: list[Any], names: Mapping[int, str], ignore: int | None) -> tuple[Any, list[str]]:
    """The data set's encoding, if the references are stored so, and a note where they could be read either way."""
    values = _values(stored, ignore)
    listed = ", ".join(map(str, sorted(values))) or "colours"
    used = [f"The references hold {listed}: they were read as the run's data set stores its labels."]
    if encoding == "nonzero":
        return ("nonzero", used) if values - {1} else (None, [])
    coloured = any(not isinstance(key, int) for key in encoding)
    if coloured:
        return (encoding, used) if _COLOURED in stored else (None, [])
    if not values <= {0, *names}:
        return (encoding, used) if values <= {0, *encoding} else (None, [])
    moved = sorted(value for value in values if encoding.get(value, value) != value)
    text = ", ".join(map(str, moved))
    note = f"The references' values {text} were taken for labels as they are, not for what the data set stores so."
    return None, [note] if moved else []


def _told(what: str, values: set[int], label: int, name: str | None) -> str:
    listed = " and ".join(map(str, sorted(values)))
    called = f"label {label}" if name is None else f"label {label} ({name})"
    return f"The {what} hold 0 and {listed}: {listed} was taken as {called}."

"""What all configuration models share: strict, frozen, faults told with file, line, key and the nearest valid key."""

from __future__ import annotations

import json
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.component import nearest
from medseg.config_yaml import Document, Path_
from medseg.errors import ConfigError, MedsegError, collect

__all__ = ["Strict", "from_plain", "validate"]


class Strict(BaseModel):
    """Frozen; unknown keys refused; no conversion between types (but a list fits a tuple, and 1 fits a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


Model = TypeVar("Model", bound=Strict)


def validate(model: type[Model], document: Document, prefix: Path_ = ()) -> tuple[Model | None, list[MedsegError]]:
    """The model made of `document.value`, or None and everything that is wrong with it.

    Args:
        model: a subclass of Strict.
        document: the values and where they were written.
        prefix: path of the value inside the file, for the places (`("liver",)` for an entry of datasets.yaml).
    """
    value = document.value
    if not isinstance(value, dict):
        place = str(document.place(prefix))
        return None, [ConfigError("expected keys and values", code="E111", file=place, found=_short(value))]
    try:
        return model.model_validate_json(json.dumps(value)), []
    except ValidationError as error:
        return None, _problems(error, model, document, prefix)


def from_plain(model: type[Model], value: dict[str, Any], source: str) -> Model:
    """The model from plain values without a file, such as a checkpoint's; `source` is what messages call it.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    found, problems = validate(model, Document(value, {}, source))
    if found is None:
        raise collect(problems)
    return found


def _problems(error: ValidationError, model: type[Strict], document: Document, prefix: Path_) -> list[MedsegError]:
    merged: dict[tuple, ConfigError] = {}
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        path, value = _walk(document.value, location)
        where = str(document.place((*prefix, *path)))
        shown = ".".join(map(str, (*prefix, *path)))
        if kind == "extra_forbidden":
            valid = _fields(model, path[:-1])
            near = nearest(str(path[-1]), valid)
            problem = ConfigError(
                f"unknown key `{path[-1]}`", code="E112", field=shown, file=where, expected=", ".join(valid),
                fix=f"did you mean `{near}`?" if near else None,
            )  # fmt: skip
        elif kind == "missing":
            name = str(location[-1])
            shown = ".".join(map(str, (*prefix, *path, name)))
            problem = ConfigError(f"the key `{name}` is missing", code="E115", field=shown, file=where)
            path = (*path, name)
        else:
            expected = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            message = f"`{shown}` has the wrong value" if path else "wrong values"
            found = _short(value) if path else None
            problem = ConfigError(message, code="E114", field=shown or None, file=where, expected=expected, found=found)
        before = merged.get((path, problem.message))
        if before is None:
            merged[path, problem.message] = problem
        elif problem.expected and problem.expected not in (before.expected or ""):
            # one fault of a value that may have several types is told once
            before.expected = f"{before.expected}, or {problem.expected}"
    return list(merged.values())


def _walk(value: Any, location: tuple) -> tuple[Path_, Any]:
    """The part of pydantic's location that exists in the file, and the value there."""
    path: list[Any] = []
    for step in location:
        if isinstance(value, dict):
            keys = {str(key): key for key in value}
            if str(step) not in keys:
                continue  # the name of a union's member
            path.append(keys[str(step)])
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
        else:
            continue
        value = value[path[-1]]
    return tuple(path), value


def _fields(model: type[Strict], path: Path_) -> list[str]:
    current: Any = model
    for step in path:
        if isinstance(step, int):
            continue
        current = _inner_model(current.model_fields[step].annotation) if str(step) in current.model_fields else None
        if current is None:
            return []
    return list(current.model_fields)


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner_model(part)) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

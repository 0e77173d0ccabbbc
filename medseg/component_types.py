"""Does a value from YAML fit an argument? Annotations of any library, reduced to what YAML can express.

Rules are strict: no "3" for 3, no true for 1; but a list fits a tuple and 1 fits a float. Arrays and tensors take
numbers and lists of numbers; callables take nothing, because code cannot be written in YAML.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

__all__ = ["check_value", "convert_value", "readable_hint", "short"]

# how one argument may be written: scalars and (nested) lists of them
_PLAIN = (int, float, bool, str, type(None))
# what an argument takes whose annotation names arrays, tensors and the like alone
_NUMBERS = float | list[float] | list[list[float]]


def check_value(value: Any, parameter: inspect.Parameter, part: Any) -> str | None:
    """None when the value fits the parameter's annotation, else what was expected."""
    hint = _hint(parameter, part)
    if hint is None:
        return None
    try:
        _validate(hint, value)
    except ValueError:
        return readable_hint(parameter.annotation)
    return None


def convert_value(value: Any, parameter: inspect.Parameter, part: Any) -> Any:
    """The value in the type of the annotation: lists become tuples, 1 becomes 1.0, where that is what is asked for."""
    hint = _hint(parameter, part)
    return value if hint is None else _validate(hint, value)


def _validate(hint: Any, value: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # strict JSON rules: no "3" for 3, no true for 1; but a list fits a tuple and 1 fits a float
    adapter = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    return adapter.validate_json(json.dumps(value))


def _hint(parameter: inspect.Parameter, part: Any) -> Any:
    """The annotation reduced to what YAML can express; None when nothing is known about it."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return None
    if isinstance(annotation, str):
        function = part.__init__ if isinstance(part, type) else part
        # typing evaluates the library's own annotation in the library's own namespace; no text of a user's gets here
        holder = types.SimpleNamespace(__annotations__={parameter.name: annotation})
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        try:
            annotation = typing.get_type_hints(holder, globalns=scope)[parameter.name]
        except (NameError, TypeError, AttributeError):
            return None
    if annotation is Any:
        return None
    if "Callable" in str(annotation):
        return type(None)  # code cannot be written in YAML
    plain = _plain_part(annotation)
    return _NUMBERS if plain is None else plain


def _plain_part(hint: Any) -> Any:
    if hint in _PLAIN or hint is type(None):
        return hint
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return hint
    if origin in (typing.Union, types.UnionType):
        kept = [part for part in map(_plain_part, inside) if part is not None]
        if kept == [type(None)]:
            return _NUMBERS | None
        return typing.Union[tuple(kept)] if kept else None  # noqa: UP007  (built at run time)
    if isinstance(origin, type) and inside:
        if issubclass(origin, tuple):
            parts = [p if p is Ellipsis else _plain_part(p) for p in inside]
            return None if None in parts else tuple[tuple(parts)]  # pyright: ignore[reportInvalidTypeForm]
        if issubclass(origin, Mapping):
            parts = [_plain_part(p) for p in inside]
            return None if None in parts else dict[parts[0], parts[1]]  # pyright: ignore[reportInvalidTypeForm]
        if issubclass(origin, typing.Collection):
            part = _plain_part(inside[0])
            return None if part is None else list[part]
    return None


def readable_hint(annotation: Any) -> str:
    """An annotation as a user may read it."""
    if annotation is inspect.Parameter.empty:
        return "a value"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("typing.", "").replace("collections.abc.", "")


def short(value: Any) -> str:
    """The value in at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

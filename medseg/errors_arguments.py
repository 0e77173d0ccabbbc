"""Arguments of the public functions, checked against the annotations that they have."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from medseg.errors import UsageError
from medseg.errors_system import system_error

__all__ = ["checked"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WIDER = {int: numbers.Integral, float: numbers.Real, bool: (bool, numbers.Integral), Path: os.PathLike}


def checked(function: _Function) -> _Function:
    """The function, which raises UsageError instead of starting with a value of another type than its annotation says.

    What fits an annotation is taken generously (NumPy's numbers, arrays and tensors of one number, any iterable for a
    sequence); `Any` takes everything. What the system refuses by name (no permission, a name that is too long) is told
    as medseg's own error too.

    >>> @checked
    ... def double(number: int = 1) -> int: return 2 * number
    >>> double(number="3")
    Traceback (most recent call last):
    medseg.errors.UsageError: E101: a value of the wrong type
      field: number
      expected: int
      found: '3'
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        hints = typing.get_type_hints(function)
        for name, value in signature.bind(*given, **named).arguments.items():
            parameter = signature.parameters[name]
            for one in value if parameter.kind is parameter.VAR_POSITIONAL else (value,):
                if not _fits(one, hints.get(name, Any)):
                    raise _wrong(one, parameter)
        try:
            return function(*given, **named)
        except OSError as error:
            if (told := system_error(error)) is None:
                raise
            raise told from error

    return typing.cast(_Function, call)


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inside)
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if isinstance(value, str):  # which is a sequence of texts
            return inside[0] is str
        fits = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)
        return fits and not (isinstance(value, Collection) and not all(_fits(one, inside[0]) for one in value))
    if isinstance(value, bool) and hint is not bool:
        return False
    if hint is float and getattr(value, "shape", None) == () and hasattr(value, "__float__"):
        return True  # what is in a tensor of several numbers, too
    return isinstance(value, _WIDER.get(hint, hint))


def _wrong(value: Any, parameter: inspect.Parameter) -> UsageError:
    parts = value if isinstance(value, list | tuple) else [value]
    fix = (
        "medseg reads files: write images to files and name those" if any(hasattr(p, "shape") for p in parts) else None
    )
    text = " ".join(repr(value).split())
    found = text if len(text) <= 80 else f"{text[:77]}..."
    message = "a value of the wrong type"
    return UsageError(message, field=parameter.name, expected=parameter.annotation, found=found, fix=fix)

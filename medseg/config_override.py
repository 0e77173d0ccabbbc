"""`--set a.b.c=value`: laid over what a pipeline's file says, before anything is checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.component import nearest
from medseg.config_yaml import Document, Path_, Place, parse_yaml
from medseg.errors import ConfigError, MedsegError, collect

__all__ = ["BUDGETS", "apply_overrides", "parse_settings"]

BUDGETS = ("epochs", "iterations", "minutes")
_COMPONENTS = ("network", "loss", "optimizer", "schedule", "inference")
_LISTS = ("preprocess", "augment", "postprocess", "metrics")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[2, 3]"]` as nested plain values; a single text is a setting too.

    Raises:
        ConfigError: a text without `=`, an empty key, a value that is no YAML; all of them.

    >>> parse_settings(["train.epochs=5", "train.patch=[64, 64]"])
    {'train': {'epochs': 5, 'patch': [64, 64]}}
    """
    result: dict[str, Any] = {}
    for keys, value, _ in _split(settings):
        here = result
        for key in keys[:-1]:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise ConfigError("two settings contradict each other", code="E117", found=", ".join(settings))
        here[keys[-1]] = value
    return result


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with every `a.b.c=value` laid over it, in order.

    A component's arguments are reached through its name (`network.UNet.channels=[16, 32]`), a list's item through its
    component's name or its position (`augment.0.RandFlipd.prob=0.5`). A whole component is replaced by
    `network=AttentionUNet`. Setting one budget (train.epochs, iterations or minutes) drops the other two.

    Raises:
        ConfigError: all settings that cannot be laid over, with the nearest valid key.
    """
    settings = _split(overrides)
    if not settings:
        return document
    head = document.head
    value, places = copy.deepcopy(document.value), dict(document.places)
    problems: list[MedsegError] = []
    chosen: set[str] = set()
    for keys, new, text in settings:
        place = Place(f"--set {text}")
        try:
            path = _lay(value, keys, new, place)
        except ConfigError as error:
            problems.append(error)
            continue
        for old in [p for p in places if p[: len(path)] == path]:
            del places[old]
        for end in range(1, len(path) + 1):
            places.setdefault(path[:end], place)  # keys that only the setting has brought in
        if keys == ["dataset"]:  # what the file says of itself is about its own data set
            head = (f"{new}, with the choices of {Path(document.source).stem}",)
        if len(keys) == 2 and keys[0] == "train" and keys[1] in BUDGETS and new is not None:
            chosen.add(keys[1])
    if len(chosen) > 1:
        said = ", ".join(f"train.{name}" for name in sorted(chosen))
        one = f"one of {', '.join(BUDGETS)}"
        problems.append(ConfigError("two budgets were given", code="E114", field="--set", expected=one, found=said))
    if problems:
        raise collect(problems)
    if chosen and isinstance(value, dict) and isinstance(value.get("train"), dict):
        for other in set(BUDGETS) - chosen:
            value["train"].pop(other, None)
    return Document(value, places, document.source, head)


def _split(settings: Sequence[str]) -> list[tuple[list[str], Any, str]]:
    result, problems = [], []
    for text in [settings] if isinstance(settings, str) else settings:
        key, equals, raw = text.partition("=")
        keys = [part.strip() for part in key.split(".")]
        if not equals or not all(keys):
            problems.append(
                ConfigError(
                    "not a setting", code="E117", field="--set", expected="key=value or a.b.c=value", found=text
                )
            )
            continue
        try:
            result.append((keys, parse_yaml(raw, source=f"--set {text}").value, text))
        except MedsegError as error:
            problems.extend(error.problems)
    if problems:
        raise collect(problems)
    return result


def _lay(root: Any, keys: list[str], new: Any, place: Place) -> Path_:
    """Put `new` where `keys` lead, in place; the path, with a list's names turned into positions."""
    if not isinstance(root, dict):
        raise ConfigError("the pipeline's file holds no keys", code="E117", file=str(place))
    path: list[Any] = []
    here: Any = root
    rest = list(keys)
    while True:
        key = rest[0]
        where = ".".join(map(str, path))
        if isinstance(here, list):
            step: Any = _position(here, key)
            if step is None:
                raise _no_such(where, key, [*map(_name, here), *map(str, range(len(here)))], place)
            if not key.isdecimal() and len(rest) > 1:
                rest.insert(1, key)  # `augment.RandFlipd.prob`: the name is the item's position and then its key
        else:
            is_component = where in _COMPONENTS or (len(path) == 2 and path[0] in _LISTS)
            if is_component and key not in here:
                raise _no_such(where, key, list(here), place)
            step = next((k for k in here if str(k) == key), key)
        path.append(step)
        if len(rest) == 1:
            here[step] = new
            return tuple(path)
        child = here[step] if isinstance(here, list) else here.get(step)
        if child is None:
            child = {}
        elif child == rest[1]:
            child = {child: {}}  # `network: UNet` and `network.UNet.channels=...`
        elif not isinstance(child, dict | list):
            found = f"`{'.'.join(map(str, path))}` is {child!r}"
            raise ConfigError("a setting reaches into a plain value", code="E117", file=str(place), found=found)
        here[step] = child
        here = child
        rest.pop(0)


def _position(items: list, key: str) -> int | None:
    if key.isdecimal():
        return int(key) if int(key) < len(items) else None
    found = [i for i, item in enumerate(items) if _name(item) == key]
    return found[0] if len(found) == 1 else None


def _name(item: Any) -> str:
    return next(iter(item), "") if isinstance(item, dict) else str(item)


def _no_such(where: str, key: str, valid: list[str], place: Place) -> ConfigError:
    near = nearest(key, valid)
    fix = f"did you mean `{near}`?" if near else f"to take another one: --set {where}={key}"
    return ConfigError(
        f"`{where}` has no `{key}`",
        code="E112",
        field=f"{where}.{key}",
        file=str(place),
        expected=", ".join(valid),
        fix=fix,
    )

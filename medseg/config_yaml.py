"""A strict reader for the part of YAML that configuration needs: mappings, lists, texts, numbers, true, false, null.

Refused, with line and column: duplicate keys, tags (`!!python/...` and all others), anchors and aliases (so nothing
explodes and nothing is inherited), tabs, several documents, keys that are not texts or whole numbers, .nan and .inf,
more than 20 levels, more than 1 MB, text that is not UTF-8. Scalars follow YAML 1.2: `1e-3` is a number, `yes`, `on`
and `2026-11-21` are texts, `010` is refused because readers disagree on it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from medseg.errors import ConfigError, MedsegError, collect

__all__ = ["Document", "Place", "parse_yaml", "read_yaml", "write_yaml"]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 20
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*_[0-9_]*|0[xob][0-9a-fA-F_]+")
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NOT_FINITE = (".inf", ".nan")

Path_ = tuple[Any, ...]  # keys and list positions from the top of the document


@dataclass(frozen=True)
class Place:
    """Where something was written: `file` is a path or the text of a `--set`; lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Document:
    """A value, and the place where each of its keys and items was written.

    Attributes:
        value: plain dicts, lists and scalars.
        places: path of keys -> place of that key (of that item in a list).
        head: the comment lines before the first key, without `#`.
        source: the file's name.
    """

    value: Any
    places: Mapping[Path_, Place]
    source: str
    head: tuple[str, ...] = field(default=())

    def place(self, path: Path_) -> Place:
        """The place of `path`, or of the nearest part of the document around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return Place(self.source)


def read_yaml(path: str | Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, or not plain YAML; all faults that were found in it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("cannot read the file", code="E111", file=path, found=error.strerror) from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError("the file is too large", code="E111", file=path, expected=f"at most {_MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("not a text in UTF-8", code="E111", file=path, found=f"byte {error.start}") from None
    document = _parsed(text, str(path))
    return replace(document, value=copy.deepcopy(document.value))  # the caller may change it


@lru_cache(maxsize=8)
def _parsed(text: str, source: str) -> Document:
    """`parse_yaml`, once for a text: a set of many is looked up by reading the file that has them all."""
    return parse_yaml(text, source=source)


def parse_yaml(text: str, *, source: str = "<text>") -> Document:
    """Read YAML from a text; see the module's docstring for what is refused.

    Raises:
        ConfigError: all faults that were found, each with its place.

    >>> parse_yaml("lr: 1e-3").value
    {'lr': 0.001}
    >>> parse_yaml("a: 1\\na: 2", source="x.yaml")
    Traceback (most recent call last):
    medseg.errors.ConfigError: E111: the key `a` is written twice
      field: a
      file: x.yaml:2:1
    """
    reader = _Reader(source)
    try:
        root = yaml.compose(text, Loader=_loader(reader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _syntax_error(error, Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)) from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ConfigError("not valid YAML", code="E111", file=source, found=message) from None
    value = None if root is None else reader.convert(root, ())
    if reader.problems:
        raise collect(reader.problems)
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("#").strip())
    return Document(value, reader.places, source, tuple(head))


def write_yaml(value: Any) -> str:
    """Plain values as YAML text that `parse_yaml` reads back equal: short lists in one line, keys in order.

    >>> print(write_yaml({"patch": [40, 56, 40], "lr": 0.001, "name": "on"}), end="")
    patch: [40, 56, 40]
    lr: 0.001
    name: 'on'
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _loader(reader: _Reader) -> Any:
    # composing keeps marks and runs no constructor; the hook sees every node before it is built
    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            place = str(reader.at(event.start_mark))
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(
                    "anchors and aliases are not allowed", code="E111", file=place, fix="write the value out"
                )
            if getattr(event, "tag", None):
                raise ConfigError(
                    "YAML tags are not allowed", code="E111", file=place, found=event.tag, fix="remove the tag"
                )
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise ConfigError("nested too deeply", code="E111", file=place, expected=f"at most {_MAX_DEPTH} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader


class _Reader:
    """Nodes to values, keeping places and collecting faults."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[Path_, Place] = {}
        self.problems: list[MedsegError] = []

    def at(self, mark: Any) -> Place:
        return Place(self.source, mark.line + 1, mark.column + 1)

    def refuse(self, message: str, node: Any, **more: Any) -> None:
        self.problems.append(ConfigError(message, code="E111", file=str(self.at(node.start_mark)), **more))

    def convert(self, node: Any, path: Path_) -> Any:
        self.places.setdefault(path, self.at(node.start_mark))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*path, i)) for i, item in enumerate(node.value)]
        result: dict[Any, Any] = {}
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, bool) or not isinstance(key, str | int):
                self.refuse("a key has to be a text or a whole number", key_node, found=_shown(key_node))
                continue
            if str(key) in seen:
                self.refuse(f"the key `{key}` is written twice", key_node, field=".".join(map(str, (*path, key))))
                continue
            seen.add(str(key))
            self.places[(*path, key)] = self.at(key_node.start_mark)
            result[key] = self.convert(value_node, (*path, key))
        return result

    def scalar(self, node: Any) -> Any:
        text = node.value
        if any("\ud800" <= c <= "\udfff" for c in text):
            self.refuse("half of a character (a lone surrogate)", node)
            return None
        if node.style is not None:  # quoted or block: always a text
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INT.fullmatch(text):
            if len(text) > 30:
                self.refuse("a whole number of more than 30 digits", node)
                return None
            return int(text)
        if _ODD_NUMBER.fullmatch(text):
            self.refuse(
                "a number that YAML readers read differently", node, found=text, fix="write it in decimal, or in quotes"
            )
            return None
        if _FLOAT.fullmatch(text):
            if not math.isfinite(float(text)):
                self.refuse("a number too large", node, found=text)
                return None
            return float(text)
        if text.lower().lstrip("+-") in _NOT_FINITE:
            self.refuse("not a finite number", node, expected="a number", found=text)
            return None
        return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump_list(dumper: yaml.SafeDumper, value: list | tuple) -> yaml.Node:
    short = all(isinstance(item, int | float | str) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=short)


def _dump_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # what this reader takes for something else than a text is quoted, also where YAML 1.1 would not need it (1e-3)
    other = value in _CONSTANTS or _INT.fullmatch(value) or _FLOAT.fullmatch(value) or _ODD_NUMBER.fullmatch(value)
    other = other or value.lower().lstrip("+-") in _NOT_FINITE
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if other else None)


_Dumper.add_representer(str, _dump_text)
_Dumper.add_representer(list, _dump_list)
_Dumper.add_representer(tuple, _dump_list)


def _shown(node: Any) -> str:
    return node.value[:40] if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _syntax_error(error: yaml.MarkedYAMLError, place: Place) -> ConfigError:
    problem = " ".join((error.problem or str(error)).split())
    if "'\\t'" in problem or "\\t" in problem:
        return ConfigError(
            "a tab where only spaces are allowed", code="E111", file=str(place), fix="indent with spaces"
        )
    if "another document" in problem or "single document" in str(error):
        return ConfigError("several documents in one file", code="E111", file=str(place), fix="remove the line ---")
    return ConfigError("not valid YAML", code="E111", file=str(place), found=problem)

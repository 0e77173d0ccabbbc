"""A component is a name and its arguments: read from YAML, checked against the part's signature, built, or written out.

In YAML a component is `Name` or `Name: {argument: value}`. Names resolve in the closed tables of `component_table`;
arguments are checked by name and by type before anything is built. Facts that the program knows (spatial_dims,
in_channels, out_channels, keys, parameters) are never written in YAML; `build_component` adds them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medseg.component_table import KINDS, facts_for_monai, find_part, names
from medseg.component_types import check_value, convert_value, readable_hint, short
from medseg.errors import ConfigError, MedsegError, UsageError, collect

__all__ = [
    "KINDS",
    "Component",
    "build_component",
    "check_component",
    "find_protocol",
    "names",
    "nearest",
    "parse_component",
    "to_target",
]

# the program fills these in wherever a signature asks for them
FACTS = frozenset(
    {"spatial_dims", "in_channels", "out_channels", "keys", "allow_missing_keys", "params", "source_key", "device"}
)


@dataclass(frozen=True)
class Component:
    """A part's name and the arguments that were written for it.

    >>> parse_component({"PolynomialLR": {"power": 0.9}})
    Component(name='PolynomialLR', arguments={'power': 0.9})
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> str | dict[str, Any]:
        """The way it is written in YAML and in checkpoints.

        >>> Component("ConstantLR").plain()
        'ConstantLR'
        """
        return {self.name: dict(self.arguments)} if self.arguments else self.name

    def without(self, *names: str) -> Component:
        """The same part without the arguments of these names.

        >>> Component("ResUNet", {"norm": "batch", "weights": "resnet34.pth"}).without("weights").plain()
        {'ResUNet': {'norm': 'batch'}}
        """
        return Component(self.name, {n: v for n, v in self.arguments.items() if n not in names})


def parse_component(value: Any) -> Component:
    """Read `Name` or `{Name: {argument: value}}`; a Component is returned as it is.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, Component):
        return value
    if isinstance(value, str) and value.strip():
        return Component(value)
    if isinstance(value, Mapping) and len(value) == 1:
        name, arguments = next(iter(value.items()))
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return Component(name, dict(arguments or {}))
    raise ConfigError("not a component", expected="Name or {Name: {argument: value}}", found=short(value))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like `name`, or None when none is near.

    >>> nearest("channles", ["channels", "norm"])
    'channels'
    """
    valid = list(valid)
    lowered = {v.lower(): v for v in reversed(valid)}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def check_component(component: Component, kind: str) -> list[MedsegError]:
    """Everything that is wrong with a component, without building it: name, argument names, types, missing arguments.

    The errors' `field` is the argument's name, or None when the component's own name is wrong.
    """
    try:
        part = find_part(kind, component.name)
    except KeyError:
        return [_unknown(f"unknown {kind}", component.name, names(kind))]
    parameters = _parameters(part)
    monai = facts_for_monai(component.name) if kind == "transform" else {}
    problems: list[MedsegError] = []
    open_names = [
        n for n in parameters if n not in monai and not (n in FACTS or (kind == "schedule" and n == "optimizer"))
    ]
    for name, value in component.arguments.items():
        if name in parameters and name not in open_names:
            message = f"`{name}` of {component.name} is known to the program and is not written"
            problems.append(ConfigError(message, code="E113", field=name, fix="remove it"))
        elif name not in parameters:
            error = _unknown(f"{component.name} has no argument `{name}`", name, open_names)
            error.field = name
            problems.append(error)
        elif (wrong := check_value(value, parameters[name], part)) is not None:
            message = f"`{name}` of {component.name} has the wrong type or value"
            problems.append(ConfigError(message, code="E114", field=name, expected=wrong, found=short(value)))
    for name, parameter in parameters.items():
        if name in open_names and name not in component.arguments and parameter.default is parameter.empty:
            message = f"{component.name} needs the argument `{name}`"
            expected = readable_hint(parameter.annotation)
            problems.append(ConfigError(message, code="E115", field=None, expected=f"{name}: {expected}"))
    if kind == "metric" and not problems:
        try:
            part.checked(component.arguments)
        except MedsegError as error:
            field_ = (error.field or "").rpartition(".")[2]
            problems.append(
                ConfigError(error.message, code="E116", field=field_, expected=error.expected, found=error.found)
            )
    return problems


def build_component(component: Component, kind: str, **facts: Any) -> Any:
    """Build the part that a component names.

    Args:
        component: name and arguments.
        kind: one of `KINDS`.
        facts: what the program knows; each is passed if the part's signature has it and the component did not give it.
            A metric is not built: its entry in the table of metrics is returned, which takes arguments when called.

    Raises:
        ConfigError: unknown name, wrong or missing arguments, or values that the part itself refuses.

    >>> build_component(Component("PolynomialLR", {"power": 2.0}), "schedule")(0.5)
    0.25
    """
    if problems := check_component(component, kind):
        raise collect(problems)
    part = find_part(kind, component.name)
    if kind == "metric":
        return part
    try:
        return part(**_arguments(component, kind, part, facts))
    except MedsegError as error:
        if isinstance(error, ConfigError):
            raise
        message = f"{component.name}: {error.message}"
        raise ConfigError(
            message, code="E116", field=error.field, file=error.file, expected=error.expected, found=error.found,
            fix=error.fix,
        ) from error  # fmt: skip
    except (ValueError, TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError) and kind != "optimizer":
            raise  # torch's optimizers say so what does not go together; elsewhere it is no refusal
        # the signature fits, the part refuses the values
        raise ConfigError(
            f"{component.name} refuses its arguments: {error}", code="E116", found=short(component.plain())
        ) from error


def find_protocol(value: Any) -> Any:
    """The official set of scores that `Name` or `{Name: {argument: value}}` names.

    Raises:
        ConfigError: there is none (the nearest name is told), or it refuses its arguments.
    """
    from medseg.metrics import get_protocol

    component, valid = parse_component(value), names("protocol")
    if component.name not in valid:
        raise _unknown("unknown protocol", component.name, valid)
    try:
        return get_protocol(component.plain())
    except UsageError as error:
        raise ConfigError(error.message, code="E116", expected=error.expected, found=error.found) from error


def to_target(component: Component, kind: str, **facts: Any) -> dict[str, Any]:
    """The component as a MONAI Bundle entry: `_target_` and all arguments, facts included.

    >>> to_target(Component("PolynomialLR", {"power": 0.9}), "schedule")
    {'_target_': 'medseg.schedules.PolynomialLR', 'power': 0.9}
    """
    if problems := check_component(component, kind):
        raise collect(problems)
    part = find_part(kind, component.name)
    arguments = _arguments(component, kind, part, facts)
    return {"_target_": f"{part.__module__}.{part.__qualname__}", **arguments}


def _arguments(component: Component, kind: str, part: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(part)
    arguments: dict[str, Any] = {n: v for n, v in facts.items() if n in parameters}
    if kind == "transform":
        arguments |= facts_for_monai(component.name)
    return arguments | {n: convert_value(v, parameters[n], part) for n, v in component.arguments.items()}


def _parameters(part: Any) -> dict[str, inspect.Parameter]:
    if not isinstance(part, type):  # a score: a function of the case's view, then its arguments
        empty, kind = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
        given = part.arguments().items()
        own = {n: inspect.Parameter(n, kind, default=v, annotation=v if v is empty else type(v)) for n, v in given}
        if part.over == "label":
            own["region"] = inspect.Parameter("region", kind, default=None, annotation=str | None)
        return own
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(part).parameters
    return {n: p for n, p in found.items() if p.kind in kinds}


def _unknown(message: str, name: str, valid: list[str]) -> ConfigError:
    near = nearest(name, valid)
    return ConfigError(
        message,
        code="E112",
        expected=", ".join(valid) or "no arguments",
        found=name,
        fix=f"did you mean `{near}`?" if near else None,
    )

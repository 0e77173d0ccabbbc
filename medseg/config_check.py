"""A pipeline checked as a whole before any data is opened: components, their arguments, the network on the patch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from medseg.component import Component, build_component, check_component, find_protocol, parse_component
from medseg.component_table import find_part, makes_labels
from medseg.config_dataset import DatasetSpec
from medseg.config_override import BUDGETS
from medseg.config_pipeline import Pipeline
from medseg.config_yaml import Document, Path_
from medseg.errors import ConfigError, MedsegError

__all__ = ["check_pipeline"]

_SINGLE = {
    "network": "network",
    "loss": "loss",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "inference": "inferer",
}
_LISTS = {"preprocess": "transform", "augment": "transform", "postprocess": "postprocess", "metrics": "metric"}


def check_pipeline(
    document: Document,
    pipeline: Pipeline | None,
    problems: list[MedsegError],
    find_dataset: Callable[[str], DatasetSpec],
) -> list[MedsegError]:
    """All that is wrong with a pipeline, in the order of its file.

    Args:
        document: the file, overrides laid over.
        pipeline: what was read from it, or None when `problems` kept it from being read.
        problems: faults of keys and values found so far; components are checked all the same.
        find_dataset: gives the facts of a data set by its name, or raises a MedsegError.
    """
    found = list(problems)
    if pipeline is None:  # the model's own checks across keys wait for every key to be right; these do not
        found += _across_keys(document, found)
    sound: dict[Path_, tuple[Component, str]] = {}
    for path, kind, raw in _components(document.value):
        try:
            part = parse_component(raw)
        except ConfigError:
            continue  # told already, with its place
        faults = check_component(part, kind)
        found += [_place(fault, document, (*path, part.name)) for fault in faults]
        if not faults:
            sound[path] = (part, kind)
    found += [*_without_side(document, sound), *_without_objects(document)]
    spec = _spec(document, found, find_dataset)
    patch = pipeline.train.patch if pipeline else None
    # two numbers for a volume: a 2-D network on its slices
    if spec is not None and patch is not None and len(patch) > spec.dims:
        found.append(
            ConfigError(
                f"the patch has {len(patch)} axes, the data set {spec.name} has {spec.dims}",
                code="E118",
                field="train.patch",
                file=str(document.place(("train", "patch"))),
                expected=f"{spec.dims} numbers",
                found=list(patch),
                fix=f"--set 'train.patch={str(list(patch[: spec.dims])).replace(' ', '')}', or another pipeline",
            )
        )
        patch = None
    slices = pipeline.train.context_slices if pipeline else 0
    if slices and patch is not None and (len(patch) == 3 or (spec is not None and spec.dims == 2)):
        found.append(
            ConfigError(
                "context slices are for 2-D networks on volumes",
                code="E118",
                field="train.context_slices",
                file=str(document.place(("train", "context_slices"))),
                expected="0, or a patch of two numbers and a data set with three axes",
                found=slices,
            )
        )
    dims = len(patch) if patch else spec.dims if spec else 2
    channels = (spec.in_channels if spec else 1) * (2 * slices + 1)
    for path, (part, kind) in sound.items():
        found += _try_build(path, part, kind, document, spec, dims, channels, patch)
    return found


def _components(value: Any) -> Iterator[tuple[Path_, str, Any]]:
    for key, raw in value.items() if isinstance(value, dict) else ():
        if key in _SINGLE:
            yield (key,), _SINGLE[key], raw
        elif key in _LISTS and isinstance(raw, list):
            for index, item in enumerate(raw):
                yield (key, index), _LISTS[key], item


def _across_keys(document: Document, found: list[MedsegError]) -> Iterator[MedsegError]:
    value = document.value if isinstance(document.value, dict) else {}
    told = {problem.field for problem in found}
    train = value.get("train")
    given = [name for name in BUDGETS if train.get(name) is not None] if isinstance(train, dict) else BUDGETS[:1]
    if len(given) != 1 and "train" not in told:
        where = str(document.place(("train", *given[:1])))
        expected = f"exactly one of {', '.join(BUDGETS)}"
        shown = ", ".join(given) or "none"
        yield ConfigError(
            "one budget is needed", code="E114", field="train", file=where, expected=expected, found=shown
        )
    metrics, best = value.get("metrics"), value.get("best")
    if isinstance(metrics, list) and isinstance(best, str):
        measured = [next(iter(m), "") if isinstance(m, dict) else str(m) for m in metrics]
        if best not in measured:
            yield ConfigError(
                "`best` is none of the metrics", code="E114", field="best", file=str(document.place(("best",))),
                expected=", ".join(measured), found=best,
            )  # fmt: skip


def _without_objects(document: Document) -> Iterator[MedsegError]:
    """Interior and border as they are: the mask would hold 1 and 2, the numbers of two objects."""
    post = _steps(document.value, "postprocess")
    if "InteriorBorderLabeld" in _steps(document.value, "preprocess") and "InstancesFromProbability" not in post:
        yield ConfigError(
            "interior and border of InteriorBorderLabeld would be written, and scored, as two objects", code="E118",
            field="postprocess", file=str(document.place(("postprocess",))), found=", ".join(map(str, post)) or "none",
            expected="InstancesFromProbability, which makes single objects of them",
        )  # fmt: skip


def _steps(value: Any, key: str) -> list[Any]:
    given = value.get(key) if isinstance(value, dict) else None
    return [next(iter(raw), "") if isinstance(raw, dict) else raw for raw in given] if isinstance(given, list) else []


def _without_side(document: Document, sound: dict[Path_, tuple[Component, str]]) -> Iterator[MedsegError]:
    """A signed error as `best`: of two networks the one that finds most beside the structure would be the better."""
    best = document.value.get("best") if isinstance(document.value, dict) else None
    named = {part.name: find_part(kind, part.name) for part, kind in sound.values() if kind == "metric"}
    if best in named and named[best].better == "none":
        sided = [name for name, metric in named.items() if metric.better != "none"]
        yield ConfigError(
            f"{best} is a signed error: neither more nor less of it is better", code="E118", field="best",
            file=str(document.place(("best",))), expected=" or ".join(sided) or "a score that has a better side",
            found=best,
        )  # fmt: skip


def _spec(
    document: Document, found: list[MedsegError], find_dataset: Callable[[str], DatasetSpec]
) -> DatasetSpec | None:
    name = document.value.get("dataset") if isinstance(document.value, dict) else None
    if not isinstance(name, str):
        return None
    try:
        spec = find_dataset(name)
        if spec.protocol is not None:
            find_protocol(spec.protocol)
        return spec
    except MedsegError as error:
        for problem in error.problems:
            problem.file = problem.file or str(document.place(("dataset",)))
            problem.field = problem.field or "dataset"
        found.extend(error.problems)
        return None


def _try_build(
    path: Path_,
    part: Component,
    kind: str,
    document: Document,
    spec: DatasetSpec | None,
    dims: int,
    channels: int,
    patch: Any,
) -> list[MedsegError]:
    """Build the part once with stand-ins for what only a run has: this is how its own checks are heard."""
    import torch

    facts: dict[str, Any] = {
        "spatial_dims": dims,
        "in_channels": channels,
        "out_channels": spec.out_channels if spec else 2,
        "params": [torch.nn.Parameter(torch.zeros(1))],
        "fused": True,  # as it is on CPUs and CUDA devices
    }
    try:
        with torch.device("meta" if kind == "network" else "cpu"):  # a network without memory: geometry only
            built = build_component(part, kind, **facts)
    except MedsegError as error:
        return [_place(problem, document, (*path, part.name)) for problem in error.problems]
    if path[0] in ("preprocess", "augment"):
        return _check_random(built, part, path, document)
    if kind == "network" and patch is not None:
        return _check_patch(built, part, patch, document)
    if kind == "loss" and spec is not None:
        return _check_loss(built, part, path, document, spec)
    if kind == "postprocess" and spec is not None:
        return _check_classes(built, part, path, document, spec)
    if kind == "metric" and spec is not None:
        return _check_structures(part, path, document, spec)
    return []


def _check_loss(built: Any, part: Component, path: Path_, document: Document, spec: DatasetSpec) -> list[MedsegError]:
    """One voxel through the loss, whose weights of classes have to be as many as there are."""
    import torch

    if any(map(makes_labels, _steps(document.value, "preprocess"))):
        return []  # other classes than the data set's
    try:
        built(torch.zeros(1, spec.out_channels, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long))
    except MedsegError as error:
        fault = ConfigError(error.message, code="E118", field=error.field, expected=error.expected, found=error.found)
        return [_place(fault, document, (*path, part.name))]
    return []


def _check_structures(part: Component, path: Path_, document: Document, spec: DatasetSpec) -> list[MedsegError]:
    """Structures that a score names have to be labels: it would fail after the first epoch."""
    known = [name for index, name in spec.labels.items() if index]
    wrong = {n: part.arguments.get(n) for n in ("region", "part", "whole")}
    problems = [
        ConfigError(
            f"the data set {spec.name} has no such label", code="E118", field=name, expected=", ".join(known), found=v
        )
        for name, v in wrong.items()
        if v is not None and v not in known
    ]
    return [_place(problem, document, (*path, part.name)) for problem in problems]


def _check_classes(
    built: Any, part: Component, path: Path_, document: Document, spec: DatasetSpec
) -> list[MedsegError]:
    """A threshold is for one structure; single objects are numbered in sets that know them, or know one structure."""
    allowed = getattr(built, "classes", None)
    if allowed is None or spec.has_instances or spec.out_channels in set(allowed) & {2}:
        return []
    rest = [step for number, step in enumerate(document.value["postprocess"]) if number != path[1]]
    return [
        ConfigError(
            f"{part.name} is for one structure, the data set {spec.name} has {spec.out_channels - 1}",
            code="E118",
            field="postprocess",
            file=str(document.place(path)),
            expected="one label besides the background",
            found=", ".join(name for index, name in spec.labels.items() if index),
            fix=f"leave it out: --set 'postprocess={json.dumps(rest)}', and choose `metrics` and `best` to suit, or "
            "take a pipeline for several structures (shapes, lung, liver)",
        )
    ]


def _check_patch(network: Any, part: Component, patch: tuple[int, ...], document: Document) -> list[MedsegError]:
    try:
        network.output_size(patch)
    except MedsegError as error:
        legal = tuple(network.legal_size(patch))
        return [
            ConfigError(
                f"{part.name} cannot take this patch: {error.message}",
                code="E118",
                field="train.patch",
                file=str(document.place(("train", "patch"))),
                expected=f"for example {list(legal)}",
                found=list(patch),
            )
        ]
    return []


def _check_random(built: Any, part: Component, path: Path_, document: Document) -> list[MedsegError]:
    """Random transforms belong to `augment`; others to `preprocess`, for they have to happen in prediction too."""
    from monai.transforms import Randomizable

    section = str(path[0])
    if isinstance(built, Randomizable) == (section == "augment"):
        return []
    if section == "augment" and "image" not in getattr(built, "keys", ()):
        return []  # targets may be made anew for each patch: prediction has none
    message, other = f"{part.name} draws random numbers, but `preprocess` happens once for each case", "augment"
    if section == "augment":
        message = f"{part.name} draws no random numbers: in `augment` it would change what is trained on alone"
        other = "preprocess"
    fix = f"move it to `{other}`"
    return [ConfigError(message, code="E118", field=section, file=str(document.place(path)), fix=fix)]


def _place(problem: MedsegError, document: Document, path: Path_) -> MedsegError:
    if problem.field is not None:
        path = (*path, problem.field)
    problem.field = ".".join(map(str, path))
    problem.file = problem.file or str(document.place(path))  # a file that the part was to read is the nearer one
    return problem

"""The one place where YAML becomes configuration: pipelines (choices) and datasets.yaml (facts), checked and frozen.

    load_pipeline("liver", overrides=["train.minutes=15"])     ./pipelines, then the copy in the wheel
    load_dataset("liver", root=DATA)                           DATA/datasets.yaml, ./datasets.yaml, the wheel's

Nothing is half-read: all faults of a file are found before any data is opened and raised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medseg.component import nearest
from medseg.config_dataset import DatasetSpec
from medseg.config_model import validate
from medseg.config_override import apply_overrides, parse_settings
from medseg.config_pipeline import Pipeline, TrainConfig
from medseg.config_place import known_root
from medseg.config_yaml import Document, parse_yaml, read_yaml, write_yaml
from medseg.errors import ConfigError, collect
from medseg.errors_arguments import checked

__all__ = [
    "DatasetSpec",
    "Pipeline",
    "TrainConfig",
    "dataset_names",
    "load_dataset",
    "load_pipeline",
    "parse_settings",
    "parse_yaml",
    "pipeline_file",
    "pipeline_names",
    "resource_folder",
    "to_yaml",
]


@checked
def load_pipeline(
    name: str | Path,
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    root: str | Path | None = None,
    check: bool = True,
) -> Pipeline:
    """Read, override and check a pipeline.

    Args:
        name: a pipeline's name, or the path of a YAML file.
        folder: look here before ./pipelines and the pipelines that come with medseg.
        overrides: texts like `train.epochs=5` (see `config_override.apply_overrides`).
        root: the data root, whose own datasets.yaml may hold the data set.
        check: also check every component against its signature, build each once without data, and check patch and
            network against the data set. False reads and checks the keys alone, in milliseconds.

    Raises:
        ConfigError: all faults, each with file, line and column, key, what was expected, and the nearest valid name.

    >>> pipeline = load_pipeline("drive", overrides=["train.minutes=5"])
    >>> pipeline.dataset, pipeline.train.minutes, pipeline.network.name
    ('drive', 5.0, 'UNet')
    """
    path = pipeline_file(name, folder=folder)
    document = apply_overrides(read_yaml(path), overrides)
    pipeline, problems = validate(Pipeline, document)
    if check:
        from medseg.config_check import check_pipeline  # with torch, MONAI and all components

        problems = check_pipeline(document, pipeline, problems, partial(load_dataset, root=root))
    if problems or pipeline is None:
        raise collect(problems)
    title = pipeline.title or next(iter(document.head), "")
    # runs of a data set of one's own are found under its name
    own = pipeline.dataset if "dataset" in parse_settings(overrides) else path.stem
    return pipeline.model_copy(update={"name": own, "title": title})


def load_dataset(name: str, *, file: str | Path | None = None, root: str | Path | None = None) -> DatasetSpec:
    """The facts about one data set.

    Args:
        name: its name in a datasets.yaml.
        file: read this file only.
        root: the data root, MEDSEG_DATA when None; its datasets.yaml comes before ./datasets.yaml and medseg's own.

    Raises:
        ConfigError: no such data set (the nearest name is told), or everything that is wrong with its entry.
        UsageError: E102, nor is there such a data root.
    """
    known: list[str] = []
    for path in _dataset_files(file, root):
        document = _read_entries(path)
        if name not in document.value:
            known += document.value
            continue
        entry = document.value[name]
        entry = {"name": name, **entry} if isinstance(entry, dict) else entry
        spec, problems = validate(DatasetSpec, Document(entry, document.places, document.source), (name,))
        if spec is None:
            raise collect(problems)
        return spec
    known_root(root, must_exist=True)  # a folder that is not there cannot tell of its sets
    near = nearest(name, known)
    raise ConfigError(
        f"unknown data set `{name}`", code="E112", field="dataset", expected=", ".join(sorted(set(known))), found=name,
        fix=f"did you mean `{near}`?" if near else "medseg data add, or --data with the folder of its datasets.yaml",
    )  # fmt: skip


def dataset_names(*, root: str | Path | None = None, file: str | Path | None = None) -> list[str]:
    """Sorted names of all data sets that `load_dataset` finds with the same arguments."""
    return sorted({str(name) for path in _dataset_files(file, root) for name in _read_entries(path).value})


def pipeline_file(name: str | Path, *, folder: str | Path | None = None) -> Path:
    """The file of a pipeline: a path as it is; a name is looked up in `folder`, ./pipelines, and among medseg's own.

    Raises:
        ConfigError: there is none; the nearest name is told.
    """
    text = str(name)
    if isinstance(name, Path) or text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text:
        if not Path(name).is_file():
            raise ConfigError(
                "no such pipeline file", code="E111", file=name, expected="a YAML file or a pipeline's name"
            )
        return Path(name)
    for place in _pipeline_folders(folder):
        if (path := place / f"{text}.yaml").is_file():
            return path
    valid = pipeline_names(folder)
    near = nearest(text, valid)
    raise ConfigError(
        f"unknown pipeline `{text}`", code="E112", expected=", ".join(valid), found=text,
        fix=f"did you mean `{near}`?" if near else "medseg pipelines list",
    )  # fmt: skip


def pipeline_names(folder: str | Path | None = None) -> list[str]:
    """Sorted names of all pipelines that can be found."""
    return sorted({path.stem for place in _pipeline_folders(folder) if place.is_dir() for path in place.glob("*.yaml")})


def to_yaml(model: Pipeline | DatasetSpec) -> str:
    """A pipeline or a data set's facts as YAML that reads back equal; keys that hold their default are left out."""
    plain = model.model_dump(mode="json", exclude_defaults=True)
    if not isinstance(model, Pipeline):
        return write_yaml(entry_of(plain))
    title, _ = plain.pop("title", ""), plain.pop("name", "")
    return f"# {' '.join(title.split())}\n{write_yaml(plain)}" if title else write_yaml(plain)


def entry_of(plain: dict[str, Any]) -> dict[str, Any]:
    """A data set's plain facts as an entry {name: facts} with whole numbers, not texts, as the keys of its mappings."""
    facts = {key: value for key, value in plain.items() if key != "name"}
    for key in ("labels", "encoding", "colours"):
        if isinstance(facts.get(key), dict):
            facts[key] = {int(index): value for index, value in facts[key].items()}
    # one layout and one image pattern are written without brackets, as a person would
    layouts = [_plain_layout(layout) for layout in facts["files"]]
    facts["files"] = layouts[0] if len(layouts) == 1 else layouts
    return {plain["name"]: facts}


def resource_folder() -> Path:
    """The folder with medseg's own datasets.yaml and pipelines/: inside the wheel, or the repository's root."""
    packed = Path(__file__).parent / "resources"
    return packed if (packed / "datasets.yaml").is_file() else Path(__file__).parent.parent


def _plain_layout(layout: dict[str, Any]) -> dict[str, Any]:
    def plain(part: Any) -> Any:
        images = part.get("image") if isinstance(part, dict) else None
        return {**part, "image": images[0]} if images is not None and len(images) == 1 else part

    return {key: plain(part) for key, part in layout.items()}


def _pipeline_folders(folder: str | Path | None) -> list[Path]:
    given = [] if folder is None else [Path(folder)]
    if given and not given[0].is_dir():
        raise ConfigError("no such folder", code="E111", field="--pipelines", file=given[0])
    return [*given, Path("pipelines"), resource_folder() / "pipelines"]


def _dataset_files(file: str | Path | None, root: str | Path | None) -> list[Path]:
    if file is not None:
        return [Path(file)]
    places = [known_root(root), Path(), resource_folder()]
    found = [place / "datasets.yaml" for place in places if place is not None]
    return [path for i, path in enumerate(found) if path.is_file() and path not in found[:i]]


def _read_entries(path: Path) -> Document:
    document = read_yaml(path)
    if document.value is None:
        return Document({}, document.places, document.source)
    if not isinstance(document.value, dict):
        raise ConfigError("expected data sets as `name: {...}`", code="E111", file=path)
    return document

"""The one place where YAML becomes configuration: pipelines (choices) and datasets.yaml (facts), checked and frozen.

    load_pipeline("liver", overrides=["train.minutes=15"])     ./pipelines, then the copy in the wheel
    load_dataset("liver", root=DATA)                           DATA/datasets.yaml, ./datasets.yaml, the wheel's

Nothing is half-read: all faults of a file are found before any data is opened and raised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from medseg.component import Component, nearest, parse_component
from medseg.config_dataset import DatasetSpec
from medseg.config_model import Strict, validate
from medseg.config_override import BUDGETS, apply_overrides, parse_settings
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


def _component(value: Any) -> Component:
    try:
        return parse_component(value)
    except ConfigError as error:
        raise ValueError(error.expected or error.message) from None


Part = Annotated[Component, PlainValidator(_component), PlainSerializer(lambda part: part.plain())]
Parts = Annotated[
    tuple[Part, ...], BeforeValidator(lambda v: () if v is None else tuple(v) if isinstance(v, list) else v)
]


class TrainConfig(Strict):
    """How long, on what, and how exactly; docs/configuration.md explains each key.

    Exactly one budget: epochs, iterations or minutes. `batch` patches are one iteration, `accumulate` of these a step.
    """

    epochs: int | None = Field(default=None, gt=0)
    iterations: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    iterations_per_epoch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    batch: int = Field(gt=0)
    patch: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=2, max_length=3)
    context_slices: int = Field(default=0, ge=0, le=16)
    samples_per_case: int = Field(default=1, gt=0)
    foreground: float = Field(default=0.5, ge=0, le=1)
    validate_every: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    validation_cases: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    folds: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    keep_on_device: bool | Literal["auto"] = "auto"
    accumulate: int = Field(default=1, gt=0)
    clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    compile: bool | Literal["auto"] = False
    replicas: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    keep_every: int | None = Field(default=None, gt=0)
    save_minutes: float = Field(default=5.0, gt=0)
    deterministic: bool = True
    checkpoint_activations: bool = False

    @model_validator(mode="after")
    def _one_budget(self) -> TrainConfig:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(BUDGETS)}; found {', '.join(given) or 'none'}")
        return self


class Pipeline(Strict):
    """One experiment: the choices of one file in pipelines/, read top to bottom.

    `name` is the file's name and `title` its first comment line; neither is a key that has to be written.
    """

    name: str = ""
    title: str = ""
    dataset: str
    preprocess: Parts = ()
    augment: Parts = ()
    network: Part
    loss: Part
    optimizer: Part
    schedule: Part = Component("ConstantLR")
    train: TrainConfig
    inference: Part = Component("OverlapTileInferer")
    postprocess: Parts = ()
    metrics: Parts = Field(min_length=1)
    best: str

    @model_validator(mode="after")
    def _best_is_measured(self) -> Pipeline:
        measured = [part.name for part in self.metrics]
        if self.best not in measured:
            raise ValueError(f"`best` to be one of the metrics ({', '.join(measured)}); found {self.best}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints carry them; `Pipeline.from_dict` reads them back equal."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, source: str = "pipeline of a checkpoint") -> Pipeline:
        """The pipeline from `to_dict`'s result.

        Names and arguments of components are checked when they are built, not here.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        pipeline, problems = validate(cls, Document(value, {}, source))
        if pipeline is None:
            raise collect(problems)
        return pipeline


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
    """
    path = pipeline_file(name, folder=folder)
    document = apply_overrides(read_yaml(path), overrides)
    pipeline, problems = validate(Pipeline, document)
    if check:
        from medseg.config_check import check_pipeline

        problems = check_pipeline(document, pipeline, problems, root=root)
    if problems or pipeline is None:
        raise collect(problems)
    title = pipeline.title or next(iter(document.head), "")
    return pipeline.model_copy(update={"name": path.stem, "title": title})


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

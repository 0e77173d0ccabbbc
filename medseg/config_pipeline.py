"""A pipeline's keys: the choices of one experiment, as the files in pipelines/ tell them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from medseg.component import Component, parse_component
from medseg.config_model import Strict, from_plain
from medseg.config_override import BUDGETS
from medseg.errors import ConfigError

__all__ = ["Pipeline", "TrainConfig"]


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

    `name` is the file's name (the data set's, where `dataset` was overridden) and `title` its first comment line;
    neither is a key that has to be written.
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
        return from_plain(cls, value, source)

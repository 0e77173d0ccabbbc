"""A trained model for prediction: network or ensemble, its pipeline, its data set's facts; out of checkpoints alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from medseg.checkpoint_read import read_state
from medseg.component import Component, build_component
from medseg.config import DatasetSpec, Pipeline
from medseg.errors import CheckpointError, ConfigError
from medseg.errors_arguments import checked
from medseg.package import MODEL_FILE, OnnxNetwork, read_package
from medseg.run import newest_run

__all__ = ["Model", "hash_weights", "load_model", "model_from_state", "with_threshold"]


if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass
class Model:
    """What prediction needs.

    Attributes:
        networks: one network, or one for each member of an ensemble; in eval mode, on `device`.
        pipeline: the choices of the (first) run.
        dataset: the facts about its data set.
        metadata: plain values: `sources` (files), `in_channels`, `out_channels`, `threshold` (share above which a
            voxel is foreground, chosen by training; None: the most probable class), `metrics` (validation
            scores), `epoch`, `versions`, `seen` (grids of the training volumes).
        device: where the networks are.
    """

    networks: tuple[nn.Module, ...]
    pipeline: Pipeline
    dataset: DatasetSpec
    metadata: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def network(self) -> nn.Module:
        """The network, or an ensemble's first."""
        return self.networks[0]

    @property
    def threshold(self) -> float | None:
        """See `metadata`; an ensemble has the mean of its members'."""
        return self.metadata.get("threshold")

    def to(self, device: torch.device | str) -> Model:
        """The same model with its networks on another device."""
        self.device = torch.device(device)
        for network in self.networks:
            network.to(self.device)
        return self


@checked
def load_model(source: str | Path | Sequence[str | Path], device: torch.device | str = "cpu") -> Model:
    """Load a trained model.

    Args:
        source: a run folder (its best.pt, else last.pt), a folder of runs (the newest), a .pt file, or several of
            these: an ensemble, whose probabilities are averaged. The folder `cross_validation` that
            `medseg train --fold all` leaves beside its runs stands for all of them.
        device: where to put the networks.

    Raises:
        CheckpointError: E360 nothing there, E361 damaged, E362 not a checkpoint of medseg, E363 the weights are not
            those of the network, E364 members of an ensemble that differ in preprocessing, labels or channels.

    >>> load_model("no/such/run")
    Traceback (most recent call last):
    medseg.errors.CheckpointError: E360: no run, checkpoint or package here
      file: no/such/run
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise CheckpointError("no run or checkpoint given", code="E360")
    files = [_find_file(member) for one in sources for member in _members(Path(one))]
    first_state = _read(files[0])
    members = [model_from_state(first_state if n == 0 else _read(file), file) for n, file in enumerate(files)]
    first, pipeline = members[0], members[0].pipeline
    for member, file in zip(members[1:], files[1:], strict=True):
        _check_alike(first, member, file)
    thresholds = [m.threshold for m in members]
    metadata = dict(first.metadata)
    metadata["sources"] = [str(file) for file in files]
    if len(members) > 1:
        known = [t for t in thresholds if t is not None]
        metadata["threshold"] = sum(known) / len(known) if len(known) == len(members) else None
        metadata["members"] = [member.metadata for member in members]
        # from its stored form: the members' own pipelines hold their own thresholds already
        pipeline = with_threshold(Pipeline.from_dict(first_state["pipeline"]), metadata["threshold"])
    networks = tuple(network for member in members for network in member.networks)
    return Model(networks, pipeline, first.dataset, metadata).to(device)


def _members(source: Path) -> list[Path]:
    """The runs beside a folder of their pooled scores; of anything else the source itself."""
    try:
        value = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [source]
    names = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        return [source]
    return [source.parent / name for name in names] or [source]


def model_from_state(state: dict[str, Any], file: Path) -> Model:
    """The model in a state that `read_state` gave.

    Raises:
        CheckpointError: E362, E363.
    """
    try:
        pipeline = Pipeline.from_dict(state["pipeline"])
        dataset = DatasetSpec.from_dict(state["dataset"])
        channels = {"in_channels": int(state["in_channels"]), "out_channels": int(state["out_channels"])}
        weights = state["sha256"] if "onnx" in state else state.get("average_state") or state["network_state"]
        # the file of weights that training began with is needed no more, and may be anywhere
        part = pipeline.network.without("weights")
        network = build_component(part, "network", spatial_dims=len(pipeline.train.patch), **channels)
    except (KeyError, TypeError, ConfigError) as error:
        text = "the checkpoint lacks what a model needs, or is of another version of medseg"
        raise CheckpointError(text, code="E362", file=file, found=str(error).splitlines()[0]) from error
    try:
        if "onnx" in state:
            network = OnnxNetwork(network, state["onnx"], weights)
        else:
            network.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        found = str(error).splitlines()[-1].strip()
        text = "the weights are not those of its network"
        raise CheckpointError(text, code="E363", file=file, found=found) from error
    network.eval().requires_grad_(False)
    pipeline = with_threshold(pipeline, state.get("threshold"))
    metadata = {
        **channels,
        "sources": [str(file)],
        "threshold": state.get("threshold"),
        "metrics": state.get("metrics", {}),
        "epoch": state.get("progress", {}).get("epoch"),
        "versions": state.get("versions", {}),
        "seen": state.get("seen"),
        "split": state.get("split"),
    }
    return Model((network,), pipeline, dataset, metadata)


def with_threshold(pipeline: Pipeline, threshold: float | None) -> Pipeline:
    """The pipeline with the threshold that training chose, where its post-processing asks for one."""
    if threshold is None:
        return pipeline
    steps = tuple(
        Component(part.name, {**part.arguments, "value": threshold}) if _is_chosen(part) else part
        for part in pipeline.postprocess
    )
    return pipeline.model_copy(update={"postprocess": steps})


def _is_chosen(part: Component) -> bool:
    return part.name == "Threshold" and build_component(part, "postprocess").chosen_on is not None


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        if (path / MODEL_FILE).is_file():
            return path / MODEL_FILE
        run = newest_run(path)
        for name in ("best.pt", "last.pt", "last.prev.pt"):
            if (run / name).is_file():
                return run / name
    raise CheckpointError("no run, checkpoint or package here", code="E360", file=path)


def _read(file: Path) -> dict[str, Any]:
    return read_package(file) if file.name == MODEL_FILE else read_state(file)


def _check_alike(first: Model, other: Model, file: Path) -> None:
    facts = {
        "preprocess": (first.pipeline.preprocess, other.pipeline.preprocess),
        "labels": (first.dataset.labels, other.dataset.labels),
        "channels": (first.metadata["in_channels"], other.metadata["in_channels"]),
        "classes": (first.metadata["out_channels"], other.metadata["out_channels"]),
        "dimensions": (len(first.pipeline.train.patch), len(other.pipeline.train.patch)),
    }
    for name, (one, two) in facts.items():
        if one != two:
            text = f"these models cannot form an ensemble: their {name} differ"
            raise CheckpointError(text, code="E364", file=file, expected=one, found=two)


def hash_weights(networks: Sequence[nn.Module]) -> _Hash:
    """SHA-256 of the names and values of all weights, to which more can be added."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).data)
    return digest

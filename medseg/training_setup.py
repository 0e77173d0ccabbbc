"""From a pipeline and a data root to everything that training needs: cases, fold, store, network, batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.augmentation import Augmentation
from medseg.batches import BatchMaker
from medseg.cache import CaseStore
from medseg.checkpoint_grids import mixed_grids, seen_grids
from medseg.component import build_component
from medseg.component_table import makes_labels
from medseg.config import DatasetSpec, Pipeline
from medseg.data import Case, check_leaks, find_parts, make_split, tell_test_leaks
from medseg.distributed import Group, wrap_network
from medseg.engine import TrainStep, build_network, build_optimizer, check_patch, crop_margin
from medseg.engine_compile import choose_compiled
from medseg.engine_held import hold_cases
from medseg.engine_recompute import recompute_activations
from medseg.engine_replicas import choose_replicas
from medseg.errors import ConfigError, LabelError, MedsegError, UsageError, collect
from medseg.hardware import Hardware, fast_layout
from medseg.training_intensity import intensity_notices
from medseg.training_patch import patch_notices, patch_reader

__all__ = ["Prepared", "build_step", "choose_split", "prepare"]

LEAST_ITERATIONS = 50  # of an epoch whose length is "auto": validation has to stay a small part of the work


@dataclass
class Prepared:
    """Attributes: facts, stored cases by id (training, validation), channels of the network, batches, and notices.

    `seen`: the grids of the training volumes (see `checkpoint_grids.seen_grids`); None for pictures.
    """

    pipeline: Pipeline
    spec: DatasetSpec
    hardware: Hardware
    group: Group
    cases: dict[str, Case]
    training: dict[str, Any]
    validation: dict[str, Any]
    channels: dict[str, int]
    network: nn.Module
    maker: BatchMaker
    device_augmentation: Augmentation | None
    seen: dict[str, Any] | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        """Id of a case -> the name of its content in the store."""
        stored = {**self.training, **self.validation}
        return {name: getattr(case, "folder", Path("not stored")).name for name, case in stored.items()}

    @property
    def patients(self) -> dict[str, str]:
        """Id of a case -> its group, "" where it has none."""
        return {name: case.group for name, case in self.cases.items()}


def choose_split(cases: Sequence[Case], pipeline: Pipeline, fold: int | None) -> dict[str, Any]:
    """The split of a new run, as in split.json; `fold` None trains on every case but those of the test part.

    Raises:
        UsageError: E105 too few cases; E101 no such fold.
        DataError: E354, E355: the same image or group on both sides.
    """
    train = pipeline.train
    if fold is None:
        (everything,) = make_split(cases, folds=None)
        return {"seed": train.seed, "folds": None, "fold": None, "training": [*everything.training], "validation": []}
    folds = make_split(cases, folds=train.folds, seed=train.seed)
    if not 0 <= fold < len(folds):
        expected = f"0 to {len(folds) - 1}"
        raise UsageError("no such fold", field="fold", expected=expected, found=fold)
    chosen = folds[fold]
    known = {case.id: case for case in cases}
    problems = check_leaks([known[i] for i in chosen.training], [known[i] for i in chosen.validation])
    if problems:
        raise collect(problems)
    sides = {"training": list(chosen.training), "validation": list(chosen.validation)}
    return {"seed": train.seed, "folds": len(folds), "fold": fold, **sides}


def prepare(
    pipeline: Pipeline,
    spec: DatasetSpec,
    root: Path,
    *,
    hardware: Hardware,
    group: Group,
    split: Mapping[str, Any] | None = None,
    fold: int | None = 0,
    cache: str | Path | None = None,
    show: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> tuple[Prepared, dict[str, Any]]:
    """Find, split and store the cases; build the network and what makes the batches.

    Args:
        pipeline, spec, root: what, with which facts, from where.
        hardware, group: on what, with whom.
        split: of the run that is continued; a new one for `fold` when None.
        fold: see `split`; None keeps no case for validation.
        cache: folder of the store; the platform's place for caches when None.
        show: called with lines about the progress.

    Raises:
        MedsegError: all that is wrong with the data, collected; a network that cannot take the patch.
    """
    found, test = find_parts(spec, root)
    known = {case.id: case for case in found}
    if split is None and pipeline.train.replicas != "auto":  # asked for by number: refused before an image is opened
        with torch.device("meta"):
            stand_in = build_network(pipeline, in_channels=1, out_channels=2)
        _parts(stand_in, pipeline, hardware, group)
    fresh = split is None
    split = choose_split(found, pipeline, fold) if split is None else dict(split)
    missing = [name for side in ("training", "validation") for name in split[side] if name not in known]
    if missing:
        text, fix = "cases of this run are no longer in the data set", "give the data root of the run with --data"
        raise UsageError(text, code="E106", case=", ".join(missing[:20]), file=root, fix=fix)
    names = [*split["training"], *split["validation"]]
    dims = len(pipeline.train.patch)
    store = CaseStore(spec, pipeline.preprocess, folder=cache, dims=dims)
    stored = _store(store, [known[name] for name in names], group, show)
    training = {name: stored[name] for name in split["training"]}
    notices = [*tell_test_leaks(found, test), *store.notices, *_notices(stored)]
    # in a set of few cases one fold may hold all there is of a label: the others are still worth training, knowingly
    notices += [
        f"label {name} has no voxel in this fold's training cases and cannot be learnt here"
        for name in _absent(spec, training)
        if not any(makes_labels(part.name) for part in pipeline.preprocess)
    ]
    slices = 2 * pipeline.train.context_slices + 1
    channels = {"in_channels": slices * _channels(training, spec), "out_channels": _classes(pipeline, spec, stored)}
    network = build_network(pipeline, seed=pipeline.train.seed, begun=not fresh, **channels)
    margin = crop_margin(pipeline.train.patch, check_patch(network, pipeline.train.patch))
    augmentation = Augmentation(pipeline.augment)
    on_device = hardware.device.type == "cuda"
    held, more = hold_cases(training, pipeline.train.keep_on_device, hardware.device, neighbours=group.neighbours)
    notices += more
    maker = BatchMaker(
        held,
        _epoch_samples(pipeline, len(training)),
        patch_reader(pipeline, margin, augmentation, training),
        batch=pipeline.train.batch,
        seed=pipeline.train.seed,
        augmentation=None if on_device else augmentation,
        ignore=spec.ignore,
        outside_fov=spec.outside_fov,
        rank=group.rank,
        world=group.world,
    )
    notices += patch_notices(network, maker.reader, training, augmentation)
    seen = seen_grids(case.affine for case in training.values()) if spec.dims == 3 else None
    notices += mixed_grids(seen) if seen else []
    if fresh and group.writes:
        notices += intensity_notices(pipeline.preprocess, [known[name] for name in split["training"]], spec)
    validation = {name: stored[name] for name in split["validation"]}
    prepared = Prepared(
        pipeline, spec, hardware, group, {name: known[name] for name in names}, training, validation, channels, network,
        maker, augmentation if on_device else None, seen, notices,
    )  # fmt: skip
    return prepared, split


def build_step(prepared: Prepared, *, replicas: int | None = None) -> tuple[TrainStep, list[str]]:
    """The network on its device with loss and optimizer, and what should be told.

    Args:
        prepared: what `prepare` gave.
        replicas: parts of a batch of the run that is continued; None: as the pipeline says.
    """
    pipeline, hardware, group = prepared.pipeline, prepared.hardware, prepared.group
    train, notices = pipeline.train, []
    network = prepared.network
    if train.checkpoint_activations:
        count = recompute_activations(network)
        if count == 0:
            text = "this network has no levels whose activations could be recomputed"
            raise ConfigError(text, code="E116", field="train.checkpoint_activations", fix="remove it")
    layout = fast_layout(network, hardware)
    network = network.to(hardware.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    wrapped, more = wrap_network(network, group, hardware.device)
    notices += more
    shape = (-(-train.batch // group.world), prepared.channels["in_channels"], *train.patch)
    forward, more = choose_compiled(wrapped, train.compile, shape, hardware)
    notices += more
    count, more = _parts(network, pipeline, hardware, group, replicas)
    notices += more
    step = TrainStep(
        wrapped,
        # a loss has tensors too: the weights of the classes
        build_component(pipeline.loss, "loss", spatial_dims=len(train.patch), **prepared.channels).to(hardware.device),
        build_optimizer(pipeline, network, hardware.device),
        hardware,
        clip=train.clip,
        ema=train.ema,
        world=group.world,
        forward=forward,
        replicas=count,
    )
    return step, [f"memory layout: {step.layout}", *notices]


def _parts(
    network: nn.Module, pipeline: Pipeline, hardware: Hardware, group: Group, began: int | None = None
) -> tuple[int, list[str]]:
    train = pipeline.train  # compile "auto" is for GPUs
    alone = group.world == 1 and train.compile is not True and not train.checkpoint_activations
    wish = train.replicas if began is None else began if alone and hardware.device.type == "cpu" else 1
    return choose_replicas(network, wish, train.batch, hardware, alone=alone)


def _store(store: CaseStore, cases: list[Case], group: Group, show: Callable[[str], None]) -> dict[str, Any]:
    """All cases in the store; with several processes each prepares its share first."""
    last = [0]

    def progress(done: int, count: int, _: str) -> None:
        share = done * 10 // count
        if share > last[0] and count >= 20:
            last[0] = share
            show(f"prepared {done} of {count} cases")

    problem: MedsegError | None = None
    if group.world > 1:
        try:
            store.prepare(cases[group.rank :: group.world], workers=1)
        except MedsegError as error:
            problem = error
        if group.any(int(problem is not None)) and problem is None:
            raise UsageError("another process found problems in the data; see its message", code="E107")
        if problem is not None:
            raise problem
    return store.prepare(cases, progress=progress if group.writes else None)


def _notices(stored: Mapping[str, Any]) -> list[str]:
    empty = [name for name, case in stored.items() if not any(k for k in case.classes if k > 0)]
    told = [f"{name}: {note}" for name, case in stored.items() for note in case.notes]
    if empty:
        told.append(
            f"no structure is labelled in {len(empty)} cases: {', '.join(empty[:5])}" + (" ..." if empty[5:] else "")
        )
    return told


def _channels(training: Mapping[str, Any], spec: DatasetSpec) -> int:
    first = next(iter(training.values()))
    return int(first.arrays["image"].shape[0]) or spec.in_channels


def _absent(spec: DatasetSpec, stored: Mapping[str, Any]) -> list[str]:
    """Labels that no voxel of these preprocessed cases has."""
    present = {label for case in stored.values() for label in case.classes}
    return [f"{index} ({name})" for index, name in spec.labels.items() if index > 0 and index not in present]


def _classes(pipeline: Pipeline, spec: DatasetSpec, stored: Mapping[str, Any]) -> int:
    """Classes of the network: the data set's, unless preprocessing makes other labels of them."""
    if any(makes_labels(part.name) for part in pipeline.preprocess):
        return 1 + max(label for case in stored.values() for label in [1, *case.classes])
    nowhere = _absent(spec, stored)
    if nowhere:
        raise LabelError(
            "classes without a voxel in the training part",
            code="E337",
            field="labels",
            expected="at least one case with each label",
            found=f"none with {', '.join(nowhere)}",
            fix="add cases, or take the label out of datasets.yaml",
        )
    return spec.out_channels


def _epoch_samples(pipeline: Pipeline, cases: int) -> int:
    train = pipeline.train
    if train.iterations_per_epoch != "auto":
        return int(train.iterations_per_epoch) * train.batch
    visit = cases * train.samples_per_case
    return visit * -(-LEAST_ITERATIONS * train.batch // visit)

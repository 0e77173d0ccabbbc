"""One run while it trains: what all handlers see, what is saved, and how it is taken up again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from medseg.augmentation import Augmentation
from medseg.batches import Batch, BatchMaker
from medseg.checkpoint import CheckpointStore
from medseg.config import DatasetSpec, Pipeline
from medseg.distributed import Group
from medseg.engine import TrainStep
from medseg.engine_budget import Budget, Progress
from medseg.engine_stream import BatchStream
from medseg.engine_validation import Validation, Validator
from medseg.hardware import Hardware
from medseg.patches import derive_seed
from medseg.run import RunFolder, versions
from medseg.schedules import Schedule

__all__ = ["Session"]


@dataclass
class Session:
    """Everything about a run that trains.

    Attributes, beside the parts named by their classes:
        split: seed, folds, fold, training, validation (and began_with, the cases that the weights of --init know): as
            in split.json.
        channels: in_channels and out_channels of the network.
        seen: the grids of the training volumes (see `checkpoint_grids.seen_grids`); None for pictures.
        replicas: parts of a batch that the run began with (`step.parts` is how many there are now).
        rates: the base learning rate of each parameter group.
        device_augmentation: applied to batches on the device; None where the workers do it.
        validation: what the last validation found.
        threshold: share above which a voxel is foreground, chosen at the end; None: most probable class.
        seconds: where the time of this session went: wait, step, validate, save.
        recent: cases of the last iterations; images: patches of this session, over all processes; mark: `images`
            and `seconds` at the end of the last epoch.
        command: how to continue.
    """

    pipeline: Pipeline
    spec: DatasetSpec
    hardware: Hardware
    group: Group
    run: RunFolder
    checkpoints: CheckpointStore
    maker: BatchMaker
    step: TrainStep
    schedule: Schedule
    budget: Budget
    validator: Validator
    split: dict[str, Any]
    channels: dict[str, int]
    seen: dict[str, Any] | None = None
    replicas: int = 1
    progress: Progress = field(default_factory=Progress)
    rates: list[float] = field(default_factory=list)
    device_augmentation: Augmentation | None = None
    stream: BatchStream | None = None
    validation: Validation | None = None
    threshold: float | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("wait", "step", "validate", "save"), 0.0))
    notices: list[str] = field(default_factory=list)
    recent: list[tuple[str, ...]] = field(default_factory=list)
    images: int = 0
    mark: dict[str, float] = field(default_factory=dict)
    loss: torch.Tensor | None = None
    _started: float | None = None
    _before: float = 0.0

    @property
    def train(self) -> Any:
        """The pipeline's `train` section."""
        return self.pipeline.train

    @property
    def per_epoch(self) -> int:
        """Iterations in an epoch."""
        return self.maker.iterations

    @property
    def command(self) -> str:
        """How to continue this run."""
        return f"medseg train --resume {self.run.path}"

    def start_clock(self) -> None:
        """Begin to count minutes of training on top of those of earlier sessions."""
        self._started, self._before = time.perf_counter(), self.progress.minutes

    @property
    def minutes(self) -> float:
        """Minutes of this session alone; `progress.minutes` counts those of earlier ones too."""
        return self.progress.minutes - self._before

    def tick(self) -> None:
        """Bring `progress.minutes` up to date (in one process; `agree` makes all processes agree)."""
        if self._started is not None:
            self.progress.minutes = self._before + (time.perf_counter() - self._started) / 60

    def agree(self, flag: int) -> int:
        """The largest flag of all processes, and the longest time on their clocks."""
        self.tick()
        if self.group.control is None:
            return flag
        flag, micro = self.group.largest([flag, int(self.progress.minutes * 6e7)])
        self.progress.minutes = micro / 6e7
        return flag

    def set_rate(self) -> float:
        """Set the learning rates for the next iteration; returns the first.

        When the minutes pass within a step of `accumulate` iterations, it keeps the rate that it has: the schedule ends
        at 0, as a rule, and the step would be lost.
        """
        if self.progress.iteration and self.budget.is_spent(self.progress):
            return self.progress.rate
        factor = self.schedule(self.budget.share(self.progress), self.progress.epoch)
        for group, rate in zip(self.step.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return self.rates[0] * factor

    def iterate(self, batch: Batch) -> torch.Tensor:
        """One iteration: forward, backward, and the optimizer's step where one is due."""
        progress, accumulate = self.progress, self.train.accumulate
        begin = time.perf_counter()
        progress.rate = self.set_rate()
        if self.device_augmentation is not None:
            batch = self.maker.finish(batch.to(self.hardware.device), self.device_augmentation)
        else:
            batch = batch.to(self.hardware.device)
        # the last step of an epoch takes what there is, so that no gradient has to be carried (and saved) over its end
        first = progress.step - progress.step % accumulate
        divide = min(accumulate, self.per_epoch - first)
        update = self.at_step_end(progress.step + 1)
        seed = derive_seed(self.train.seed, progress.iteration, self.group.rank, 0xD0)
        loss = self.step(batch, seed=seed, divide=divide, update=update)
        self.recent = [*self.recent[-63:], batch.cases]
        # double precision on the device: the mean does not depend on where a run was interrupted
        share = (loss if self.hardware.device.type == "mps" else loss.double()) * batch.share
        self.loss = share if self.loss is None else self.loss + share
        progress.iteration += 1
        progress.step += 1
        self.images += len(self.maker.samples(batch.key))
        self.seconds["step"] += time.perf_counter() - begin
        return loss

    def at_step_end(self, step: int | None = None) -> bool:
        """Whether the optimizer's step is done after this iteration of the epoch (only then can be saved)."""
        step = self.progress.step if step is None else step
        return step % self.train.accumulate == 0 or step >= self.per_epoch

    def gather_loss(self) -> None:
        """Bring the epoch's loss so far into `progress`, summed over processes (all of them call this together)."""
        own = torch.zeros(1, dtype=torch.float64) if self.loss is None else self.loss.reshape(1).cpu().double()
        self.progress.loss_sum += float(self.group.add(own)[0])
        self.loss = None

    def state(self, *, weights_only: bool = False) -> dict[str, Any]:
        """All that is saved, tensors and plain values; `weights_only`: what prediction needs."""
        facts = {
            "pipeline": self.pipeline.to_dict(),
            "dataset": self.spec.to_dict(),
            "split": self.split,
            "progress": self.progress.to_dict(),
            "metrics": {} if self.validation is None else {**self.validation.scores, "best": self.validation.score},
            "threshold": self.threshold,
            "versions": versions(),
            "processes": self.group.world,
            "threads": self.hardware.threads,
            "precision": self.hardware.precision,
            "replicas": self.replicas,
            "layout": self.step.layout,
            "random": {"seed": self.train.seed},
            "seen": self.seen,
            **self.channels,
        }
        if weights_only:
            network = self.step.validated.state_dict()
            return {**facts, "network_state": {k: v.detach().cpu().contiguous() for k, v in network.items()}}
        return {**facts, **self.step.state_dict(), "schedule_state": self.schedule.state_dict(), "rates": self.rates}

    def save(self, name: str = "last") -> None:
        """Save a checkpoint (all processes call this together; the first one writes)."""
        begin = time.perf_counter()
        self.gather_loss()
        with self.group.first():
            if self.group.writes:
                facts = {"epoch": self.progress.epoch, "iteration": self.progress.iteration}
                self.checkpoints.save(self.state(weights_only=name == "best"), name, facts=facts)
        self.seconds["save"] += time.perf_counter() - begin

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved state was."""
        self.progress = Progress.from_dict(state["progress"])
        self.step.load_state_dict(state)
        self.schedule.load_state_dict(state["schedule_state"])
        self.rates = [float(rate) for rate in state["rates"]]
        self.threshold = state.get("threshold")

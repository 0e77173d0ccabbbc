"""How much of the budget is spent, and all else that a run remembers of its past: plain numbers that can be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from medseg.config import TrainConfig

__all__ = ["Budget", "Progress"]

_LOOKING = 1 / 20  # of the time of a budget in minutes that validation may take


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: finished epochs.
        iteration: finished iterations since the beginning.
        step: finished iterations of the current epoch.
        minutes: minutes of training and validation, over all sessions.
        loss_sum: losses of the current epoch's iterations so far.
        rate: the last iteration's learning rate.
        validated: epochs after which validation took place (the last one; 0: none yet).
        best: best score so far, higher is better (None: none yet); best_epoch: after which epoch.
        waited: validations since the best one.
        looked, looking: when the last validation ended (as `minutes`), and the minutes that it took.
        history: one row for each epoch, as in log.csv.
        finished: why training ended: "", "budget" or "patience".
    """

    epoch: int = 0
    iteration: int = 0
    step: int = 0
    minutes: float = 0.0
    loss_sum: float = 0.0
    rate: float = 0.0
    validated: int = 0
    best: float | None = None
    best_epoch: int = 0
    waited: int = 0
    looked: float = 0.0
    looking: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: str = ""

    def observe(self, score: float) -> bool:
        """Take note of a validation score (higher is better; NaN is the worst); True if it is the best so far.

        The first one is, whatever it is; a second NaN is no better than the first, so that patience counts it.
        """
        worst = not math.isfinite(score)
        first = self.best is None and not (worst and self.best_epoch)
        if first or (self.best is not None and not worst and score > self.best):
            self.best = None if worst else float(score)
            self.best_epoch, self.waited = self.epoch, 0
            return True
        self.waited += 1
        return False

    def look(self, begin: float) -> None:
        """Take note of a validation that began after `begin` minutes and ends now."""
        took = self.minutes - begin
        # one that was slow because of something else does not keep the next ones away
        self.looked, self.looking = self.minutes, min(took, 2 * self.looking) if self.looking else took

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Progress:
        """From what `to_dict` gave."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


@dataclass(frozen=True)
class Budget:
    """The budget of a run: exactly one of epochs, iterations, minutes.

    >>> Budget(epochs=4, iterations=None, minutes=None, per_epoch=10).share(Progress(iteration=10))
    0.25
    """

    epochs: int | None
    iterations: int | None
    minutes: float | None
    per_epoch: int

    @classmethod
    def of(cls, train: TrainConfig, per_epoch: int) -> Budget:
        """The budget that a pipeline states, with its number of iterations in an epoch.

        Iterations that end within a step of the optimizer are rounded up to its end: the step is done, and the schedule
        has to span it.
        """
        iterations = train.iterations
        if iterations is not None:
            epochs, rest = divmod(iterations, per_epoch)
            iterations = epochs * per_epoch + min(-(-rest // train.accumulate) * train.accumulate, per_epoch)
        return cls(train.epochs, iterations, train.minutes, per_epoch)

    @property
    def total(self) -> int | None:
        """Iterations in all; None for a budget in minutes."""
        if self.epochs is not None:
            return self.epochs * self.per_epoch
        return self.iterations

    def share(self, progress: Progress) -> float:
        """Spent share, from 0 to 1 (a budget in minutes overshoots by part of an iteration and of a validation)."""
        if self.total is not None:
            return progress.iteration / self.total
        assert self.minutes is not None
        return progress.minutes / self.minutes

    def is_spent(self, progress: Progress) -> bool:
        """Whether training is over."""
        return self.share(progress) >= 1.0

    def is_validation_due(self, progress: Progress, every: int | str) -> bool:
        """Whether the epoch that ends now (`progress.epoch` does not count it yet) is followed by a validation.

        Args:
            progress: with the minutes up to now.
            every: `train.validate_every`. "auto" is every epoch, but with a budget in minutes only so often that
                validation takes about a twentieth of them, beside the first: what it does not take is trained. (With
                other budgets the clock decides nothing, so that equal runs have equal weights.)

        >>> budget = Budget(epochs=None, iterations=None, minutes=10.0, per_epoch=50)
        >>> last = Progress(epoch=3, minutes=2.5, looked=2.0, looking=0.1)  # half a minute ago, six seconds long
        >>> budget.is_validation_due(last, "auto"), budget.is_validation_due(last, 2)
        (False, True)
        """
        if self.is_spent(progress):
            return True
        if every != "auto":
            return (progress.epoch + 1) % int(every) == 0
        return self.minutes is None or progress.minutes - progress.looked >= progress.looking * (1 / _LOOKING - 1)

    def minutes_left(self, progress: Progress) -> float | None:
        """Estimate from the pace so far; None before the first iteration."""
        share = self.share(progress)
        if self.minutes is not None:
            return max(0.0, self.minutes - progress.minutes)
        return progress.minutes * (1 - share) / share if share > 0 and progress.minutes > 0 else None

    def describe(self) -> str:
        """In words.

        >>> Budget(None, 500, None, 10).describe()
        '500 iterations'
        """
        for name in ("epochs", "iterations", "minutes"):
            if (value := getattr(self, name)) is not None:
                return f"{value:g} {name if value != 1 else name[:-1]}"
        raise AssertionError("a budget has one of the three")

"""Learning-rate schedules as pure functions of how much of the budget is spent.

A budget may be epochs, iterations or minutes; in all three the program knows the share `progress` in [0, 1] that is
spent, so a schedule maps (progress, epoch) to a factor on the base learning rate and has nothing else to count. That
makes resuming trivial: only `ReduceLROnPlateau` has state, and its `state_dict` is plain numbers.
"""

from __future__ import annotations

import math
from typing import Any

from medseg.errors import UsageError

__all__ = ["ConstantLR", "CosineLR", "ExponentialLR", "PolynomialLR", "ReduceLROnPlateau", "Schedule", "StepLR"]


class Schedule:
    """Base: a linear warm-up over the first `warmup` share of the budget, then the subclass's `curve`.

    Args:
        warmup: share of the budget, in [0, 1), over which the factor climbs linearly to 1; 0 switches it off.

    Raises:
        UsageError: an argument outside its range.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        _require(0 <= warmup < 1, "warmup", "0 <= warmup < 1 (a share of the budget)", warmup)
        self.warmup = warmup

    def __call__(self, progress: float, epoch: int = 0) -> float:
        """The factor on the base learning rate.

        Args:
            progress: spent share of the budget; values outside [0, 1] are clipped, because a budget in minutes
                overshoots by part of an iteration.
            epoch: number of finished epochs, used by `StepLR` and `ExponentialLR` alone.
        """
        progress = min(max(float(progress), 0.0), 1.0)
        if progress < self.warmup:
            # never exactly 0: the first iteration would be wasted
            return max(progress / self.warmup, 1e-3)
        return self.curve((progress - self.warmup) / (1 - self.warmup), epoch)

    def curve(self, progress: float, epoch: int) -> float:
        """Factor after the warm-up; `progress` runs from 0 to 1 over what is left of the budget."""
        raise NotImplementedError

    def observe(self, score: float, progress: float = 1.0) -> None:
        """Take note of a validation score (higher is better) at `progress`; only `ReduceLROnPlateau` acts on it."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved so that a resumed run goes on alike: nothing, unless a subclass says otherwise."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class ConstantLR(Schedule):
    """The base learning rate throughout.

    >>> ConstantLR()(0.7)
    1.0
    """

    def curve(self, progress: float, epoch: int) -> float:
        return 1.0


class PolynomialLR(Schedule):
    """(1 - progress) ** power, the schedule of DeepLab and nnU-Net (https://doi.org/10.1038/s41592-020-01008-z).

    Args:
        power: exponent > 0.
        warmup: see `Schedule`.

    >>> round(PolynomialLR(power=0.9)(0.5), 4)
    0.5359
    """

    def __init__(self, power: float = 0.9, warmup: float = 0.0) -> None:
        super().__init__(warmup)
        _require(power > 0, "power", "> 0", power)
        self.power = power

    def curve(self, progress: float, epoch: int) -> float:
        return (1 - progress) ** self.power


class CosineLR(Schedule):
    """Half a cosine from 1 to `final` (SGDR without restarts, https://arxiv.org/abs/1608.03983); warm-up on request.

    Args:
        warmup: see `Schedule`.
        final: factor at the end, in [0, 1].

    >>> [round(CosineLR(warmup=0.1)(p), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        super().__init__(warmup)
        _require(0 <= final <= 1, "final", "0 <= final <= 1", final)
        self.final = final

    def curve(self, progress: float, epoch: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class StepLR(Schedule):
    """gamma ** (epoch // step_size), as torch's scheduler of that name.

    Args:
        step_size: epochs between two drops, at least 1.
        gamma: factor of one drop, in (0, 1].
        warmup: see `Schedule`.

    >>> [round(StepLR(step_size=10)(0.0, epoch), 3) for epoch in (9, 10, 20)]
    [1.0, 0.1, 0.01]
    """

    def __init__(self, step_size: int, gamma: float = 0.1, warmup: float = 0.0) -> None:
        super().__init__(warmup)
        _require(step_size >= 1, "step_size", ">= 1 epoch", step_size)
        _require(0 < gamma <= 1, "gamma", "0 < gamma <= 1", gamma)
        self.step_size, self.gamma = step_size, gamma

    def curve(self, progress: float, epoch: int) -> float:
        return self.gamma ** (epoch // self.step_size)


class ExponentialLR(Schedule):
    """gamma ** epoch.

    Args:
        gamma: factor per epoch, in (0, 1].
        warmup: see `Schedule`.

    >>> ExponentialLR(gamma=0.5)(0.0, epoch=3)
    0.125
    """

    def __init__(self, gamma: float, warmup: float = 0.0) -> None:
        super().__init__(warmup)
        _require(0 < gamma <= 1, "gamma", "0 < gamma <= 1", gamma)
        self.gamma = gamma

    def curve(self, progress: float, epoch: int) -> float:
        return self.gamma**epoch


class ReduceLROnPlateau(Schedule):
    """Multiply by `factor` whenever `patience` validations in a row brought no better score.

    A score that is not a number counts as no better. After a drop the count starts again. Validations during the
    warm-up are not waited for: the rate still climbs.

    Args:
        factor: in (0, 1).
        patience: validations without improvement that are waited for, at least 1.
        threshold: improvement that counts, in the unit of the score.
        min_factor: the factor never falls below this, in [0, 1].
        warmup: see `Schedule`.

    >>> schedule = ReduceLROnPlateau(factor=0.5, patience=2)
    >>> for score in (0.6, 0.6, 0.6):
    ...     schedule.observe(score)
    >>> schedule(0.5)
    0.5
    """

    def __init__(
        self,
        factor: float = 0.5,
        patience: int = 5,
        threshold: float = 1e-4,
        min_factor: float = 1e-3,
        warmup: float = 0.0,
    ) -> None:
        super().__init__(warmup)
        _require(0 < factor < 1, "factor", "0 < factor < 1", factor)
        _require(patience >= 1, "patience", ">= 1 validation", patience)
        _require(threshold >= 0, "threshold", ">= 0", threshold)
        _require(0 <= min_factor <= 1, "min_factor", "0 <= min_factor <= 1", min_factor)
        self.factor, self.patience, self.threshold, self.min_factor = factor, patience, threshold, min_factor
        self._best: float | None = None
        self._waited = 0
        self._current = 1.0

    def observe(self, score: float, progress: float = 1.0) -> None:
        if math.isfinite(score) and (self._best is None or score > self._best + self.threshold):
            self._best, self._waited = float(score), 0
            return
        self._waited += progress >= self.warmup
        if self._waited >= self.patience:
            self._current, self._waited = max(self._current * self.factor, self.min_factor), 0

    def curve(self, progress: float, epoch: int) -> float:
        return self._current

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "current": self._current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state["best"]
        self._best = None if best is None else float(best)
        self._waited, self._current = int(state["waited"]), float(state["current"])


def _require(condition: bool, field: str, expected: str, found: object) -> None:
    if not condition:
        raise UsageError("schedule argument out of range", field=field, expected=expected, found=found)

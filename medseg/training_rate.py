"""The learning-rate range test (Smith 2017, doi:10.1109/WACV.2017.58): which rate to begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.config import Pipeline, load_dataset, load_pipeline
from medseg.data import data_root
from medseg.distributed import Group
from medseg.engine_stream import BatchStream
from medseg.errors import MedsegError, ResourceError, TrainingError
from medseg.hardware import choose_hardware, configured
from medseg.inference.passes import is_out_of_memory
from medseg.patches import derive_seed
from medseg.training_setup import build_step, prepare
from medseg.training_weights import load_weights

__all__ = ["LearningRates", "find_learning_rate", "suggest"]


@dataclass(frozen=True)
class LearningRates:
    """Attributes: rows (learning rate, smoothed loss), the suggested rate, and the optimizer's name."""

    rows: tuple[tuple[float, float], ...]
    suggested: float
    optimizer: str


def find_learning_rate(
    pipeline: Pipeline | str | Path,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 80,
    fold: int | None = 0,
    init: str | Path | None = None,
) -> LearningRates:
    """Train for some iterations while the learning rate grows exponentially, and suggest one.

    Args:
        pipeline: a loaded pipeline, or its name.
        data, device, cache, fold, init: as for `train`.
        lowest, highest: the range.
        steps: iterations; it ends early when the loss is four times its least value.

    Returns:
        LearningRates: the suggestion is where the smoothed loss falls most steeply per decade.

    Raises:
        TrainingError: E602, the loss is no number from the start.
        ResourceError: E523, a step does not fit into memory.
    """
    root = data_root(data)
    chosen = pipeline if isinstance(pipeline, Pipeline) else load_pipeline(pipeline, root=root)
    spec = load_dataset(chosen.dataset, root=root)
    hardware = choose_hardware(device, chosen.train.precision)
    prepared, _ = prepare(chosen, spec, root, hardware=hardware, group=Group(), fold=fold, cache=cache)
    rows: list[tuple[float, float]] = []
    smooth, weight = 0.0, 0.0
    with configured(hardware, deterministic=chosen.train.deterministic):
        step, _ = build_step(prepared)
        if init is not None:
            load_weights(step, init)
        stream = BatchStream(prepared.maker)
        for number in range(steps):
            rate = lowest * (highest / lowest) ** (number / max(1, steps - 1))
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            batch = next(stream)
            try:
                batch = batch.to(hardware.device)
                if prepared.device_augmentation is not None:
                    batch = prepared.maker.finish(batch, prepared.device_augmentation)
                loss = float(step(batch, seed=derive_seed(chosen.train.seed, number)))
            except Exception as error:
                if isinstance(error, MedsegError) or not is_out_of_memory(error):
                    raise
                what, fix = "out of memory while looking for a learning rate", "medseg train names the patch that fits"
                found = f"patch {list(chosen.train.patch)}, batch {chosen.train.batch}"
                raise ResourceError(what, code="E523", field="train.patch", found=found, fix=fix) from error
            if not math.isfinite(loss):
                break
            # a mean over the last ten or so, without the pull of its first value
            smooth, weight = 0.9 * smooth + 0.1 * loss, 0.9 * weight + 0.1
            rows.append((rate, smooth / weight))
            if rows[-1][1] > 4 * min(value for _, value in rows) + 1e-12 and number > steps // 4:
                break
    if len(rows) < 3:
        fix = "look at the data and the loss, or use precision fp32"
        raise TrainingError("the loss is no number even at the lowest learning rate", code="E602", fix=fix)
    return LearningRates(tuple(rows), suggest(rows), chosen.optimizer.name)


def suggest(rows: Sequence[tuple[float, float]]) -> float:
    """The rate at which the loss falls most steeply against the logarithm of the rate, before its least value.

    The first eighth of many rows is left out: there the running mean is one of a few batches and jumps with each.

    >>> suggest([(1e-4, 1.0), (1e-3, 0.95), (1e-2, 0.4), (1e-1, 0.2), (1.0, 2.0)])
    0.01
    """
    rates, losses = np.log([rate for rate, _ in rows]), np.array([loss for _, loss in rows])
    slope = np.gradient(losses, rates)
    first = len(rows) // 8
    least = first + int(np.argmin(losses[first:]))
    return float(f"{rows[first + int(np.argmin(slope[first : least + 1]))][0]:.3g}")

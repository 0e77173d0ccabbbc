"""Fine-tuning: weights of another run put into a new network, as far as they fit, and a report of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medseg.checkpoint import load_model
from medseg.config import DatasetSpec
from medseg.engine import TrainStep
from medseg.errors import CheckpointError
from medseg.run import seen_before

__all__ = ["load_weights"]


def load_weights(
    step: TrainStep, source: str | Path, split: dict[str, Any] | None = None, spec: DatasetSpec | None = None
) -> list[str]:
    """Load what has the same name and shape.

    Args:
        step: holds the network (and its average).
        source: a run folder or a checkpoint.
        split: of the new run; `began_with` becomes the cases of its data set that the weights were trained on.
        spec: the new run's data set.

    Returns:
        Lines that say how many tensors were loaded, and which were not and why; and whether validation cases are
        among those that the weights know.

    Raises:
        CheckpointError: E360-E362, no checkpoint; E365, nothing in it fits.
    """
    model = load_model(source)
    given, own = model.network.state_dict(), step.bare.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    shapes = [name for name in own if name in given and name not in fitting]
    absent = [name for name in own if name not in given]
    extra = [name for name in given if name not in own]
    kernels = {name for name, value in step.bare.named_parameters() if value.ndim > 1}  # a bias alone is nothing
    if not kernels & fitting.keys():
        found = f"{len(given)} tensors, none with a name and shape of this network"
        raise CheckpointError("no weight of the checkpoint fits", code="E365", file=source, found=found)
    with torch.no_grad():
        for network in filter(None, (step.bare, step.average)):
            network.load_state_dict(fitting, strict=False)
    told = [f"weights: {len(fitting)} of {len(own)} tensors loaded from {Path(source)}"]
    for names, why in ((shapes, "another shape"), (absent, "not in the checkpoint"), (extra, "not in this network")):
        if names:
            told.append(f"weights not loaded ({why}): {', '.join(names[:10])}" + (" ..." if len(names) > 10 else ""))
    known = model.metadata.get("split")
    if known and split is not None and spec is not None and spec.files == model.dataset.files:  # the same cases by id
        split["began_with"] = sorted({*known["training"], *known.get("began_with", ())})
        told += seen_before(split)
    return told

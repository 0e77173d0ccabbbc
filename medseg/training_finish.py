"""The end of a training: the best weights on all validation cases, their predictions as files, the threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medseg.checkpoint_read import read_state
from medseg.config import DatasetSpec, Pipeline
from medseg.data import Case
from medseg.engine_session import Session
from medseg.errors import CheckpointError
from medseg.files import safe_stem
from medseg.metrics import get_protocol, parse_metrics
from medseg.volumes import Volume, find_format, write_label

__all__ = ["load_best", "mend_best", "needs_probabilities", "output_name", "predict_validation"]

_SHARES = ".probabilities.zarr"


def mend_best(session: Session, state: Mapping[str, Any]) -> list[str]:
    """Save best.pt if it is not the one that the checkpoint `state` knows and that holds it; what should be told.

    last.pt is saved before best.pt: after a kill between the two it holds the best weights itself. After a fall back to
    last.prev.pt, best.pt may be of an epoch that is trained again, and whose weights are nowhere else. Where there is
    no whole best.pt, and its weights are lost, the epochs from here on have to find a best one.
    """
    done = session.progress
    try:
        there = read_state(session.run.path / "best.pt")["progress"]
        found = there["epoch"], there["best"]
    except (CheckpointError, KeyError, TypeError):  # none yet, or damaged
        found = 0, None
    if found == (done.best_epoch, done.best):
        return []
    if done.epoch == done.best_epoch and not done.step:
        if session.group.writes:
            best = {**session.state(weights_only=True), "metrics": state.get("metrics", {})}
            session.checkpoints.save(best, "best", facts={"epoch": done.epoch, "iteration": done.iteration})
        return []
    if not session.validator.stored:  # the newest weights count: those of the next epoch replace it
        return []
    if not found[0]:
        lost, done.best, done.best_epoch, done.waited = done.best_epoch, None, 0, 0
        return [f"there is no whole best.pt (of epoch {lost}): the best of the epochs from here on is kept"]
    known = f"was best after epoch {done.best_epoch}" if done.best_epoch else "had no validation yet"
    return [
        f"best.pt is of epoch {found[0]}, but the checkpoint that is continued {known}: best.pt stays until a later "
        "epoch is better"
    ]


def load_best(session: Session) -> int:
    """Put the weights of best.pt into the network whose predictions count (the run is over: training ends here).

    Returns the epoch that they are of; without best.pt the weights stay those of the last one.
    """
    path = session.run.path / "best.pt"
    if not path.is_file():
        return session.progress.epoch
    state = read_state(path)
    session.step.validated.load_state_dict(state["network_state"])
    return int(state["progress"]["epoch"])


def predict_validation(
    session: Session, cases: dict[str, Case], *, check_stop: Callable[[], None] = lambda: None
) -> Path:
    """Predict every validation case with the current weights and write the labels to RUN/validation.

    Probabilities are written beside them (`<case>.probabilities.zarr`, as by `medseg predict`) when a score of the
    pipeline or of the data set's protocol looks at them. The processes share the cases. Returns the folder.
    """
    from medseg.inference.outputs import probability_file

    keep = needs_probabilities(session.pipeline, session.spec)
    folder = session.run.path / "validation"
    names = session.validator.choose(None)
    group = session.group
    mine = names[group.rank :: group.world]
    for turn in range(-(-len(names) // group.world)):
        check_stop()  # by all processes, also by one that has no case left
        if turn >= len(mine):
            continue
        name = mine[turn]
        label, probabilities = session.validator.predict(session.step.validated, name, probabilities=keep, exact=True)
        case = cases[name]
        like = _like(case, session.spec.affine, session.validator.stored[name].native, session.spec.in_channels)
        target = folder / output_name(case)
        if keep:
            assert probabilities is not None
            with probability_file(folder / (safe_stem(case.id, _SHARES) + _SHARES), label.shape) as put:
                put((slice(None),) * label.ndim, probabilities)
        write_label(target, label, like, description="medseg validation")
    group.wait()
    return folder


def needs_probabilities(pipeline: Pipeline, spec: DatasetSpec) -> bool:
    """Whether a score of the pipeline or of the data set's protocol is another one with probabilities."""
    wanted = [*pipeline.metrics, *(get_protocol(spec.protocol).metrics if spec.protocol else ())]
    return bool(wanted) and any(metric.uses_probabilities for metric, _ in parse_metrics(wanted))


def output_name(case: Case) -> str:
    """Name of a case's label file: `.nii.gz` for volumes, `.tif` for TIFF, `.png` for other pictures."""
    kind = find_format(case.images[0])
    suffix = {"tiff": ".tif", "png": ".png", "jpeg": ".png", "gif": ".png"}.get(kind, ".nii.gz")
    return safe_stem(case.id, suffix) + suffix


def _like(case: Case, affine: str, native: Any, channels: int) -> Volume:
    """The case's image without its voxels: what the writer of labels needs to give the same grid."""
    from medseg.inference.outputs import header_of

    found = header_of(case.images[0], native, channels, affine)
    assert isinstance(found.array, np.ndarray)
    return found

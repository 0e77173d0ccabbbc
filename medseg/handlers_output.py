"""Where a run can be watched: log.csv, TensorBoard, MLflow, lines and a bar on the screen."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from medseg.engine_session import Session
from medseg.errors import ResourceError

__all__ = [
    "BarOutput",
    "LineOutput",
    "MlflowOutput",
    "TableOutput",
    "TensorBoardOutput",
    "format_minutes",
    "overlay",
]

_FIRST = ("epoch", "iteration", "minutes", "lr", "loss", "score")


class TableOutput:
    """log.csv: one row for each epoch, written anew and whole each time from what the checkpoint remembers.

    `score` is the number that picks the best weights; `val <metric> <label>` are means over the validated cases.
    """

    def iterated(self, session: Session) -> None: ...

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        rows = session.progress.history
        names = dict.fromkeys([*_FIRST, *(name for row in rows for name in row)])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
        session.run.write_text("log.csv", text.getvalue())

    def close(self, session: Session) -> None: ...


class TensorBoardOutput:
    """tensorboard/: the numbers of log.csv, and after a validation one slice with reference and prediction.

    What cannot be written (the disk is full) is told and ends this record alone: whether training goes on is for the
    checkpoints to say.
    """

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # after a resume, what was written beyond the checkpoint is hidden
        again = session.progress.iteration or None
        self.writer: Any = None
        with self._told():
            self.writer = SummaryWriter(str(session.run.path / "tensorboard"), purge_step=again and again + 1)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.writer = None
            print(f"note: TensorBoard's file cannot be written any more ({error.strerror})", file=sys.stderr)

    def iterated(self, session: Session) -> None: ...

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        if self.writer is not None:
            with self._told():
                self._write(session, row)

    def _write(self, session: Session, row: dict[str, Any]) -> None:
        step = session.progress.iteration
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("epoch", "iteration"):
                self.writer.add_scalar(name.replace("val ", "validation/").replace(" ", "_"), value, step)
        found = session.validation
        if session.progress.validated == session.progress.epoch and found is not None and found.picture is not None:
            self.writer.add_image("validation/case", overlay(*found.picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self, session: Session) -> None:
        if self.writer is not None:
            with self._told():
                self.writer.close()


class MlflowOutput:
    """MLflow (extra `mlflow`): parameters and the numbers of log.csv, in a SQLite file beside the runs by default.

    Raises:
        ResourceError: E530, MLflow is not installed.
    """

    def __init__(self, session: Session) -> None:
        self.mlflow = mlflow = self.find()
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{(session.run.path.parent.parent / 'mlflow.db').resolve()}")
        mlflow.set_experiment(session.pipeline.dataset)
        self.run = mlflow.start_run(run_name=f"{session.run.path.parent.name} {session.run.path.name}")
        mlflow.log_params({"fold": session.split["fold"], **_flat(session.pipeline.to_dict())})

    @staticmethod
    def find() -> Any:
        """The module mlflow; also called before anything is prepared.

        Raises:
            ResourceError: E530, MLflow is not installed.
        """
        try:
            import mlflow

            if not mlflow.is_tracking_uri_set():  # what a SQLite file takes
                import_module("sqlalchemy")
                import_module("alembic")
        except ImportError as error:
            fix = "pip install 'medseg[mlflow]'"
            text = "MLflow, or what its SQLite file takes, is not installed"
            raise ResourceError(text, code="E530", field="--mlflow", found=str(error), fix=fix) from error
        return mlflow

    def iterated(self, session: Session) -> None: ...

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        numbers = {k.replace(" ", "_"): float(v) for k, v in row.items() if isinstance(v, int | float)}
        self.mlflow.log_metrics(numbers, step=session.progress.iteration)

    def close(self, session: Session) -> None:
        self.mlflow.end_run()


class LineOutput:
    """A line on standard error for each validated epoch, and for others if a minute has passed since the last."""

    _told = 0.0  # minutes at the last line

    def iterated(self, session: Session) -> None: ...

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        late = row["minutes"] - self._told >= 1
        if row["score"] is not None or session.progress.finished or late:
            self._told = row["minutes"]
            print(_line(session, row), file=sys.stderr, flush=True)

    def close(self, session: Session) -> None: ...


class BarOutput:
    """A bar with the time left, for a terminal; validated epochs are lines above it."""

    def __init__(self, session: Session) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        left = TextColumn("{task.fields[left]}")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), left)
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
        self.task = self.bar.add_task("training", total=1.0, left="")
        self.bar.start()

    def iterated(self, session: Session) -> None:
        progress, budget = session.progress, session.budget
        minutes = budget.minutes_left(progress)
        self.bar.update(
            self.task,
            completed=min(1.0, budget.share(progress)),
            description=f"epoch {progress.epoch + 1}, iteration {progress.iteration}",
            left="" if minutes is None else f"{format_minutes(minutes)} left",
        )

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        if row["score"] is not None or session.progress.finished:
            self.bar.console.print(_line(session, row), markup=False, highlight=False)

    def close(self, session: Session) -> None:
        self.bar.stop()


def format_minutes(minutes: float) -> str:
    """A time as people say it.

    >>> format_minutes(0.5), format_minutes(12.34), format_minutes(150)
    ('30 s', '12 min', '2 h 30 min')
    """
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def overlay(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """A slice beside itself with outlines: the reference green, the prediction red, both yellow.

    Args:
        image: (C, row, column); label, prediction: (row, column) integers.

    Returns:
        (row, 2 * column, 3) uint8.
    """
    grey = image[:3] if image.shape[0] == 3 else image[:1]
    low, high = float(grey.min()), float(grey.max())
    bands = ((grey - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    plain = np.ascontiguousarray(np.broadcast_to(bands, (3, *bands.shape[1:])).transpose(1, 2, 0))
    drawn = plain.copy()
    for channel, values in ((1, label), (0, prediction)):
        edge = _outline(np.asarray(values))
        other = _outline(np.asarray(prediction if channel else label))
        drawn[edge] = np.where(other[edge][:, None], drawn[edge] & [255, 255, 0], 0)
        drawn[edge, channel] = 255
        drawn[edge & other] = (255, 255, 0)
    return np.concatenate([plain, drawn], axis=1)


def _outline(label: np.ndarray) -> np.ndarray:
    edge = np.zeros(label.shape, bool)
    for axis in range(2):
        near, far = [slice(None)] * 2, [slice(None)] * 2
        near[axis], far[axis] = slice(None, -1), slice(1, None)
        differ = label[tuple(near)] != label[tuple(far)]
        edge[tuple(near)] |= differ & (label[tuple(near)] > 0)
        edge[tuple(far)] |= differ & (label[tuple(far)] > 0)
    return edge


def _line(session: Session, row: dict[str, Any]) -> str:
    progress, name = session.progress, session.validator.shown
    score = "" if row["score"] is None else f"  {name} {row['score']:.4f}"
    best = "  (best)" if progress.best_epoch == progress.epoch and row["score"] is not None else ""
    left = session.budget.minutes_left(progress)
    rest = "" if left is None or progress.finished else f"  {format_minutes(left)} left"
    loss = math.nan if row["loss"] is None else row["loss"]
    return f"epoch {row['epoch']}  iteration {row['iteration']}  loss {loss:.4f}{score}{best}{rest}"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}" if name else key).items()}
    return {name: str(value)[:500]}


def write_profile(session: Session, path: Path) -> str:
    """Where the time of this session went, as a small table; also written to `path`."""
    total = max(1e-9, session.minutes * 60)
    names = {"step": "steps", "wait": "waiting for data", "validate": "validation", "save": "checkpoints"}
    lines = [f"{names[key]:18} {value:9.1f} s {100 * value / total:5.1f} %" for key, value in session.seconds.items()]
    text = "\n".join([f"{'all':18} {total:9.1f} s", *lines]) + "\n"
    from medseg.files import write_text

    write_text(path, text)
    return text

"""What happens around the training step, as handlers on the events of an ignite Engine.

    attach_handlers(engine, session, signals, outputs)

After each iteration: stop when asked to, stop when the gradient is no number, save from time to time, end when the
budget is spent. After each epoch: validate, adapt the schedule, write the log, save, end when nothing improves.
`outputs` (handlers_output) only look on: log.csv, TensorBoard, MLflow, the screen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from ignite.engine import Engine, Events

from medseg.batches import Batch
from medseg.engine_session import Session
from medseg.errors import TrainingError
from medseg.handlers_signals import Signals, Stopped
from medseg.hardware import peak_memory

__all__ = ["Output", "attach_handlers", "close_epoch", "make_engine", "save_epoch"]

BAD_STEPS = 5  # updates in a row without a finite gradient after which training ends
_HALVINGS = 16  # with fp16 so many more: each halves the scale of the loss, 65536 at the start, until gradients fit
_LOOK_EVERY = 20  # on a GPU: iterations between two looks, each of which waits for the device
_SAVE_SHARE = 0.1  # share of the time that saving after epochs may take


class Output(Protocol):
    """Something that shows or records a run; every method may do nothing."""

    def iterated(self, session: Session) -> None:
        """After each iteration."""

    def finished_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """After each epoch, with its row of log.csv."""

    def close(self, session: Session) -> None:
        """At the end, however it came."""


def make_engine(session: Session) -> Engine:
    """The ignite Engine whose step is `session.iterate`."""
    import logging

    engine = Engine(lambda _, batch: session.iterate(batch))
    # ignite would print each exception that passes through it; the command line tells it once
    engine.logger = logging.getLogger("medseg.engine")
    engine.logger.setLevel(logging.CRITICAL)
    return engine


def attach_handlers(engine: Engine, session: Session, signals: Signals, outputs: Sequence[Output] = ()) -> None:
    """Attach all handlers, in the order in which they have to act."""
    saved = [time.monotonic(), 0.0]  # when, and how long it took

    def save(write: Callable[[], None]) -> None:
        begin = time.monotonic()
        write()
        saved[:] = [time.monotonic(), time.monotonic() - begin]

    def after_iteration(engine: Engine) -> None:
        _check_gradient(session)
        due = session.at_step_end() and time.monotonic() - saved[0] > session.train.save_minutes * 60
        flag = session.agree(signals.received * 2 or int(due))
        if flag >= 2 and session.at_step_end():
            session.save()
            raise Stopped(flag // 2)
        for output in outputs:
            output.iterated(session)
        spent = session.budget.is_spent(session.progress) and session.at_step_end()
        if flag == 1 and not spent and session.progress.step < session.per_epoch:
            save(session.save)
        if spent and session.progress.step < session.per_epoch:
            end_epoch(engine)

    def end_epoch(engine: Engine) -> None:
        close_epoch(session, signals, outputs)
        # a checkpoint of a long run is large: after short epochs it waits until it costs little. Not with the best
        # weights so far: a last.pt from before them would not know best.pt. Without validation the newest are the best
        often = time.monotonic() - saved[0] > saved[1] / _SAVE_SHARE
        chosen = _is_best(session) and bool(session.validator.stored)
        if session.group.any(int(often or chosen or bool(session.progress.finished))):
            save(partial(save_epoch, session))
        elif _is_best(session):
            session.save("best")
        if session.progress.finished:
            engine.terminate()

    engine.add_event_handler(Events.ITERATION_COMPLETED, after_iteration)
    engine.add_event_handler(Events.EPOCH_COMPLETED, end_epoch)


def close_epoch(session: Session, signals: Signals, outputs: Sequence[Output] = ()) -> None:
    """Finish the epoch, tell the outputs, and keep a checkpoint where one is to be kept; `save_epoch` comes next.

    What is kept is saved before last.pt: a run that was killed in between goes on from before the epoch's end.
    """
    row = finish_epoch(session, signals)
    for output in outputs:
        output.finished_epoch(session, row)
    keep = session.train.keep_every
    if keep is not None and session.progress.epoch % keep == 0:
        session.save(f"epoch_{session.progress.epoch:04d}")


def save_epoch(session: Session) -> None:
    """Save last.pt at the end of an epoch, then best.pt if these weights are the best.

    In this order, because last.pt holds all that best.pt does: killed in between, it is made up for (`mend_best`).
    """
    session.save()
    if _is_best(session):
        session.save("best")


def _is_best(session: Session) -> bool:
    return session.progress.best_epoch == session.progress.epoch


def finish_epoch(session: Session, signals: Signals) -> dict[str, Any]:
    """Validate if it is due, note the epoch's row, choose the best weights, adapt the schedule, decide about the end.

    Raises:
        Stopped: a signal came during validation; what was trained is saved, validation is done when resumed.
    """
    progress, train = session.progress, session.train
    pace = _pace(session)
    begin = time.perf_counter()
    session.gather_loss()
    loss = progress.loss_sum / max(1, progress.step)
    ends = session.budget.is_spent(progress)
    # what counts validations counts epochs unless told otherwise
    counts = train.patience is not None or session.pipeline.schedule.name == "ReduceLROnPlateau"
    every = 1 if counts and train.validate_every == "auto" else train.validate_every
    due, before = session.budget.is_validation_due(progress, every), progress.minutes
    scored = due and bool(session.validator.stored)
    if due and session.hardware.device.type == "cpu":  # batch norm's statistics; on GPUs they are synchronised
        session.group.share_values(session.step.validated.buffers())
    if scored:
        _validate(session, signals)
    session.seconds["validate"] += time.perf_counter() - begin
    progress.epoch += 1
    if scored and session.validation is not None:
        progress.validated = progress.epoch
        session.schedule.observe(session.validation.score, session.budget.share(progress))
        progress.observe(session.validation.score)
    elif due:  # no case was kept back to choose by: the newest weights count
        progress.best_epoch = progress.epoch
    row = _row(session, loss, scored, pace)
    progress.history.append(row)
    progress.step, progress.loss_sum = 0, 0.0
    session.agree(0)
    if scored:
        progress.look(before)
    # where the last minute passed just now and no validation was due, one more iteration leads to the one at the end
    if ends or (due and session.budget.is_spent(progress)):
        progress.finished = "budget"
    elif train.patience is not None and progress.waited >= train.patience:
        progress.finished = "patience"
    return row


def _validate(session: Session, signals: Signals) -> None:
    def check_stop() -> None:
        if number := session.group.any(signals.received):
            session.save()
            raise Stopped(number)

    cases = session.validator.choose(session.train.validation_cases)
    session.validation = session.validator(
        session.step.validated, cases=cases, group=session.group, check_stop=check_stop
    )


def _row(session: Session, loss: float, validated: bool, pace: dict[str, float | None]) -> dict[str, Any]:
    """One row of log.csv; a number that is none stays an empty cell."""
    progress = session.progress
    session.tick()
    found = session.validation if validated else None
    scores = {} if found is None else {f"val {name}": value for name, value in found.scores.items()}
    row = {
        "epoch": progress.epoch,
        "iteration": progress.iteration,
        "minutes": round(progress.minutes, 4),
        "lr": progress.rate,
        "loss": loss,
        "score": None if found is None else session.validator.sign * found.score,
        **scores,
        **pace,
        **{f"memory_{name}_mb": round(value, 1) for name, value in peak_memory(session.hardware.device).items()},
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _pace(session: Session) -> dict[str, float | None]:
    """Patches per second and the share of the time spent waiting for data, since the last epoch's end.

    None where no iteration is timed: the run was interrupted after the epoch's last one.
    """
    if session.stream is not None:
        session.seconds["wait"] = session.stream.waited
    now = {"images": float(session.images), "wait": session.seconds["wait"], "step": session.seconds["step"]}
    images, wait, step = (now[name] - session.mark.get(name, 0.0) for name in now)
    session.mark = now
    if not images:
        return {"images_per_second": None, "wait_share": None}
    busy = max(1e-9, wait + step)
    return {"images_per_second": round(images / busy, 3), "wait_share": round(wait / busy, 4)}


def _check_gradient(session: Session) -> None:
    on_cpu = session.hardware.device.type == "cpu"
    if not on_cpu and session.progress.iteration % _LOOK_EVERY and session.progress.step < session.per_epoch:
        return
    begin = time.perf_counter()
    bad = session.step.bad_steps()
    session.seconds["step"] += time.perf_counter() - begin  # a GPU's steps were only begun before
    if bad < BAD_STEPS + _HALVINGS * (session.hardware.precision == "fp16"):
        return
    cases = list(dict.fromkeys(case for batch in session.recent[-bad * session.train.accumulate :] for case in batch))
    raise TrainingError(
        f"the loss or its gradient is no number, {bad} steps in a row",
        code="E601",
        case=", ".join(cases[:20]),
        field="loss",
        found=f"iteration {session.progress.iteration}",
        fix="use a lower learning rate, train.clip or precision fp32; what was good is in best.pt and last.pt, if any",
    )


def run_engine(engine: Engine, session: Session, stream: Any) -> None:
    """Run from where `session.progress` stands until the budget is spent or a handler ends it."""
    limit = 2**31
    done = session.progress.epoch * session.per_epoch + session.progress.step
    if done:
        engine.load_state_dict({"iteration": done, "epoch_length": session.per_epoch, "max_epochs": limit})
    engine.run(_Source(stream), max_epochs=limit, epoch_length=session.per_epoch)


class _Source:
    """The stream as ignite wants it: iterable more than once, always the same iterator."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        return iter(self.stream)

    def __next__(self) -> Batch:
        return next(self.stream)

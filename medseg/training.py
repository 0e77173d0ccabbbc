"""`medseg train`: a pipeline and a data set in; a run folder with the best weights and validation predictions out.

from medseg.training import train
run = train("liver", data="data", fold=0)          # runs/liver/<when>_fold0
train(None, resume=run)                            # continues where it stopped, exactly
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medseg.config import Pipeline
from medseg.distributed import Group, lost_process, processes, tell_copies
from medseg.engine_session import Session
from medseg.engine_stream import BatchStream
from medseg.errors import MedsegError, ResourceError
from medseg.errors_arguments import checked
from medseg.handlers import Output, attach_handlers, close_epoch, make_engine, run_engine, save_epoch
from medseg.handlers_output import BarOutput, LineOutput, MlflowOutput, TableOutput, TensorBoardOutput, write_profile
from medseg.handlers_signals import Signals, Stopped, listen
from medseg.hardware import Hardware, choose_hardware, configured
from medseg.run import RunFolder, newest_run
from medseg.training_finish import load_best, predict_validation
from medseg.training_memory import check_memory, memory_error
from medseg.training_plan import Plan, plan_new, plan_resume
from medseg.training_rate import LearningRates, find_learning_rate
from medseg.training_session import describe_run, open_session
from medseg.training_setup import Prepared, prepare
from medseg.training_threshold import choose_threshold
from medseg.training_weights import load_weights

__all__ = ["LearningRates", "find_learning_rate", "train"]


@checked
def train(
    pipeline: Pipeline | str | Path | None,
    *,
    data: str | Path | None = None,
    output: str | Path = "runs",
    fold: int | None = 0,
    resume: str | Path | None = None,
    init: str | Path | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    cache: str | Path | None = None,
    progress: bool = True,
    profile: bool = False,
    mlflow: bool = False,
) -> Path:
    """Train a pipeline on one fold, or continue a run.

    Args:
        pipeline: a loaded pipeline, its name, or the path of a YAML file; None with `resume`.
        data: the data root; MEDSEG_DATA when None (with `resume`: the run's own).
        output: folder of runs.
        fold: which of the `train.folds` folds is kept for validation; None: no case is, every one is trained on and
            the weights of the last epoch are kept (the last step before new images, once folds have said how good).
        resume: a run folder: everything goes on as if it had not been interrupted. With `overrides` its budget can be
            extended (`train.epochs=200`), and patience, workers and the like changed.
        init: start from the weights of this run or checkpoint (fine-tuning); what fits is loaded, and told.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        overrides: texts like `train.epochs=5`; one alone too.
        cache: folder of the preprocessed store.
        progress: show lines, and on a terminal a bar, on standard error.
        profile: write profile.txt, which says where the time went.
        mlflow: also log to MLflow.

    Returns:
        The run folder, with best.pt, last.pt, log.csv, tensorboard/, validation/ (one label image for each validation
        case, and its probabilities where the scores look at them), pipeline.yaml, split.json, provenance.json,
        status.json, and threshold.json where the pipeline asks for a threshold.

    Raises:
        UsageError, ConfigError: E1xx, before any image is opened.
        DataError: cases that are refused, all of them.
        CheckpointError: E360, nothing to resume.
        ResourceError: disk, memory, device; E530, before anything is prepared: MLflow is not installed.
        TrainingError: the loss is no number, or a data worker was lost.
        KeyboardInterrupt, SystemExit(143): SIGINT or SIGTERM came; the run is saved and can be resumed.

    >>> import tempfile
    >>> from medseg.phantom import write_phantom
    >>> data = write_phantom("cell", tempfile.mkdtemp(), cases=5).parent
    >>> short = ["epochs=1", "iterations_per_epoch=1", "batch=2", "patch=[64,64]", "workers=0"]
    >>> short = [f"train.{setting}" for setting in short]
    >>> run = train("cell", data=data, output=data / "runs", cache=data / "cache", overrides=short, progress=False)
    >>> (run / "best.pt").is_file()
    True
    """
    if mlflow:
        MlflowOutput.find()
    with processes(device) as group:
        show = _shower(progress and group.writes)
        if resume is not None:
            plan = plan_resume(resume, data=data, overrides=overrides, group=group)
        else:
            plan = plan_new(pipeline, data=data, output=output, fold=fold, overrides=overrides, group=group)
        hardware = choose_hardware(device, plan.pipeline.train.precision, local_rank=group.local_rank)
        kept = "no validation" if plan.fold is None else f"fold {plan.fold}"
        show(f"{plan.pipeline.dataset}, {kept}: {hardware.describe()}")
        # a function of its own, so that nothing of the network is left when the processes part
        return _train_plan(
            plan, hardware, group, show, init=init, cache=cache, progress=progress, profile=profile, mlflow=mlflow
        )


def _train_plan(
    plan: Plan,
    hardware: Hardware,
    group: Group,
    show: Callable[[str], None],
    *,
    init: str | Path | None,
    cache: str | Path | None,
    progress: bool,
    profile: bool,
    mlflow: bool,
) -> Path:
    prepared, split = prepare(
        plan.pipeline, plan.spec, plan.root, hardware=hardware, group=group, split=plan.split, fold=plan.fold,
        cache=cache, show=show,
    )  # fmt: skip
    run = plan.open_run(group)
    deterministic = plan.pipeline.train.deterministic
    alone = run.alone() if group.writes else contextlib.nullcontext()
    with alone, listen() as signals, _status(run, group, show), configured(hardware, deterministic=deterministic):
        session = open_session(plan, prepared, split, run)
        if init is not None and plan.state is None:
            session.notices += load_weights(session.step, init, session.split, plan.spec)
        session.notices += check_memory(session)
        session.notices[:0] = [*tell_copies(), *plan.notices, *prepared.notices]
        for notice in session.notices:
            show(f"note: {notice}")
        describe_run(plan, prepared, session, None if init is None else str(newest_run(init).resolve()))
        _run(session, prepared, signals, mlflow=mlflow, progress=progress, show=show)
        if profile and group.writes:
            show(write_profile(session, run.path / "profile.txt"))
    return run.path


def _run(session: Session, prepared: Prepared, signals: Signals, *, mlflow: bool, progress: bool, show: Any) -> None:
    """Train until the end, then predict the validation cases with the best weights."""
    outputs = _outputs(session, mlflow=mlflow, progress=progress)
    session.start_clock()
    try:
        if not session.progress.finished:
            over = session.budget.is_spent(session.progress) and session.progress.step > 0
            if over or session.progress.step >= session.per_epoch:  # interrupted during a validation
                close_epoch(session, signals, outputs)
                save_epoch(session)
            if not session.progress.finished:
                _train(session, signals, outputs)
    finally:
        for output in outputs:
            output.close(session)

    def check_stop() -> None:
        if number := session.group.any(signals.received):
            raise Stopped(number)

    if session.progress.finished == "patience":
        done, name = session.progress, session.validator.shown
        show(f"stopped early: {done.waited} validations without a better {name} than after epoch {done.best_epoch}")
    best = load_best(session)
    if (chosen := choose_threshold(session, prepared.training, check_stop=check_stop, show=show)) is not None:
        show(chosen)
    if not (count := len(session.validator.stored)):
        show(f"weights of the last epoch, {best}; no case was kept back, so nothing is scored")
        return
    show(f"predicting {count} validation cases with the weights of epoch {best}")
    predict_validation(session, prepared.cases, check_stop=check_stop)


def _train(session: Session, signals: Signals, outputs: list[Output]) -> None:
    engine = make_engine(session)
    attach_handlers(engine, session, signals, outputs)
    done, pin = session.progress, session.hardware.device.type == "cuda"
    workers = session.train.workers
    count = _choose_loaders(session.hardware) if workers == "auto" else int(workers)
    session.stream = BatchStream(session.maker, (done.epoch, done.step), workers=count, pin=pin)
    try:
        run_engine(engine, session, session.stream)
    except Exception as error:
        mended = memory_error(error, session) or lost_process(error)
        if mended is not None:
            raise mended from error
        raise
    finally:
        session.seconds["wait"] = session.stream.waited
        session.stream.close()


def _choose_loaders(hardware: Hardware) -> int:
    if hardware.device.type == "cpu":
        return 1 if hardware.threads > 1 else 0
    return max(1, min(8, hardware.threads - 1))


def _outputs(session: Session, *, mlflow: bool, progress: bool) -> list[Output]:
    if not session.group.writes:
        return []
    outputs: list[Output] = [TableOutput(), TensorBoardOutput(session)]
    if mlflow:
        outputs.append(MlflowOutput(session))
    if progress:
        outputs.append(BarOutput(session) if sys.stderr.isatty() else LineOutput())
    return outputs


def _shower(wanted: bool) -> Any:
    return (lambda text: print(text, file=sys.stderr, flush=True)) if wanted else (lambda text: None)


@contextlib.contextmanager
def _status(run: RunFolder, group: Group, show: Any) -> Iterator[None]:
    """status.json tells how it ended, whatever happens; signals become what callers expect of them."""

    def note(state: str, code: int | None = None, message: str | None = None) -> None:
        if group.writes:
            with contextlib.suppress(ResourceError):  # the disk is full: the error itself says so
                run.set_status(state, exit_code=code, message=message)

    command = shlex.join(["medseg", "train", "--resume", str(run.path)])
    note("running")
    try:
        yield
    except Stopped as stopped:
        note("interrupted", 128 + stopped.number, stopped.name)
        show(f"stopped by {stopped.name}; everything is saved. Continue with: {command}")
        if stopped.name == "SIGINT":
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.number) from None
    except MedsegError as error:
        note("failed", error.exit_code, error.message)
        if error.code == "E501" and any(run.path.glob("last*.pt")):  # the same command would begin anew
            error.fix = f"free space, then: {command}"
        raise
    except BaseException as error:
        note("failed", 130 if isinstance(error, KeyboardInterrupt) else 1, type(error).__name__)
        raise
    note("finished", 0)

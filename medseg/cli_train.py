"""`medseg train`: choose the pipeline, train one fold or all, score the validation cases, write the report."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli_common import (
    DataOption,
    DeviceOption,
    JsonOption,
    PipelinesOption,
    SetOption,
    kept,
    note,
    say,
    show_json,
    show_summary,
    state,
    table,
)
from medseg.errors import MedsegError


def train(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A pipeline, a YAML file, or a data set with --pipeline.")] = None,
    data: DataOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of runs.")] = Path("runs"),
    pipeline: Annotated[str | None, typer.Option(help="Use this pipeline's choices for the data set NAME.")] = None,
    pipelines: PipelinesOption = None,
    fold: Annotated[str, typer.Option(help="0, 1, ... or all; none: train on every case, score none.")] = "0",
    minutes: Annotated[float | None, typer.Option(help="Short for --set train.minutes=...")] = None,
    settings: SetOption = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this run where it stopped; with --fold all: its series.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run or checkpoint.")] = None,
    device: DeviceOption = "auto",
    cache: Annotated[Path | None, typer.Option(help="Folder for preprocessed cases.")] = None,
    report: Annotated[
        bool, typer.Option(help="Score validation cases (and folds together), write report.html.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Say at the end where the time went.")] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Try learning rates, print the best, do not train.")
    ] = False,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Also log to MLflow (extra: mlflow).")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a pipeline on a data set; validate, keep the best, report.

    Reads datasets.yaml for what the data are and pipelines/NAME.yaml for what to do with them. Everything is checked
    before any image is opened. Ctrl-C saves and says how to go on.
    """
    state["json"] = as_json
    from medseg.config_place import data_root

    overrides = [*(settings or []), *([f"train.minutes={minutes}"] if minutes is not None else [])]
    if resume is not None:
        _refuse_beside_resume(context, every=fold == "all")
    if resume is None and name is not None and data is None:
        data_root(data)  # told before what takes seconds to load; a folder that is not there, after wrong settings
    from medseg import training

    plan = None if resume is not None else _pipeline_for(name, pipeline, pipelines, overrides, data)
    common: dict[str, Any] = {
        "data": data, "device": device, "cache": cache, "profile": profile, "mlflow": mlflow, "progress": not as_json,
    }  # fmt: skip
    if find_lr and plan is not None:
        number = 0 if fold == "all" else _fold_number(fold)
        result = training.find_learning_rate(plan, data=data, device=device, cache=cache, fold=number, init=init)
        table("Learning rates", ["learning rate", "loss"], [list(row) for row in result.rows])
        say(
            f"suggested: {result.suggested:.2e}   "
            f"use it with --set optimizer.{result.optimizer}.lr={result.suggested:.2e}"
        )
        if as_json:
            show_json({"suggested": result.suggested, "rows": result.rows})
        return
    if fold == "all":
        runs, reports = _train_folds(plan, resume, output=output, init=init, report=report, common=common)
    else:
        if resume is not None:
            run = training.train(None, resume=resume, overrides=overrides, **common)
        else:
            run = training.train(plan, output=output, fold=_fold_number(fold), init=init, **common)
        runs, reports = [run], [_score_and_report(run, "Scores")] if report and _writes() else []
    if not _writes():  # the first process tells
        return
    for run in runs:
        say(f"run: {run}")
    for page in reports:
        say(f"report: {page}")
    if as_json:
        show_json({"runs": runs, "reports": reports})


def _train_folds(
    plan: Any, resume: Path | None, *, output: Path, init: Path | str | None, report: bool, common: dict[str, Any]
) -> tuple[list[Path], list[Path]]:
    """Every fold, each scored when it ends, then all together; what `resume` holds of them is not done again."""
    from medseg import training
    from medseg.run import newest_run
    from medseg.training_series import take_up

    # of a folder of runs the newest now: later it would be one of these folds, which has seen the others' cases
    init = None if init is None else newest_run(init)
    series = None if resume is None else take_up(resume, data=common["data"])
    if series is not None:
        plan, output, init, common = series.pipeline, series.output, series.init, {**common, "data": series.root}
    runs, reports = [], []
    for fold in range(_count_folds(plan, common["data"])):
        try:
            if series is not None and series.is_finished(fold):
                runs.append(series.runs[fold])
                note(f"fold {fold}: {runs[-1]} is finished")
            elif series is not None and fold in series.runs:
                runs.append(training.train(None, resume=series.runs[fold], **common))
            else:
                runs.append(training.train(plan, output=output, fold=fold, init=init, **common))
            if report and _writes():
                reports.append(_score_and_report(runs[-1], f"Scores, fold {fold}"))
        except BaseException:
            if _writes():
                place = output / (plan.name or plan.dataset)
                note(f"all folds: {shlex.join(['medseg', 'train', '--resume', str(place), '--fold', 'all'])}")
            raise
    if report and _writes():
        reports.append(_pool_folds(runs))
    return runs, reports


def _refuse_beside_resume(context: typer.Context, *, every: bool) -> None:
    """What a run that goes on, or every fold of a series, has of its own cannot be said again; it would be ignored."""
    from medseg.errors import UsageError

    options = ["name", "output", "pipeline", "pipelines", "init", "find_lr"]
    options += ["settings", "minutes"] if every else ["fold"]
    given = [name for name in options if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"]
    if given:
        words = {"name": "NAME", "settings": "--set", "find_lr": "--find-lr"}
        told = ", ".join(words.get(name, f"--{name}") for name in given)
        text = "a run that goes on has its own pipeline, data set, fold, weights and place"
        more = "" if every else "; --set train.* can extend the run"
        raise UsageError(text, field="--resume", found=told, fix=f"leave out {told}{more}")


def _pipeline_for(
    name: str | None, pipeline: str | None, folder: Path | None, overrides: list[str], data: Path | None
) -> Any:
    """The pipeline called `name`, or the choices of `--pipeline` for the data set called `name`."""
    from medseg import config
    from medseg.errors import UsageError

    if name is None:
        raise UsageError(
            "no pipeline given",
            field="NAME",
            expected=", ".join(config.pipeline_names(folder)),
            fix="medseg train NAME",
        )
    if pipeline is None:
        own = name in config.dataset_names(root=data)
        if own and name not in config.pipeline_names(folder):
            text, fix = (
                f"`{name}` is a data set, and there is no pipeline of that name",
                "--pipeline P, for example cell",
            )
            raise UsageError(text, code="E101", field="--pipeline", expected="whose choices to use", fix=fix)
        chosen = config.load_pipeline(name, folder=folder, overrides=overrides, root=data)
        if own and chosen.dataset != name:
            text = f"`{name}` is a data set, and also a pipeline for another one, {chosen.dataset}"
            fix = f"write `dataset: {name}` into {config.pipeline_file(name, folder=folder)}, or add --pipeline {name}"
            raise UsageError(text, code="E101", field="NAME", fix=fix)
        return chosen
    return config.load_pipeline(pipeline, folder=folder, overrides=[f"dataset={name}", *overrides], root=data)


def _fold_number(text: str) -> int | None:
    """The number; None for "none"."""
    from medseg.errors import UsageError

    if text == "none":
        return None
    if not text.isdecimal():
        raise UsageError("not a fold", field="--fold", expected="0, 1, ..., all or none", found=text)
    return int(text)


def _count_folds(plan: Any, data: Path | None) -> int:
    """`train.folds` may be "auto", and a set with an official validation part has one fold: the split itself tells."""
    from medseg import config
    from medseg import data as cases

    root = cases.data_root(data)
    found = cases.find_cases(config.load_dataset(plan.dataset, root=root), root, part="training")
    return len(cases.make_split(found, folds=plan.train.folds, seed=plan.train.seed))


def _writes() -> bool:
    """Only the first of several processes started by torchrun writes."""
    return os.environ.get("RANK", "0") == "0"


def _score_and_report(run: Path, title: str) -> Path:
    from medseg import evaluation
    from medseg import report as program

    command = shlex.join(["medseg", "evaluate", str(run)])
    with kept(f"the run is finished; its scores and report: {command}", MedsegError):
        if _held_out(run):
            show_summary(evaluation.evaluate(run, progress=not state["json"]), _chosen_metrics(run), title=title)
        return program.write_report(run)


def _held_out(run: Path) -> list[str]:
    """Ids of the validation cases; none after `--fold none`, also when such a run is continued."""
    from medseg.run import RunFolder

    return RunFolder(run).read_json("split.json")["validation"]


def _chosen_metrics(run: Path) -> list[str]:
    """Names of the scores that the pipeline chose; the data set's protocol adds more, which the report shows."""
    from medseg.config import load_pipeline

    return [part.name for part in load_pipeline(run / "pipeline.yaml", check=False).metrics]


def _pool_folds(runs: list[Path]) -> Path:
    """Scores of all folds together: each case was predicted by the one model that had not seen it."""
    from medseg import evaluation
    from medseg import report as program

    folder = runs[0].parent / "cross_validation"
    earlier = 1
    while folder.exists() and not _is_left(folder, runs):  # of other seeds, or of another number of folds
        earlier += 1
        folder = folder.with_name(f"cross_validation_{earlier}")
    result = evaluation.pool_runs(runs, output=folder)
    show_summary(result, _chosen_metrics(runs[0]), title="Scores, all folds together")
    return program.write_report(result.folder)


def _is_left(folder: Path, runs: list[Path]) -> bool:
    """Whether the pooling of these very runs was stopped here before its last file, the report."""
    from medseg.run import RunFolder

    summary = RunFolder(folder).read_json("summary.json")
    if (folder / "report.html").exists():
        return False
    return not isinstance(summary, dict) or summary.get("runs") == [run.resolve().name for run in runs]

"""What a call of `train` is to do: a new run, or an old one taken up again; decided before any image is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from medseg.checkpoint import CheckpointStore
from medseg.checkpoint_run import FREE as CHANGEABLE  # how long and how often, never what is computed
from medseg.config import DatasetSpec, Pipeline, load_dataset, load_pipeline, parse_settings
from medseg.config_override import apply_overrides
from medseg.config_yaml import Document
from medseg.data import data_root
from medseg.distributed import Group
from medseg.engine_session import Session
from medseg.errors import CheckpointError, ConfigError, UsageError
from medseg.files import probe_writable
from medseg.run import RunFolder

__all__ = ["Plan", "plan_new", "plan_resume"]


@dataclass
class Plan:
    """Pipeline, facts, data root; `output` is the folder of runs, or the run that is continued: then there are `state`,
    `split` and `changed` too."""

    pipeline: Pipeline
    spec: DatasetSpec
    root: Path
    output: Path
    name: str
    fold: int | None = 0
    split: dict[str, Any] | None = None
    state: Mapping[str, Any] | None = None
    changed: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)

    @property
    def replicas(self) -> int | None:
        """Parts of a batch of the run that is continued; None for a new one.

        Raises:
            CheckpointError: E363, the checkpoint holds no such number.
        """
        if self.state is None:
            return None
        count = self.state.get("replicas", 1)  # before there were any
        if not isinstance(count, int) or not 1 <= count <= self.pipeline.train.batch:
            text, expected = "the checkpoint has a wrong value", f"1 to {self.pipeline.train.batch}"
            raise CheckpointError(text, code="E363", file=self.output, field="replicas", expected=expected, found=count)
        return count

    def open_run(self, group: Group) -> RunFolder:
        """The run's folder: that of the run that is continued, or a new one, made by the first process."""
        if self.state is not None:
            return RunFolder(self.output)
        path = ""
        with group.first():
            if group.writes:
                path = str(RunFolder.create(self.output, self.name, fold=self.fold).path)
        return RunFolder(group.share_text(path))

    def reopen(self, session: Session, keys: Mapping[str, str]) -> list[str]:
        """Take note of what differs from when the state was saved; what should be told.

        Args:
            keys: case -> name of its content in the store, which changes with its files, medseg and the libraries.
        """
        assert self.state is not None
        told = []
        before = (session.run.read_json("provenance.json") or {}).get("cases", {})
        if other := [name for name, key in keys.items() if before.get(name, key) != key]:
            told.append(
                f"{len(other)} of {len(keys)} cases are not what they were when the run began "
                f"({', '.join(other[:10])}): "
                "their files, medseg or a library changed; the run goes on with them as they are now"
            )
        for name, now in (
            ("processes", session.group.world),
            ("threads", session.hardware.threads),
            ("precision", session.hardware.precision),
            ("replicas", session.step.parts),
            ("layout", session.step.layout),
        ):
            # an older checkpoint had one part, and does not tell its layout
            if (before := self.state.get(name, {"replicas": 1, "layout": now}.get(name))) != now:
                told.append(
                    f"{name}: {before} before, {now} now: the run goes on, but not bit for bit as it would have"
                )
        longer = {"epochs", "iterations", "minutes"} & {*self.changed}
        if longer:
            before = float(session.step.optimizer.param_groups[0]["lr"])
            spent = session.budget.share(session.progress)
            told.append(
                f"the schedule now spans the new budget ({session.budget.describe()}, {100 * spent:.0f} % spent): "
                f"learning rate {before:.3g} -> {session.set_rate():.3g}"
            )
        goes_on = longer or "patience" in self.changed  # with other workers, say, it only comes to its end
        if session.progress.finished and not session.budget.is_spent(session.progress) and goes_on:
            if session.progress.finished == "patience":
                session.progress.waited = 0
            session.progress.finished = ""
        return told


def plan_new(
    pipeline: Pipeline | str | Path | None,
    *,
    data: str | Path | None,
    output: str | Path,
    fold: int | None,
    overrides: Sequence[str],
    group: Group,
) -> Plan:
    """A new run: the pipeline checked, the data root found, the output folder tried.

    Raises:
        UsageError, ConfigError: E1xx. ResourceError: E502, the output folder cannot be written.
    """
    if pipeline is None:
        raise UsageError("no pipeline given", field="pipeline", fix="give a pipeline, or a run to resume")
    root = data_root(data)
    if isinstance(pipeline, Pipeline):
        chosen = _override(pipeline, overrides)
    else:
        chosen = load_pipeline(pipeline, overrides=overrides, root=root)
    spec = load_dataset(chosen.dataset, root=root)
    folds = chosen.train.folds
    if fold is None:
        _check_blind(chosen)
    elif not isinstance(fold, Integral) or fold < 0 or (folds != "auto" and fold >= folds):
        expected = "0, 1, ..., or None" if folds == "auto" else f"0 to {folds - 1}, or None"
        raise UsageError("no such fold", field="fold", expected=expected, found=fold)
    name = chosen.name or chosen.dataset
    with group.first():  # found before hours of preparation, not after
        if group.writes:
            probe_writable(Path(output))
    return Plan(chosen, spec, root, Path(output), name, None if fold is None else int(fold))


def plan_resume(resume: str | Path, *, data: str | Path | None, overrides: Sequence[str], group: Group) -> Plan:
    """A run taken up again: everything comes from its checkpoint.

    Raises:
        CheckpointError: E360, no run or no usable checkpoint.
        UsageError: E108, the run is finished and its budget was not extended; a setting that cannot be changed.
    """
    run = RunFolder.open(resume)
    state, notices = CheckpointStore(run.path).load("last")
    try:
        before = Pipeline.from_dict(state["pipeline"])
        spec = DatasetSpec.from_dict(state["dataset"])
        names = ("seed", "folds", "fold", "training", "validation")
        split = {**state["split"], **{name: state["split"][name] for name in names}}
        finished = str(state["progress"]["finished"])
    except (KeyError, TypeError, ConfigError) as error:
        text = "the checkpoint cannot be continued: it is best.pt, or of another version of medseg"
        raise CheckpointError(text, code="E362", file=run.path, found=str(error).splitlines()[0]) from error
    changed = _check_changes(overrides)
    pipeline = _override(before, overrides)
    if split["fold"] is None:
        _check_blind(pipeline)
    if (
        finished
        and run.status.get("state") == "finished"
        and not changed & {"epochs", "iterations", "minutes", "patience"}
    ):
        raise UsageError(
            "this run is finished: there is nothing to continue",
            code="E108",
            file=run.path,
            found=f"ended by {finished}",
            fix=f"extend it, for example with --set train.epochs=...; its scores: medseg evaluate {run.path}",
        )
    root = data_root(data, known=run.data)
    notices.append(f"continuing after iteration {state['progress']['iteration']}")
    return Plan(
        pipeline,
        spec,
        root,
        run.path,
        run.path.parent.name,
        None if split["fold"] is None else int(split["fold"]),
        split,
        state,
        tuple(sorted(changed)),
        notices,
    )


def _check_blind(pipeline: Pipeline) -> None:
    """Without validation cases nothing that looks at their score can decide anything."""
    asks = [("train.patience", pipeline.train.patience is not None)]
    asks += [("schedule", pipeline.schedule.name == "ReduceLROnPlateau")]
    for field_name, wanted in asks:
        if wanted:
            raise ConfigError(
                "this needs the score of validation cases, and --fold none keeps none",
                code="E118",
                field=field_name,
                fix="train one fold, or --set schedule={PolynomialLR: {}} and train.patience=null",
            )


def _check_changes(overrides: Sequence[str]) -> set[str]:
    settings = parse_settings(overrides)
    names = {
        f"{k}.{n}" if isinstance(v, dict) else k
        for k, v in settings.items()
        for n in (v if isinstance(v, dict) else [k])
    }
    wrong = sorted(name for name in names if name.removeprefix("train.") not in CHANGEABLE or "." not in name)
    if wrong:
        raise ConfigError(
            "this cannot be changed while a run is continued",
            code="E117",
            field=", ".join(wrong),
            expected=", ".join(f"train.{name}" for name in sorted(CHANGEABLE)),
            fix="start a new run; --init takes over the weights",
        )
    return {name.removeprefix("train.") for name in names}


def _override(pipeline: Pipeline, overrides: Sequence[str]) -> Pipeline:
    if not overrides:
        return pipeline
    document = apply_overrides(Document(pipeline.to_dict(), {}, "the pipeline"), overrides)
    return Pipeline.from_dict(document.value)

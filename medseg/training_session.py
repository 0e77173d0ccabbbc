"""The session of a run, new or continued, and the files that say what was asked of it."""

from __future__ import annotations

from typing import Any

from medseg.checkpoint import CheckpointStore
from medseg.component import build_component
from medseg.config import to_yaml
from medseg.engine_budget import Budget
from medseg.engine_session import Session
from medseg.engine_validation import Validator
from medseg.errors import CheckpointError
from medseg.run import RunFolder, provenance
from medseg.training_finish import mend_best
from medseg.training_plan import Plan
from medseg.training_setup import Prepared, build_step

__all__ = ["describe_run", "open_session"]


def open_session(plan: Plan, prepared: Prepared, split: dict[str, Any], run: RunFolder) -> Session:
    """The session of a new run, or of a run that goes on where its checkpoint was written.

    Raises:
        CheckpointError: E363, the checkpoint is not one of this network and optimizer.
    """
    pipeline = plan.pipeline
    step, notices = build_step(prepared, replicas=plan.replicas)
    session = Session(
        pipeline=pipeline,
        spec=plan.spec,
        hardware=prepared.hardware,
        group=prepared.group,
        run=run,
        checkpoints=CheckpointStore(run.path),
        maker=prepared.maker,
        step=step,
        schedule=build_component(pipeline.schedule, "schedule"),
        budget=Budget.of(pipeline.train, prepared.maker.iterations),
        validator=Validator(pipeline, plan.spec, prepared.validation, prepared.hardware, prepared.patients),
        split=split,
        channels=prepared.channels,
        seen=prepared.seen,
        replicas=plan.replicas or step.parts,
        rates=[float(part["lr"]) for part in step.optimizer.param_groups],
        device_augmentation=prepared.device_augmentation,
        notices=notices,
    )
    if plan.state is not None:
        try:
            session.restore(plan.state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            text = "the checkpoint is not one of this run's network and optimizer"
            found = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(text, code="E363", file=run.path, found=found) from error
        session.notices += plan.reopen(session, prepared.keys) + mend_best(session, plan.state)
    return session


def describe_run(plan: Plan, prepared: Prepared, session: Session, init: str | None) -> None:
    """pipeline.yaml, split.json, provenance.json: what was asked, and of what."""
    if not session.group.writes:
        return
    run = session.run
    run.write_text("pipeline.yaml", to_yaml(plan.pipeline))
    run.write_json("split.json", session.split)
    facts = provenance(
        data=str(plan.root.resolve()),
        dataset=plan.spec.name,
        hardware=session.hardware.describe(),
        processes=session.group.world,
        iterations_per_epoch=session.per_epoch,
        cases=prepared.keys,
        notices=session.notices,
        init=init,
    )
    earlier = run.read_json("provenance.json") if plan.state is not None else None
    if isinstance(earlier, dict):
        before, facts["init"] = earlier.get("cases", {}), earlier.get("init")
        earlier["cases"] = {name: key for name, key in before.items() if prepared.keys.get(name) != key}
        facts["earlier"] = [*earlier.pop("earlier", []), earlier]
    run.write_json("provenance.json", facts)

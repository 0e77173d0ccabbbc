"""The threshold of `Threshold: {value: validation}`, chosen on the validation cases by the pipeline's best score."""

from __future__ import annotations

from typing import Any

import numpy as np

from medseg.checkpoint_model import with_threshold
from medseg.checkpoint_read import read_state
from medseg.engine_session import Session
from medseg.engine_validation import Validator
from medseg.metrics import pool_scores

__all__ = ["CANDIDATES", "choose_threshold"]

CANDIDATES = tuple(round(0.05 * step, 2) for step in range(1, 20))


def choose_threshold(session: Session) -> float | None:
    """Choose it, put it into the session and into best.pt; None when the pipeline asks for none.

    Every candidate goes through the whole post-processing and is scored as validation is; of equal ones the one nearest
    to 0.5 wins. With several processes each does the same work and finds the same.
    """
    wanted = any(getattr(step, "from_validation", False) for step in session.validator.postprocess)
    if not wanted:
        return None
    validator = session.validator
    results: dict[float, list[Any]] = {value: [] for value in CANDIDATES}
    for name in validator.choose(None):
        _, probabilities = validator.predict(session.step.validated, name, probabilities=True, exact=True)
        assert probabilities is not None
        for value in CANDIDATES:
            validator.use(with_threshold(session.pipeline, value))
            label = (probabilities[-1] > value).astype(np.uint8)
            for step in validator.postprocess:
                spacing = validator.stored[name].native.spacing
                label = np.asarray(step(label, probabilities=probabilities, spacing=spacing))
            results[value].append(validator.measure(name, label, probabilities))
        validator.use(session.pipeline)
    scores = {value: _score(validator, found) for value, found in results.items()}
    chosen = max(CANDIDATES, key=lambda value: (scores[value], -abs(value - 0.5)))
    session.threshold = chosen
    validator.use(with_threshold(session.pipeline, chosen))
    with session.group.first():
        if session.group.writes:
            best = session.run.path / "best.pt"
            state = {**read_state(best), "threshold": chosen}
            facts = {"epoch": session.progress.best_epoch, "threshold": chosen}
            session.checkpoints.save(state, "best", facts=facts)
    return chosen


def _score(validator: Validator, results: list[Any]) -> float:
    if validator.metric.terms is not None:
        spec = validator.spec
        found = pool_scores(results, validator.best, unit=spec.unit, dims=spec.dims)
    else:
        found = [score for result in results for score in result.scores if score.metric == validator.shown]
    values = [score.value for score in found]
    return validator.sign * sum(values) / len(values) if values else float("-inf")

"""The threshold of `Threshold: {value: validation}` or `{value: training}`, chosen when training ends, and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from medseg.checkpoint_model import with_threshold
from medseg.checkpoint_read import read_state
from medseg.engine_session import Session
from medseg.engine_validation import Validator
from medseg.metrics import ProbabilityCounts, pool_scores, probability_counts

__all__ = ["CANDIDATES", "choose_threshold", "count_probabilities", "middle_of_the_best"]

CANDIDATES = tuple(round(0.05 * step, 2) for step in range(1, 20))
DIGITS = 4  # of the probabilities that are counted: 10 001 values, whatever the number of images


def choose_threshold(
    session: Session,
    training: Mapping[str, Any],
    *,
    check_stop: Callable[[], None] = lambda: None,
    show: Callable[[str], None] = lambda _: None,
) -> str | None:
    """Choose it, put it into the session, best.pt and threshold.json; None when the pipeline asks for none.

    "validation": every candidate goes through the whole post-processing and is scored as validation is, and the middle
    of the best ones is taken (`middle_of_the_best`). "training": the threshold with the highest Dice of all pixels of
    the training images together, inside the field of view, void pixels left out; every value that separates two
    probabilities (to four digits) is tried. With several processes each does the same work and finds the same.
    Where no case was kept for validation, the training cases stand in for them, and the words say so.

    Args:
        session: with the best weights loaded.
        training: id -> stored training case.
        check_stop: called between cases; may raise.
        show: told on which cases, before they are predicted: whole images take their time.

    Returns:
        What was chosen, in words.
    """
    wanted = {step.chosen_on for step in session.validator.postprocess if getattr(step, "chosen_on", None)}
    if not wanted:
        return None
    if "training" in wanted:
        show(f"choosing the threshold on {len(training)} training cases")
        counts = count_probabilities(session, training, check_stop)
        if not counts.inside.any():
            return "threshold stays at 0.5: no pixel of the structure in the training images to choose it by"
        value = float(np.clip(counts.best_threshold(), 10.0**-DIGITS, 1 - 10.0**-DIGITS))
        facts = {"value": value, "chosen_on": "training", "cases": len(training), "rule": "highest pooled Dice"}
    else:
        side, validator = "validation", session.validator
        if not validator.stored:
            side, validator = "training", _validator(session, training)
        show(f"choosing the threshold on {len(validator.stored)} {side} cases")
        value = _from_scores(session, validator, check_stop)
        facts = {"value": value, "chosen_on": side, "cases": len(validator.stored), "rule": f"best {validator.shown}"}
    session.threshold = value
    session.validator.use(with_threshold(session.pipeline, value))
    with session.group.first():
        if session.group.writes:
            state = {**read_state(session.run.path / "best.pt"), "threshold": value}
            epoch = {"epoch": session.progress.best_epoch, "threshold": value}
            session.checkpoints.save(state, "best", facts=epoch)
            session.run.write_json("threshold.json", facts)
    return f"threshold {value:.4g}: {facts['rule']} on the {facts['cases']} {facts['chosen_on']} cases"


def count_probabilities(
    session: Session, cases: Mapping[str, Any], check_stop: Callable[[], None] = lambda: None
) -> ProbabilityCounts:
    """How often each probability (to four digits) was given inside and outside the structure, over all pixels that
    count of these stored cases together."""
    validator = _validator(session, cases)
    total = ProbabilityCounts(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for name in validator.choose(None):
        check_stop()
        _, probabilities = validator.predict(session.step.validated, name, probabilities=True, exact=True)
        assert probabilities is not None
        reference, fov, _ = validator.references(name)
        valid = np.ones(reference.shape, bool) if fov is None else fov != 0
        if session.spec.ignore is not None:
            valid &= reference != session.spec.ignore
        total = total + probability_counts(probabilities[-1].round(DIGITS), reference != 0, valid)
    return total


def _validator(session: Session, cases: Mapping[str, Any]) -> Validator:
    return Validator(session.pipeline, session.spec, cases, session.hardware, session.validator.patients)


def _from_scores(session: Session, validator: Validator, check_stop: Callable[[], None]) -> float:
    # a score that looks for its own threshold in probabilities would be the same for every candidate
    shares = validator.metric.needs == "probabilities"
    results: dict[float, list[Any]] = {value: [] for value in CANDIDATES}
    for name in validator.choose(None):
        check_stop()
        _, probabilities = validator.predict(session.step.validated, name, probabilities=True, exact=True)
        assert probabilities is not None
        for value in CANDIDATES:
            validator.use(with_threshold(session.pipeline, value))
            label = (probabilities[-1] > value).astype(np.uint8)
            for step in validator.postprocess:
                spacing = validator.stored[name].native.spacing
                label = np.asarray(step(label, probabilities=probabilities, spacing=spacing))
            results[value].append(validator.measure(name, label, probabilities if shares else None))
        validator.use(session.pipeline)
    return middle_of_the_best({value: _score(validator, found) for value, found in results.items()})


def middle_of_the_best(scores: Mapping[float, float]) -> float:
    """The threshold whose score, smoothed with its neighbours' (1-2-1), is highest; of equal ones the nearest to 0.5.

    A score of single objects jumps where one gap opens or closes: on few cases the highest candidate may stand at the
    edge of a cliff, and new cases fall from it.

    >>> middle_of_the_best({0.4: 0.6, 0.45: 0.6, 0.5: 0.95, 0.55: 0.94, 0.6: 0.94, 0.65: 0.90})
    0.55
    """
    values = sorted(scores)
    found = [scores[value] for value in values]
    around = zip([found[0], *found[:-1]], found, [*found[1:], found[-1]], strict=True)
    smooth = {v: round((low + 2 * own + high) / 4, 12) for v, (low, own, high) in zip(values, around, strict=True)}
    return max(values, key=lambda value: (smooth[value], -abs(value - 0.5)))


def _score(validator: Validator, results: list[Any]) -> float:
    if validator.metric.terms is not None:
        spec = validator.spec
        found = pool_scores(results, validator.best, unit=spec.unit, dims=spec.dims)
    else:
        found = [score for result in results for score in result.scores if score.metric == validator.shown]
    values = [score.value for score in found]
    return validator.sign * sum(values) / len(values) if values else float("-inf")

"""Scores of objects from pictures small enough to count by eye, and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.errors import GeometryError, UsageError
from medseg.metrics import (
    aggregated_jaccard,
    average_precision,
    ctc_seg,
    match_instances,
    mean_average_precision,
    panoptic_quality,
)
from medseg.metrics.matching import instance_overlap

# object 1: 8 px, found as 5 with 6 px (IoU 6/8); object 2: 4 px, found as 6 with 5 px, 3 shared (IoU 3/6);
# object 3: 2 px, missed; predicted 7: 2 px, false
REFERENCE = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 3, 3, 0, 0, 0]])
PREDICTION = np.array([[0, 5, 5, 5, 5, 5, 5, 0, 0, 0, 6, 6, 6, 6, 6, 0, 0, 0, 7, 7]])
EMPTY = np.zeros_like(REFERENCE)


def test_match_by_hand():
    match = match_instances(PREDICTION, REFERENCE)  # exactly 0.5 is no match
    assert match.pairs.tolist() == [[5, 1]]
    assert match.iou.tolist() == [0.75]
    assert (match.tp, match.fp, match.fn) == (1, 2, 2)
    assert match.missed.tolist() == [2, 3]
    assert match.extra.tolist() == [6, 7]
    assert match.precision == match.recall == match.f1 == pytest.approx(1 / 3)
    loose = match_instances(PREDICTION, REFERENCE, threshold=0.0)
    assert loose.pairs.tolist() == [[5, 1], [6, 2]]
    assert loose.f1 == pytest.approx(2 / 3)


def test_scores_by_hand():
    assert average_precision(PREDICTION, REFERENCE, threshold=0.5) == pytest.approx(1 / 5)
    assert average_precision(PREDICTION, REFERENCE, threshold=0.4) == pytest.approx(2 / 4)
    # IoU 0.75 counts at the thresholds 0.5 ... 0.7, not at 0.75
    assert mean_average_precision(PREDICTION, REFERENCE) == pytest.approx((5 * 1 / 5) / 10)
    assert panoptic_quality(PREDICTION, REFERENCE) == pytest.approx(0.75 / (1 + 2 / 2 + 2 / 2))
    # 6/8 and 3/6, object 3 adds 2 to the unions, predicted 7 adds 2
    assert aggregated_jaccard(PREDICTION, REFERENCE) == pytest.approx((6 + 3) / (8 + 6 + 2 + 2))
    # 6 of 8 covered: IoU 0.75; 3 of 4 covered: IoU 0.5; object 3: 0
    assert ctc_seg(PREDICTION, REFERENCE) == pytest.approx((0.75 + 0.5 + 0) / 3)


def test_exactly_half_is_no_match_for_seg():
    reference = np.array([[4, 4, 4, 4]])
    assert ctc_seg(np.array([[1, 1, 0, 0]]), reference) == 0.0
    assert ctc_seg(np.array([[1, 1, 1, 0]]), reference) == 0.75


@pytest.mark.parametrize(
    "score", [average_precision, mean_average_precision, panoptic_quality, aggregated_jaccard, ctc_seg]
)
def test_empty_pictures(score):
    assert score(EMPTY, REFERENCE) == 0.0
    assert score(PREDICTION, EMPTY) == 0.0
    assert score(EMPTY, EMPTY) == 1.0
    assert score(REFERENCE, REFERENCE) == 1.0


def test_aji_lets_two_objects_choose_one_prediction():
    """Kumar et al.: a merger is chosen by both cells, its union counts twice."""
    reference = np.array([[1, 1, 2, 2]])
    prediction = np.array([[9, 9, 9, 9]])
    assert aggregated_jaccard(prediction, reference) == pytest.approx((2 + 2) / (4 + 4))


def brute_force(table, threshold):
    """Largest number of pairs above the threshold, then the largest sum of IoU, over all assignments."""
    iou = {(int(p), int(r)): v for (p, r), v in zip(table.pairs, table.iou, strict=True) if v > threshold}
    rows, columns = range(len(table.predicted)), range(len(table.present))
    best = (0, 0.0)
    for chosen in itertools.product([None, *columns], repeat=len(rows)):
        used = [c for c in chosen if c is not None]
        found = [iou.get((r, c)) for r, c in zip(rows, chosen, strict=True) if c is not None]
        if len(set(used)) == len(used) and None not in found:
            best = max(best, (len(found), round(sum(found), 9)))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
def test_match_equals_brute_force(seed, threshold):
    rng = np.random.default_rng(seed)
    a, b = (np.kron(rng.integers(0, 5, (4, 4)), np.ones((2, 2), int)) for _ in range(2))
    b = np.roll(np.where(rng.random(b.shape) < 0.5, a, b), 1, axis=0)
    match = match_instances(a, b, threshold)
    table = instance_overlap(a, b)
    assert (match.tp, round(float(match.iou.sum()), 9)) == brute_force(table, threshold)
    assert match.tp + match.fp == len(np.setdiff1d(a, [0]))
    assert match.tp + match.fn == len(np.setdiff1d(b, [0]))


def test_ids_need_not_be_consecutive_and_order_does_not_matter():
    renamed = np.select([PREDICTION == 5, PREDICTION == 6, PREDICTION == 7], [70_000, 2, 900], 0)
    for score in (mean_average_precision, panoptic_quality, aggregated_jaccard, ctc_seg):
        assert score(renamed, REFERENCE * 13) == score(PREDICTION, REFERENCE)


def test_bad_input_is_refused():
    with pytest.raises(GeometryError):
        match_instances(PREDICTION, REFERENCE[:, 1:])
    with pytest.raises(UsageError):
        match_instances(PREDICTION, REFERENCE, threshold=1.0)
    with pytest.raises(UsageError):
        match_instances(-PREDICTION, REFERENCE)
    with pytest.raises(UsageError):
        match_instances(PREDICTION)


def test_more_pairs_go_before_better_pairs():
    """Any overlap counts at 0: the middle prediction leaves the first object to the small one, and takes the second."""
    reference = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2]])
    prediction = np.array([[8, 8, 8, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0]])
    assert sorted(match_instances(prediction, reference, threshold=0.0).pairs.tolist()) == [[5, 2], [8, 1]]
    assert match_instances(prediction, reference).pairs.tolist() == [[5, 1]]

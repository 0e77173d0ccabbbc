"""Overlap scores from numbers worked out by hand, and against scikit-learn's formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.errors import GeometryError, UsageError
from medseg.metrics import Confusion, confusion
from medseg.metrics.overlap import confusion_of_masks, pool

# 10 voxels: prediction and reference agree on 3 of label 1; the table below is counted by eye
REFERENCE = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], dtype=np.uint8)
PREDICTION = np.array([[0, 1, 1, 1, 1, 1, 0, 2, 1, 0]], dtype=np.uint8)


def test_counts_by_hand():
    counts = confusion(PREDICTION, REFERENCE, labels=[1, 2])
    assert counts[1] == Confusion(tp=3, fp=3, fn=1, tn=3)
    assert counts[2] == Confusion(tp=1, fp=0, fn=2, tn=7)
    assert counts[1].dice == pytest.approx(6 / 10)
    assert counts[1].iou == pytest.approx(3 / 7)
    assert counts[1].voe == pytest.approx(4 / 7)
    assert counts[1].sensitivity == pytest.approx(3 / 4)
    assert counts[1].specificity == pytest.approx(3 / 6)
    assert counts[1].precision == pytest.approx(3 / 6)
    assert counts[1].accuracy == pytest.approx(6 / 10)
    assert counts[1].rvd == pytest.approx(2 / 4)
    assert counts[1].mcc == pytest.approx((3 * 3 - 3 * 1) / np.sqrt(6 * 4 * 6 * 4))


def test_mask_and_ignore_leave_voxels_out():
    mask = np.ones_like(REFERENCE)
    mask[0, 1:3] = 0
    assert confusion(PREDICTION, REFERENCE, [1], mask=mask)[1] == Confusion(tp=3, fp=1, fn=1, tn=3)
    void = REFERENCE.copy()
    void[0, 3] = 255
    assert confusion(PREDICTION, void, [1], ignore=255)[1] == Confusion(tp=2, fp=3, fn=1, tn=3)
    assert confusion(PREDICTION, void, [1], mask=mask, ignore=255)[1] == Confusion(tp=2, fp=1, fn=1, tn=3)
    assert confusion(PREDICTION, void, [1])[1].tn == 3  # not ignored, 255 is another label


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_orders_and_large_labels(dtype, order):
    rng = np.random.default_rng(0)
    a, b = (np.asarray(rng.choice([0, 3, 100, 250, 251], (9, 8, 7)), dtype=dtype, order=order) for _ in range(2))
    counts = confusion(a, b, labels=[250, 3])
    assert list(counts) == [250, 3]
    for label, found in counts.items():
        assert found == confusion_of_masks(a == label, b == label)


def test_negative_values_are_no_large_ones():
    # in memory -1 as int8 is 255 as uint8
    minus, large = np.full(4, -1, np.int8), np.full(4, 255, np.uint8)
    assert confusion(minus, large, [255])[255] == Confusion(0, 0, 4, 0)
    assert confusion(large, minus, [255])[255] == Confusion(0, 4, 0, 0)


def test_pooled_counts_add_up():
    a, b = Confusion(1, 2, 3, 4), Confusion(10, 20, 30, 40)
    assert a + b == Confusion(11, 22, 33, 44)
    assert pool([{1: a}, {1: b, 2: a}]) == {1: a + b, 2: a}


@pytest.mark.parametrize(
    ("counts", "status", "ratio"),
    [
        (Confusion(0, 0, 5, 5), "missed", 0.0),
        (Confusion(0, 5, 0, 5), "false_alarm", 0.0),
        (Confusion(0, 0, 0, 10), "both_empty", 1.0),
    ],
)
def test_empty_masks_follow_the_policy(counts, status, ratio):
    assert counts.status == status
    for name in ("dice", "iou", "sensitivity", "precision"):
        assert getattr(counts, name) == ratio, name
    for name in ("specificity", "accuracy", "mcc", "voe", "rvd"):
        assert np.isfinite(getattr(counts, name))


def test_nothing_is_counted_without_voxels():
    counts = confusion(PREDICTION, REFERENCE, [1], mask=np.zeros_like(REFERENCE))[1]
    assert counts == Confusion(0, 0, 0, 0)
    assert counts.dice == counts.accuracy == counts.specificity == 1.0


def test_counts_of_large_volumes_do_not_overflow():
    big = Confusion(2**40, 2**41, 2**40, 2**45)
    assert 0 < big.mcc < 1
    assert confusion_of_masks(np.ones((3, 5_000_001), bool), np.ones((3, 5_000_001), bool)).tp == 15_000_003
    assert confusion(np.ones((1, 5_000_001), np.uint8), np.ones((1, 5_000_001), np.uint8), [1])[1].tp == 5_000_001


def test_bad_input_is_refused():
    with pytest.raises(GeometryError):
        confusion(PREDICTION, REFERENCE[:, 1:], [1])
    with pytest.raises(GeometryError):
        confusion(PREDICTION, REFERENCE, [1], mask=np.ones((2, 2)))
    with pytest.raises(UsageError, match="whole numbers"):
        confusion(PREDICTION * 0.5, REFERENCE, [1])
    with pytest.raises(UsageError):
        confusion(PREDICTION, REFERENCE, [-1])

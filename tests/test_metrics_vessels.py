"""ROC area, threshold and centre-line Dice of vessels; Rand and information scores of membranes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.stats import mannwhitneyu

from medseg.errors import GeometryError, UsageError
from medseg.metrics import (
    auc,
    best_threshold,
    cldice,
    label_components,
    membrane_curve,
    probability_counts,
    v_info,
    v_rand,
    vessels,
)

RNG = np.random.default_rng(0)
REFERENCE = RNG.random((30, 40)) < 0.2
PROBABILITY = np.round(np.clip(RNG.random((30, 40)) * 0.7 + 0.3 * REFERENCE, 0, 1), 2).astype(np.float32)  # many ties


def test_auc_is_the_mann_whitney_statistic():
    inside, outside = PROBABILITY[REFERENCE], PROBABILITY[~REFERENCE]
    expected = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    assert auc(PROBABILITY, REFERENCE) == pytest.approx(expected, abs=1e-12)
    mask = np.zeros(REFERENCE.shape)
    mask[:10] = 1
    assert auc(PROBABILITY, REFERENCE, mask) == pytest.approx(auc(PROBABILITY[:10], REFERENCE[:10]), abs=1e-12)


def test_pooled_auc_is_that_of_all_pixels_together():
    halves = [probability_counts(PROBABILITY[part], REFERENCE[part]) for part in (slice(0, 13), slice(13, None))]
    assert (halves[0] + halves[1]).auc == pytest.approx(auc(PROBABILITY, REFERENCE), abs=1e-12)


def test_auc_counts_part_by_part_and_holds_no_more_than_a_part(monkeypatch):
    random = np.random.default_rng(0)
    probability = random.random((256, 64, 64)).round(2).astype(np.float16)
    reference = random.random(probability.shape) < probability
    mask = random.random(probability.shape) < 0.5
    whole = probability_counts(probability, reference, mask)  # one part
    inside, outside = (probability[mask & (reference == kind)].astype(float) for kind in (1, 0))
    expected = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    assert whole.auc == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(vessels, "_PART", 1 << 15)
    tracemalloc.start()
    parts = probability_counts(probability, reference, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for name in ("values", "inside", "outside"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert peak < 10 * probability.size  # bytes; at once it takes some 30 for each pixel


def test_auc_without_one_kind_of_pixel_is_finite():
    nothing, everything = np.zeros_like(REFERENCE), np.ones_like(REFERENCE)
    assert auc(np.full(REFERENCE.shape, 0.1), nothing) == 1.0
    assert auc(PROBABILITY, nothing) == 0.0
    assert auc(np.full(REFERENCE.shape, 0.9), everything) == 1.0
    assert auc(PROBABILITY, everything) == 0.0


def test_best_threshold_beats_all_others():
    def dice(threshold):
        predicted = threshold <= PROBABILITY
        return 2 * (predicted & REFERENCE).sum() / (predicted.sum() + REFERENCE.sum())

    images = [probability_counts(PROBABILITY[rows], REFERENCE[rows]) for rows in (slice(0, 9), slice(9, None))]
    found = best_threshold(images)
    assert dice(found) == max(dice(t) for t in [0.0, *np.unique(PROBABILITY)])


def test_a_threshold_needs_something_to_choose_by():
    with pytest.raises(UsageError):
        best_threshold([])
    with pytest.raises(UsageError):
        best_threshold(probability_counts(PROBABILITY, np.zeros_like(REFERENCE)))
    with pytest.raises(UsageError, match="NaN"):
        probability_counts(np.full((2, 2), np.nan), np.ones((2, 2)))


def test_cldice_by_hand():
    line = np.zeros((11, 41), bool)
    line[5, 3:38] = True  # its own skeleton, 35 px
    short = line.copy()
    short[5, 31:] = False  # 28 of them
    assert cldice(short, line) == pytest.approx(2 * 1 * (28 / 35) / (1 + 28 / 35))
    thick = binary_dilation(line, iterations=1)
    assert cldice(thick, line) == pytest.approx(1.0)  # width does not matter
    assert cldice(np.roll(line, 4, axis=0), line) == 0.0
    assert cldice(line & False, line) == cldice(line, line & False) == 0.0
    assert cldice(line & False, line & False) == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 2, 2), (2, 2, 2)])
def test_cldice_of_specks_is_finite(shape):
    speck = np.zeros([n + 4 for n in shape], bool)
    speck[tuple(slice(2, 2 + n) for n in shape)] = True
    assert cldice(speck, speck) == 1.0


def cells(width):
    """A grid of 6 x 6 cells, 30 px each, with membranes `width` px wide."""
    axis = np.arange(6 * 30) % 30
    inside = (axis >= width // 2 + width % 2) & (axis < 30 - width // 2)
    return inside[:, None] & inside[None, :]


def test_rand_and_information_by_hand():
    truth = np.array([[1, 1, 2, 2]])
    assert v_rand(np.array([[1, 2, 3, 4]]), truth) == pytest.approx((4 / 16) / (0.5 * 4 / 16 + 0.5 * 2 / 4))
    # split into singles: I = H(T) = ln 2, H(S) = ln 4
    assert v_info(np.array([[1, 2, 3, 4]]), truth) == pytest.approx(np.log(2) / (0.5 * np.log(4) + 0.5 * np.log(2)))
    # membrane of the reference does not count
    assert v_rand(np.array([[1, 1, 9, 2, 2]]), np.array([[1, 1, 0, 2, 2]])) == 1.0
    for score in (v_rand, v_info):
        assert score(np.zeros((1, 4), int), truth) == 0.0
        assert score(truth, np.zeros((1, 4), int)) == 0.0
        assert score(np.zeros((1, 4), int), np.zeros((1, 4), int)) == 1.0
        assert score(truth, truth) == 1.0


def test_wide_membranes_cost_nothing_after_thinning():
    truth, wide = cells(1), cells(6)  # 5 px too wide
    curve = membrane_curve(wide, truth)
    assert curve.v_rand >= 0.997
    assert curve.v_info >= 0.997
    # an irregular picture too: membranes 3 px wide (truth) and 8 px, one side a pixel more than the other
    seeds = np.random.default_rng(3).integers(0, 240, (15, 2))
    grid = np.stack(np.meshgrid(np.arange(240), np.arange(240), indexing="ij"), -1)
    owner = ((grid[:, :, None] - seeds) ** 2).sum(-1).argmin(-1)
    edge = np.zeros((240, 240), bool)
    edge[1:] |= owner[1:] != owner[:-1]
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge = binary_dilation(edge)
    curve = membrane_curve(~binary_dilation(edge, np.ones((6, 6), bool)), ~edge)
    assert curve.v_rand >= 0.997
    unthinned = v_rand(label_components(~binary_dilation(edge, np.ones((6, 6), bool))), label_components(~edge))
    assert unthinned < 0.98


def test_a_gap_in_a_membrane_merges_cells():
    truth, holed = cells(1), cells(1)
    holed[10, 25:35] = True
    both = membrane_curve(holed, truth)
    assert both.v_rand < 0.98
    assert both.v_info < 1.0


def test_the_best_threshold_is_that_of_the_mean():
    truth = cells(2)
    good_low = np.where(truth, 0.35, 0.05)  # right from 0.1 to 0.3
    good_high = np.where(truth, 0.95, 0.55)  # right from 0.6 to 0.9
    low, high = membrane_curve(good_low, truth), membrane_curve(good_high, truth)
    assert low.v_rand == high.v_rand == 1.0
    assert low.best_threshold == 0.1
    assert high.best_threshold == 0.6
    assert (low + high).v_rand < 1.0  # no threshold is right for both
    assert (low + high).images == 2


def test_touching_corners_part_cells():
    diagonal = ~np.eye(20, dtype=bool)  # a membrane one pixel wide that runs through corners
    assert label_components(diagonal).max() == 2


def test_bad_input_is_refused():
    for score in (v_rand, v_info, membrane_curve):
        with pytest.raises(GeometryError):
            score(np.ones((2, 2), int), np.ones((2, 3), int))
    with pytest.raises(GeometryError):
        cldice(np.ones((2, 2)), np.ones((2, 3)))

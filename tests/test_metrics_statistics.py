"""Intervals and verdicts: known numbers, scipy's tests, and coverage of simulated skewed differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medseg.errors import UsageError
from medseg.metrics.statistics import compare_paired, correct, holm, summarise, wilcoxon


def skewed(rng, n=60):
    """Two Dice-like columns: most cases near 0.9, a tail down to 0.4; the second is better by a skewed gain of 0.02."""
    first = 1 - rng.gamma(1.2, 0.08, n)
    return first, first + rng.gamma(0.8, 0.05, n) - 0.04 + 0.02


def test_quartiles_mean_and_sd():
    s = summarise([1, 2, 3, 4, 10], resamples=200)
    assert (s.mean, s.median, s.q1, s.q3) == (4.0, 3.0, 2.0, 4.0)
    assert s.sd == pytest.approx(np.std([1, 2, 3, 4, 10], ddof=1))
    assert s.low < 4 < s.high
    assert (s.n, s.groups) == (5, 5)


def test_interval_is_the_usual_one_for_normal_scores():
    values = np.random.default_rng(0).normal(5, 1, 200)
    s = summarise(values)
    low, high = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert s.low == pytest.approx(low, abs=0.02)
    assert s.high == pytest.approx(high, abs=0.02)


def test_special_columns():
    one = summarise([0.7])
    assert (one.low, one.mean, one.high, one.sd) == (0.7, 0.7, 0.7, 0.0)
    same = summarise([1.0] * 8)
    assert (same.low, same.high) == (1.0, 1.0)
    cut = summarise([1.0, 1.0, 1.0, 0.0], bounds=(0, 1))
    assert 0 <= cut.low < 0.75 < cut.high <= 1
    two = summarise([0.0, 1.0])
    assert np.isfinite([two.low, two.high]).all()


def test_seed_decides():
    values = np.random.default_rng(1).random(30)
    assert summarise(values, seed=3) == summarise(values, seed=3)
    assert summarise(values, seed=3) != summarise(values, seed=4)


def test_patients_are_resampled_whole():
    """Ten copies of each of 8 patients say no more than the 8 patients."""
    rng = np.random.default_rng(2)
    patients = rng.random(8)
    alone = summarise(patients, seed=0)
    copies = summarise(np.repeat(patients, 10), groups=np.repeat(np.arange(8), 10).tolist(), seed=0)
    blind = summarise(np.repeat(patients, 10), seed=0)
    assert copies.groups == 8
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    assert blind.high - blind.low < 0.5 * (copies.high - copies.low)


def test_error_of_groups_of_unequal_size():
    """With groups, the standard error is that of a ratio; groups of one give the ordinary one."""
    from medseg.metrics.statistics import _mean_and_error

    values = np.array([[1.0, 4.0, 2.0, 8.0]])
    mean, error = _mean_and_error(values, np.ones((1, 4)))
    assert mean[0] == values.mean()
    assert error[0] == pytest.approx(stats.sem(values[0]))


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_wilcoxon_is_scipys():
    d = np.random.default_rng(3).normal(0.3, 1, 40)
    p, side = wilcoxon(d)
    assert p == pytest.approx(stats.wilcoxon(d).pvalue)
    assert side == (1 if stats.wilcoxon(d, alternative="greater").pvalue < 0.5 else -1)
    assert wilcoxon(np.zeros(5)) == (1.0, 0)


def test_verdicts():
    rng = np.random.default_rng(4)
    a = rng.random(50)
    b = a + rng.normal(0.1, 0.05, 50)
    assert compare_paired(a, b).verdict == "better"
    assert compare_paired(a, b, better="lower").verdict == "worse"
    assert compare_paired(b, a).verdict == "worse"
    assert compare_paired(a, b, better="none").verdict == "no difference shown"
    assert compare_paired(a, a + rng.normal(0, 0.05, 50)).verdict == "no difference shown"
    assert compare_paired(a[:1], b[:1]).verdict == "no difference shown"
    found = compare_paired(a, b)
    assert found.difference == pytest.approx((b - a).mean())
    assert found.low < found.difference < found.high


def test_a_difference_of_bounded_scores_stays_possible():
    """Three cases, differences 1, 0.8 and -0.1: Student's interval alone is 0.567 +- 1.455."""
    first, second = np.array([0.0, 0.1, 0.2]), np.array([1.0, 0.9, 0.1])
    free = compare_paired(first, second)
    cut = compare_paired(first, second, bounds=(0, 1))
    assert free.high > 1
    assert (cut.low, cut.high) == (max(free.low, -1.0), 1.0)
    back = compare_paired(second, first, bounds=(0, 1))
    assert (back.low, back.high) == (-1.0, -cut.low)
    assert compare_paired(first, second, bounds=(-1, 1)).high == min(free.high, 2.0)  # correlations may differ by 2
    assert cut.verdict == free.verdict == "no difference shown"


def test_one_patient_whose_differences_cancel_is_no_error():
    first, second = [0.9, 0.8, 0.7], [0.9 + 0.3, 0.8 - 0.1, 0.7 - 0.2]
    assert sum(b - a for a, b in zip(first, second, strict=True)) != 0  # but for rounding it is
    found = compare_paired(first, second, groups=["p"] * 3)
    assert (found.p, found.ranks, found.verdict) == (1.0, 0, "no difference shown")


def test_a_mean_against_most_cases_gets_no_verdict():
    """50 of 60 cases gain 0.025, ten lose 0.475: the mean falls by 0.058, the ranks (1275 against 555) say gain."""
    first = np.linspace(0.6, 0.9, 60)
    found = compare_paired(first, first + np.where(np.arange(60) % 6 == 0, -0.475, 0.025))
    assert found.difference == pytest.approx(-0.35 / 6)
    assert found.high < 0
    assert found.p < 0.05
    assert (found.ranks, found.verdict) == (1, "no difference shown")
    assert correct([found])[0].verdict == "no difference shown"


def test_many_comparisons_are_corrected():
    rng = np.random.default_rng(5)
    a = rng.random(20)
    weak = compare_paired(a, a + np.linspace(-0.04, 0.10, 20))
    assert weak.verdict == "better"
    assert weak.p > 0.05 / 40
    many = correct([weak, *(compare_paired(a, a + rng.normal(0, 0.05, 20)) for _ in range(39))])
    assert many[0].p_holm == pytest.approx(min(1, 40 * weak.p))
    assert many[0].verdict == "no difference shown"


def coverage(repetitions, seed):
    covered = false = 0
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, repetition])
        first, second = skewed(rng)
        found = compare_paired(first, second, seed=repetition, resamples=1000)
        covered += found.low <= 0.02 <= found.high
        null = compare_paired(first, second - 0.02, seed=repetition, resamples=1000)  # no difference in the mean
        false += null.verdict != "no difference shown"
    return covered / repetitions, false / repetitions


def test_coverage_of_skewed_differences():
    covered, false = coverage(400, seed=0)  # standard error of the coverage: 1.1 %
    assert 0.925 <= covered <= 0.985
    assert false <= 0.06


@pytest.mark.slow
def test_coverage_over_2000_repetitions():
    covered, false = coverage(2000, seed=1)
    assert 0.935 <= covered <= 0.965
    assert false <= 0.05


def test_bad_input_is_refused():
    with pytest.raises(UsageError):
        summarise([])
    with pytest.raises(UsageError, match="finite"):
        summarise([1.0, float("nan")])
    with pytest.raises(UsageError):
        summarise([1.0, 2.0], groups=["a"])
    with pytest.raises(UsageError):
        compare_paired([1.0], [1.0, 2.0])
    with pytest.raises(UsageError):
        compare_paired([1.0], [1.0], better="bigger")

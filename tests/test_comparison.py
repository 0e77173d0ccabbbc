"""Comparison: the same cases paired, verdicts only where there is evidence, mismatched pairs refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from medseg.comparison import compare
from medseg.errors import DataError, UsageError
from medseg.tables import POOLED, SCHEMA, ScoreRow, write_cases, write_summary


def scores(folder, values, *, metric="Dice", unit="", label="liver", cases=None, better=None, groups=None):
    rows = [
        ScoreRow(case, label, metric, float(v), unit, "scored", "d")
        for case, v in zip(cases or [f"c{n}" for n in range(len(values))], values, strict=True)
    ]
    rows.append(ScoreRow(POOLED, label, "PooledDice", 0.5, "", "scored", "d"))
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "cases.csv", rows)
    if better or groups:
        entry = {"label": label, "metric": metric, "unit": unit, "better": better or "higher"}
        write_summary(folder / "summary.json", {"schema": SCHEMA, "scores": [entry], "groups": groups or {}})
    return folder


@pytest.fixture
def base():
    return np.random.default_rng(0).beta(8, 2, 60)


def test_better_worse_and_no_difference(tmp_path, base):
    noise = np.random.default_rng(1).normal(0, 0.01, 60)
    a = scores(tmp_path / "a", base)
    b = scores(tmp_path / "b", base + 0.02 + noise)
    c = scores(tmp_path / "c", base - 0.02 + noise)
    d = scores(tmp_path / "d", base + noise - noise.mean())
    result = compare(a, b, c, d, output=tmp_path / "out")
    assert [x.verdict for x in result.differences] == ["better", "worse", "no difference shown"]
    first = result.differences[0]
    assert first.difference == pytest.approx((0.02 + noise).mean())
    assert first.low < first.difference < first.high
    assert first.p <= first.p_holm
    assert (first.first, first.second, first.n, first.better) == ("a", "b", 60, "higher")
    text = result.text()
    assert "better" in text
    assert "b against a, 60 cases" in text
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(result.as_dict()))
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["better", "worse", "no difference shown"]


def test_lower_is_better_for_distances_and_signed_errors_are_not_judged(tmp_path, base):
    a = scores(tmp_path / "a", base * 10, metric="HD95", unit="mm")
    b = scores(tmp_path / "b", base * 10 - 0.5, metric="HD95", unit="mm")
    assert compare(a, b).differences[0].verdict == "better"
    a = scores(tmp_path / "a", base, metric="VolumeError", unit="mL")
    b = scores(tmp_path / "b", base - 0.5, metric="VolumeError", unit="mL")
    assert compare(a, b).differences[0].verdict == "not judged"


def test_other_references_and_missing_predictions_are_told(tmp_path, base):
    def evaluated(name, volume, missing=()):
        folder = scores(tmp_path / name, base)
        volumes = [{"case": f"c{n}", "label": "liver", "reference": 5.0, "prediction": n} for n in range(60)]
        volumes[7]["reference"] = volume
        facts = {"schema": SCHEMA, "scores": [], "volumes": volumes, "cases": {"count": 60, "missing": list(missing)}}
        write_summary(folder / "summary.json", facts)
        return folder

    a, same, other = evaluated("a", 5.0), evaluated("same", 5.0), evaluated("other", 5.1, ["c3", "c7"])
    assert compare(a, same).notes == ()
    first, second = compare(a, same, other).notes
    assert first.startswith("The references of 1 case (c7) have other volumes in other than in a")
    assert second == "other has no prediction of 2 cases (c3, c7): counted as missed."
    assert compare(a, scores(tmp_path / "table alone", base)).notes == ()


def test_the_interval_of_a_difference_is_cut_to_what_the_score_allows(tmp_path):
    first, second = [0.0, 0.1, 0.2], [1.0, 0.9, 0.1]
    (dice,) = compare(scores(tmp_path / "a", first), scores(tmp_path / "b", second)).differences
    assert dice.high == 1.0
    wide = {"metric": "HD95", "unit": "mm"}  # a distance has no largest value
    (distance,) = compare(scores(tmp_path / "c", first, **wide), scores(tmp_path / "d", second, **wide)).differences
    assert distance.high > 1
    unknown = {"metric": "Elsewhere"}
    (other,) = compare(scores(tmp_path / "e", first, **unknown), scores(tmp_path / "f", second, **unknown)).differences
    assert (other.high, other.better) == (distance.high, "none")


def test_a_mean_against_most_cases_is_told(tmp_path):
    first = np.linspace(0.6, 0.9, 60)
    a = scores(tmp_path / "a", first)
    b = scores(tmp_path / "b", first + np.where(np.arange(60) % 6 == 0, -0.475, 0.025))
    result = compare(a, b)
    assert result.differences[0].high < 0
    assert result.differences[0].verdict == "no difference shown"
    assert result.notes == ("b, liver, Dice: the mean and most cases point to different sides.",)
    assert "different sides" in result.text()


def test_the_same_table_shows_no_difference(tmp_path, base):
    a = scores(tmp_path / "x" / "a", base)
    b = scores(tmp_path / "y" / "a", base)
    (one,) = compare(a, b).differences
    assert (one.verdict, one.difference, one.p_holm) == ("no difference shown", 0.0, 1.0)
    assert (one.first, one.second) == ("x/a", "y/a")


def test_holm_makes_a_verdict_harder_the_more_is_compared(tmp_path):
    generator = np.random.default_rng(3)
    base = generator.beta(8, 2, 40)
    step = generator.normal(0, 1, 40)
    step = 0.004 + 0.0098 * (step - step.mean()) / step.std()  # alone just significant: t = 2.6
    a = scores(tmp_path / "a", base)
    b = scores(tmp_path / "b", base + step)
    alone = compare(a, b).differences[0]
    others = [scores(tmp_path / f"o{n}", base + generator.normal(0, 0.01, 40)) for n in range(6)]
    together = compare(a, b, *others).differences[0]
    assert alone.verdict == "better"
    assert alone.p == together.p
    assert together.p_holm == pytest.approx(min(1, 7 * alone.p))
    assert together.verdict == "no difference shown"


def test_patients_are_the_unit_where_they_are_known(tmp_path):
    # one patient of ten makes all the difference with its many cases
    values = np.concatenate([np.full(50, 0.5), np.full(9, 0.5)])
    other = np.concatenate([np.full(50, 0.6), np.full(9, 0.5) - 1e-3 * np.arange(9)])
    groups = {f"c{n}": "p0" if n < 50 else f"p{n}" for n in range(59)}
    a = scores(tmp_path / "a", values, groups=groups)
    b = scores(tmp_path / "b", other, groups=groups)
    (grouped,) = compare(a, b).differences
    assert grouped.patients == 10
    assert grouped.verdict == "no difference shown"
    for folder in (a, b):
        (folder / "summary.json").unlink()
    (single,) = compare(a, b).differences
    assert single.verdict == "better"


def test_patients_that_only_one_evaluation_knows_count_whichever_comes_first(tmp_path):
    values = np.linspace(0.5, 0.9, 24)
    groups = {f"c{n}": f"p{n // 6}" for n in range(24)}
    plain = scores(tmp_path / "plain", values)
    known = scores(tmp_path / "known", values + np.linspace(0.01, 0.02, 24), groups=groups)
    there, back = compare(plain, known).differences[0], compare(known, plain).differences[0]
    assert (there.patients, back.patients) == (4, 4)
    assert there.p == back.p == 0.125  # four patients on one side: 2 / 2**4
    assert (there.verdict, back.verdict) == ("no difference shown",) * 2


def test_distances_in_different_units_are_refused(tmp_path, base):
    one = scores(tmp_path / "one", base, metric="HD95", unit="mm")
    two = scores(tmp_path / "two", base * 2, metric="HD95", unit="px")
    with pytest.raises(DataError) as caught:
        compare(one, two)
    assert (caught.value.field, caught.value.expected, caught.value.found) == ("liver, HD95", "mm", "px")


def test_other_cases_are_refused_and_named(tmp_path, base):
    a = scores(tmp_path / "a", base)
    b = scores(tmp_path / "b", base[:-1])
    c = scores(tmp_path / "c", base, cases=[f"d{n}" for n in range(60)])
    with pytest.raises(DataError) as caught:
        compare(a, b)
    assert "lacking c59" in caught.value.found
    assert caught.value.exit_code == 3
    with pytest.raises(DataError) as caught:
        compare(a, b, c)
    assert len(caught.value.problems) == 2


def test_other_refusals(tmp_path, base):
    a = scores(tmp_path / "a", base)
    with pytest.raises(UsageError, match="two evaluations"):
        compare(a)
    with pytest.raises(DataError, match="no scores here"):
        compare(a, tmp_path / "absent")
    with pytest.raises(UsageError, match="in common"):
        compare(a, scores(tmp_path / "b", base, label="spleen"))
    with pytest.raises(DataError, match="twice"):
        compare(a, scores(tmp_path / "d", base[:2], cases=["c1", "c1"]))
    write_cases(tmp_path / "a" / "cases.csv", [])
    with pytest.raises(DataError, match="empty"):
        compare(a, a)


def test_scores_that_only_one_has_are_told(tmp_path, base):
    a = scores(tmp_path / "a", base)
    b = scores(tmp_path / "b" / "validation", base)
    rows = [ScoreRow(f"c{n}", "liver", "IoU", 0.5, "", "scored", "d") for n in range(60)]
    from medseg.tables import read_cases

    write_cases(b / "cases.csv", [*read_cases(b / "cases.csv"), *rows])
    result = compare(a, tmp_path / "b")
    assert len(result.differences) == 1
    assert "liver IoU" in result.notes[0]
    assert "liver IoU" in result.text()


def test_folders_of_runs_stand_for_the_newest_and_one_list_is_several(tmp_path, base):
    for name, shift in (("a", 0.0), ("b", 0.02)):
        for day in ("20", "21"):
            run = tmp_path / "runs" / name / f"2026-11-{day}_090000_fold0"
            scores(run / "validation", base + (shift if day == "21" else 0.5))
            (run / "best.pt").write_bytes(b"")
    result = compare([tmp_path / "runs" / "a", tmp_path / "runs" / "b"])
    assert result.names == ("a", "b")
    assert result.differences[0].difference == pytest.approx(0.02)
    assert any("2026-11-21" in note for note in result.notes)

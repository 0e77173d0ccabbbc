"""Cases without a prediction: no score of theirs is ever right, wherever the reference's voxels lie."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from PIL import Image

from medseg.evaluation import evaluate
from medseg.evaluation_pairs import Pair, Reading
from medseg.evaluation_scoring import Scoring, score_pair
from medseg.inference.outputs import probability_file

SIZE = (32, 24)
NOTHING = np.zeros(SIZE, np.uint8)
CORNER, EVERYWHERE = NOTHING.copy(), np.ones(SIZE, np.uint8)
CORNER[0, 0] = 1
FOV = NOTHING.copy()
FOV[8:24, 8:16] = 255
WORST = {"Dice": 0.0, "MCC": 0.0, "Accuracy": 0.0, "Specificity": 0.0, "SurfaceDice@1px": 0.0, "HD": math.hypot(*SIZE)}


def missing(folder, reference, labels, metrics, *, fov=None, regions=None, ignore=None):
    Image.fromarray(reference).save(folder / "reference.png")
    if fov is not None:
        Image.fromarray(fov).save(folder / "fov.png")
    pair = Pair("a", folder / "reference.png", None, fov=None if fov is None else folder / "fov.png")
    return score_pair(pair, Reading(labels, ignore=ignore), Scoring(tuple(metrics), regions))


@pytest.mark.parametrize(
    ("reference", "fov", "ignore"),
    [
        (NOTHING, None, None),
        (NOTHING, FOV, None),
        (CORNER, FOV, None),
        (EVERYWHERE, None, None),
        (EVERYWHERE, FOV, None),
        (EVERYWHERE, NOTHING, None),
        (EVERYWHERE * 255, None, 255),
    ],
    ids=["empty", "empty in fov", "label beyond fov", "no background", "none in fov", "no fov at all", "all void"],
)
def test_a_missing_prediction_has_the_worst_of_each_score(tmp_path, reference, fov, ignore):
    metrics = [*(name for name in WORST if "@" not in name), "SurfaceDice"]
    found = missing(tmp_path, reference, {1: "x", 2: "y"}, metrics, fov=fov, ignore=ignore)
    values = {(row.label, row.metric): row.value for row in found.rows}
    assert values == {(label, name): pytest.approx(worst) for label in "xy" for name, worst in WORST.items()}
    assert {row.status for row in found.rows} == {"missed"}


@pytest.mark.parametrize("labels", [{1: "x"}, {1: "x", 2: "y"}])
@pytest.mark.parametrize("count", [1, 2])
def test_a_missing_prediction_finds_no_objects(tmp_path, labels, count):
    reference = NOTHING.copy()
    reference[2:5], reference[8:10] = 1, count - 1
    metrics = ["V_rand", "V_info", "AP50", "PQ", "AJI", "SEG", "CountError"]
    found = missing(tmp_path, reference, labels, metrics)
    assert {row.metric: row.value for row in found.rows} == {**dict.fromkeys(metrics, 0.0), "CountError": count}
    assert {row.status for row in found.rows} == {"missed"}


def test_a_missing_prediction_does_not_find_a_part_of_a_region(tmp_path):
    metrics = ["Dice", "LesionRecall", "AP50", ("ShareMaximum", {"part": "tumour", "whole": "liver"})]
    regions = {"liver": (1, 2), "tumour": (2,)}
    # organ everywhere and no tumour: a tumour put on it would be a voxel of organ that was found
    found = missing(tmp_path, EVERYWHERE, {1: "organ", 2: "tumour"}, metrics, regions=regions)
    assert [row.value for row in found.rows] == [0.0] * 5  # two of each structure, one of the case
    # nor is the share of tumour in the organ right: all of it instead of nothing
    assert [terms.largest for terms in found.result.terms.values()] == [1.0]
    # half of it background: nothing changes
    half = EVERYWHERE.copy()
    half[16:] = 0
    found = missing(tmp_path, half, {1: "organ", 2: "tumour"}, metrics, regions=regions)
    assert [row.value for row in found.rows] == [0.0] * 5
    assert [terms.largest for terms in found.result.terms.values()] == [1.0]


@pytest.fixture
def with_probabilities(tmp_path):
    """Two cases of 25 of 768 pixels predicted perfectly, with probabilities; a third without a prediction."""
    square = NOTHING.copy()
    square[4:9, 4:9] = 1
    for folder in ("reference", "prediction"):
        (tmp_path / folder).mkdir()
    for case in "abc":
        Image.fromarray(square).save(tmp_path / "reference" / f"{case}.png")
    for case in "ab":
        Image.fromarray(square).save(tmp_path / "prediction" / f"{case}.png")
        with probability_file(tmp_path / "prediction" / f"{case}.probabilities.zarr", SIZE) as put:
            put((slice(None), slice(None)), np.stack([1.0 - square, square]))
    return tmp_path


def test_a_missing_prediction_has_no_roc_area(with_probabilities):
    found = evaluate(
        with_probabilities / "prediction", with_probabilities / "reference", labels="1=x", metrics="AUC,PooledAUC",
        workers=1,
    )  # fmt: skip
    area, pooled = found.summary["scores"]
    assert (area["metric"], area["n"], area["missed"], area["mean"]) == ("AUC", 3, 1, pytest.approx(2 / 3))
    # of three cases: a pixel inside beats one outside if both are right (2/3 * 2/3), ties with it if one of them is
    # missing and its wrong value is the other's (inside at 1 and outside at 1, or both at 0: 2 * 2/9, half)
    assert (pooled["metric"], pooled["mean"]) == ("PooledAUC", pytest.approx(4 / 9 + 4 / 9 / 2))


def test_without_stored_probabilities_no_case_has_a_roc_area(with_probabilities):
    for folder in (with_probabilities / "prediction").glob("*.zarr"):
        shutil.rmtree(folder)
    found = evaluate(
        with_probabilities / "prediction", with_probabilities / "reference", labels="1=x", protocol="drive", workers=1
    )
    assert not any("AUC" in entry["metric"] for entry in found.summary["scores"])
    assert any("Not scored" in note and "AUC" in note for note in found.summary["notes"])


@pytest.mark.parametrize("fov", [None, FOV, NOTHING], ids=["whole", "in fov", "no fov at all"])
def test_the_roc_area_of_a_missing_prediction_is_0_for_each_structure(tmp_path, fov):
    parts = NOTHING.copy()
    parts[8:12, 8:12], parts[12:14, 8:12] = 1, 2
    regions = {"organ": (1, 2), "tumour": (2,), "cyst": (3,)}
    found = missing(tmp_path, parts, {1: "a", 2: "b", 3: "c"}, ["AUC", "PooledAUC"], fov=fov, regions=regions)
    assert [(row.label, row.value, row.status) for row in found.rows] == [(name, 0.0, "missed") for name in regions]
    assert [terms.auc for terms in found.result.terms.values()] == [0.0] * 3

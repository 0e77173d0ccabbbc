"""Cases without a prediction: no score of theirs is ever right, wherever the reference's voxels lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from medseg.evaluation_pairs import Pair, Reading
from medseg.evaluation_scoring import Scoring, score_pair

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


def test_a_missing_prediction_does_not_find_a_part_of_a_region(tmp_path):
    metrics = ["Dice", "LesionRecall", "AP50", ("ShareMaximum", {"part": "tumour", "whole": "liver"})]
    regions = {"liver": (1, 2), "tumour": (2,)}
    # organ everywhere and no tumour: a tumour put on it would be a voxel of organ that was found
    found = missing(tmp_path, EVERYWHERE, {1: "organ", 2: "tumour"}, metrics, regions=regions)
    assert [row.value for row in found.rows] == [0.0] * 5  # two of each structure, one of the case
    # half of it background: the share of tumour in the organ cannot be right, either
    half = EVERYWHERE.copy()
    half[16:] = 0
    found = missing(tmp_path, half, {1: "organ", 2: "tumour"}, metrics, regions=regions)
    assert [row.value for row in found.rows] == [0.0] * 5
    assert [terms.largest for terms in found.result.terms.values()] == [1.0]

"""A second observer's row: the same scores by the same code, from a folder or a pattern, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError, GeometryError
from medseg.evaluation import evaluate
from medseg.report import write_report
from medseg.tables import read_cases


def draw(path, columns, shape=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.zeros(shape, np.uint8)
    picture[:, columns] = 255
    Image.fromarray(picture).save(path)


@pytest.fixture
def place(tmp_path):
    """Two cases: the reference has columns 0 to 5; the prediction 3 of them, the second observer columns 1 to 6."""
    for name in ("a", "b"):
        draw(tmp_path / "first" / f"{name}.png", slice(0, 6))
        draw(tmp_path / "masks" / f"{name}.png", slice(0, 3))
        draw(tmp_path / "second" / f"{name}.png", slice(1, 7))
        draw(tmp_path / "named" / f"{name}_2ndHO.png", slice(1, 7))
    return tmp_path


@pytest.mark.parametrize("observer", ["second", "named", "named/{id}_2ndHO.png"])
def test_the_observer_is_scored_as_a_prediction_would_be(place, observer):
    options = {"output": place / "out", "protocol": "drive", "workers": 1}
    result = evaluate(place / "masks", place / "first", observer=str(place / observer), **options)
    alone = evaluate(place / "second", place / "first", protocol="drive", workers=1, output=place / "alone")
    assert result.summary["observer"]["cases"] == 2
    assert result.summary["observer"]["scores"] == alone.summary["scores"]
    human = {s["metric"]: s["mean"] for s in result.summary["observer"]["scores"]}
    # 5 of 6 columns shared; 72 pixels each, 60 shared, 12 wrong either way, of 144
    assert human["Dice"] == pytest.approx(10 / 12)
    assert human["PooledDice"] == pytest.approx(10 / 12)
    assert human["Accuracy"] == pytest.approx(120 / 144)
    assert "AUC" not in human  # an observer gives no probabilities
    own = {s["metric"]: s["mean"] for s in result.summary["scores"]}
    assert own["Dice"] == pytest.approx(2 * 3 / 9)
    assert [row.value for row in read_cases(place / "out" / "observer.csv") if row.metric == "Dice"] == [10 / 12] * 2
    _, lines = result.table()
    assert [line[2] for line in lines if line[:2] == ["foreground (second observer)", "Dice"]] == ["0.833"]
    assert "foreground (second observer)" in write_report(place / "out").read_text()


def test_cases_without_a_second_label_are_left_out_and_told(place):
    (place / "second" / "b.png").unlink()
    result = evaluate(place / "masks", place / "first", observer=place / "second", output=place / "out", workers=1)
    assert result.summary["observer"]["cases"] == 1
    assert [note for note in result.summary["notes"] if note.startswith("1 cases have no label of the second observer")]
    assert result.exit_code == 0


def test_observers_that_do_not_belong_are_refused(place):
    options = {"output": place / "out", "workers": 1}
    with pytest.raises(DataError, match="no case has a label of the second observer") as caught:
        evaluate(place / "masks", place / "first", observer=str(place / "named/{id}_3rd.png"), **options)
    assert caught.value.field == "--observer"
    draw(place / "second" / "a.png", slice(0, 3), shape=(12, 13))
    with pytest.raises(GeometryError, match="different grids"):
        evaluate(place / "masks", place / "first", observer=place / "second", **options)


@pytest.mark.data
def test_the_second_observer_of_chase_db1(data_root, tmp_path):
    """Known from the literature on this set: sensitivity 0.74, specificity 0.98, accuracy 0.95 to 0.96."""
    for path in sorted((data_root / "CHASE_DB1" / "labels").glob("*_1stHO.png"))[:6]:
        mask = np.asarray(Image.open(path).convert("L")) > 0
        target = tmp_path / "masks" / path.name.replace("_1stHO", "")
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(target)
    result = evaluate(
        tmp_path / "masks", "chase_db1", data=data_root, part="training", output=tmp_path / "out", workers=1,
        observer="CHASE_DB1/labels/{id}_2ndHO.png", metrics=["Dice", "Sensitivity", "Specificity", "Accuracy"],
    )  # fmt: skip
    human = {s["metric"]: s["mean"] for s in result.summary["observer"]["scores"]}
    assert result.summary["observer"]["cases"] == 20
    assert human["Sensitivity"] == pytest.approx(0.74, abs=0.02)
    assert human["Specificity"] == pytest.approx(0.98, abs=0.01)
    assert human["Accuracy"] == pytest.approx(0.955, abs=0.01)
    assert 0.75 < human["Dice"] < 0.8

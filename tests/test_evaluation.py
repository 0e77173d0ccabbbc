"""Evaluation: pairs, grids, honest counting of what is missing, files written, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg import evaluation_numbers, evaluation_pool
from medseg.cli import main
from medseg.entry import add_dataset
from medseg.errors import CasesFailed, CheckpointError, DataError, GeometryError, LabelError, MedsegError, UsageError
from medseg.evaluation import evaluate, pool_runs
from medseg.evaluation_numbers import count_overlaps
from medseg.evaluation_pairs import Reading, match_folders, parse_labels
from medseg.evaluation_pool import count_workers, largest_reference
from medseg.evaluation_probabilities import calibration_counts
from medseg.evaluation_views import choose_cases
from medseg.files import safe_stem
from medseg.inference.outputs import probability_file
from medseg.metrics.statistics import summarise
from medseg.report import write_report
from medseg.tables import (
    POOLED,
    SCHEMA,
    ScoreRow,
    main_metric,
    read_cases,
    read_summary,
    summarise_rows,
    write_cases,
    write_summary,
)
from medseg.tables_text import latex_table, markdown_table
from medseg.views import read_views

AFFINE = np.diag([-1.0, -1.0, 2.5, 1.0])


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(np.asarray(array, np.uint8), affine).to_filename(path)


def cube(shape=(20, 18, 12), at=4, size=6, value=1):
    array = np.zeros(shape, np.uint8)
    array[at : at + size, at : at + size, 3:9] = value
    return array


@pytest.fixture
def folders(tmp_path):
    """Six cases: four perfect, one shifted by two voxels, one without prediction; one stray prediction."""
    for number in range(6):
        save(tmp_path / "ref" / f"case_{number}.nii.gz", cube())
        if number < 4:
            save(tmp_path / "pred" / f"case_{number}.nii.gz", cube())
    save(tmp_path / "pred" / "case_4.nii.gz", cube(at=6))
    save(tmp_path / "pred" / "stray.nii.gz", cube())
    return tmp_path


def mean_of(result, metric, label="liver"):
    return next(s for s in result.summary["scores"] if s["metric"] == metric and s["label"] == label)


@pytest.mark.parametrize(
    ("reference", "prediction", "longer"),
    [
        ("case_{}_cp_masks", "case_{}", "references"),  # Cellpose
        ("Case-{}L_1stHO", "Case-{}L", "references"),
        ("case_{}", "case_{}_0000", "predictions"),  # of nnU-Net's images, which have their channel's number
        ("seg-case_{}", "case_{}", "references"),
    ],
)
def test_names_that_differ_by_a_text_around_all_of_one_side_are_paired(tmp_path, reference, prediction, longer):
    for number in (1, 3, 10):
        save(tmp_path / "ref" / f"{reference.format(number)}.nii.gz", cube())
        if number > 1:  # the one that is missing is the first, and case_1 is no case_10
            save(tmp_path / "pred" / f"{prediction.format(number)}.nii.gz", cube())
            save(tmp_path / "img" / f"{prediction.format(number)}.nii.gz", cube())
    result = evaluate(tmp_path / "pred", tmp_path / "ref", images=tmp_path / "img", workers=1, output=tmp_path / "out")
    short = prediction if longer == "references" else reference
    dice = {row.case: row.value for row in result.rows if row.metric == "Dice"}
    assert dice == {short.format(1): 0.0, short.format(3): 1.0, short.format(10): 1.0}
    assert any(note.startswith(f"The {longer}' names have more text") for note in result.summary["notes"])


@pytest.mark.parametrize(
    ("references", "predictions"),
    [
        (["case_10", "case_20"], ["case_1", "case_2"]),  # no sign between the name and what follows
        (["a_mask", "b_label"], ["a", "b"]),  # not one text around all
        (["a_x", "b_x"], ["c", "d"]),
    ],
)
def test_names_that_only_begin_alike_are_not_paired(tmp_path, references, predictions):
    for folder, names in (("ref", references), ("pred", predictions)):
        for name in names:
            save(tmp_path / folder / f"{name}.nii.gz", cube())
    with pytest.raises(DataError, match="no prediction has the name of a reference"):
        evaluate(tmp_path / "pred", tmp_path / "ref", workers=1, output=tmp_path / "out")


def test_values_and_counts(folders):
    result = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, output=folders / "out")
    dice = {row.case: row.value for row in result.rows if row.metric == "Dice"}
    # 6x6x6 cubes; a shift by 2 along two axes shares 4 of 6 along both: 2 * 96 / 432
    assert dice == {**{f"case_{n}": 1.0 for n in range(4)}, "case_4": pytest.approx(4 / 9), "case_5": 0.0}
    distance = {row.case: row for row in result.rows if row.metric == "HD95"}
    assert distance["case_5"].value == pytest.approx(math.hypot(20, 18, 12 * 2.5))
    assert (distance["case_5"].status, distance["case_5"].unit) == ("missed", "mm")
    entry = mean_of(result, "Dice")
    assert entry["mean"] == pytest.approx((4 + 4 / 9) / 6)
    assert (entry["n"], entry["missed"], entry["scored"], entry["better"]) == (6, 1, 5, "higher")
    assert entry["low"] < entry["mean"] < entry["high"] <= 1
    assert (result.missing, result.extra, result.exit_code) == (("case_5",), ("stray",), 4)


def test_killed_at_any_moment_no_summary_stands_beside_the_table_of_another_evaluation(folders, monkeypatch):
    """Every file that gets its name is one moment; whatever stands together is of one evaluation."""
    out, real, left = folders / "out", os.replace, [0]
    facts = {"labels": "1=liver", "workers": 1, "output": out, "metrics": ["Dice"]}

    def replace(*names):
        if not left[0]:
            raise SystemExit  # nothing after this moment happens, as with SIGKILL
        left[0] -= 1
        real(*names)

    def values(folder):
        return sorted(row.value for row in read_cases(folder / "cases.csv"))

    before = values(evaluate(folders / "ref", folders / "ref", **{**facts, "formats": ["latex"]}).folder)
    write_report(out)
    after = values(evaluate(folders / "pred", folders / "ref", **{**facts, "output": folders / "other"}).folder)
    assert before != after
    monkeypatch.setattr(os, "replace", replace)
    seen = set()
    for moment in range(50):
        left[0] = moment
        with contextlib.suppress(SystemExit):
            evaluate(folders / "pred", folders / "ref", **facts)
        assert not list(out.rglob(".medseg-*"))
        now = values(out)
        assert now in (before, after)
        whole = (out / "summary.json").is_file()
        seen.add((now == after, whole))
        if whole:
            (score,) = read_summary(out / "summary.json")["scores"]
            assert score["mean"] == pytest.approx(sum(now) / 6)
            assert {view.score for view in read_views(out / "views")} <= set(now)
            assert [(out / name).exists() for name in ("scores.tex", "report.html")] == [now == before] * 2
        if left[0]:
            break
    assert seen == {(False, True), (False, False), (True, False), (True, True)}


def test_without_a_summary_the_report_shows_no_pictures_of_another_evaluation(folders):
    folder = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, metrics=["Dice"]).folder
    pictures = '<section id="cases">'
    assert pictures in write_report(folder).read_text()
    (folder / "summary.json").unlink()
    assert pictures not in write_report(folder).read_text()


def test_files_written_can_be_read_back(folders):
    result = evaluate(
        folders / "pred",
        folders / "ref",
        labels={1: "liver"},
        workers=1,
        formats=("markdown", "latex"),
        metrics=["Dice", "HD95"],
    )
    assert result.folder == folders / "pred" / "scores"
    assert tuple(read_cases(result.folder / "cases.csv")) == result.rows
    with (result.folder / "cases.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["case", "label", "metric", "value", "unit", "status", "definition"]
    summary = read_summary(result.folder / "summary.json")
    assert summary["cases"] == {"count": 6, "missing": ["case_5"], "extra": ["stray"], "resampled": []}
    assert summary["labels"] == {"1": "liver"}
    assert [view["role"] for view in summary["views"]] == ["best", "median", "worst", "worst", "worst"]
    assert [view["case"] for view in summary["views"]][-1] == "case_5"
    assert len(list((result.folder / "views").glob("*.npz"))) == 5
    assert "| liver | Dice |" in (result.folder / "scores.md").read_text()
    assert r"\toprule" in (result.folder / "scores.tex").read_text()
    volume = next(v for v in summary["volumes"] if v["case"] == "case_4")
    assert volume == {"case": "case_4", "label": "liver", "prediction": 0.54, "reference": 0.54, "unit": "mL"}
    header, lines = result.table()
    assert len(lines[0]) == len(header)
    json.dumps(result.as_dict())
    # a second evaluation into the same folder takes its pictures away
    evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, metrics=["Dice"])
    assert len(list((result.folder / "views").glob("*.npz"))) == 5


def test_missed_cases_make_every_mean_worse(tmp_path):
    for number in range(10):
        save(tmp_path / "ref" / f"{number}.nii", cube())
        save(tmp_path / "pred" / f"{number}.nii", cube() if number < 5 else np.zeros((20, 18, 12)))
        save(tmp_path / "good" / f"{number}.nii", cube())
    for number in range(5, 10):
        (tmp_path / "good" / f"{number}.nii").unlink()
        (tmp_path / "ref2").mkdir(exist_ok=True)
    for number in range(5):
        save(tmp_path / "ref2" / f"{number}.nii", cube())
    with_missed = evaluate(tmp_path / "pred", tmp_path / "ref", labels="1=a", workers=1)
    absent = evaluate(tmp_path / "good", tmp_path / "ref", labels="1=a", workers=1)
    without = evaluate(tmp_path / "good", tmp_path / "ref2", labels="1=a", workers=1, output=tmp_path / "o")
    for entry in without.summary["scores"]:
        if entry["better"] == "none":
            continue
        for other in (with_missed, absent):
            found = mean_of(other, entry["metric"], "a")
            worse = found["mean"] < entry["mean"] if entry["better"] == "higher" else found["mean"] > entry["mean"]
            assert worse, (entry["metric"], found["mean"], entry["mean"])
            if entry["level"] == "case":
                assert found["missed"] == 5
    assert (with_missed.exit_code, absent.exit_code, without.exit_code) == (0, 4, 0)


def test_a_missing_prediction_is_never_right_even_where_there_is_nothing(tmp_path):
    save(tmp_path / "ref" / "a.nii", cube())
    save(tmp_path / "ref" / "b.nii", np.zeros((20, 18, 12)))
    save(tmp_path / "pred" / "a.nii", cube())
    result = evaluate(
        tmp_path / "pred", tmp_path / "ref", labels="1=x", workers=1, metrics=["Dice", "HD95", "Sensitivity"]
    )
    of_b = {row.metric: row for row in result.rows if row.case == "b"}
    assert of_b["Dice"].value == 0
    assert of_b["HD95"].value > 30
    assert {row.status for row in of_b.values()} == {"missed"}
    # the same case with an empty prediction is perfect
    save(tmp_path / "pred" / "b.nii", np.zeros((20, 18, 12)))
    result = evaluate(tmp_path / "pred", tmp_path / "ref", labels="1=x", workers=1, metrics=["Dice"])
    assert [(r.value, r.status) for r in result.rows if r.case == "b"] == [(1.0, "both_empty")]


@pytest.mark.parametrize(
    ("array", "affine", "code"),
    [
        (cube((20, 18, 11)), AFFINE, "E320"),
        (cube(), np.diag([-1.0, -1.0, 2.6, 1.0]), "E325"),
        (cube(), np.array([[-1.0, 0, 0, 9], [0, -1, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]]), "E326"),
        (cube(), np.diag([1.0, -1.0, 2.5, 1.0]), "E327"),
    ],
)
def test_another_grid_is_refused_with_both_geometries(folders, array, affine, code):
    save(folders / "pred" / "case_1.nii.gz", array, affine)
    with pytest.raises(GeometryError) as caught:
        evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1)
    error = caught.value
    assert (error.code, error.case, error.exit_code) == (code, "case_1", 3)
    assert "20 x 18 x 12 voxels of 1 x 1 x 2.5 mm" in error.expected
    assert "voxels of" in error.found
    assert "--resample" in error.fix
    assert not (folders / "pred" / "scores" / "cases.csv").exists()


def test_resampling_is_the_explicit_way_out(folders):
    # the same structure on a grid of half the spacing in plane, flipped on the first axis
    fine = np.repeat(np.repeat(cube(), 2, axis=0), 2, axis=1)[::-1]
    affine = np.diag([0.5, -0.5, 2.5, 1.0])
    affine[:3, 3] = [0.25 - 0.5 * 39, 0.25, 0]
    save(folders / "pred" / "case_1.nii.gz", fine, affine)
    result = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, resample=True, metrics=["Dice"])
    assert next(row.value for row in result.rows if row.case == "case_1") == 1.0
    assert result.summary["cases"]["resampled"] == ["case_1"]


def whole_and_coarse(tmp_path, spacing, shape):
    """A reference of 8 x 8 x 8 mm that is liver throughout; a prediction that is, on its grid from the same corner."""
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = (spacing - 1) / 2  # centres of voxels, so that the volumes' corners lie upon one another
    save(tmp_path / "ref" / "a.nii.gz", np.ones((8, 8, 8)), np.eye(4))
    save(tmp_path / "pred" / "a.nii.gz", np.ones(shape), affine)
    result = evaluate(
        tmp_path / "pred", tmp_path / "ref", labels="1=liver", workers=1, resample=True, metrics=["Sensitivity"]
    )
    assert result.summary["cases"]["resampled"] == ["a"]
    return next(row.value for row in result.rows)


def test_resampling_reaches_the_edge_of_the_border_voxels(tmp_path):
    # 4 x 4 x 4 voxels of 2 mm fill the same 8 mm: nothing is lost at the border
    assert whole_and_coarse(tmp_path, 2.0, (4, 4, 4)) == 1.0
    # 2 x 2 x 2 voxels of 3 mm fill the first 6 of them
    assert whole_and_coarse(tmp_path, 3.0, (2, 2, 2)) == pytest.approx((6 / 8) ** 3)


def test_a_prediction_of_other_spacing_and_the_same_shape_is_resampled(tmp_path):
    # 8 voxels of 0.75 mm fill the first 6 of 8 mm on each axis
    assert whole_and_coarse(tmp_path, 0.75, (8, 8, 8)) == pytest.approx((6 / 8) ** 3)


def test_probabilities_on_another_grid_are_left_out(tmp_path):
    """The same structure on a grid that runs the other way: of the same shape, but each voxel is elsewhere."""
    reference, flipped = cube(), np.diag([1.0, -1.0, 2.5, 1.0])
    flipped[0, 3] = -19
    for case, array, affine in (("a", reference, AFFINE), ("b", reference[::-1], flipped)):
        save(tmp_path / "ref" / f"{case}.nii.gz", reference)
        save(tmp_path / "pred" / f"{case}.nii.gz", array, affine)
        with probability_file(tmp_path / "pred" / f"{case}.probabilities.zarr", array.shape) as put:
            put((slice(None),) * 3, np.stack([1.0 - array, array]))
    facts = {"labels": "1=liver", "workers": 1, "resample": True}
    result = evaluate(tmp_path / "pred", tmp_path / "ref", protocol="drive", **facts)
    values = {(row.case, row.metric): row.value for row in result.rows}
    assert values["a", "AUC"] == values["a", "Dice"] == values["b", "Dice"] == values["all cases", "PooledAUC"] == 1.0
    assert ("b", "AUC") not in values
    assert [entry["error"] for entry in result.summary["calibration"]] == [0.0]
    assert any("1 resampled cases" in note for note in result.summary["notes"])


def test_void_voxels_have_no_part_in_the_volumes(tmp_path):
    reference = cube()
    reference[10:14, 10:14, 3:9] = 255
    save(tmp_path / "ref" / "a.nii.gz", reference)
    save(tmp_path / "pred" / "a.nii.gz", (reference > 0).astype(np.uint8))
    result = evaluate(tmp_path / "pred", tmp_path / "ref", labels="1=liver", workers=1, ignore=255, metrics=["Dice"])
    assert result.summary["scores"][0]["mean"] == 1.0
    (volume,) = result.summary["volumes"]
    assert volume["prediction"] == volume["reference"] == pytest.approx(6**3 * 2.5 / 1000)  # mL
    words = [str(tmp_path / "pred"), str(tmp_path / "ref"), "--labels", "1=liver", "--metric", "Dice", "--workers", "1"]
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", *words, "--ignore", "255", "-o", str(tmp_path / "out")])
    (score,) = json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]
    assert score["mean"] == 1.0


def test_values_that_are_no_labels_and_broken_files_are_all_told(folders):
    save(folders / "pred" / "case_0.nii.gz", cube(value=7))
    (folders / "pred" / "case_2.nii.gz").write_bytes((folders / "pred" / "case_3.nii.gz").read_bytes()[:-9])
    with pytest.raises(MedsegError) as caught:
        evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1)
    assert caught.value.exit_code == 3
    assert {problem.case for problem in caught.value.problems} == {"case_0", "case_2"}
    assert any(isinstance(problem, LabelError) and "216" in str(problem) for problem in caught.value.problems)
    assert not isinstance(caught.value, CasesFailed)


def test_labels_are_found_in_the_references_alone(folders):
    result = evaluate(folders / "pred", folders / "ref", workers=1, metrics=["Dice"])
    assert result.summary["labels"] == {"1": "label 1"}
    save(folders / "pred" / "case_0.nii.gz", cube(value=2))
    with pytest.raises(LabelError):
        evaluate(folders / "pred", folders / "ref", workers=1)


def test_black_and_white_masks(tmp_path):
    for folder, value in (("ref", 255), ("pred", 1)):
        (tmp_path / folder).mkdir()
        Image.fromarray((cube((20, 18, 12))[:, :, 4] * value).astype(np.uint8)).save(tmp_path / folder / "a.png")
    result = evaluate(tmp_path / "pred", tmp_path / "ref", workers=1)
    assert next(row for row in result.rows if row.metric == "Dice").value == 1.0
    assert next(row for row in result.rows if row.metric == "HD95").unit == "px"
    assert "255 was taken as label 1" in result.summary["notes"][0]


def squares(folder, *values, shift=0):
    """Pictures a.png, b.png, ... each with one square of 6 x 6 pixels of its value."""
    folder.mkdir(parents=True)
    for name, value in zip("abcd", values, strict=False):
        array = np.zeros((20, 18), np.uint16 if value > 255 else np.uint8)
        array[4 + shift : 10 + shift, 4:10] = value
        Image.fromarray(array).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("reference", "prediction", "labels", "named"),
    [
        (255, 1, "1=blob", "255 was taken as label 1 (blob)"),
        (255, 1, "255=blob", "predictions hold 0 and 1: 1 was taken as label 255 (blob)"),
        (255, 255, "1=blob", "predictions hold 0 and 255: 255 was taken as label 1 (blob)"),
        (1, 255, "1=blob", "predictions hold 0 and 255"),
        (65535, 1, None, "65535 was taken as label 1"),
        (65535, 255, None, "predictions hold 0 and 255"),
        (128, 1, None, "128 was taken as label 1"),
        (128, 128, "1=blob", "128 was taken as label 1 (blob)"),
        (1, 255, None, "predictions hold 0 and 255"),
    ],
)
def test_masks_of_one_label_may_have_any_value(tmp_path, reference, prediction, labels, named):
    squares(tmp_path / "ref", reference, reference)
    squares(tmp_path / "pred", prediction, prediction, shift=2)
    result = evaluate(tmp_path / "pred", tmp_path / "ref", labels=labels, workers=1, metrics=["Dice"])
    assert [row.value for row in result.rows] == [pytest.approx(2 * 24 / 72)] * 2  # 4 of 6 rows shared
    assert any(named in note for note in result.summary["notes"]), result.summary["notes"]
    if labels:
        assert {row.label for row in result.rows} == {"blob"}


@pytest.mark.parametrize(
    ("references", "predictions", "labels"),
    [
        ((2, 2), (1, 1), "2=tumour"),  # a model that knows another label alone
        ((2, 2), (1, 2), None),  # two labels in the predictions
        ((255, 255), (1, 2), "1=blob"),
        ((1, 2), (1, 1), "1=blob"),  # two labels in the references
        ((1, 1), (7, 7), "1=blob"),
    ],
)
def test_values_that_may_be_another_label_are_no_masks(tmp_path, references, predictions, labels):
    squares(tmp_path / "ref", *references)
    squares(tmp_path / "pred", *predictions)
    with pytest.raises(LabelError) as caught:
        evaluate(tmp_path / "pred", tmp_path / "ref", labels=labels, workers=1, metrics=["Dice"])
    assert caught.value.code == "E332"
    assert "--labels" in caught.value.problems[0].fix


def test_the_encoding_of_a_runs_data_set_holds_for_its_references(tmp_path):
    from tiny import ENTRY, tiny_pipeline

    from medseg.config import to_yaml

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datasets.yaml").write_text(
        ENTRY.replace("{0: background, 1: ball}", "{0: background, 1: ball, 2: core}").replace(
            "{1: 1, 2: 1}", "{100: 1, 200: 2}"
        )
    )
    run = tmp_path / "runs" / "balls" / "2026-11-21_090000_fold0"
    run.mkdir(parents=True)
    (run / "pipeline.yaml").write_text(to_yaml(tiny_pipeline(dataset="balls")))
    (run / "status.json").write_text("{}")
    squares(tmp_path / "stored", 100, 200)
    squares(tmp_path / "indices", 1, 2)
    squares(tmp_path / "pred", 1, 2)
    for name in ("stored", "indices"):
        result = evaluate(tmp_path / "pred", tmp_path / name, run=run, data=tmp_path / "data", workers=1)
        dice = {(row.case, row.label): row.value for row in result.rows if row.metric == "Dice"}
        assert dice["a", "ball"] == dice["b", "core"] == 1.0
        assert any("read as the run's data set stores" in n for n in result.summary["notes"]) == (name == "stored")


def test_labels_that_are_numbered_differently_are_told(tmp_path):
    """References of 1 and 5 against a model's 1 and 2: refused with the way out, and told where labels are named."""
    squares(tmp_path / "ref", 1, 5)
    squares(tmp_path / "pred", 1, 2)
    with pytest.raises(LabelError, match="--run RUN or the set's name"):
        evaluate(tmp_path / "pred", tmp_path / "ref", workers=1)
    named = evaluate(tmp_path / "pred", tmp_path / "ref", labels="1=a,2=b,5=c", workers=1)
    (note,) = (note for note in named.summary["notes"] if "numbered differently" in note)
    assert note.startswith("No prediction has c, no reference b")
    for values, labels in (((1, 1), "1=a,5=c"), ((1, 5), "1=a,2=b,5=c")):  # a missed label alone, and none
        shutil.rmtree(tmp_path / "pred")
        squares(tmp_path / "pred", *values)
        sound = evaluate(tmp_path / "pred", tmp_path / "ref", labels=labels, workers=1)
        assert not any("numbered differently" in note for note in sound.summary["notes"])


def test_labels_that_lie_where_others_are_are_told(tmp_path):
    """Numbers that were exchanged: Dice of 0 alone does not say so. A label inside another is no such case."""
    one, two = cube(), cube(at=12, size=5, value=2)
    save(tmp_path / "ref" / "a.nii.gz", one + two)
    told = {}
    for name, values in {"same": (0, 1, 2), "exchanged": (0, 2, 1), "second as first": (0, 1, 1)}.items():
        save(tmp_path / name / "a.nii.gz", np.array(values, np.uint8)[one + two])
        found = evaluate(tmp_path / name, tmp_path / "ref", labels="1=left,2=right", workers=1, metrics=["Dice"])
        told[name] = [note for note in found.summary["notes"] if "mixed up" in note]
    assert told["same"] == told["second as first"] == []
    (note,) = told["exchanged"]
    assert note.startswith("The predictions have right where the references have left, left where the references have")


def test_numbers_of_objects_that_are_scored_as_classes_are_told(tmp_path):
    for case, count in (("a", 4), ("b", 6)):
        cells = np.zeros((8, 32), np.uint8)
        for number in range(count):
            cells[2:6, 5 * number : 5 * number + 4] = number + 1
        other = np.where(cells == 0, 0, count + 1 - cells.astype(int)).astype(np.uint8)  # from behind
        for name, array in (("labels", cells), ("masks", other)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{case}.png")
    (note,) = evaluate(tmp_path / "masks", tmp_path / "labels").summary["notes"]
    assert "4 to 6 values" in note
    assert "--metric AP50,PQ,AJI" in note
    asked = evaluate(tmp_path / "masks", tmp_path / "labels", metrics="AP50,PQ,AJI", output=tmp_path / "objects")
    assert [row.value for row in asked.rows] == [1.0] * 6
    assert not asked.summary["notes"]
    named = {value: f"class {value}" for value in range(1, 7)}
    assert not evaluate(tmp_path / "masks", tmp_path / "labels", labels=named).summary["notes"]


def test_objects_by_number(tmp_path):
    reference = np.zeros((20, 30), np.uint16)
    reference[2:8, 2:8], reference[2:8, 8:14], reference[12:18, 4:10] = 1, 2, 3  # two of them touch
    prediction = np.where(reference == 3, 0, reference).astype(np.uint16)
    for folder, array in (("ref", reference), ("pred", prediction)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    result = evaluate(tmp_path / "pred", tmp_path / "ref", workers=1, metrics=["AP50", "CountError", "Dice"])
    assert {row.metric: row.value for row in result.rows} == {
        "AP50": pytest.approx(2 / 3),
        "CountError": 1.0,
        "Dice": pytest.approx(0.8),
    }


def test_images_lie_under_the_pictures_and_one_on_another_grid_is_told(folders):
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None] * 12, cube().shape)
    save(folders / "images" / "case_0.nii.gz", ramp)
    save(folders / "images" / "case_3_0000.nii.gz", ramp)  # as nnU-Net names the first channel
    save(folders / "images" / "case_3_0001.nii.gz", 0 * ramp)
    save(folders / "images" / "case_4.nii.gz", ramp, AFFINE @ np.diag([1, 1, 2, 1]))  # same shape, another spacing
    save(folders / "images" / "case_5.nii.gz", ramp[:-1])
    save(folders / "images" / "case_9.nii.gz", ramp)  # of no case
    given = {"labels": "1=liver", "workers": 1, "metrics": ["Dice"]}
    result = evaluate(folders / "pred", folders / "ref", images=folders / "images", **given)
    views = {view.case: view for view in read_views(result.folder / "views")}
    assert {case: view.image is not None for case, view in views.items()} == {
        "case_0": True, "case_2": False, "case_3": True, "case_4": False, "case_5": False
    }  # fmt: skip
    for case in ("case_0", "case_3"):  # brighter towards one side of the first axis, the same everywhere else
        assert (np.ptp(views[case].image, axis=(1, 2)) == 0).all()
        assert abs(int(views[case].image[-1, 0, 0]) - int(views[case].image[0, 0, 0])) > 100
    told = [note for note in result.summary["notes"] if "show no image" in note]
    assert len(told) == 2, told
    assert "case_4" in told[0]
    assert "spacings" in told[0]
    assert "case_5" in told[1]
    assert "shapes" in told[1]
    assert not any(
        "show no image" in note for note in evaluate(folders / "pred", folders / "ref", **given).summary["notes"]
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"predictions": "absent"}, DataError, "no such folder"),
        ({"predictions": "empty"}, DataError, "holds no images"),
        ({"predictions": "other"}, DataError, "no prediction has the name"),
        ({"reference": "nothing_known"}, UsageError, "unknown data set"),
        ({"reference": "./absent"}, DataError, "no such folder of references"),
        ({"metrics": ["Dize"]}, UsageError, "no score named Dize"),
        ({"metrics": ["AUC"]}, UsageError, "probabilities"),
        ({"formats": ["word"]}, UsageError, "unknown format"),
        ({"labels": "liver"}, UsageError, "cannot be read"),
        ({"labels": {0: "background"}}, UsageError, "above 0"),
        ({"workers": 0}, UsageError, "at least one"),
        ({"protocol": "imaginary"}, UsageError, "unknown protocol"),
        ({"protocol": "msd: 7"}, UsageError, "unknown protocol"),
        ({"protocol": "msd: {tolerance: far}"}, UsageError, "tolerance out of range"),
        ({"metrics": "SurfaceDice: 7"}, UsageError, "a name with arguments"),
        ({"metrics": "Dice, HD95: {definition: mean}"}, UsageError, "unknown definition"),
        ({"reference": None}, UsageError, "no run"),
        ({"images": "absent"}, DataError, "no such folder of images"),
        ({"images": "other"}, DataError, "no image has the name of a reference"),
        ({"reference": None, "images": "ref"}, UsageError, "know their images themselves"),
        ({"reference": "liver", "images": "ref"}, UsageError, "know their images themselves"),
    ],
)
def test_wrong_arguments(folders, monkeypatch, arguments, kind, said):
    (folders / "empty").mkdir()
    save(folders / "other" / "x.nii", cube())
    monkeypatch.chdir(folders)
    given = {"predictions": "pred", "reference": "ref", "labels": "1=liver", "workers": 1, **arguments}
    with pytest.raises(kind, match=said):
        evaluate(**given)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"metrics": "Dice, SurfaceDice: {tolerance: 9}"}, ["Dice", "SurfaceDice@9mm"]),
        (
            {"metrics": ["HD95: {definition: pooled}", "SurfaceDice: {tolerance: 9}"]},
            ["HD95 (pooled)", "SurfaceDice@9mm"],
        ),
        ({"protocol": "msd: {tolerance: 9}"}, ["Dice", "SurfaceDice@9mm", "SurfaceDice@1mm", "SurfaceDice@2mm"]),
        ({"protocol": {"msd": {"tolerance": 9}}}, ["Dice", "SurfaceDice@9mm", "SurfaceDice@1mm", "SurfaceDice@2mm"]),
    ],
)
def test_scores_and_protocols_with_arguments_in_one_text(folders, asked, names):
    """The shifted cube lies within 9 mm of the reference, the missing one nowhere: five of six."""
    result = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, **asked)
    assert [score["metric"] for score in result.summary["scores"]] == names
    assert mean_of(result, "SurfaceDice@9mm")["mean"] == pytest.approx(5 / 6)
    assert result.summary["protocol"] == ("msd" if "protocol" in asked else None)


def test_what_is_missing_extra_or_resampled_is_named_on_the_screen(folders, capsys):
    save(folders / "pred" / "case_0.nii.gz", cube(), AFFINE @ np.diag([1, 1, 1.2, 1]))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, (folders / "pred", folders / "ref")), "--labels", "1=liver", "--resample",
              "--workers", "1", "--metric", "Dice", "-o", str(folders / "out")])  # fmt: skip
    assert ended.value.code == 4
    said = capsys.readouterr().out.splitlines()
    assert "without a prediction, counted as missed: case_5" in said
    assert "predictions without a reference, not scored: stray" in said
    assert "predictions on another grid, resampled as asked: case_0" in said


def test_a_run_that_is_none_is_named(folders):
    with pytest.raises(CheckpointError, match="this is no run") as caught:
        evaluate(folders / "pred", folders / "ref", run=folders / "nowhere", workers=1)
    assert caught.value.code == "E360"


def test_two_processes_give_the_same_rows_and_collect_problems(folders):
    one = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=1, metrics=["Dice"])
    two = evaluate(folders / "pred", folders / "ref", labels="1=liver", workers=2, metrics=["Dice"], progress=True)
    assert one.rows == two.rows
    save(folders / "pred" / "case_0.nii.gz", cube(value=7))
    save(folders / "pred" / "case_3.nii.gz", cube(value=8))
    with pytest.raises(MedsegError) as caught:  # with two labels no processes are started to look at values first
        evaluate(folders / "pred", folders / "ref", labels="1=liver,2=tumour", workers=2, metrics=["Dice"])
    assert len(caught.value.problems) == 2


def test_a_data_set_by_name(tmp_path):
    (tmp_path / "datasets.yaml").write_text(
        "mine:\n  title: Mine\n  modality: CT\n  dims: 3\n  channels: [ct]\n  unit: mm\n"
        "  labels: {0: background, 1: organ}\n"
        "  encoding: {255: 1}\n  split: {unit: patient, group: '^(p.)'}\n"
        "  files: {training: {image: 'im/{id}_img.nii.gz', label: 'la/{id}.nii.gz'}}\n"
    )
    for case in ("p1_a", "p1_b", "p2_a"):
        save(tmp_path / "im" / f"{case}_img.nii.gz", cube() * 3 + 1)
        save(tmp_path / "la" / f"{case}.nii.gz", cube(value=255))
        save(tmp_path / "pred" / f"{case}_img.nii.gz", cube())
    result = evaluate(tmp_path / "pred", "mine", data=tmp_path, part="training", workers=1, metrics=["Dice"])
    assert [row.value for row in result.rows] == [1, 1, 1]
    assert result.summary["groups"] == {"p1_a": "p1", "p1_b": "p1", "p2_a": "p2"}
    assert mean_of(result, "Dice", "organ")["patients"] == 2
    assert result.summary["bootstrap"]["by"] == "patients"


def test_a_data_set_in_px_is_measured_in_voxels(tmp_path):
    from types import SimpleNamespace

    from medseg.engine_validation import Validator

    (tmp_path / "datasets.yaml").write_text(
        "mine:\n  title: Mine\n  modality: x\n  dims: 3\n  channels: [x]\n  unit: px\n"
        "  labels: {0: background, 1: cell}\n"
        "  files: {training: {image: 'im/{id}.nii.gz', label: 'la/{id}.nii.gz'}}\n"
    )
    moved = np.roll(cube(), 2, axis=0)  # by two voxels, each half a millimetre
    for folder, array in (("im", cube()), ("la", cube()), ("pred", moved)):
        save(tmp_path / folder / "a.nii.gz", array, np.diag([-0.5, -0.5, 0.5, 1]))
    save(tmp_path / "im" / "b.nii.gz", cube(), np.diag([-0.5, -0.5, 0.5, 1]))
    save(tmp_path / "la" / "b.nii.gz", cube(), np.diag([-0.5, -0.5, 0.5, 1]))  # without a prediction
    metrics = ["HD", ("SurfaceDice", {"tolerance": 1.5}), "VolumeError"]
    result = evaluate(tmp_path / "pred", "mine", data=tmp_path, part="training", workers=1, metrics=metrics)
    found = {(row.case, row.metric): (row.value, row.unit) for row in result.rows}
    assert found["a", "HD"] == (2.0, "px")
    # a sixth of each surface, the face that the shift has left behind, is 2 px from the other surface
    assert 0.5 < found["a", "SurfaceDice@1.5px"][0] < 0.85
    assert found["a", "VolumeError"] == (0.0, "voxel")
    assert found["b", "HD"] == (pytest.approx(math.hypot(20, 18, 12)), "px")
    assert found["b", "VolumeError"] == (-216.0, "voxel")
    training = SimpleNamespace(
        labels={0: "background", 1: "cell"}, metrics=["HD"], patients={}, spec=SimpleNamespace(unit="px", ignore=None),
        stored={"a": SimpleNamespace(native=SimpleNamespace(spacing=(0.5, 0.5, 0.5)))},
        references=lambda name: (cube(), None, None),
    )  # fmt: skip
    assert [s.value for s in Validator.measure(training, "a", moved, None).scores] == [2.0]


@pytest.mark.parametrize("affine", ["sform", "qform"])
def test_the_affine_that_a_data_set_names_counts_in_evaluation(tmp_path, runs, affine):
    data, run = tmp_path / "data", runs / "2026-11-21_090000_fold0"
    entry = (data / "datasets.yaml").read_text()
    (data / "datasets.yaml").write_text(entry.replace("  unit: mm\n", f"  unit: mm\n  affine: {affine}\n"))
    named, other = np.diag([0.5, 0.5, 0.5, 1.0]), np.diag([2.0, 2.0, 2.0, 1.0])
    for path in data.glob("*/*.nii.gz"):
        image = nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), named)
        image.set_sform(named if affine == "sform" else other, 1)
        image.set_qform(named if affine == "qform" else other, 1)
        nibabel.save(image, path)
    masks = run / "validation" / "predictions"
    for number in (0, 1):
        label = np.asarray(nibabel.load(data / "labels" / f"c{number}.nii.gz").dataobj)
        save(masks / f"c{number}.nii.gz", np.roll(label, 2, axis=0), named)
    common = {"data": data, "workers": 1, "metrics": ["HD"], "output": tmp_path / "out"}
    observed = {"part": "training", "observer": data / "labels"}
    for result in (
        evaluate(run, **common),
        evaluate(masks, "tiny", **observed, **common),
        evaluate(masks, data / "labels", run=run, **common),
    ):
        # two voxels of half a millimetre, by the affine that counts
        assert [row.value for row in result.rows] == [1.0] * 4
    with pytest.raises(MedsegError, match="E321"):  # nothing says which one counts
        evaluate(masks, data / "labels", labels="1=ball,2=core", **common)


def test_ids_that_are_no_names_of_files_find_their_predictions(tmp_path):
    names = {"p1/a": "p1_a-", "p1\\b": "p1_b-"}
    table = ["id,image,label"]
    for number, (case, start) in enumerate(names.items()):
        save(tmp_path / f"im/{number}.nii.gz", cube() * 3 + 1)
        save(tmp_path / f"la/{number}.nii.gz", cube())
        stem = safe_stem(case)
        assert stem.startswith(start)
        save(tmp_path / "pred" / f"{stem}.nii.gz", cube())
        table.append(f"{case},im/{number}.nii.gz,la/{number}.nii.gz")
    (tmp_path / "cases.csv").write_text("\n".join(table))
    add_dataset("mine", tmp_path, csv=str(tmp_path / "cases.csv"))
    result = evaluate(tmp_path / "pred", "mine", data=tmp_path, part="training", workers=1, metrics=["Dice"])
    assert {row.case: row.value for row in result.rows} == dict.fromkeys(names, 1)


def test_a_data_set_of_objects_is_scored_by_objects(tmp_path):
    (tmp_path / "datasets.yaml").write_text(
        "mine:\n  title: Mine\n  modality: x\n  dims: 2\n  channels: [grey]\n  colour: grey\n  unit: px\n"
        "  labels: {0: background, 1: object}\n"
        "  files: {training: {image: 'im/{id}.png', instances: 'ob/{id}.png'}}\n"
    )
    reference = np.zeros((20, 30), np.uint16)
    reference[2:8, 2:8], reference[2:8, 8:14], reference[12:18, 4:10] = 1, 2, 3  # two of them touch
    prediction = np.where(reference == 3, 0, reference).astype(np.uint16)
    for folder, array in (("im", reference.astype(np.uint8)), ("ob", reference), ("pred", prediction)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    found = evaluate(tmp_path / "pred", "mine", data=tmp_path, part="training", workers=1)
    values = {row.metric: row.value for row in found.rows if row.case == "a"}
    assert values == {m: pytest.approx(2 / 3) for m in ("AP50", "AP75", "PQ", "AJI")} | {"Dice": pytest.approx(0.8)} | {
        "PQ": pytest.approx(2 / (2 + 0.5))  # two matches, one missed
    }
    # numbered objects are also read where no score of objects is asked for
    alone = evaluate(tmp_path / "pred", "mine", data=tmp_path, part="training", workers=1, metrics=["Dice"])
    assert [row.value for row in alone.rows] == [pytest.approx(0.8)]


def test_folds_are_put_together_once(folders):
    for fold in (0, 1):
        for kind in ("ref", "pred"):
            save(folders / f"{kind}{fold}" / f"f{fold}.nii.gz", cube(at=4 + fold * (kind == "pred")))
        evaluate(
            folders / f"pred{fold}",
            folders / f"ref{fold}",
            labels="1=x",
            workers=1,
            output=folders / "runs" / f"r{fold}" / "validation",
            metrics=["Dice"],
        )
    runs = [folders / "runs" / "r0", folders / "runs" / "r1"]
    result = pool_runs(runs)
    assert result.folder == folders / "runs" / "cross_validation"
    assert mean_of(result, "Dice", "x")["n"] == 2
    assert mean_of(result, "Dice", "x")["better"] == "higher"
    with pytest.raises(UsageError, match="in two runs"):
        pool_runs([runs[0], runs[0]])
    with pytest.raises(UsageError, match="no runs"):
        pool_runs([])
    with pytest.raises(DataError):
        pool_runs([folders / "absent"])


def test_cells_that_a_spreadsheet_would_run_are_quoted_and_come_back(tmp_path):
    names = [
        "=1+1",
        "+x",
        "-x",
        "@x",
        "\tx",
        "'=x",
        "a,b",
        'quo"te',
        "new\nline",
        "<script>",
        "日本",
        "'plain",
        "%d {x}",
    ]
    rows = [ScoreRow(name, name, "Dice", -0.1234567890123456, "", "scored", name) for name in names]
    write_cases(tmp_path / "cases.csv", rows)
    assert read_cases(tmp_path / "cases.csv") == rows
    for cells in csv.reader((tmp_path / "cases.csv").open(newline="", encoding="utf-8")):
        for column, cell in enumerate(cells):
            assert column == 3 or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,label\n1,2\n", "lacks columns"),
        ("", "lacks columns"),
        ("case,label,metric,value,unit,status,definition\na,b,c,x,,scored,d\n", "line"),
        ("case,label,metric,value,unit,status,definition\na,b,c,nan,,scored,d\n", "line"),
        ("case,label,metric,value,unit,status,definition\na,b,c,1,,guessed,d\n", "line"),
        ("case,label,metric,value,unit,status,definition\na,b\n", "line"),
    ],
)
def test_broken_tables_are_refused(tmp_path, text, said):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_cases(tmp_path / "cases.csv")


def test_tables_in_markdown_and_latex_escape_names():
    rows = [ScoreRow(f"c{n}", "a_b|<&%", "Dice", v, "", "scored", "d") for n, v in enumerate((0.5, 0.7, 0.9))]
    rows.append(ScoreRow(POOLED, "a_b|<&%", "PooledDice", 0.75, "", "scored", "d"))
    scores = summarise_rows(rows, better={})
    assert scores[0]["mean"] == pytest.approx(0.7)
    assert scores[0]["sd"] == pytest.approx(0.2)
    assert (scores[0]["q1"], scores[0]["median"], scores[0]["q3"]) == pytest.approx((0.6, 0.7, 0.8))
    assert scores[1] == {"label": "a_b|<&%", "metric": "PooledDice", "unit": "", "better": "higher", "definition": "d",
                         "level": "pooled",
                         "n": 1, "mean": 0.75, "status": "scored"}  # fmt: skip
    assert r"a\_b\|\<&%" in markdown_table(scores)
    assert r"a\_b|\textless{}\&\%" in latex_table(scores)
    assert "0.700" in latex_table(scores)
    one = summarise_rows(rows[:1], better={})[0]
    assert (one["low"], one["sd"]) == (None, None)


def test_cases_to_show():
    def rows(values):
        return [ScoreRow(f"c{n}", "x", "Dice", v, "", "scored", "") for n, v in enumerate(values)]

    chosen, metric = choose_cases(rows([0.1, 0.9, 0.5, 0.7, 0.3, 0.2, 0.8]), {"Dice": "higher"})
    assert metric == "Dice"
    assert [(case, role) for case, role, _ in chosen] == [
        ("c1", "best"),
        ("c2", "median"),
        ("c4", "worst"),
        ("c5", "worst"),
        ("c0", "worst"),
    ]
    assert [role for _, role, _ in choose_cases(rows([0.1, 0.9]), {})[0]] == ["best", "worst"]
    assert [role for _, role, _ in choose_cases(rows([0.1]), {})[0]] == ["best"]
    assert [role for _, role, _ in choose_cases(rows([0.1, 0.2, 0.3, 0.4]), {})[0]] == [
        "best",
        "median",
        "worst",
        "worst",
    ]
    # of five the third is the median, and so none of the worst: it stood there twice
    found = choose_cases(rows([0.5, 0.4, 0.3, 0.2, 0.1]), {})[0]
    assert [(case, role) for case, role, _ in found] == [
        ("c0", "best"),
        ("c2", "median"),
        ("c3", "worst"),
        ("c4", "worst"),
    ]
    assert choose_cases([], {}) == ([], "")
    both = [
        *rows([0.1, 0.9]),
        *[ScoreRow(f"c{n}", "all", "SEG", v, "", "scored", "") for n, v in enumerate([0.8, 0.7])],
    ]
    assert choose_cases(both, {}, "SEG") == ([("c0", "best", 0.8), ("c1", "worst", 0.7)], "SEG")
    assert choose_cases(both, {}, "PQ")[1] == "Dice"
    assert main_metric(["HD95", "IoU"]) == "IoU"
    assert main_metric(["HD95"]) == "HD95"
    assert main_metric([]) is None


def test_calibration_counts_are_those_of_the_bins():
    probability = np.array([[0.05, 0.05, 0.95, 0.95], [0.0, 0.55, 1.0, 0.55]], np.float32)
    reference = np.array([[0, 1, 1, 1], [0, 0, 1, 255]])
    counts = calibration_counts(
        np.stack([1 - probability, probability]), reference, Reading({1: "x"}, ignore=255), None
    )[1]
    assert counts[0].tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert counts[2].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert counts[1][9] == pytest.approx(2.9)


def test_stored_probabilities_are_never_in_memory_all_at_once(tmp_path):
    import tracemalloc

    import zarr

    from medseg.evaluation_pairs import Pair
    from medseg.evaluation_scoring import Scoring, score_pair
    from medseg.inference.outputs import probability_file
    from medseg.metrics import auc

    classes, shape = 12, (40, 70, 500)
    random = np.random.default_rng(0)
    reference = np.zeros(shape, np.uint8)
    reference[5:20, 5:60, 5:450], reference[20:30, 5:60, 5:450] = 1, 2
    save(tmp_path / "ref.nii.gz", reference)
    with probability_file(tmp_path / "p.zarr", shape) as put:
        for first in range(0, 500, 64):
            box = (slice(0, 40), slice(0, 70), slice(first, first + 64))
            share = random.random(reference[box].shape, np.float32)
            put(box, np.stack([1 - share, *(share * (k == 1) + 0.25 * (k == 2) for k in range(1, classes))]))
    pair = Pair("a", tmp_path / "ref.nii.gz", tmp_path / "ref.nii.gz", probabilities=tmp_path / "p.zarr")
    reading = Reading({k: str(k) for k in range(1, classes)})
    score_pair(pair, reading, Scoring(("Dice",)))  # what is imported does not count
    tracemalloc.start()
    found = score_pair(pair, reading, Scoring(("Dice",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < classes * reference.size * 2  # not even as they are stored, two bytes each
    # of one class only its own part of the files is read
    one = zarr.open_array(str(tmp_path / "p.zarr"), mode="r")
    tracemalloc.start()
    one[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < classes * reference.size  # half of what is stored
    # the same numbers as of the whole array at once
    whole = np.asarray(zarr.open(str(tmp_path / "p.zarr"), mode="r")[...], np.float32)
    expected = calibration_counts(whole, reference, reading, None)
    assert found.calibration.keys() == expected.keys()
    for label, counts in expected.items():
        assert found.calibration[label] == pytest.approx(counts, rel=1e-9)
    areas = score_pair(pair, Reading({1: "1", 2: "2"}), Scoring(("AUC",), {"1": (1,), "both": (1, 2)})).rows
    assert areas[0].value == pytest.approx(auc(whole[1], reference == 1))
    assert areas[1].value == pytest.approx(auc(whole[1] + whole[2], reference > 0))
    save(tmp_path / "other.nii.gz", reference[:39])  # another grid than that of the probabilities
    with pytest.raises(UsageError, match="another shape"):
        score_pair(Pair("a", tmp_path / "other.nii.gz", tmp_path / "other.nii.gz", probabilities=pair.probabilities),
                   reading, Scoring(("Dice",)))  # fmt: skip


def test_label_texts():
    assert parse_labels("1=liver,2=tu=mour") == {1: "liver", 2: "tu=mour"}
    assert parse_labels({np.uint8(1): "liver", "2": "tumour", 0: "air"}) == {1: "liver", 2: "tumour"}
    for wrong in (
        "",
        "1",
        "a=b",
        "1=a,1=b",
        "1=a,2=a",
        "1=a,2=all",
        "0=back",
        {"a": "b"},
        {-1: "a"},
        {1: "a", "1": "b"},
    ):
        with pytest.raises(UsageError):
            parse_labels(wrong)
    assert count_workers(8, 3) == 3


def test_a_case_called_as_the_line_of_pooled_scores_is_refused(folders):
    """Its scores were taken for pooled ones, and left out of the means."""
    for folder in ("ref", "pred"):
        save(folders / folder / f"{POOLED}.nii.gz", cube())
    with pytest.raises(DataError, match="no case can have this name") as caught:
        evaluate(folders / "pred", folders / "ref", labels="1=cube", metrics=["Dice"])
    assert (caught.value.code, caught.value.case) == ("E352", "all cases")
    assert caught.value.file == str(folders / "ref" / "all cases.nii.gz")


def test_large_volumes_are_scored_in_as_many_processes_as_memory_allows(folders, monkeypatch):
    (folders / "ref" / "case_9.nii.gz").write_bytes(b"no image")  # told by who reads it
    save(folders / "ref" / "case_8.nii.gz", cube(shape=(20, 18, 40)))
    pairs, *_ = match_folders(folders / "pred", folders / "ref")
    assert largest_reference(pairs) == 20 * 18 * 40
    voxels, cores = 512 * 512 * 1000, len(os.sched_getaffinity(0))
    asked = []
    for gigabytes in (1, 20, 10_000):
        monkeypatch.setattr(evaluation_pool, "available_memory", lambda free=gigabytes: free * 2**30)
        asked.append(count_workers(None, 1000, voxels))  # a case takes 10 GB, a process a quarter of one
        assert count_workers(None, 2**22, 1) == min(cores, 4 * gigabytes * 7 // 10)
        assert count_workers(None, 1000, 4000) == 1  # done before other processes have started
        assert count_workers(8, 1000, voxels) == 8  # as asked for
    assert asked == [1, 1, cores]


def test_attention_maps_lie_on_the_image(tmp_path):
    from types import SimpleNamespace

    import torch

    from medseg.evaluation_attention import AttentionMaps, _GatesAsOutput, _to_native, has_attention
    from medseg.networks import AttentionUNet

    assert has_attention("AttentionUNet")
    assert not has_attention("UNet")
    network = AttentionUNet(2, 1, 2, channels=(4, 8, 8)).eval()
    image = torch.randn(1, 1, 16, 24)
    with torch.inference_mode():
        maps = _GatesAsOutput(network)(image)
        _, wanted = network(image, return_attention=True)
    assert maps.shape == (1, len(wanted), 16, 24)
    assert maps.mean() == pytest.approx(float(np.mean([alpha.mean() for alpha in wanted])), abs=0.05)
    # a grid of twice the spacing: the bright voxel lies where it did in mm
    values = np.zeros((8, 8), np.float32)
    values[3, 5] = 1
    native = SimpleNamespace(shape=(16, 16), affine=np.eye(4))
    moved = _to_native(values, np.diag([2.0, 2, 1, 1]), native)
    assert np.unravel_index(moved.argmax(), moved.shape) == (6, 10)
    # the same attention everywhere, on a grid from the same corner: everywhere it is, at the border too
    corner = np.array([[2.0, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert _to_native(np.ones((8, 8), np.float32), corner, native).tolist() == np.ones((16, 16)).tolist()
    assert AttentionMaps.__doc__


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_maps_of_a_2d_network_on_a_volume_are_those_of_its_slices(tmp_path, monkeypatch, channels):
    from types import SimpleNamespace

    import torch
    from tiny import write_cases

    from medseg.config import load_dataset
    from medseg.data import find_cases
    from medseg.evaluation_attention import AttentionMaps, _GatesAsOutput
    from medseg.networks import AttentionUNet

    data = write_cases(tmp_path, 1)
    spec = load_dataset("tiny", root=data)
    network = AttentionUNet(2, channels, 3, channels=(4, 8, 8)).eval()  # three channels: the neighbouring slices
    model = SimpleNamespace(network=network, dataset=spec, pipeline=SimpleNamespace(preprocess=()))
    monkeypatch.setattr("medseg.evaluation_attention.load_model", lambda run: model)
    found = AttentionMaps(tmp_path)(find_cases(spec, data, part="all")[0])
    volume = torch.from_numpy(nibabel.load(data / "images" / "c0.nii.gz").get_fdata(dtype=np.float32))
    around = volume[..., 4:7] if channels == 3 else volume[..., 5:6]
    with torch.inference_mode():
        wanted = _GatesAsOutput(network)(around.permute(2, 0, 1)[None])[0].numpy()
    assert len(found) == len(wanted) > 0
    for one, other in zip(found.values(), wanted, strict=True):
        assert one.shape == tuple(volume.shape)
        assert one[..., 5] == pytest.approx(other, abs=1e-4)


@pytest.fixture
def runs(tmp_path):
    """A folder of two runs that label c0 and c1 of `tiny` as they are; the older one has no predictions."""
    from tiny import tiny_pipeline, write_cases

    from medseg.config import to_yaml

    data = write_cases(tmp_path / "data", 2)
    for day in ("20", "21"):
        run = tmp_path / "runs" / "tiny" / f"2026-11-{day}_090000_fold0"
        run.mkdir(parents=True)
        (run / "pipeline.yaml").write_text(to_yaml(tiny_pipeline()))
        (run / "split.json").write_text(json.dumps({"validation": ["c0", "c1"]}))
        (run / "best.pt").write_bytes(b"")
    shutil.copytree(data / "labels", run / "validation" / "predictions")
    return run.parent


def test_a_folder_of_runs_stands_for_its_newest(runs, tmp_path):
    data = tmp_path / "data"
    result = evaluate(runs, data=data, workers=1)
    assert result.folder == runs / "2026-11-21_090000_fold0" / "validation"
    named = evaluate(data / "labels", data / "labels", run=runs, data=data, workers=1, output=tmp_path / "out")
    assert named.summary["labels"] == {"1": "ball", "2": "core"}


def test_the_score_that_chose_the_weights_is_the_main_one(runs, tmp_path):
    from tiny import tiny_pipeline

    from medseg.config import to_yaml

    run, data = runs / "2026-11-21_090000_fold0", tmp_path / "data"
    scores = {"metrics": ["Dice", {"SurfaceDice": {"tolerance": 2.0}}], "best": "SurfaceDice"}
    (run / "pipeline.yaml").write_text(to_yaml(tiny_pipeline(**scores)))
    assert evaluate(run, data=data, workers=1).summary["main_score"] == "SurfaceDice@2mm"
    summary = pool_runs([run]).summary
    assert summary["main_score"] == "SurfaceDice@2mm"
    other = evaluate(run, data=data, workers=1, metrics="Dice,IoU", output=tmp_path / "out").summary
    assert other["main_score"] is None
    named = evaluate(data / "labels", data / "labels", run=run, data=data, workers=1, output=tmp_path / "two").summary
    assert {view["metric"] for view in named["views"]} == {"SurfaceDice@2mm"}


def test_other_scores_never_replace_a_runs_own(runs, tmp_path):
    data, own = tmp_path / "data", runs / "2026-11-21_090000_fold0" / "validation" / "cases.csv"
    evaluate(runs, data=data, workers=1)
    before = own.read_bytes()
    for asked in ({"metrics": ["IoU"]}, {"protocol": "msd"}):
        with pytest.raises(UsageError, match="replace the run's own"):
            evaluate(runs, data=data, workers=1, **asked)
    result = evaluate(runs, data=data, workers=1, metrics="Dice,IoU", formats="latex", output=tmp_path / "out")
    assert {row.metric for row in result.rows} == {"Dice", "IoU"}
    assert (tmp_path / "out" / "scores.tex").is_file()
    assert own.read_bytes() == before


def test_what_a_run_or_a_data_set_knows_of_its_labels_is_not_told_again(runs, tmp_path):
    data, masks = tmp_path / "data", runs / "2026-11-21_090000_fold0" / "validation" / "predictions"
    common = {"data": data, "workers": 1, "output": tmp_path / "out"}
    for asked in ({"labels": "1=x"}, {"ignore": 2}):
        with pytest.raises(UsageError, match=f"leave --{next(iter(asked))} out"):
            evaluate(runs, **asked, **common)
    with pytest.raises(UsageError, match="leave --ignore out"):
        evaluate(masks, "tiny", part="training", ignore=2, **common)
    assert not (tmp_path / "out").exists()


def test_numbered_objects_of_a_run_are_read_whatever_is_scored(tmp_path):
    """A pipeline for objects on a set of labels: each ball was predicted as two halves, 1 and 2, of which Dice is 1."""
    from tiny import tiny_pipeline, write_cases

    from medseg.config import to_yaml

    data = write_cases(tmp_path / "data", 2)
    run = tmp_path / "runs" / "balls" / "2026-11-21_090000_fold0"
    (run / "validation").mkdir(parents=True)
    (run / "pipeline.yaml").write_text(to_yaml(tiny_pipeline(dataset="balls", metrics=["AP50", "Dice"], best="AP50")))
    (run / "split.json").write_text(json.dumps({"validation": ["c0", "c1"]}))
    (run / "best.pt").write_bytes(b"")
    for name in ("c0", "c1"):
        stored = nibabel.load(data / "labels" / f"{name}.nii.gz")
        ball = np.asarray(stored.dataobj) > 0
        halves = ball * (1 + (np.arange(ball.shape[0]) > ball.shape[0] // 2)[:, None, None])
        nibabel.save(nibabel.Nifti1Image(halves.astype(np.uint8), stored.affine), run / "validation" / f"{name}.nii.gz")
    for asked in (
        {},
        {"run": run, "reference": data / "labels"},
        {"run": run, "reference": "balls", "part": "training"},
    ):
        folder = run / "validation" if asked else run
        found = evaluate(folder, data=data, workers=1, metrics=["Dice"], output=tmp_path / "out", **asked)
        assert {row.case: row.value for row in found.rows} == {"c0": 1.0, "c1": 1.0}, asked


def test_scores_are_not_lost_with_the_pictures(runs, tmp_path, monkeypatch):
    from tiny import tiny_pipeline

    from medseg import evaluation_views
    from medseg.config import to_yaml

    data, run = tmp_path / "data", runs / "2026-11-21_090000_fold0"
    (run / "pipeline.yaml").write_text(to_yaml(tiny_pipeline(network={"AttentionUNet": {"channels": [4, 8, 8]}})))
    result = evaluate(run, data=data, workers=1)  # its checkpoint is an empty file
    assert [row.value for row in result.rows if row.metric == "Dice"] == [1.0] * 4
    assert len(result.summary["views"]) == 2
    assert any(note.startswith("There are no attention maps: ") for note in result.summary["notes"])

    def fail(*_, **__):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr("medseg.evaluation_attention.AttentionMaps", lambda run: fail)
    result = evaluate(run, data=data, workers=1)
    notes = [f"The pictures of c{n} show no attention maps: RuntimeError: no memory." for n in (0, 1)]
    assert sorted(result.summary["notes"]) == notes
    assert len(result.summary["views"]) == 2
    monkeypatch.setattr(evaluation_views, "make_view", fail)
    result = evaluate(run, data=data, workers=1)
    assert "There are no pictures of c0: RuntimeError: no memory." in result.summary["notes"]
    assert result.summary["views"] == []
    assert (run / "validation" / "cases.csv").is_file()


def test_a_set_without_test_cases_says_which_parts_it_has(tmp_path, capsys):
    from tiny import write_cases

    data = write_cases(tmp_path / "data", 2)
    with pytest.raises(UsageError) as caught:
        evaluate(data / "labels", "tiny", data=data, workers=1)
    assert caught.value.code == "E103"
    assert "training" in caught.value.expected
    assert caught.value.fix.startswith("--part training")
    with pytest.raises(SystemExit):
        main(["evaluate", str(data / "labels"), "tiny", "--data", str(data), "--part", "training", "--workers", "1",
              "--metric", "Dice", "-o", str(tmp_path / "out")])  # fmt: skip
    assert "note: These are training cases" in capsys.readouterr().out


def test_a_set_with_a_validation_part_is_told_to_score_that(tmp_path):
    from tiny import write_cases

    from medseg.config_yaml import parse_yaml, write_yaml

    data = write_cases(tmp_path / "data", 2)
    table = data / "datasets.yaml"
    entry = parse_yaml(table.read_text()).value
    (data / "held").mkdir()
    for kind in ("images", "labels"):
        (data / kind / "c1.nii.gz").rename(data / "held" / f"c1_{kind}.nii.gz")
    held = {"image": "held/{id}_images.nii.gz", "label": "held/{id}_labels.nii.gz"}
    entry["tiny"]["files"]["validation"] = held
    table.write_text(write_yaml(entry))
    with pytest.raises(UsageError) as caught:
        evaluate(data / "labels", "tiny", data=data, workers=1)
    assert caught.value.fix == "--part validation"


@pytest.mark.parametrize("written", ["image", "id"])
def test_a_prediction_named_as_the_image_of_two_cases_is_of_neither(tmp_path, written):
    """Frames of two videos have one name: the masks of one must not be scored as the other's."""
    data = tmp_path / "data"
    for video, label in (("a", [[0, 1]]), ("b", [[1, 0]])):
        for kind, values in (("images", [[9, 9]]), ("labels", label)):
            (data / video / kind).mkdir(parents=True)
            Image.fromarray(np.array(values, np.uint8)).save(data / video / kind / "t0.png")
    patterns = '{image: "{video}/images/{frame}.png", label: "{video}/labels/{frame}.png"}'
    (data / "datasets.yaml").write_text(
        "films:\n  title: films\n  modality: none\n  dims: 2\n  channels: [grey]\n  colour: grey\n  unit: px\n"
        f"  labels: {{0: background, 1: cell}}\n  files: {{training: {patterns}}}\n"
    )
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(data / "a" / "labels" / "t0.png", masks / ("t0.png" if written == "image" else "a_t0.png"))
    facts = {"data": data, "part": "training", "metrics": ["Dice"], "workers": 1}
    if written == "id":  # said: the other one is missing
        assert evaluate(masks, "films", **facts).missing == ("b_t0",)
        return
    complete = tmp_path / "complete"
    complete.mkdir()
    for video in "ab":
        shutil.copy(data / video / "labels" / "t0.png", complete / f"{video}_t0.png")
    for folder, more in ((masks, {}), (complete, {"observer": masks})):
        with pytest.raises(DataError) as caught:
            evaluate(folder, "films", **facts, **more)
        assert caught.value.code == "E352"
        assert str(caught.value.file) == str(masks / "t0.png")
        assert "a_t0, b_t0" in caught.value.expected


def test_pooled_folds_resample_patients_also_where_a_fold_has_one_case_of_each(tmp_path):
    """A fold in which each case is its own patient writes no groups; the others' patients still count."""
    values = {"p1_1": 0.9, "p1_2": 0.9, "p1_3": 0.8, "p2_1": 0.3, "p2_2": 0.4, "p3_1": 0.8, "p4_1": 0.7}
    patients = {case: case[:2] for case in values}
    for name, cases in (("f0", list(values)[:5]), ("f1", list(values)[5:])):
        rows = [ScoreRow(case, "cell", "Dice", values[case], "", "scored", "") for case in cases]
        groups = {case: patients[case] for case in cases} if name == "f0" else {}
        (tmp_path / name).mkdir()
        write_cases(tmp_path / name / "cases.csv", rows)
        scores = summarise_rows(rows, better={}, groups=groups)
        summary = {"schema": SCHEMA, "title": "", "cases": {}, "groups": groups, "scores": scores}
        write_summary(tmp_path / name / "summary.json", summary)
    found = pool_runs([tmp_path / "f0", tmp_path / "f1"]).summary
    (score,) = found["scores"]
    wanted = summarise(list(values.values()), groups=list(patients.values()), bounds=(0, 1))
    assert (score["n"], score["patients"], found["bootstrap"]["by"]) == (7, 4, "patients")
    assert (score["low"], score["high"]) == (wanted.low, wanted.high)


@pytest.mark.parametrize("voxels", [1, 50, 10**6])
def test_pairs_of_labels_are_counted_in_slabs(voxels, monkeypatch):
    monkeypatch.setattr(evaluation_numbers, "_VOXELS", voxels)
    prediction, reference = np.random.default_rng(0).integers(0, 6, (2, 7, 5, 4)).astype(np.uint8)
    counts = count_overlaps(prediction, reference, (1, 3, 4))
    for one in range(5):
        for two in range(5):
            both = np.sum((reference == one) & (prediction == two)) if one and two else 0
            assert counts[one, two] == both

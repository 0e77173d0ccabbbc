"""The main job through the command line, small: draw, check, train, predict, evaluate, report; and what goes wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.cli import main

SMALL = [  "--set", "train.iterations=6", "--set", "train.iterations_per_epoch=3",
    "--set", "train.patch=[32,32,16]", "--set", "train.batch=1", "--set", "train.workers=0",
    "--set", "network.UNet.channels=[4,8]",
]  # fmt: skip


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with phantom data and one small finished run."""
    folder = tmp_path_factory.mktemp("main job")  # the space is meant
    assert run("data", "phantom", "liver", "-o", folder / "data", "--cases", "3") == 0
    code = run(
        "train", "liver", "--data", folder / "data", "-o", folder / "runs", "--cache", folder / "cache",
        "--device", "cpu", *SMALL,
    )  # fmt: skip
    assert code == 0
    return folder


def newest(house: Path) -> Path:
    return max((house / "runs" / "liver").iterdir())


def test_a_run_holds_what_the_design_says(house):
    folder = newest(house)
    for name in ("pipeline.yaml", "split.json", "provenance.json", "log.csv", "last.pt", "best.pt", "index.json",
                 "status.json", "report.html", "validation/cases.csv", "validation/summary.json"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 0
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert len(rows) == 2
    assert float(rows[-1]["loss"]) > 0
    split = json.loads((folder / "split.json").read_text())
    assert not set(split["training"]) & set(split["validation"])
    assert "<script src=" not in (folder / "report.html").read_text(encoding="utf-8")


def test_predictions_are_on_the_grid_of_their_images(house):
    out = house / "predictions"
    images = house / "data" / "Task03_Liver" / "imagesTr"
    assert run("predict", house / "runs" / "liver", images, "-o", out) == 0
    for path in sorted(images.iterdir()):
        image, label = nib.load(path), nib.load(out / path.name)
        assert label.shape == image.shape
        assert np.array_equal(label.affine, image.affine)
        for code in ("qform_code", "sform_code"):
            assert label.header[code] == image.header[code]
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2}
        assert np.asarray(label.dataobj).dtype == np.uint8


def test_evaluation_scores_every_case_and_label(house, capsys):
    predictions = house / "copies"
    shutil.copytree(house / "data" / "Task03_Liver" / "labelsTr", predictions)
    code = run("evaluate", predictions, "liver", "--data", house / "data", "--part", "training", "-o", house / "scores",
               "--json")  # fmt: skip
    assert code == 0
    rows = list(csv.DictReader((house / "scores" / "cases.csv").open()))
    dice = [row for row in rows if row["metric"] == "Dice"]
    assert {(row["case"], row["label"]) for row in dice} >= {
        (f"liver_{n}", label) for n in range(3) for label in ("liver", "tumour")
    }
    assert {float(row["value"]) for row in dice} == {1.0}
    assert (house / "scores" / "report.html").is_file()
    assert json.loads(capsys.readouterr().out)["report"]


def test_a_missing_prediction_is_counted_and_ends_with_4(house):
    predictions = house / "fewer"
    shutil.copytree(house / "data" / "Task03_Liver" / "labelsTr", predictions)
    (predictions / "liver_1.nii.gz").unlink()
    code = run("evaluate", predictions, "liver", "--data", house / "data", "--part", "training", "-o", house / "less")
    assert code == 4
    rows = list(csv.DictReader((house / "less" / "cases.csv").open()))
    missed = [row for row in rows if row["case"] == "liver_1" and row["metric"] == "Dice"]
    assert missed
    assert {(float(row["value"]), row["status"]) for row in missed} == {(0.0, "missed")}


def test_one_bad_case_does_not_stop_the_others(house, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(house / "data" / "Task03_Liver" / "imagesTr", images)
    whole = (images / "liver_1.nii.gz").read_bytes()
    (images / "liver_1.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert run("predict", house / "runs" / "liver", images, "-o", tmp_path / "out") == 4
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["liver_0.nii.gz", "liver_2.nii.gz"]


def damage_label_missing(task: Path) -> None:
    (task / "labelsTr" / "liver_1.nii.gz").unlink()


def damage_affine(task: Path) -> None:
    path = task / "labelsTr" / "liver_1.nii.gz"
    label = nib.load(path)
    affine = label.affine.copy()
    affine[0, 3] += 40
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), path)


def damage_shape(task: Path) -> None:
    path = task / "labelsTr" / "liver_1.nii.gz"
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[:-3], label.affine), path)


def damage_label_value(task: Path) -> None:
    path = task / "labelsTr" / "liver_1.nii.gz"
    label = nib.load(path)
    array = np.asarray(label.dataobj).copy()
    array[3, 3, 3] = 7
    nib.save(nib.Nifti1Image(array, label.affine), path)


def damage_cut(task: Path) -> None:
    path = task / "imagesTr" / "liver_1.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def damage_four_dimensions(task: Path) -> None:
    path = task / "imagesTr" / "liver_1.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.stack([array, array], -1), image.affine), path)


def damage_nan(task: Path) -> None:
    path = task / "imagesTr" / "liver_1.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj, np.float32).copy()
    array[5, 6, 7] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)


@pytest.mark.parametrize(
    "damage",
    [
        damage_label_missing,
        damage_affine,
        damage_shape,
        damage_label_value,
        damage_cut,
        damage_four_dimensions,
        damage_nan,
    ],
)
def test_training_refuses_bad_data_naming_case_and_file(house, tmp_path, capsys, damage):
    shutil.copytree(house / "data", tmp_path / "data")
    damage(tmp_path / "data" / "Task03_Liver")
    for command in (["train", *SMALL, "-o", tmp_path / "runs", "--cache", tmp_path / "cache"], ["data", "check"]):
        code = run(*command, "liver", "--data", tmp_path / "data")
        err = capsys.readouterr().err
        assert code == 3, err
        assert "liver_1" in err
        assert "Traceback" not in err
    assert not list((tmp_path / "runs").rglob("*.pt")), "refused before training"


def test_data_folder_missing_or_empty(tmp_path, capsys):
    for root in (tmp_path / "no such folder", tmp_path):
        code = run("train", "liver", "--data", root, "-o", tmp_path / "runs", *SMALL)
        assert code in (2, 3)
        assert str(root) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.epoch=3", "epochs"),
        ("network.UNet.chanels=[4,8]", "channels"),
        ("network={UNett: {}}", "UNet"),
        ("loss={DiceLos: {}}", "Loss"),
        ("train.patch=[33,32,16]", "patch"),
        ("train.batch=-1", "batch"),
    ],
)
def test_wrong_settings_are_told_before_any_data_is_opened(tmp_path, capsys, setting, told):
    code = run("train", "liver", "--data", tmp_path / "nothing here", *SMALL, "--set", setting)
    assert code == 2
    assert told in capsys.readouterr().err


def test_a_checkpoint_that_is_none(house, tmp_path, capsys):
    bad = tmp_path / "best.pt"
    bad.write_bytes(b"this is not a checkpoint")
    assert run("predict", bad, house / "data" / "Task03_Liver" / "imagesTs", "-o", tmp_path / "out") == 3
    assert "best.pt" in capsys.readouterr().err

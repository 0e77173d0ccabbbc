"""Folders and tables as other programs and people leave them: `data add` reads them, or says what they lack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from test_entry import blob, fill, noise, refused, save

from medseg.checking import check_cases
from medseg.config import load_dataset
from medseg.data import load_sample
from medseg.data_layout import list_cases
from medseg.entry import add_dataset
from medseg.evaluation import evaluate
from medseg.volumes import read_image


def table(root: Path, head: str, *rows: str) -> Path:
    (root / "t.csv").write_text("\n".join([head, *rows]))
    return root / "t.csv"


def rows(*more: str) -> list[str]:
    """Rows of the four cases of `fill`, with further cells."""
    return [f"img/p{i}_x.png,msk/p{i}_x_mask.png,{text}" for i, text in enumerate(more)]


def cases(root: Path) -> list[tuple[str, str, str]]:
    return [(case.id, case.split, case.group) for case in list_cases(load_dataset("mine", root=root), root)[0]]


# --- tables -----------------------------------------------------------------------------------------------------


def test_a_column_patient_keeps_patients_together(tmp_path):
    fill(tmp_path)
    notes = add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,patient", *rows("a", "a", "b", "b"))).notes
    assert "4 cases in 2 groups: a group stays together in every split" in notes
    assert [group for *_, group in cases(tmp_path)] == ["a", "a", "b", "b"]


def test_a_patient_of_a_table_on_both_sides_of_its_split_is_told(tmp_path):
    fill(tmp_path)
    lines = rows("a,train", "b,train", "a,val", "c,val")
    notes = add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,patient,split", *lines)).notes
    assert any(note.startswith("a in several parts of the set") for note in notes)
    assert not any("stays together in every split" in note for note in notes)
    (problem,) = check_cases(load_dataset("mine", root=tmp_path), tmp_path)
    assert (problem.code, problem.case) == ("E355", "p2_x")


def test_a_patient_who_is_validated_on_is_no_test(tmp_path):
    fill(tmp_path)
    lines = rows("a,train", "b,val", "b,test", "c,test")
    add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,patient,split", *lines))
    (problem,) = check_cases(load_dataset("mine", root=tmp_path), tmp_path)
    assert (problem.code, problem.case) == ("E355", "p2_x")
    assert problem.found == "b is also the group of p1_x, which is for validation; this one for test"


def test_all_that_is_wrong_in_a_table_is_told_at_once(tmp_path):
    fill(tmp_path)
    csv = table(tmp_path, "image,split", "img/p0_x.png,tset", "img/gone.png,train", "img/p1_x.png,train")
    found = refused(lambda: add_dataset("mine", tmp_path, csv=csv), 3)
    assert [(p.code, p.field) for p in found] == [("E119", "label"), ("E119", "split"), ("E350", "line 3")]
    csv = table(tmp_path, "label,split", "msk/p0_x_mask.png,tset")
    found = refused(lambda: add_dataset("mine", tmp_path, csv=csv), 2)
    assert [(p.code, p.field) for p in found] == [("E119", "image"), ("E119", "split")]


def test_a_label_of_a_table_that_is_gone_is_told_once(tmp_path):
    fill(tmp_path)
    add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label", *(row.rstrip(",") for row in rows(*[""] * 4))))
    (tmp_path / "msk/p1_x_mask.png").unlink()
    (problem,) = check_cases(load_dataset("mine", root=tmp_path), tmp_path)
    assert (problem.code, problem.case) == ("E350", "p1_x")


def test_where_a_table_has_group_the_column_patient_is_not_read(tmp_path):
    fill(tmp_path)
    lines = rows("1,a,x", "1,b,y", "2,c,z", "2,d,z")
    notes = add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,group,patient,age", *lines)).notes
    assert [group for *_, group in cases(tmp_path)] == ["1", "1", "2", "2"]
    assert any(note.startswith("columns that are not read: patient, age ") for note in notes)


def test_the_usual_names_of_parts_in_a_table(tmp_path):
    fill(tmp_path)
    file = table(tmp_path, "image,label,split", *rows("Train", "train", "val", "Test"))
    notes = add_dataset("mine", tmp_path, csv=file).notes
    assert "parts: 2 training, 1 validation, 1 test" in notes
    assert [part for _, part, _ in cases(tmp_path)] == ["training", "training", "validation", "test"]


@pytest.mark.parametrize(
    ("head", "fixes"),
    [
        ("picture file,truth", ["rename the column `picture file` to `image`", "add a column `label`"]),
        ("image,mask_of_reader_1", ["rename the column `mask_of_reader_1` to `label`"]),
        ("file_name,label", ["rename the column `file_name` to `image`"]),
        ("image,zzz", ["add a column `label`"]),
    ],
)
def test_a_missing_column_names_the_one_that_was_probably_meant(tmp_path, head, fixes):
    fill(tmp_path)
    file = table(tmp_path, head, *(row.rstrip(",") for row in rows("", "")))
    found = refused(lambda: add_dataset("mine", tmp_path, csv=file), 2)
    assert [str(problem.fix).removesuffix(", if that is meant") for problem in found] == fixes


@pytest.mark.parametrize(
    "written", ["patient_id", "subject", "subject_id", "PatientID", "Patient ID", "patient-id", "participant_id"]
)
def test_a_patients_column_in_other_spellings(tmp_path, written):
    fill(tmp_path)
    lines = rows("a,1", "a,2", "b,3", "b,4")
    notes = add_dataset("mine", tmp_path, csv=table(tmp_path, f"image,label,{written},age", *lines)).notes
    assert [group for *_, group in cases(tmp_path)] == ["a", "a", "b", "b"]
    assert f"columns that are read: image, label, {written} as patient" in notes
    assert any(note.startswith("columns that are not read: age ") for note in notes)


def test_two_columns_of_patients_that_differ_are_refused(tmp_path):
    fill(tmp_path)
    head, same = "image,label,patient,Subject ID", rows("a,s1", "a,s1", "b,s2", "b,s2")
    add_dataset("mine", tmp_path, csv=table(tmp_path, head, *same))
    assert [group for *_, group in cases(tmp_path)] == ["a", "a", "b", "b"]
    for lines in (rows("a,s1", "a,s1", "b,s1", "b,s1"), rows("a,s1", "a,s2", "b,s3", "b,s4")):
        table(tmp_path, head, *lines)
        (problem,) = refused(lambda: add_dataset("other", tmp_path, csv="t.csv"), 2)
        assert (problem.code, problem.field, problem.found) == ("E119", "patient", "patient, Subject ID")
        (problem,) = list_cases(load_dataset("mine", root=tmp_path), tmp_path)[1]  # of an entry from before
        assert problem.field == "patient"


def test_images_labels_and_split_in_other_spellings(tmp_path):
    fill(tmp_path)
    lines = rows("Train,1", "train,2", "val,0", "Testing,0")
    notes = add_dataset("mine", tmp_path, csv=table(tmp_path, "Image Path,Mask,subset,fold", *lines)).notes
    assert [part for _, part, _ in cases(tmp_path)] == ["training", "training", "validation", "test"]
    assert "columns that are read: Image Path as image, Mask as label, subset as split" in notes
    assert any(note.startswith("columns that are not read: fold ") for note in notes)


def test_a_column_that_is_not_surely_the_split_is_not_read(tmp_path):
    fill(tmp_path)
    add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,set", *rows("train", "val", "A", "B")))
    assert [part for _, part, _ in cases(tmp_path)] == ["training"] * 4


def test_two_columns_that_may_be_the_label_are_refused_unless_one_is_called_so(tmp_path):
    fill(tmp_path)
    lines = [f"img/p{i}_x.png,msk/p{i}_x_mask.png,msk/p0_x_mask.png" for i in range(4)]
    (problem,) = refused(lambda: add_dataset("a", tmp_path, csv=table(tmp_path, "image,mask,Label", *lines)), 2)
    assert (problem.code, problem.field, problem.found) == ("E119", "label", "mask, Label")
    add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,mask", *lines))
    found = list_cases(load_dataset("mine", root=tmp_path), tmp_path)[0]
    assert [case.label and case.label.name for case in found] == [f"p{i}_x_mask.png" for i in range(4)]


def test_a_column_of_labels_that_are_no_files_names_the_one_that_may_be(tmp_path):
    fill(tmp_path)
    lines = [f"img/p{i}_x.png,msk/p{i}_x_mask.png,benign" for i in range(4)]
    found = refused(lambda: add_dataset("mine", tmp_path, csv=table(tmp_path, "image,mask,label", *lines)), 3)
    assert [(p.code, p.found) for p in found] == [("E350", "benign")] * 4
    assert "the column `mask` is not read beside `label`" in str(found[0].fix)


def test_the_line_that_excel_puts_above_a_table_is_passed_over(tmp_path):
    fill(tmp_path)
    lines = [*(row.replace(",", ";") for row in rows("1", "1", "2", "2")), "img/gone.png;msk/p0_x_mask.png;3"]
    file = table(tmp_path, "sep=;", "image;label;patient", *lines)
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, csv=file), 3)
    assert (problem.code, problem.field, problem.found) == ("E350", "line 7", "img/gone.png")
    add_dataset("mine", tmp_path, csv=table(tmp_path, "sep=;", "image;label;patient", *lines[:4]))
    assert [group for *_, group in cases(tmp_path)] == ["1", "1", "2", "2"]


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (["p1_01", "p1_02", "p2_01", "p2_02"], "2 patients, p1, p2"),
        (["p1_01", "p2_01", "p3_01", "p4_02"], ""),
        (["img_1", "img_2", "img_3", "img_4"], ""),
        (["a_1", "a_2", "b_1", "other"], ""),
    ],
)
def test_ids_that_look_like_several_images_of_a_patient(tmp_path, names, patients):
    for number, name in enumerate(names):
        save(tmp_path / f"im/{name}.png", noise(number))
        save(tmp_path / f"la/{name}.png", blob())
    where = {"images": "im/*.png", "labels": "la/*.png"}
    note = add_dataset("mine", tmp_path, **where).notes[-1]
    assert note.startswith("each image is a case of its own")
    assert (f"ids may be those of {patients}: --group" in note) == bool(patients)
    assert ("ids may be" in note) == bool(patients)
    if patients:
        expression = note.rpartition("--group '")[2].removesuffix("')")
        assert (
            "4 cases in 2 groups: a group stays together in every split"
            in add_dataset("grouped", tmp_path, **where, group=expression).notes
        )


def test_channels_in_other_spellings(tmp_path):
    fill(tmp_path)
    lines = [f"img/p{i}_x.png,img/p{i}_x.png,msk/p{i}_x_mask.png" for i in range(4)]
    entry = add_dataset("mine", tmp_path, csv=table(tmp_path, "Image 1,Image 2,label", *lines)).entry
    assert entry["channels"] == ["channel 1", "channel 2"]


def test_two_rows_of_one_id_are_told_by_their_lines(tmp_path):
    fill(tmp_path)
    lines = [*rows("", ""), "", "img/p0_x.png,msk/p1_x_mask.png,"]
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, csv=table(tmp_path, "image,label,age", *lines)), 2)
    assert (problem.code, problem.case, problem.field, problem.found) == (
        "E352", "p0_x", "line 5", "the same id in line 2",
    )  # fmt: skip
    assert problem.file == str(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("set/img/p0_x.png", "not to the data root"),
        ("top/set/img/p0_x.png", "not to the working folder"),
        ("img\\p0_x.png", "write / instead of \\"),
        ("img/gone.png", "own folder"),
    ],
)
def test_a_path_of_a_table_that_is_not_there_says_how_to_write_it(tmp_path, monkeypatch, path, fix):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "top/set")
    (tmp_path / "top/set/t.csv").write_text(f"image,label\n{path},msk/p0_x_mask.png\n")
    (problem,) = refused(lambda: add_dataset("mine", tmp_path / "top", csv="set/t.csv"), 3)
    assert (problem.code, problem.field, problem.found) == ("E350", "line 2", path)
    assert fix in str(problem.fix)


# --- folders of parts -------------------------------------------------------------------------------------------


def parts_tree(root: Path, where: str, names: Sequence[tuple[str, str]]) -> None:
    for number, (part, name) in enumerate(names):
        save(root / where.format(kind="images", part=part, name=name), noise(number))
        save(root / where.format(kind="masks", part=part, name=name), blob())


WHERE = pytest.mark.parametrize(
    "where", ["{kind}/{part}/{name}.png", "{part}/{kind}/{name}.png", "{part}/{name}/{kind}.png"]
)


def add_parts(root: Path, where: str, names: Sequence[tuple[str, str]]) -> Sequence[str]:
    """What `data add` tells of such a tree."""
    parts_tree(root, where, names)
    images, labels = (where.format(kind=kind, part="*", name="*") for kind in ("images", "masks"))
    return add_dataset("mine", root, images=images, labels=labels).notes


@WHERE
def test_folders_called_as_parts_are_the_split(tmp_path, where):
    notes = add_parts(tmp_path, where, [("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")])
    assert [case[:2] for case in cases(tmp_path)] == [
        ("a", "training"), ("b", "training"), ("c", "validation"), ("d", "test"),
    ]  # fmt: skip
    assert "parts: 2 training, 1 validation, 1 test" in notes
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []


def test_numbered_objects_in_folders_called_as_parts(tmp_path):
    numbers = np.arange(100, dtype=np.uint8).reshape(10, 10)
    for part, name in (("train", "a"), ("val", "b")):
        save(tmp_path / f"images/{part}/{name}.png", noise(1, (10, 10)))
        save(tmp_path / f"masks/{part}/{name}.png", numbers)
    entry = add_dataset("mine", tmp_path, images="images/*/*.png", labels="masks/*/*.png").entry
    assert entry["files"]["validation"] == {"image": "images/val/{id}.png", "instances": "masks/val/{id}.png"}


@pytest.mark.parametrize("names", [[("train", "1"), ("train", "2"), ("monday", "3")], [("val", "1"), ("test", "2")]])
def test_folders_that_are_no_parts(tmp_path, names):
    parts_tree(tmp_path, "{kind}/{part}/{name}.png", names)
    add_dataset("mine", tmp_path, images="images/*/*.png", labels="masks/*/*.png")
    assert [case[1] for case in cases(tmp_path)] == ["training"] * len(names)


@WHERE
def test_parts_with_files_of_one_name(tmp_path, where):
    notes = add_parts(tmp_path, where, [("train", "1"), ("train", "2"), ("val", "1"), ("test", "1")])
    assert [case[:2] for case in cases(tmp_path)] == [
        ("1_train", "training"), ("2_train", "training"), ("1_val", "validation"), ("1_test", "test"),
    ]  # fmt: skip
    assert "1 is in several of them: ids end with the folder's name, as in 1_train" in notes
    assert "ids may be" not in notes[-1]
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []
    (tmp_path / where.format(kind="masks", part="val", name="1")).unlink()
    (problem,) = list_cases(load_dataset("mine", root=tmp_path), tmp_path)[1]
    assert (problem.code, problem.case) == ("E350", "1_val")


@pytest.mark.parametrize("where", ["{kind}/{part}/{name}.png", "{kind}_{part}.png"])
def test_one_image_in_each_part_is_told(tmp_path, where):
    notes = add_parts(tmp_path, where, [("train", "1"), ("test", "1")])
    assert any(note.startswith("test, train are taken as the ids of cases, NOT as parts") for note in notes)


def test_patients_who_are_in_several_parts_are_told_where_files_have_one_name(tmp_path):
    parts_tree(tmp_path, "{kind}/{part}/{name}.png", [("train", "p1_1"), ("train", "p2_1"), ("val", "p1_1")])
    patterns = {"images": "images/*/*.png", "labels": "masks/*/*.png"}
    add_dataset("mine", tmp_path, **patterns, group="^(p[0-9]+)_")
    (problem,) = check_cases(load_dataset("mine", root=tmp_path), tmp_path)
    assert (problem.code, problem.case) == ("E355", "p1_1_val")


def test_masks_of_a_part_with_files_of_one_name_are_scored(tmp_path):
    parts_tree(tmp_path, "{kind}/{part}/{name}.png", [("train", "1"), ("train", "2"), ("test", "1")])
    add_dataset("mine", tmp_path, images="images/*/*.png", labels="masks/*/*.png")
    save(tmp_path / "out/1.png", blob(1))
    found = evaluate(tmp_path / "out", "mine", data=tmp_path, part="test", metrics="Dice")
    assert [(row.case, row.value) for row in found.rows] == [("1_test", 1.0)]


# --- what is not read, or lies otherwise -------------------------------------------------------------------------


def test_annotations_that_are_outlines_are_refused_with_the_way_to_masks(tmp_path):
    fill(tmp_path)
    for name in ("p0_x", "p1_x", "p2_x", "p3_x"):
        (tmp_path / f"img/{name}.json").write_text('{"version": "5.0.1", "shapes": []}')
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    for way in ({"labels": "img/*.json"}, {"labels": "coco.json"}, {"images": None, "csv": "coco.json"}):
        (problem,) = refused(lambda way=way: add_dataset("mine", tmp_path, **{"images": "img/*.png", **way}), 3)
        assert (problem.code, problem.message) == ("E301", "annotations in JSON (COCO, LabelMe) are not read")
        assert "one label image for each image" in str(problem.fix)


def test_a_folder_that_does_not_describe_itself(tmp_path):
    fill(tmp_path / "coco")
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, folder="coco"), 2)
    assert (problem.code, problem.field, problem.found) == ("E119", "--folder", "img, msk")
    assert "--images and --labels" in str(problem.fix)


def test_two_observers_are_told_apart_by_a_pattern(tmp_path):
    for i in range(3):
        save(tmp_path / f"all/Image_0{i}L.jpg", noise(i))
        for observer in ("1stHO", "2ndHO"):
            save(tmp_path / f"all/Image_0{i}L_{observer}.png", blob())
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="all/*.jpg", labels="all/*.png"), 2)
    assert "one of them in the pattern, such as 'all/*_1stHO.png'" in str(problem.fix)
    assert add_dataset("mine", tmp_path, images="all/*.jpg", labels="all/*_1stHO.png").cases == 3


def test_a_second_label_and_an_image_of_another_kind_are_told_as_what_they_are(tmp_path):
    for i in range(4):
        save(tmp_path / f"img/p{i}.{'png' if i else 'jpg'}", noise(i))
        save(tmp_path / f"msk/p{i}.png", blob())
    save(tmp_path / "msk/p1_b.png", blob())
    found = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert [(p.code, p.case, p.found) for p in found] == [("E351", "p0", "img/p0.jpg"), ("E351", "p1_b", None)]
    assert "one suffix" in str(found[0].fix)
    assert "other observers" in str(found[1].fix)


def test_a_wrong_number_of_cases_in_dataset_json_says_which_to_write(tmp_path):
    home = tmp_path / "Dataset001_x"
    for name in ("a", "b"):
        save(home / f"imagesTr/{name}_0000.png", noise(1))
        save(home / f"labelsTr/{name}.png", blob(1))
    facts = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}, "file_ending": ".png"}
    (home / "dataset.json").write_text(json.dumps({**facts, "numTraining": 3}))
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, folder="Dataset001_x"), 2)
    assert (problem.field, problem.fix) == (
        "numTraining", "write 2 into dataset.json, or add the images that are missing",
    )  # fmt: skip


def test_broken_images_and_labels_are_told_together(tmp_path):
    fill(tmp_path)
    (tmp_path / "img/p0_x.png").write_bytes(b"")
    (tmp_path / "img/p1_x.png").write_bytes(b"")
    (tmp_path / "msk/p2_x_mask.png").write_text("<html>")
    found = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert [(p.code, Path(str(p.file)).name) for p in found] == [
        ("E302", "p0_x.png"), ("E302", "p1_x.png"), ("E301", "p2_x_mask.png"),
    ]  # fmt: skip
    assert all("leave its case out" in str(p.fix) for p in found[:2])


def test_all_images_that_are_cut_off_are_told(tmp_path):
    fill(tmp_path)
    for name in ("p1_x", "p3_x"):
        file = tmp_path / f"img/{name}.png"
        file.write_bytes(file.read_bytes()[:-60])
    found = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert [(p.code, Path(str(p.file)).name) for p in found] == [("E303", "p1_x.png"), ("E303", "p3_x.png")]
    assert {p.fix for p in found} == {"copy, download or export the file again, or leave its case out"}


@pytest.mark.parametrize(("suffix", "code"), [("tif", "E303"), ("jpg", "E305"), ("nii.gz", "E303")])
def test_damaged_files_of_every_kind_say_what_to_do(tmp_path, suffix, code):
    file = tmp_path / f"a.{suffix}"
    if suffix == "nii.gz":
        nibabel.Nifti1Image(noise(1, (8, 8, 8)).astype(np.int16), np.eye(4)).to_filename(file)
    else:
        save(file, noise(1))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (problem,) = refused(lambda: read_image(file), 3)
    assert problem.code == code
    assert "again" in str(problem.fix)


def test_labels_on_another_grid_than_their_images_are_told(tmp_path):
    fill(tmp_path)
    save(tmp_path / "msk/p1_x_mask.png", blob().T)
    save(tmp_path / "msk/p2_x_mask.png", blob(shape=(16, 20)))
    found = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", labels="msk/*.png"), 3)
    assert [(p.code, p.case, Path(str(p.file)).name, p.found) for p in found] == [
        ("E320", "p1_x", "p1_x_mask.png", "(18, 16)"), ("E320", "p2_x", "p2_x_mask.png", "(16, 20)"),
    ]  # fmt: skip
    assert {p.fix for p in found} == {"resample the label to the image's grid"}


def test_volumes_labels_and_channels_on_another_grid_are_told(tmp_path):
    affine, moved = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 30
    label = np.zeros((6, 7, 8), np.uint8)
    label[2:4, 2:5, 3:6] = 1
    for i in range(3):
        for name, array, grid in (
            ("a", noise(i, label.shape), affine),
            ("b", noise(i, label.shape), moved if i == 1 else affine),
            ("seg", label, moved if i == 2 else affine),
        ):
            (tmp_path / f"p{i}").mkdir(exist_ok=True)
            nibabel.Nifti1Image(array.astype(np.int16), grid).to_filename(tmp_path / f"p{i}/{name}.nii.gz")
    lines = [f"p{i},p{i}/a.nii.gz,p{i}/b.nii.gz,p{i}/seg.nii.gz" for i in range(3)]
    file = table(tmp_path, "id,image_1,image_2,label", *lines)
    found = refused(lambda: add_dataset("mine", tmp_path, csv=file), 3)
    assert [(p.code, p.case, p.message) for p in found] == [
        ("E326", "p1", "image and further channel have different origins or directions"),
        ("E326", "p2", "image and label have different origins or directions"),
    ]
    assert [Path(str(p.file)).name for p in found] == ["b.nii.gz", "seg.nii.gz"]


# --- what labels hold, and what only looks like it ----------------------------------------------------------------


def labelled(root: Path, *labels: np.ndarray) -> dict[str, str]:
    for number, label in enumerate(labels):
        save(root / f"im/x{number}.png", noise(number, label.shape))
        (root / "la").mkdir(exist_ok=True)
        Image.fromarray(label).save(root / f"la/x{number}.png")
    return {"images": "im/*.png", "labels": "la/*.png"}


def discs(seed: int, values: Sequence[int] = (255,) * 4) -> np.ndarray:
    """A label of 120 x 120 with a disc for each value."""
    random, grid = np.random.default_rng(seed), np.indices((120, 120))
    label = np.zeros((120, 120), np.uint8)
    for value, place in zip(values, [(30, 30), (30, 85), (85, 30), (85, 85)], strict=False):
        middle = np.array(place) + random.uniform(-5, 5, 2)
        label[((grid - middle[:, None, None]) ** 2).sum(axis=0) < random.uniform(8, 18) ** 2] = value
    return label


@pytest.mark.parametrize("factor", [3, 4])
def test_masks_that_were_made_smaller_with_smoothing_are_no_classes(tmp_path, factor):
    small = [Image.fromarray(discs(seed)).reduce(factor) for seed in range(3)]
    where = labelled(tmp_path, *map(np.asarray, small))
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, **where), 3)
    assert (problem.code, problem.message) == ("E330", "masks whose borders were smoothed")
    assert "above 127" in str(problem.fix)


def test_classes_in_greys_are_no_smoothed_masks(tmp_path):
    greys = (36, 72, 108, 144, 180, 216, 255)
    entry = add_dataset("mine", tmp_path, **labelled(tmp_path, discs(0, greys[:4]), discs(1, greys[3:]))).entry
    assert list(entry["encoding"]) == list(greys)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([(1, 2, 5), (1, 3)], "2 to 3 label values"),
        ([(1, 2, 3), (60, 70, 80)], "3 label values"),
        ([(1, 2), (1, 4)], ""),
    ],
)
def test_numbers_of_objects_with_gaps_are_told(tmp_path, values, told):
    notes = add_dataset("mine", tmp_path, **labelled(tmp_path, *(discs(i, v) for i, v in enumerate(values)))).notes
    found = [note for note in notes if "use --instances instead of --labels" in note]
    assert [note.partition(" in an image")[0] for note in found] == ([told] if told else [])


def test_a_structure_that_is_nearly_everything_is_told_and_can_be_turned(tmp_path):
    where = labelled(tmp_path, *(255 - blob() for _ in range(3)))
    notes = add_dataset("mine", tmp_path, **where).notes
    (note,) = [note for note in notes if "covers" in note]
    share = 1 - 5 * 7 / (16 * 18)  # what `blob` leaves of it
    assert f"label value 255, taken as the structure, covers {share:.0%} of all labels" in note
    assert "write `encoding: {0: 1, 255: 0}`" in note
    spec = load_dataset("mine", root=tmp_path)
    turned = spec.model_copy(update={"encoding": {0: 1, 255: 0}})
    case = list_cases(spec, tmp_path)[0][0]
    assert np.array_equal(load_sample(case, turned)["label"][0], blob(1))


def test_255_beside_one_class_is_told_and_can_be_made_void(tmp_path):
    label = np.maximum(blob(1), np.pad(blob(255)[:6], ((10, 0), (0, 0))))
    notes = add_dataset("mine", tmp_path, **labelled(tmp_path, label, label)).notes
    assert any(note.startswith("label value 255 beside 1: taken as a class; if it is void") for note in notes)
    file = tmp_path / "datasets.yaml"
    entry = yaml.safe_load(file.read_text())
    entry["mine"] |= {"ignore": 255, "labels": {0: "background", 1: "cell"}}
    del entry["mine"]["encoding"]
    file.write_text(yaml.safe_dump(entry))
    assert check_cases(load_dataset("mine", root=tmp_path), tmp_path) == []


def test_tiff_stacks_whose_voxel_size_is_not_read_are_told(tmp_path):
    for name, array in (("im", noise(1, (5, 16, 18))), ("la", np.stack([blob(1)] * 5))):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "x.tif", array.astype(np.uint8), photometric="minisblack")
        nibabel.Nifti1Image(array.astype(np.uint8), np.eye(4)).to_filename(tmp_path / name / "y.nii.gz")
    notes = add_dataset("mine", tmp_path, images="im/*.tif", labels="la/*.tif").notes
    assert any(note.startswith("of TIFF stacks no voxel size is read, 1 mm stands for it") for note in notes)
    notes = add_dataset("other", tmp_path, images="im/*.nii.gz", labels="la/*.nii.gz").notes
    assert not any("TIFF" in note for note in notes)


def test_masks_of_classes_in_a_folder_for_each_image_are_told(tmp_path):
    for number in range(3):
        save(tmp_path / f"im/x{number}.png", noise(number))
        for name in ("liver", "tumour"):
            save(tmp_path / f"la/x{number}/{name}.png", blob())
    notes = add_dataset("mine", tmp_path, images="im/*.png", instances="la/*/*.png").notes
    assert any(note.startswith("masks are called liver, tumour for each image") for note in notes)


def test_masks_of_objects_in_one_folder_are_refused_with_the_way(tmp_path):
    fill(tmp_path)
    for number in range(2):
        save(tmp_path / f"one/p0_x_{number}.png", blob())
        save(tmp_path / f"one/p1_x_{number}.png", blob())
        save(tmp_path / f"one/p2_x_{number}.png", blob())
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="img/*.png", instances="one/*.png"), 2)
    assert (problem.code, problem.message) == ("E120", "masks of single objects lie in one folder")
    assert "--instances 'masks/*/*.png'" in str(problem.fix)


# --- names, channels, dataset.json ---------------------------------------------------------------------------------


def test_braces_in_a_pattern_are_told_to_be_none(tmp_path):
    fill(tmp_path)
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, images="{img,x}/*.png", labels="msk/*.png"), 2)
    assert (problem.code, problem.found) == ("E103", "{img,x}/*.png")
    assert "braces are not read" in str(problem.fix)


def test_names_that_are_a_word_and_a_number_are_paired_by_it(tmp_path):
    for number in (1, 2, 10, 11):
        save(tmp_path / f"all/img{number}.png", noise(number))
        save(tmp_path / f"all/mask{number}.png", blob())
    entry = add_dataset("mine", tmp_path, images="all/img*.png", labels="all/mask*.png").entry
    assert entry["files"]["training"] == {"image": "all/img{id}.png", "label": "all/mask{id}.png"}


def nnunet(root: Path, labels: dict[str, int], *values: int) -> Path:
    home = root / "Dataset001_x"
    for name in ("a_1", "b_1", "c_1"):
        for channel in range(2):
            save(home / f"imagesTr/{name}_000{channel}.png", noise(channel))
        save(home / f"labelsTr/{name}.png", three_parts(values))
    facts = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "file_ending": ".png", "numTraining": 3}
    (home / "dataset.json").write_text(json.dumps(facts))
    return home


def three_parts(values: Sequence[int]) -> np.ndarray:
    label = np.zeros((16, 18), np.uint8)
    for number, value in enumerate(values):
        label[4 * number + 1 : 4 * number + 4, 3:15] = value
    return label


def test_dataset_json_with_gaps_between_labels(tmp_path):
    nnunet(tmp_path, {"background": 0, "a": 1, "b": 2, "c": 4}, 1, 2, 4)
    entry = add_dataset("mine", tmp_path, folder="Dataset001_x").entry
    assert entry["labels"] == {0: "background", 1: "a", 2: "b", 3: "c"}
    assert entry["encoding"] == {1: 1, 2: 2, 4: 3}
    spec = load_dataset("mine", root=tmp_path)
    case = list_cases(spec, tmp_path)[0][0]
    assert np.array_equal(load_sample(case, spec)["label"][0], three_parts((1, 2, 3)))
    nnunet(tmp_path, {"background": 0, "a": 1, "b": 2, "c": 4}, 1, 2, 3)
    (problem,) = refused(lambda: add_dataset("other", tmp_path, folder="Dataset001_x"), 3)
    assert (problem.code, problem.expected, problem.found) == ("E332", "0, 1, 2, 4", "0, 1, 2, 3")


def test_further_channels_beside_the_images_are_told(tmp_path):
    nnunet(tmp_path, {"background": 0, "a": 1}, 1)
    images, labels = "Dataset001_x/imagesTr/*_0000.png", "Dataset001_x/labelsTr/*.png"
    notes = add_dataset("mine", tmp_path, images=images, labels=labels).notes
    assert notes[0].startswith("left out by --images: Dataset001_x/imagesTr/a_1_0001.png and its like, 3 files")
    (problem,) = refused(lambda: add_dataset("all", tmp_path, images=images.replace("_0000", ""), labels=labels), 2)
    assert (problem.code, problem.message) == ("E120", "several images for a label")
    assert "image_1, image_2" in str(problem.fix)


def test_labels_with_a_channel_for_each_class_and_arrays_of_numpy_say_what_to_do(tmp_path):
    one_hot = np.stack([blob(1), 1 - blob(1)], axis=-1)[:, :, None].repeat(4, axis=2)
    for number in range(2):
        for name, array in (("im", noise(number, (16, 18, 4))), ("la", one_hot)):
            (tmp_path / name).mkdir(exist_ok=True)
            nibabel.Nifti1Image(array.astype(np.uint8), np.eye(4)).to_filename(tmp_path / f"{name}/x{number}.nii.gz")
        np.save(tmp_path / f"la/x{number}.npy", one_hot)
    for pattern, code, fix in (("la/*.nii.gz", "E310", "a value for each class"), ("la/*.npy", "E301", "convert it")):
        where = {"images": "im/*.nii.gz", "labels": pattern}
        found = refused(lambda where=where: add_dataset("mine", tmp_path, **where), 3)
        assert [problem.code for problem in found] == [code] * 2
        assert all(fix in str(problem.fix) for problem in found)


def test_more_channels_than_dataset_json_names_say_what_to_do(tmp_path):
    home = tmp_path / "Task05_x"
    for kind, array in (("images", noise(1, (8, 9, 4, 3))), ("labels", np.indices((8, 9, 4))[0] > 3)):
        (home / f"{kind}Tr").mkdir(parents=True)
        nibabel.Nifti1Image(array.astype(np.uint8), np.eye(4)).to_filename(home / f"{kind}Tr/a.nii.gz")
    facts = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "x"}, "numTraining": 1}
    case = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    (home / "dataset.json").write_text(json.dumps({**facts, "training": [case]}))
    (problem,) = refused(lambda: add_dataset("mine", tmp_path, folder="Task05_x"), 3)
    assert (problem.code, problem.expected, problem.found) == ("E310", "2: T2, ADC", "3")
    assert "points in time" in str(problem.fix)

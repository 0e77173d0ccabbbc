"""`data check`: every problem of every case, and problems that only the whole set shows."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.checking import check_case, check_cases, check_dataset
from medseg.config import DatasetSpec, load_dataset
from medseg.data import find_cases
from medseg.errors import UsageError


def spec_of(files=None, **facts) -> DatasetSpec:
    given = {
        "name": "set",
        "title": "A set",
        "modality": "CT",
        "dims": 3,
        "channels": ["CT"],
        "unit": "mm",
        "labels": {0: "background", 1: "organ"},
        "files": files or {"training": {"image": "i/{id}.nii.gz", "label": "l/{id}.nii.gz"}},
    }
    return DatasetSpec.from_dict({**given, **facts})


def write(path: Path, array, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine).to_filename(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Five sound cases."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        write(tmp_path / f"i/{name}.nii.gz", rng.integers(-100, 100, (6, 7, 8)).astype(np.int16))
        label = np.zeros((6, 7, 8), np.uint8)
        label[2:4, 2:4, 2:4] = 1
        write(tmp_path / f"l/{name}.nii.gz", label)
    return tmp_path


def test_a_sound_set(root):
    report = check_dataset(spec_of(), root)
    assert (report.cases, report.problems, report.warnings) == (5, [], [])
    assert report.bytes == sum(path.stat().st_size for path in root.rglob("*.nii.gz"))


def test_every_kind_of_problem_is_told_at_once_with_its_case(root):
    raw = (root / "i/a.nii.gz").read_bytes()
    (root / "i/a.nii.gz").write_bytes(raw[: len(raw) // 2])
    write(root / "l/b.nii.gz", np.full((6, 7, 8), 9, np.uint8))
    write(root / "l/c.nii.gz", np.ones((6, 7, 9), np.uint8))
    image = np.zeros((6, 7, 8), np.float32)
    image[1, 2, 3] = np.nan
    write(root / "i/d.nii.gz", image)
    (root / "l/e.nii.gz").unlink()
    problems = check_cases(spec_of(), root)
    assert {problem.case for problem in problems} == set("abcde")
    assert {problem.exit_code for problem in problems} == {3}
    codes = {problem.case: problem.code for problem in problems}
    assert (codes["b"], codes["d"], codes["e"]) == ("E332", "E311", "E350")


def test_image_and_label_of_a_case_are_both_told(root):
    (root / "i/a.nii.gz").write_bytes(b"<html>")
    write(root / "l/a.nii.gz", np.full((6, 7, 8), 9, np.uint8))
    case = next(case for case in find_cases(spec_of(), root) if case.id == "a")
    problems, _ = check_case(case, spec_of())
    assert len(problems) == 2


def test_one_case_alone(root):
    write(root / "l/b.nii.gz", np.full((6, 7, 8), 9, np.uint8))
    assert check_cases(spec_of(), root, only=["a"]) == []
    assert [problem.case for problem in check_cases(spec_of(), root, only=["b"])] == ["b"]
    with pytest.raises(UsageError) as caught:
        check_dataset(spec_of(), root, only=["z"])
    assert caught.value.exit_code == 2


def test_an_empty_root(tmp_path):
    with pytest.raises(UsageError) as caught:
        check_dataset(spec_of(), tmp_path)
    assert caught.value.code == "E103"


def test_warnings_are_not_problems(root):
    write(root / "l/a.nii.gz", np.zeros((6, 7, 8), np.uint8))
    write(root / "i/b.nii.gz", np.full((6, 7, 8), 3, np.int16))
    report = check_dataset(spec_of(), root)
    assert report.problems == []
    assert [(warning.case, warning.code) for warning in report.warnings] == [("a", "E333"), ("b", "E313")]


def test_a_class_that_no_case_shows(root):
    (problem,) = check_cases(spec_of(labels={0: "background", 1: "organ", 2: "lesion"}), root)
    assert problem.code == "E335"
    assert "lesion" in problem.message


def test_a_background_that_no_voxel_has_is_a_warning(root):
    report = check_dataset(spec_of(labels={0: "none", 1: "one", 2: "two"}, encoding={0: 1, 1: 2}), root)
    assert report.problems == []
    assert [(warning.code, warning.message) for warning in report.warnings] == [
        ("E335", "no training case shows the label 0 (none)")
    ]


def test_the_same_voxels_under_two_names(root):
    image = nibabel.load(root / "i/a.nii.gz")
    # packed again, so the files' bytes differ; their content is the same
    plain = root / "i/b.nii"
    image.to_filename(plain)
    (root / "i/b.nii.gz").unlink()
    (root / "i/b.nii.gz").write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()
    (problem,) = check_cases(spec_of(), root)
    assert (problem.code, problem.case) == ("E356", "b")
    assert "a (training)" in (problem.found or "")
    # one patient's two copies never part: a warning
    rows = ["image,label,group", *(f"i/{name}.nii.gz,l/{name}.nii.gz,p" for name in "abcde")]
    (root / "t.csv").write_text("\n".join(rows))
    report = check_dataset(spec_of({"csv": "t.csv"}), root)
    assert report.problems == []
    assert [(warning.code, warning.case) for warning in report.warnings] == [("E356", "b")]


def test_the_same_numbers_in_another_shape_are_another_image(root):
    image = np.asarray(nibabel.load(root / "i/a.nii.gz").dataobj)
    write(root / "i/b.nii.gz", image.reshape(7, 6, 8, order="F"))
    write(root / "l/b.nii.gz", np.ones((7, 6, 8), np.uint8))
    assert check_cases(spec_of(), root) == []


def test_an_image_in_two_parts(root):
    files = {"training": {"image": "i/{id}.nii.gz", "label": "l/{id}.nii.gz"}, "test": {"image": "t/{id}.nii.gz"}}
    (root / "t").mkdir()
    (root / "t/z.nii.gz").write_bytes((root / "i/c.nii.gz").read_bytes())
    (problem,) = check_cases(spec_of(files), root)
    assert (problem.code, problem.case) == ("E354", "z")


def test_a_patient_in_two_parts(root):
    files = {"training": {"image": "i/{id}.nii.gz", "label": "l/{id}.nii.gz"}, "test": {"image": "t/{id}.nii.gz"}}
    write(root / "t/a2.nii.gz", np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    (problem,) = check_cases(spec_of(files, split={"unit": "patient", "group": "^[a-z]"}), root)
    assert (problem.code, problem.case) == ("E355", "a2")


def test_ids_from_which_no_patient_can_be_read(root):
    problems = check_cases(spec_of(split={"unit": "patient", "group": "^[abc]$"}), root)
    assert [(problem.code, problem.case) for problem in problems] == [("E353", "d"), ("E353", "e")]
    assert all("mend the expression" in str(problem.fix) for problem in problems)


def test_pictures_of_different_depth(tmp_path):
    for name, kind in (("a", np.uint8), ("b", np.uint8), ("c", np.uint16)):
        for folder in ("i", "l"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.arange(64).reshape(8, 8).astype(kind) + ord(name)).save(tmp_path / f"i/{name}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / f"l/{name}.png")
    spec = spec_of({"training": {"image": "i/{id}.png", "label": "l/{id}.png"}}, dims=2, unit="px")
    (problem,) = check_cases(spec, tmp_path)
    assert (problem.code, problem.case) == ("E318", "c")
    assert problem.found == "2 of uint8, 1 of uint16"


def test_the_number_of_threads_changes_nothing(root):
    write(root / "l/b.nii.gz", np.full((6, 7, 8), 9, np.uint8))
    write(root / "l/d.nii.gz", np.full((6, 7, 8), 9, np.uint8))
    found = [[str(p) for p in check_cases(spec_of(), root, workers=n)] for n in (1, 4)]
    assert found[0] == found[1]


@pytest.mark.data
@pytest.mark.parametrize("name", ["liver", "drive", "isbi2012", "hela"])
def test_real_sets_are_sound(data_root, name):
    assert check_cases(load_dataset(name), data_root) == []

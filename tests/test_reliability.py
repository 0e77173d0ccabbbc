"""Every bad input through both doors: `medseg` on the command line and the Python API, with the same codes.

The readers' own tests look closer; here a whole data set or a whole folder of images is bad, and what is asked is that
all of it is told, with the case's name, that the good cases are finished, and that the exit code is the documented one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import corpus
import nibabel
import numpy as np
import pytest
import torch
from tiny import tiny_pipeline, write_cases

from medseg import prediction
from medseg.checking import check_dataset
from medseg.checkpoint import CheckpointStore
from medseg.cli import main
from medseg.config import load_dataset, to_yaml
from medseg.errors import DataError, MedsegError, UsageError
from medseg.networks import build_network
from medseg.tables import read_cases
from medseg.training import train

VOLUMES = (".nii", ".nii.gz", ".mha", ".nrrd")


def medseg(capsys: Any, *arguments: str | Path) -> tuple[int, Any, str]:
    """(exit code, JSON on standard output, standard error) of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    value = json.loads(shown.out) if "--json" in arguments and shown.out.strip() else None
    return int(ended.value.code or 0), value, shown.err


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Three sound cases and an untrained run for them."""
    write_cases(tmp_path / "data", 3)
    spec, pipeline = load_dataset("tiny", root=tmp_path / "data"), tiny_pipeline()
    torch.manual_seed(0)
    network = build_network(
        "UNet", spatial_dims=3, in_channels=1, out_channels=3, **dict(pipeline.network.arguments)
    )  # fmt: skip
    state = {
        "pipeline": pipeline.to_dict(), "dataset": spec.to_dict(), "in_channels": 1, "out_channels": 3,
        "network_state": network.state_dict(), "threshold": None, "metrics": {}, "progress": {}, "versions": {},
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    CheckpointStore(tmp_path / "run").save(state, "best")
    return tmp_path


def volumes_of_the_corpus(folder: Path) -> list[corpus.Bad]:
    """The bad volumes, each under a name of its own (`half.nii.gz` becomes case `half_nii_gz`)."""
    found = []
    for bad in corpus.write_corpus(folder):
        suffix = next((s for s in sorted(VOLUMES, key=len, reverse=True) if bad.path.name.endswith(s)), None)
        if suffix is None or bad.name == "missing":
            continue
        path = bad.path.with_name(bad.name.replace(".", "_") + suffix)
        os.rename(bad.path, path)
        found.append(corpus.Bad(bad.row, path.name[: -len(suffix)], path, bad.codes, bad.says))
    assert len(found) > 50
    return found


def test_predict_fails_every_bad_volume_and_finishes_the_good_one(house: Path, capsys: Any) -> None:
    bad = volumes_of_the_corpus(house / "bad")
    images = [house / "data/images/c0.nii.gz", *(file.path for file in bad)]
    code, told, said = medseg(
        capsys, "predict", house / "run", *images, "-o", house / "cli", "--device", "cpu", "--json"
    )
    assert code == 4, said
    result = prediction.predict(house / "run", images, house / "api", device="cpu", progress=False)
    assert result.exit_code == 4
    for cases in (told["cases"], [vars(case) for case in result.cases]):
        by_name = {case["case"]: case for case in cases}
        assert by_name["c0"]["status"] == "done"
        for file in bad:
            error = by_name[file.name]["error"]
            assert error["code"] in file.codes, file.name
            assert error["exit_code"] == 3
            assert error["file"] == str(file.path)
            assert file.says in by_name[file.name]["message"]
    for folder in ("cli", "api"):
        assert [path.name for path in (house / folder).iterdir() if path.name != ".medseg"] == ["c0.nii.gz"]
    assert (house / "cli/c0.nii.gz").read_bytes() == (house / "api/c0.nii.gz").read_bytes()


def test_data_check_tells_every_bad_volume_with_its_case(house: Path, capsys: Any) -> None:
    bad = [file for file in volumes_of_the_corpus(house / "bad") if file.path.name.endswith(".nii.gz")]
    whole = (house / "data/labels/c0.nii.gz").read_bytes()
    for file in bad:
        os.rename(file.path, house / "data/images" / file.path.name)
        (house / "data/labels" / file.path.name).write_bytes(whole)
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code == 3
    report = check_dataset(load_dataset("tiny", root=house / "data"), house / "data")
    assert report.cases == 3 + len(bad)
    for problems in (told["problems"], [problem.as_dict() for problem in report.problems]):
        for file in bad:
            assert any(p["case"] == file.name and p["code"] in file.codes for p in problems), file.name
        assert not [p for p in problems if p["case"] in ("c0", "c1", "c2")]


def relabel(house: Path, change: Any, affine: Any = None, case: str = "c1", dtype: Any = None) -> None:
    path = house / "data/labels" / f"{case}.nii.gz"
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    array = array if dtype is None else array.astype(dtype)
    affine = image.affine if affine is None else affine(image.affine.copy())
    nibabel.Nifti1Image(array, affine, dtype=array.dtype).to_filename(path)


def put(value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[0, 0, 0] = value
        return array

    return change


def moved(affine: np.ndarray) -> np.ndarray:
    affine[0, 3] += 0.6  # of a voxel of 1 mm
    return affine


def stretched(affine: np.ndarray) -> np.ndarray:
    affine[0, 0] *= 1.01
    return affine


def turned(affine: np.ndarray) -> np.ndarray:
    affine[:2] = affine[1::-1]
    return affine


LABELS = {
    "negative": (put(-1), None, "E331", "-1"),
    "not in the list": (put(7), None, "E332", "7"),
    "ignore not declared": (put(255), None, "E332", "255"),
    "fractional": (put(0.5), None, "E330", "0.5"),
    "not a number": (put(np.nan), None, "E33", "nan"),
    "infinite": (put(np.inf), None, "E33", "inf"),
    "too large for an integer": (put(1e30), None, "E33", "1e+30"),
    "shape": (lambda array: array[:-1], None, "E320", "15"),
    "spacing": (lambda array: array, stretched, "E325", "1.01"),
    "origin": (lambda array: array, moved, "E326", "0.6"),
    "axes": (lambda array: array, turned, "E327", ""),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_bad_label_is_refused_by_check_and_train(house: Path, capsys: Any, name: str) -> None:
    change, affine, wanted, says = LABELS[name]
    relabel(house, change, affine)
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code == 3
    (problem,) = told["problems"]
    assert problem["code"].startswith(wanted), problem
    assert problem["case"] == "c1"
    assert says.lower() in json.dumps(problem).lower()
    (house / "tiny.yaml").write_text(to_yaml(tiny_pipeline()))
    where = ["--data", house / "data", "-o", house / "runs", "--cache", house / "cache", "--device", "cpu"]
    code, _, said = medseg(capsys, "train", house / "tiny.yaml", *where)
    assert (code, problem["code"] in said, "c1" in said) == (3, True, True)
    with pytest.raises(DataError) as caught:
        train(tiny_pipeline(), data=house / "data", output=house / "runs", cache=house / "cache", progress=False)
    assert caught.value.code == problem["code"]
    assert not list((house / "runs").rglob("*.pt")), "refused before training"


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint16, np.int8])
def test_labels_of_any_type_pass_the_check(house: Path, capsys: Any, dtype: type) -> None:
    relabel(house, lambda array: array, dtype=dtype)
    assert nibabel.load(house / "data/labels/c1.nii.gz").get_data_dtype() == dtype
    assert medseg(capsys, "data", "check", "tiny", "--data", house / "data")[0] == 0
    assert check_dataset(load_dataset("tiny", root=house / "data"), house / "data").problems == []


def test_an_empty_label_warns_and_a_class_that_no_case_shows_is_refused(house: Path, capsys: Any) -> None:
    relabel(house, np.zeros_like)
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert (code, told["problems"]) == (0, [])
    assert [(w["code"], w["case"]) for w in told["warnings"]] == [("E333", "c1")]
    for case in ("c0", "c1", "c2"):
        relabel(house, lambda array: (array > 5).astype(np.uint8), case=case)
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code == 3
    assert {p["code"] for p in told["problems"]} == {"E335"}


def missing(path: Path) -> None:
    path.unlink()


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all.nii.gz")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("damage", [missing, folder_in_place, dangling, pipe, emptied, loop])
def test_what_stands_in_place_of_a_file_is_refused(house: Path, capsys: Any, damage: Any, part: str) -> None:
    damage(house / "data" / part / "c1.nii.gz")
    code, told, said = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code in (2, 3)
    assert "c1" in json.dumps(told) + said
    with pytest.raises(MedsegError) as caught:
        train(tiny_pipeline(), data=house / "data", output=house / "runs", cache=house / "cache", progress=False)
    assert caught.value.exit_code == code
    assert "c1" in str(caught.value)
    if part == "images" and damage is not missing:
        path = house / "data/images/c1.nii.gz"
        if damage is folder_in_place:
            return  # an empty folder that is named is no image at all: a wrong command
        code, told, said = medseg(
            capsys, "predict", house / "run", path, house / "data/images/c0.nii.gz", "-o", house / "out", "--json"
        )
        assert code == 4, said
        assert {case["case"]: case["status"] for case in told["cases"]} == {"c0": "done", "c1": "failed"}


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_out_of_the_data_folder_is_refused(house: Path, capsys: Any, inside: bool) -> None:
    path = house / "data/images/c1.nii.gz"
    elsewhere = (house / "data" / "elsewhere" if inside else house / "outside") / "x.nii.gz"
    elsewhere.parent.mkdir()
    os.rename(path, elsewhere)
    path.symlink_to(elsewhere)
    code, told, said = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code == (0 if inside else 2)
    assert ("E104" in json.dumps(told) + said) is not inside


def test_the_same_image_twice_is_told_by_content(house: Path, capsys: Any) -> None:
    for part in ("images", "labels"):
        shutil.copy(house / f"data/{part}/c0.nii.gz", house / f"data/{part}/other.nii.gz")
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert code == 3
    assert [p["code"] for p in told["problems"]] == ["E356"]


ODD = [
    "with blank", "Ünïcode é", "肝脏", "'q' \"q\"", "line\nbreak", "100% %s", "-leading", "<script>alert(1)<", "CON",
    "a" * 245, "$(touch x)", "a;b&c", "\u202eright", "=cmd|x", "[b]*?",
]  # fmt: skip


def test_odd_names_from_check_to_report(house: Path, capsys: Any) -> None:
    for part in ("images", "labels"):
        for name in ODD:
            shutil.copy(house / f"data/{part}/c0.nii.gz", house / f"data/{part}/{name}.nii.gz")
            image = nibabel.load(house / f"data/{part}/{name}.nii.gz")
            if part == "images":  # not the same voxels under two names
                array = np.asarray(image.dataobj).copy()
                array[0, 0, 0] = ODD.index(name) + 10
                nibabel.Nifti1Image(array, image.affine).to_filename(house / f"data/{part}/{name}.nii.gz")
    code, told, _ = medseg(capsys, "data", "check", "tiny", "--data", house / "data", "--json")
    assert (code, told["cases"], told["problems"]) == (0, 3 + len(ODD), [])
    code, _, said = medseg(capsys, "predict", house / "run", house / "data/images", "-o", house / "masks")
    assert code == 0, said
    written = {path.name for path in (house / "masks").glob("*.nii.gz")}
    assert written == {f"{name}.nii.gz" for name in ("c0", "c1", "c2", *ODD)}
    code, _, said = medseg(
        capsys, "evaluate", house / "masks", house / "data/labels", "-o", house / "scores", "--workers", "1"
    )
    assert code == 0, said
    page = (house / "scores/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert {row.case for row in read_cases(house / "scores/cases.csv")} >= {"c0", "c1", "c2", *ODD}


def test_names_that_differ_in_case_alone_are_refused_where_they_would_collide(house: Path, capsys: Any) -> None:
    (house / "in").mkdir()
    for name in ("Case", "case"):
        shutil.copy(house / "data/images/c0.nii.gz", house / f"in/{name}.nii.gz")
    code, _, said = medseg(capsys, "predict", house / "run", house / "in", "-o", house / "out")
    assert code == 2
    assert "one output" in said
    with pytest.raises(UsageError):
        prediction.predict(house / "run", house / "in", house / "out", progress=False)


def test_zero_one_and_too_few_cases_tell_the_number_needed(house: Path, capsys: Any) -> None:
    (house / "tiny.yaml").write_text(to_yaml(tiny_pipeline()))
    for left, needed in ((2, "3"), (1, "3"), (0, "")):
        for part in ("images", "labels"):
            (house / f"data/{part}/c{left}.nii.gz").unlink()
        for again in (lambda: medseg(capsys, "train", house / "tiny.yaml", "--data", house / "data"),):
            code, _, said = again()
            assert code == 2
            assert needed in said
        with pytest.raises(UsageError):
            train(tiny_pipeline(), data=house / "data", output=house / "runs", progress=False)


def test_a_volume_smaller_than_the_patch_and_a_single_slice_are_padded_and_cropped_back(
    house: Path, capsys: Any
) -> None:
    image = nibabel.load(house / "data/images/c0.nii.gz")
    array = np.asarray(image.dataobj)
    (house / "small").mkdir()
    for name, piece in {"slice": array[:, :, :1], "line": array[:, :1, :1], "voxels": array[:2, :3, :2]}.items():
        nibabel.Nifti1Image(piece, image.affine).to_filename(house / f"small/{name}.nii.gz")
    assert medseg(capsys, "predict", house / "run", house / "small", "-o", house / "out")[0] == 0
    for path in (house / "small").iterdir():
        mask = nibabel.load(house / "out" / path.name)
        assert mask.shape == nibabel.load(path).shape
        assert np.array_equal(mask.affine, image.affine)


def test_training_on_volumes_smaller_than_the_patch(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", 3, shape=(16, 20, 12))
    pipeline = tiny_pipeline(patch=[32, 8, 32], epochs=1, iterations_per_epoch=1)
    run = train(pipeline, data=tmp_path / "data", output=tmp_path / "r", cache=tmp_path / "c", progress=False)
    for path in (run / "validation").glob("*.nii.gz"):
        assert nibabel.load(path).shape == (16, 20, 12)


def test_an_output_that_cannot_be_written_is_told_before_the_work(house: Path, capsys: Any) -> None:
    (house / "tiny.yaml").write_text(to_yaml(tiny_pipeline()))
    (house / "taken").write_text("a file")
    image = house / "data/images/c0.nii.gz"
    assert medseg(capsys, "predict", house / "run", image, "-o", house / "taken")[0] == 5
    assert medseg(capsys, "train", house / "tiny.yaml", "--data", house / "data", "-o", house / "taken")[0] == 5
    assert medseg(capsys, "predict", house / "run", image, "-o", "/proc/none/masks")[0] == 5
    assert medseg(capsys, "train", house / "tiny.yaml", "--data", house / "data", "-o", "/proc/none")[0] == 5
    assert (house / "taken").read_text() == "a file"


def test_an_input_is_never_overwritten(house: Path, capsys: Any) -> None:
    images = house / "data/images"
    before = {path: path.read_bytes() for path in images.iterdir()}
    code, _, said = medseg(capsys, "predict", house / "run", images, "-o", images)
    assert code == 2
    assert "output folder is an input folder" in said
    code, _, said = medseg(capsys, "predict", house / "run", images / "c0.nii.gz", "-o", images)
    assert code == 2
    assert "overwrite" in said or "output folder" in said
    assert {path: path.read_bytes() for path in images.iterdir()} == before


def test_predicted_twice_or_into_another_folder_the_bytes_are_the_same(house: Path, capsys: Any) -> None:
    for out in ("a", "b", "b"):
        assert medseg(capsys, "predict", house / "run", house / "data/images", "-o", house / out)[0] == 0
    for path in (house / "a").glob("*.nii.gz"):
        assert path.read_bytes() == (house / "b" / path.name).read_bytes()


def test_twenty_problems_on_the_screen_and_all_in_check_json(house: Path, capsys: Any) -> None:
    whole = (house / "data/labels/c0.nii.gz").read_bytes()
    for number in range(25):
        (house / f"data/images/bad{number}.nii.gz").write_bytes(b"<html>" * 100)
        (house / f"data/labels/bad{number}.nii.gz").write_bytes(whole)
    code, _, said = medseg(
        capsys, "data", "check", "tiny", "--data", house / "data", "-o", house / "check.json"
    )  # fmt: skip
    assert code == 3
    assert said.count("E301") == 20
    assert "... and 5 more" in said
    problems = json.loads((house / "check.json").read_text())["problems"]
    assert {p["case"] for p in problems} == {f"bad{number}" for number in range(25)}
    assert all(p["fix"] or p["found"] for p in problems)


def test_out_of_memory_while_training(house: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg import engine

    real, calls = engine.TrainStep.__call__, []

    def once(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, *arguments, **options)

    monkeypatch.setattr(engine.TrainStep, "__call__", once)
    (house / "tiny.yaml").write_text(to_yaml(tiny_pipeline(patch=[16, 16, 8])))
    code, _, said = medseg(
        capsys, "train", house / "tiny.yaml", "--data", house / "data", "-o", house / "runs", "--cache", house / "c"
    )  # fmt: skip
    assert code == 5
    assert "E523" in said
    assert "patch [16, 16, 8], batch 2" in said
    assert "train.batch=1 with train.accumulate=2" in said
    assert "fits" in said
    (status,) = (house / "runs").glob("tiny/*/status.json")
    assert json.loads(status.read_text())["exit_code"] == 5


def test_a_checkpoint_of_another_run_is_not_continued(house: Path, capsys: Any) -> None:
    one, other = (
        train(tiny_pipeline(epochs=1, iterations_per_epoch=1, seed=seed), data=house / "data", output=house / "runs",
              cache=house / "cache", device="cpu", progress=False)
        for seed in (0, 1)
    )  # fmt: skip
    for name in ("index.json", "last.prev.pt"):
        (one / name).unlink(missing_ok=True)
    shutil.copy(other / "last.pt", one / "last.pt")
    before = {path.name: path.read_bytes() for path in one.iterdir() if path.is_file()}
    code, told, said = medseg(capsys, "train", "--resume", one, "--set", "train.epochs=2", "--json")
    assert code == 3
    assert (told["error"][0]["code"], told["error"][0]["field"]) == ("E366", "train.seed and 3 more")
    assert "of another run than the folder" in said
    assert {path.name: path.read_bytes() for path in one.iterdir() if path.is_file()} == before


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    write_cases(tmp_path / "data", 3)
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(ticks))
    options = {"data": tmp_path / "data", "cache": tmp_path / "c", "device": "cpu", "progress": False}
    run = train(tiny_pipeline(epochs=1, save_minutes=1e-9), output=tmp_path / "a", **options)
    monkeypatch.undo()
    other = train(tiny_pipeline(epochs=1), output=tmp_path / "b", **options)
    states = [CheckpointStore(folder).load()[0]["network_state"] for folder in (run, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    from medseg.cache import CaseStore
    from medseg.data import find_cases

    write_cases(tmp_path / "data", 6)
    spec = load_dataset("tiny", root=tmp_path / "data")
    cases = find_cases(spec, tmp_path / "data")
    children = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                CaseStore(spec, tiny_pipeline().preprocess, folder=tmp_path / "cache").prepare(cases, workers=0)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    store = CaseStore(spec, tiny_pipeline().preprocess, folder=tmp_path / "cache")
    alone = CaseStore(spec, tiny_pipeline().preprocess, folder=tmp_path / "alone")
    alone.prepare(cases, workers=0)
    for case in cases:
        one, two = (place.open(case).read("image", (0, 0, 0), (16, 20, 12)) for place in (store, alone))
        assert np.array_equal(one, two)
    assert not list((tmp_path / "cache").rglob(".medseg-*"))


def test_libraries_with_known_holes_are_excluded() -> None:
    import tomllib

    from packaging.requirements import Requirement

    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        needed = {r.name: r.specifier for r in map(Requirement, tomllib.load(file)["project"]["dependencies"])}
    # MONAI before 1.6.1: pickles and zip members outside of the folder; torch before 2.11: weights_only could be passed
    assert "1.6.0" not in needed["monai"]
    assert "1.6.1" in needed["monai"]
    assert "1.7.0" not in needed["monai"]
    assert "2.10.0" not in needed["torch"]
    assert "2.11.0" in needed["torch"]

"""Bad input to `medseg predict`, through the command line and from Python: a clear error, the others finish."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import corpus
import nibabel
import numpy as np
import pytest
from PIL import Image
from test_cli import run
from test_prediction import make_model, make_volume
from test_volumes_dicom import TURNED, change

from medseg.errors import MedsegError, ResourceError, UsageError
from medseg.inference import stages
from medseg.prediction import predict

ARRAY = corpus.image((7, 6, 5), seed=3)


def two_series(folder: Path) -> Path:
    corpus.series(folder, ARRAY, uid="1.2.3", number=4)
    return corpus.series(folder, ARRAY, uid="1.2.9", number=7, prefix="z")


def nifti(array: np.ndarray) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place.with_name("bad.nii.gz")
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        return path

    return make


def colour_volume(place: Path) -> Path:
    rgb = np.zeros((6, 6, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    rgb["R"] = np.arange(6)
    return nifti(rgb)(place)


def picture(place: Path) -> Path:
    path = place.with_name("bad.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)).save(path)
    return path


def stack(place: Path) -> Path:
    import tifffile

    tifffile.imwrite(place.with_name("bad.tif"), np.zeros((3, 30, 20), np.uint8), photometric="minisblack")
    return place.with_name("bad.tif")


def nothing(place: Path) -> Path:
    place.mkdir()
    (place / "notes.txt").write_text("no image")
    return place


def gone(place: Path) -> Path:
    place.with_name("bad.nii.gz").symlink_to("not-there.nii.gz")
    return place.with_name("bad.nii.gz")


def web_page(place: Path) -> Path:
    place.with_name("bad.nii.gz").write_bytes(b"<html>not found</html>")
    return place.with_name("bad.nii.gz")


def series(edit: Callable) -> Callable[[Path], Path]:
    return lambda place: corpus.series(place, ARRAY, edit=edit)


# what it is: (how it is made, model's dimensions, code, what the message must say)
REFUSED = {
    "empty folder": (nothing, 3, "E103", "holds no images"),
    "missing file": (lambda place: place.with_name("bad.nii.gz"), 3, "E103", "no such file"),
    "dangling link": (gone, 3, "E3", "bad.nii.gz"),
    "a web page": (web_page, 3, "E301", "<html"),
    "mixed series": (two_series, 3, "E341", "number 7"),
    "missing slice": (series(lambda k, data: k != 2), 3, "E342", "missing"),
    "two sizes": (series(change({1}, Rows=3)), 3, "E346", "7 x 3"),
    "mixed orientation": (series(change({1}, ImageOrientationPatient=TURNED)), 3, "E344", "orientation"),
    "multi-frame": (series(change({0}, NumberOfFrames=3)), 3, "E349", "convert it to NIfTI"),
    "colour series": (series(change({0}, SamplesPerPixel=3)), 3, "E314", "colour"),
    "no position": (series(change({0}, ImagePositionPatient=None)), 3, "E347", "position"),
    "four dimensions": (nifti(np.zeros((6, 6, 6, 4), np.int16)), 3, "E310", "save one of its volumes"),
    "colour volume": (colour_volume, 3, "E314", "save it as a grey volume"),
    "picture for a volume model": (picture, 3, "E310", "a volume (three dimensions)"),
    "volume for a picture model": (nifti(ARRAY), 2, "E310", "a picture (two dimensions)"),
    "stack for a picture model": (stack, 2, "E310", "3 pages"),
    "colour for a grey model": (picture, 2, "E314", "save it as a grey picture"),
    "NaN": (nifti(np.full((6, 6, 6), np.nan, np.float32)), 3, "E312", "NaN"),
}  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the command line load a made model instead of a checkpoint."""

    def use(dims: int) -> None:
        model = make_model(dims, colour="grey" if dims == 2 else None)
        monkeypatch.setattr("medseg.checkpoint.load_model", lambda path, device: model)

    return use


def good_image(folder: Path, dims: int) -> tuple[Path, str]:
    if dims == 3:
        make_volume(folder / "good.nii.gz")
        return folder / "good.nii.gz", "good.nii.gz"
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (20, 30), np.uint8)).save(folder / "good.png")
    return folder / "good.png", "good.png"


@pytest.mark.parametrize("name", REFUSED)
def test_the_bad_case_is_told_and_the_others_finish(tmp_path, capsys, trained, name):
    make, dims, code, says = REFUSED[name]
    trained(dims)
    good, output = good_image(tmp_path, dims)
    bad = make(tmp_path / "bad")
    ended, out, _ = run(capsys, "predict", "run", str(bad), str(good), "-o", str(tmp_path / "one"))
    assert ended == 4, out
    assert f"  {code}" in out
    assert says in out
    assert "bad" in out  # the file or folder is named
    assert "fix:" in out or "found:" in out
    assert "1 done, 1 failed" in out
    assert "CANARY" not in out
    assert (tmp_path / "one" / output).is_file()
    assert not list((tmp_path / "one").glob("*bad*"))
    ended, out, _ = run(capsys, "predict", "run", str(good), str(bad), "-o", str(tmp_path / "two"), "--json")
    told = json.loads(out)
    assert ended == told["exit_code"] == 4
    assert sorted(case["status"] for case in told["cases"]) == ["done", "failed"]
    failed = next(case for case in told["cases"] if case["status"] == "failed")
    assert failed["error"]["code"].startswith(code)
    assert "bad" in failed["error"]["file"]


@pytest.mark.parametrize("name", ["empty folder", "missing file"])
def test_alone_it_is_a_usage_error(tmp_path, capsys, trained, name):
    trained(3)
    bad = REFUSED[name][0](tmp_path / "bad")
    ended, _, told = run(capsys, "predict", "run", str(bad), "-o", str(tmp_path / "out"))
    assert ended == 2
    assert "E103" in told
    assert "bad" in told
    with pytest.raises(UsageError):
        predict(make_model(), [bad], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_one_shard_tells_of_what_is_missing(tmp_path):
    make_volume(tmp_path / "good.nii.gz")
    inputs = [tmp_path / "good.nii.gz", tmp_path / "gone.nii.gz"]
    codes = [
        predict(make_model(), inputs, tmp_path / "out", shard=f"{k}/2", progress=False).exit_code for k in range(2)
    ]
    assert codes == [4, 0]


def test_a_file_that_changes_while_it_is_read(tmp_path, capsys, trained, monkeypatch):
    trained(3)
    for name in ("a", "b", "c"):
        make_volume(tmp_path / f"{name}.nii.gz")
    real = stages.load_image_sample

    def slow(path, *arguments, **options):
        sample = real(path, *arguments, **options)
        if path.name == "b.nii.gz":  # somebody is still copying it
            with path.open("ab") as file:
                file.write(b"more")
        return sample

    monkeypatch.setattr(stages, "load_image_sample", slow)
    ended, out, _ = run(capsys, "predict", "run", str(tmp_path), "-o", str(tmp_path / "out"))
    assert ended == 4
    assert "E302" in out
    assert "b.nii.gz" in out
    assert "predict it again" in out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_a_file_that_changes_after_it_was_read_is_predicted_again(tmp_path, monkeypatch):
    make_volume(tmp_path / "a.nii.gz")
    real = stages.Work.compute

    def slow(work, job, sample):
        result = real(work, job, sample)
        make_volume(job.source, seed=5)  # replaced while its predecessor is being predicted
        return result

    with monkeypatch.context() as patch:
        patch.setattr(stages.Work, "compute", slow)
        predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    again = predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "out", resume=True, progress=False)
    assert [case.status for case in again.cases] == ["done"]
    expected = np.asanyarray(nibabel.load(tmp_path / "a.nii.gz").dataobj) > 100
    assert np.array_equal(np.asanyarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj) > 0, expected)


def test_results_never_lie_among_the_images(tmp_path, capsys, trained):
    trained(3)
    source = tmp_path / "in"
    source.mkdir()
    make_volume(source / "a.nii.gz")
    before = (source / "a.nii.gz").read_bytes()
    for output in (source, source / ".." / "in"):
        ended, _, told = run(capsys, "predict", "run", str(source), "-o", str(output))
        assert ended == 2
        assert "output folder is an input folder" in told
        assert "fix:" in told
    ended, _, told = run(capsys, "predict", "run", str(source / "a.nii.gz"), "-o", str(source))
    assert ended == 2
    assert "overwrite an input" in told
    assert [p.name for p in source.iterdir()] == ["a.nii.gz"]
    assert (source / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize("inputs", ["in", "in/**/*.nii.gz"])
def test_results_below_the_images_are_no_images(tmp_path, capsys, trained, monkeypatch, inputs):
    trained(3)
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    make_volume(Path("in/a.nii.gz"))
    for _ in range(2):  # the second time the results of the first are there
        ended, out, _ = run(capsys, "predict", "run", inputs, "-o", "in/masks", "--json")
        assert ended == 0
        assert [case["case"] for case in json.loads(out)["cases"]] == ["a"]


def test_images_below_the_results_are_images(tmp_path):
    (tmp_path / "data" / "in").mkdir(parents=True)
    make_volume(tmp_path / "data" / "in" / "a.nii.gz")
    for inputs in (tmp_path / "data" / "in", str(tmp_path / "data" / "in" / "*.nii.gz")):
        result = predict(make_model(), [inputs], tmp_path / "data", progress=False)
        assert [case.case for case in result.cases] == ["a"]


def test_files_of_others_are_never_replaced(tmp_path, capsys, trained):
    trained(3)
    make_volume(tmp_path / "a.nii.gz")
    mine = tmp_path / "labels"
    mine.mkdir()
    (mine / "a.nii.gz").write_bytes(b"drawn by hand, days of work")
    ended, _, told = run(capsys, "predict", "run", str(tmp_path / "a.nii.gz"), "-o", str(mine))
    assert ended == 2
    assert "did not write" in told
    assert "a.nii.gz" in told
    assert [p.name for p in mine.iterdir()] == ["a.nii.gz"]
    assert (mine / "a.nii.gz").read_bytes() == b"drawn by hand, days of work"
    # what predict wrote itself it writes again
    for _ in range(2):
        assert run(capsys, "predict", "run", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "out"))[0] == 0


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys, trained):
    trained(3)
    make_volume(tmp_path / "a.nii.gz")
    (tmp_path / "file").write_text("a file")
    ended, _, told = run(capsys, "predict", "run", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "file" / "out"))
    assert ended == 5
    assert "E50" in told
    assert str(tmp_path / "file") in told


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_folder_without_permission(tmp_path, capsys, trained):
    trained(3)
    make_volume(tmp_path / "a.nii.gz")
    (tmp_path / "out").mkdir(mode=0o500)
    assert run(capsys, "predict", "run", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "out"))[0] == 5


def test_a_checkpoint_for_another_dimension(tmp_path):
    # a 2-D data set cannot hold a network of three dimensions: the fault lies in the model, every case says so
    from test_prediction import Bright

    Image.fromarray(np.random.default_rng(0).integers(0, 200, (20, 30), np.uint8)).save(tmp_path / "a.png")
    result = predict(make_model(2, networks=(Bright(3).eval(),)), tmp_path / "a.png", tmp_path / "out", progress=False)
    assert result.exit_code == 4
    assert "the network has another number of dimensions than the image" in (result.cases[0].message or "")
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("wrong", [5, None, [5], np.zeros(3)])
def test_a_model_of_the_wrong_type_is_refused_by_the_arguments_own_name(tmp_path, wrong):
    """The error spoke of `source`, as an argument of `load_model` is called."""
    make_volume(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match="wrong type") as caught:
        predict(wrong, tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    assert caught.value.field == "model"


def test_errors_are_medsegs_own(tmp_path):
    # nothing but a MedsegError comes out of the search for inputs, whatever is named
    for name in ("", ".", "[", "a" * 300, str(tmp_path / "x\ny.nii.gz")):
        with pytest.raises(MedsegError):
            predict(make_model(), [name] if name != "." else [tmp_path], tmp_path / "out", progress=False)


def test_a_folders_name_is_never_the_id_of_a_dicom_case(tmp_path):
    folder = corpus.series(tmp_path / "Doe^John", ARRAY)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:140])  # nothing behind the mark can be read
    result = predict(make_model(), [folder], tmp_path / "out", progress=False)
    (case,) = result.cases
    assert case.status == "failed"
    assert case.case.startswith("dicom-unread-")
    assert "Doe" not in case.case


@pytest.mark.parametrize("name", ["run", "runs", "run/best.pt", "package"])
def test_a_second_model_among_the_images_is_refused(tmp_path, name):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to("runs/run")
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "run" / "mask.png")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.json").write_text("{}")
    make_volume(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match="an input is a model") as caught:
        predict(make_model(), [tmp_path / name, tmp_path / "a.nii.gz"], tmp_path / "out", progress=False)
    assert f"--with {tmp_path / name}" in caught.value.fix


def test_an_output_that_is_a_file_is_called_one(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    (tmp_path / "mask.nii.gz").write_text("x")
    with pytest.raises(ResourceError, match="the output is a file, and a folder is needed"):
        predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "mask.nii.gz", progress=False)
    assert (tmp_path / "mask.nii.gz").read_text() == "x"


def test_a_format_that_cannot_hold_the_mask_is_refused_before_the_network_runs(tmp_path, monkeypatch):
    picture(tmp_path / "bad")
    make_volume(tmp_path / "a.nii.gz")
    monkeypatch.setattr(stages, "predict_case", lambda *_, **__: pytest.fail("the network ran"))
    for name, format in (("bad.png", "nifti"), ("a.nii.gz", "PNG"), ("a.nii.gz", "dicom-seg")):
        model = make_model(2, 3, colour="rgb") if name == "bad.png" else make_model()
        result = predict(model, tmp_path / name, tmp_path / format, format=format, progress=False)
        assert "cannot be written so" in (result.cases[0].message or ""), result.text()


def test_a_series_that_no_segmentation_can_refer_to_is_refused_before_the_network_runs(tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    good = corpus.series(tmp_path / "good", ARRAY)
    bare = corpus.series(tmp_path / "bare", ARRAY, edit=change({2}, FrameOfReferenceUID=None))
    result = predict(make_model(), good, tmp_path / "out", format="dicom-seg", progress=False)
    assert result.exit_code == 0, result.text()
    monkeypatch.setattr(stages, "predict_case", lambda *_, **__: pytest.fail("the network ran"))
    result = predict(make_model(), bare, tmp_path / "out", format="dicom-seg", progress=False)
    assert (result.cases[0].error or {})["code"] == "E340"
    assert "FrameOfReferenceUID" in result.text()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    result = predict(make_model(), good, tmp_path / "more", format="dicom-seg", progress=False)
    assert (result.cases[0].error or {})["code"] == "E506"

"""Exports: the same masks from run, package, bundle and ONNX; damaged files refused; no network needed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys

import monai
import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import medseg
from medseg.checkpoint import CheckpointStore, load_model
from medseg.config import DatasetSpec, Pipeline
from medseg.errors import CheckpointError, MedsegError, UsageError
from medseg.export import export_bundle, export_onnx, export_package
from medseg.networks import build_network
from medseg.package import FORMAT, read_package, traced_network
from medseg.prediction import predict
from medseg.tables import SCHEMA, write_summary

ONNX = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


def pipeline(**changes):
    plain = {
        "title": "A phantom.", "dataset": "phantom_ct",
        "preprocess": [
            {"Orientationd": {"axcodes": "RAS"}}, {"Spacingd": {"pixdim": [2.0, 2.0, 3.0]}},
            {"ScaleIntensityRanged": {"a_min": -100.0, "a_max": 200.0, "b_min": -1.0, "b_max": 1.0, "clip": True}},
        ],
        "augment": [], "network": {"UNet": {"channels": [4, 8], "padding": "same", "norm": "batch"}},
        "loss": {"DistanceWeightedDiceCELoss": {}}, "optimizer": {"AdamW": {"lr": 1e-3}},
        "schedule": {"PolynomialLR": {"power": 0.9}},
        "train": {"epochs": 1, "batch": 1, "patch": [16, 16, 16]}, "inference": {"OverlapTileInferer": {"mirror": [0]}},
        "postprocess": ["KeepLargestComponent"], "metrics": ["Dice"], "best": "Dice",
    }  # fmt: skip
    return Pipeline.from_dict({**plain, **changes})


def dataset(**changes):
    plain = {
        "name": "phantom_ct", "title": "Phantom `CT` | <b>", "modality": "CT", "dims": 3, "channels": ["ct"],
        "unit": "mm",
        "labels": {0: "background", 1: "organ", 2: "lesion"},
        "files": [{"training": {"image": "a/{id}.nii.gz", "label": "b/{id}.nii.gz"}}],
    }  # fmt: skip
    return DatasetSpec.from_dict({**plain, **changes})


def make_run(folder, choices, facts, seed=0):
    torch.manual_seed(seed)
    part = choices.network
    dims = len(choices.train.patch)
    channels = facts.in_channels * (2 * choices.train.context_slices + 1)
    network = build_network(
        part.name, spatial_dims=dims, in_channels=channels, out_channels=facts.out_channels, **part.arguments
    )
    with torch.no_grad():
        for module in network.modules():  # statistics of a trained network are not those of a new one
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    folder.mkdir(parents=True)
    state = {
        "pipeline": choices.to_dict(), "dataset": facts.to_dict(), "in_channels": channels,
        "out_channels": facts.out_channels,
        "network_state": network.state_dict(), "threshold": None, "metrics": {"Dice": 0.5}, "progress": {"epoch": 3},
        "versions": {"torch": "x"},
    }  # fmt: skip
    CheckpointStore(folder).save(state, "best")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", pipeline(), dataset())
    (folder / "split.json").write_text(
        json.dumps({"seed": 0, "folds": 5, "fold": 0, "training": ["a", "b"], "validation": ["c"]})
    )
    entry = {"label": "organ", "metric": "Dice", "unit": "", "better": "higher", "definition": "",
             "level": "case", "n": 5, "patients": 5,
             "mean": 0.9, "sd": 0.1, "median": 0.9, "q1": 0.8, "q3": 1.0, "low": 0.81, "high": 0.97, "scored": 5,
             "missed": 0,
             "false_alarm": 0, "both_empty": 0}  # fmt: skip
    write_summary(folder / "validation" / "summary.json", {"schema": SCHEMA, "scores": [entry]})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, axes in enumerate(([-1.5, -1.5, 4.0], [2.0, 1.5, -3.0])):
        array = np.zeros((37, 30, 15), np.int16) - 1000
        array[8:30, 6:24, 2:12] = generator.normal(60, 60, (22, 18, 10))
        affine = np.diag([*axes, 1.0])
        affine[:3, 3] = [10, -20, 5]
        nibabel.Nifti1Image(array, affine).to_filename(folder / f"scan_{number}.nii.gz")
    return folder


def masks(folder):
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def wanted(run, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wanted")
    assert predict(run, images, folder, progress=False).exit_code == 0
    found = masks(folder)
    assert len(found) == 2
    assert all(len(np.unique(mask)) > 1 for mask in found.values())
    return found


def test_a_package_predicts_the_same_masks(run, images, wanted, tmp_path):
    folder = export_package(run, tmp_path / "package")
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.safetensors", "MODEL_CARD.md"}
    assert predict(folder, images, tmp_path / "masks", progress=False).exit_code == 0
    found = masks(tmp_path / "masks")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    content = json.loads((folder / "model.json").read_text())
    assert content["format"] == FORMAT
    assert Pipeline.from_dict(content["pipeline"]) == pipeline()
    export_package(run, folder)  # an earlier export is replaced


def test_the_model_card_says_what_matters(run, tmp_path):
    text = (export_package(run, tmp_path / "package") / "MODEL_CARD.md").read_text()
    for said in (
        "Not a medical device",
        "fold 0 of 5",
        "2 cases trained on, 1 held out",
        "0.810 to 0.970",
        r"Phantom \`CT\` \| \<b\>",
        "Limits",
        "1 organ, 2 lesion",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "E361"),
        ("model.safetensors", None, "E360"),
        ("model.json", lambda b: b"{", "E362"),
        ("model.json", lambda b: b"[1]", "E362"),
        ("model.json", lambda b: b.replace(FORMAT.encode(), b"other"), "E362"),
        ("model.json", lambda b: b.replace(b'"model.safetensors"', b'"../../secret"'), "E"),
        ("model.json", lambda b: b.replace(b'"safetensors"', b'"pickle"'), "E362"),
        ("model.json", lambda b: b.replace(b'"weights"', b'"weihgts"'), "E362"),
        ("model.json", lambda b: b.replace(b'"channels": [', b'"channels": [2,'), "E36"),
    ],
)
def test_damaged_and_foreign_packages_are_refused(run, tmp_path, name, change, code):
    folder = export_package(run, tmp_path / "package")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change is not None:
        (folder / name).write_bytes(change(content))
    with pytest.raises(MedsegError) as caught:
        load_model(folder)
    assert caught.value.code.startswith(code)
    assert caught.value.exit_code in (2, 3)


def test_exports_do_not_overwrite_what_is_not_theirs(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for export in (export_package, export_bundle, export_onnx):
        with pytest.raises(UsageError, match="something else"):
            export(run, tmp_path)
        with pytest.raises(CheckpointError):
            export(tmp_path / "nothing", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "configs").mkdir()  # a bundle that is not medseg's, such as one of MONAI's model zoo
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(UsageError, match="something else"):
        export_bundle(run, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_export_of_another_model_is_not_replaced(run, tmp_path):
    other = make_run(tmp_path / "other", pipeline(), dataset(), seed=1)
    for number, export in enumerate((export_package, export_bundle)):
        export(run, tmp_path / f"x{number}")
        before = (tmp_path / f"x{number}" / "model.json").read_bytes()
        with pytest.raises(UsageError, match="another model"):
            export(other, tmp_path / f"x{number}")
        assert (tmp_path / f"x{number}" / "model.json").read_bytes() == before
        export(run, tmp_path / f"x{number}")  # the same model again
    with pytest.raises(UsageError, match="another form"):
        export_package(run, tmp_path / "x1")
    assert medseg.export_package is export_package


@pytest.fixture(scope="module")
def onnx(run, tmp_path_factory):
    return export_onnx(run, tmp_path_factory.mktemp("onnx") / "model")


def test_onnx_equals_the_network_on_any_size_and_batch(run, onnx):
    network = load_model(run).network
    session = ONNX.InferenceSession(str(onnx / "model.onnx"))
    for shape in ((1, 1, 16, 16, 16), (2, 1, 8, 20, 32), (1, 1, 40, 18, 12)):
        image = torch.randn(shape)
        (found,) = session.run(None, {"image": image.numpy()})
        assert np.abs(found - network(image).numpy()).max() < 1e-4
    assert json.loads((onnx / "model.json").read_text())["onnx"]["difference"] < 1e-4
    with pytest.raises(UsageError, match="not an export"):
        export_package(onnx, onnx.parent / "again")


def test_predict_takes_an_onnx_export(onnx, images, wanted, tmp_path):
    assert predict(onnx, images, tmp_path, progress=False).exit_code == 0
    for name, mask in masks(tmp_path).items():
        assert (mask != wanted[name]).mean() < 1e-3  # rounding may move a voxel between classes


def test_the_standalone_runner_needs_no_medseg_and_gives_the_same_masks(onnx, images, wanted, tmp_path):
    block = tmp_path / "block"
    for name in ("medseg", "monai", "torch"):  # importing any of them would fail
        (block / name).mkdir(parents=True)
        (block / name / "__init__.py").write_text("raise ImportError('not here')")
    command = [
        sys.executable,
        str(onnx / "run_onnx.py"),
        *map(str, sorted(images.glob("*.nii.gz"))),
        "-o",
        str(tmp_path / "masks"),
    ]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(block), "PATH": "/usr/bin:/bin"}, capture_output=True)
    found = masks(tmp_path / "masks")
    assert found.keys() == wanted.keys()
    for name, mask in found.items():
        assert (mask != wanted[name]).mean() < 1e-3
    for path in images.glob("*.nii.gz"):
        made = nibabel.load(tmp_path / "masks" / path.name)
        assert np.allclose(made.affine, nibabel.load(path).affine)


def test_the_runner_replaces_no_image_and_no_other_mask(onnx, images, tmp_path):
    for part in ("a", "b"):
        shutil.copytree(images, tmp_path / part)
    first, second = (sorted((tmp_path / part).glob("*.nii.gz"))[0] for part in ("a", "b"))
    before = first.read_bytes()
    for given, output in (
        ([first], first.parent),
        ([first, second], tmp_path / "out"),
        ([tmp_path / "no.nii"], tmp_path),
    ):
        command = [sys.executable, str(onnx / "run_onnx.py"), *map(str, given), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, str(given[0]) in done.stderr, "Traceback" in done.stderr) == (1, True, False)
    assert first.read_bytes() == before
    assert not masks(tmp_path / "out")


def test_the_runner_tiles_a_picture_of_an_unpadded_network_exactly(tmp_path):
    choices = pipeline(
        preprocess=[{"NormalizeIntensityd": {"channel_wise": True}}], network={"UNet": {"channels": [4, 8]}},
        train={"epochs": 1, "batch": 1, "patch": [32, 32]}, inference="OverlapTileInferer", postprocess=[],
    )  # fmt: skip
    facts = dataset(dims=2, unit="px", channels=["r", "g", "b"], colour="rgb", modality="photograph")
    run = make_run(tmp_path / "run", choices, facts, seed=3)
    picture = np.random.default_rng(1).integers(0, 255, (70, 83, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "a.png")
    predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    folder = export_onnx(run, tmp_path / "onnx")
    script = folder / "run_onnx.py"
    script.write_text(script.read_text().replace("2: 1024", "2: 20"))  # many tiles
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "in" / "a.png"), "-o", str(tmp_path / "masks")], check=True
    )
    one, two = (np.asarray(Image.open(tmp_path / d / "a.png")) for d in ("out", "masks"))
    assert len(np.unique(one)) > 1
    assert (one != two).mean() < 1e-3


def test_the_runner_reads_pictures_as_medseg_does_or_stops(tmp_path):
    """16 bits in either order of bytes are 16 bits; what would be cut to 8, and other channels, end without a mask."""
    choices = pipeline(
        preprocess=[{"NormalizeIntensityd": {}}], network={"UNet": {"channels": [4, 8]}},
        train={"epochs": 1, "batch": 1, "patch": [32, 32]}, inference="OverlapTileInferer", postprocess=[],
    )  # fmt: skip
    grey = dataset(dims=2, unit="px", channels=["grey"], colour="grey", modality="microscopy")
    run = make_run(tmp_path / "run", choices, grey, seed=3)
    folder = export_onnx(run, tmp_path / "onnx")
    pixels = np.random.default_rng(1).integers(300, 60000, (40, 44), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    for name, order in (("little", "<"), ("big", ">")):
        tifffile.imwrite(tmp_path / f"in/{name}.tif", pixels, byteorder=order)
    predict(run, tmp_path / "in", tmp_path / "out", progress=False)
    wanted = tifffile.imread(tmp_path / "out" / "big.tif")
    assert len(np.unique(wanted)) > 1
    command = [sys.executable, str(folder / "run_onnx.py"), "-o", str(tmp_path / "masks")]
    subprocess.run([*command, *(str(tmp_path / f"in/{name}.tif") for name in ("little", "big"))], check=True)
    for name in ("little", "big"):
        assert (np.asarray(Image.open(tmp_path / f"masks/{name}.png")) != wanted).mean() < 1e-3
    tifffile.imwrite(tmp_path / "colour16.tif", np.stack([pixels] * 3, -1), photometric="rgb")
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([pixels] * 5), photometric="minisblack")
    Image.fromarray(np.random.default_rng(1).integers(0, 9, (40, 44, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    for name in ("colour16.tif", "pages.tif", "colour.png"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert (done.returncode, name in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert sorted(path.stem for path in (tmp_path / "masks").iterdir()) == ["big", "little"]


def test_the_runner_takes_neighbouring_slices_as_channels(images, tmp_path):
    choices = pipeline(
        preprocess=[{"NormalizeIntensityd": {}}], postprocess=[], inference="OverlapTileInferer",
        train={"epochs": 1, "batch": 1, "patch": [16, 16], "context_slices": 1},
    )  # fmt: skip
    run = make_run(tmp_path / "run", choices, dataset(), seed=5)
    predict(run, images, tmp_path / "out", progress=False)
    folder = export_onnx(run, tmp_path / "onnx")
    command = [sys.executable, str(folder / "run_onnx.py"), *map(str, sorted(images.glob("*.nii.gz")))]
    subprocess.run([*command, "-o", str(tmp_path / "masks")], check=True)
    wanted, found = masks(tmp_path / "out"), masks(tmp_path / "masks")
    assert len(wanted) == 2
    for name, mask in wanted.items():
        assert len(np.unique(mask)) > 1
        assert (mask != found[name]).mean() < 1e-3


def run_both(run, image, tmp_path):
    """The mask of `medseg predict` (None where it refuses), that of the runner, and what the runner says."""
    folder = export_onnx(run, tmp_path / "onnx")
    done = predict(run, image, tmp_path / "out", progress=False)
    command = [sys.executable, str(folder / "run_onnx.py"), str(image), "-o", str(tmp_path / "masks")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in said.stderr

    def read(path):
        array = np.asarray(nibabel.load(path).dataobj if path.suffix == ".gz" else Image.open(path))
        assert len(np.unique(array)) > 1
        return array

    one = read(tmp_path / "out" / image.name) if done.exit_code == 0 else None
    return one, read(tmp_path / "masks" / image.name) if said.returncode == 0 else None, said.stderr


PICTURES = {"dims": 2, "unit": "px", "channels": ["grey"], "colour": "grey", "modality": "microscopy"}


@pytest.mark.parametrize(
    ("preprocess", "postprocess"),
    [
        (["NormalizeIntensityd", {"Spacingd": {"pixdim": [2.0, 2.0]}}], []),  # as hela and liver_slices have it
        (["NormalizeIntensityd"], [{"Threshold": {"value": 0.35}}]),
    ],
)
def test_the_runner_resamples_pictures_and_takes_thresholds(tmp_path, preprocess, postprocess):
    choices = pipeline(
        preprocess=preprocess, postprocess=postprocess, train={"epochs": 1, "batch": 1, "patch": [16, 16]},
        inference="OverlapTileInferer",
    )  # fmt: skip
    run = make_run(tmp_path / "run", choices, dataset(**PICTURES, labels={0: "background", 1: "cell"}))
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (37, 46), dtype=np.uint8)).save(tmp_path / "a.png")
    one, two, said = run_both(run, tmp_path / "a.png", tmp_path)
    assert (one != two).mean() < 1e-3
    assert "not done" not in said


@pytest.mark.parametrize(
    ("rule", "unit", "same"),
    [("qform", "mm", True), ("sform", "mm", True), ("auto", "mm", False), ("auto", "micron", True)],
)
def test_the_runner_takes_the_affine_that_medseg_takes(tmp_path, rule, unit, same):
    """Two that disagree: the one that the set names, or none; micrometres are a thousandth of a millimetre."""
    choices = pipeline(preprocess=[{"Spacingd": {"pixdim": [2.0, 3.0]}}, *pipeline().to_dict()["preprocess"][2:]])
    run = make_run(tmp_path / "run", choices, dataset(affine=rule))
    values = np.random.default_rng(2).normal(60, 60, (21, 19, 9)).astype(np.int16)
    length = 1000.0 if unit == "micron" else 1.0
    image = nibabel.Nifti1Image(values, np.diag([1.5 * length, 1.5 * length, 4.0 * length, 1.0]))
    image.header.set_xyzt_units(unit)
    image.set_qform(image.affine if unit == "micron" else np.diag([3.0, 1.5, 4.0, 1.0]), 1)
    image.set_sform(image.affine, 1)
    image.to_filename(tmp_path / "a.nii.gz")
    one, two, said = run_both(run, tmp_path / "a.nii.gz", tmp_path)
    assert (one is None, two is None) == (not same, not same), said
    assert one is None or (one != two).mean() < 1e-3


def test_the_runner_stops_or_says_so_where_tiles_are_others(images, tmp_path):
    other = {"GaussianTileInferer": {"roi_size": [16, 16, 8]}}, {"OverlapTileInferer": {"border": "mirror"}}
    for number, inference in enumerate(other):
        run = make_run(tmp_path / f"run{number}", pipeline(inference=inference), dataset())
        _, found, said = run_both(run, images / "scan_0.nii.gz", tmp_path / str(number))
        assert (found is None, next(iter(inference)) in said) == (number == 1, True)


@pytest.fixture(scope="module")
def runner(onnx):
    """The standalone script as a module."""
    spec = importlib.util.spec_from_file_location("run_onnx", onnx / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ScaleIntensityd", {}),
        ("ScaleIntensityd", {"minv": -1.0, "maxv": 1.0}),
        ("ScaleIntensityd", {"minv": None, "maxv": None}),
        ("ScaleIntensityRanged", {"a_min": 10, "a_max": 500, "b_min": 0, "b_max": 1, "clip": True}),
        ("ScaleIntensityRangePercentilesd", {"lower": 1, "upper": 99, "b_min": 0, "b_max": 1, "channel_wise": True}),
        ("NormalizeIntensityd", {}),
        ("NormalizeIntensityd", {"channel_wise": True}),
        ("NormalizeIntensityd", {"channel_wise": True, "subtrahend": [0.5, 500.0], "divisor": [0.3, 300.0]}),
    ],
)
def test_the_runner_prepares_images_as_monai_does(runner, name, arguments, constant):
    random = np.random.default_rng(0)
    image = np.stack([random.random((9, 8)), 1000 * random.random((9, 8))]).astype(np.float32)
    if constant:
        image[:] = 5
    (wanted,) = getattr(monai.transforms, name)("image", **arguments)({"image": torch.tensor(image)}).values()
    found, _ = runner.preprocess(image.copy(), np.eye(4), [{name: arguments}, "BoundaryWeightMapd"])
    assert np.allclose(found, np.asarray(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "lacks"),
    [
        ({"ScaleIntensityd": {"minv": None, "maxv": None, "factor": 0.5}}, "ScaleIntensityd.factor"),
        ({"ScaleIntensityd": {"channel_wise": True}}, "ScaleIntensityd.channel_wise"),
        ({"NormalizeIntensityd": {"nonzero": True}}, "NormalizeIntensityd.nonzero"),
        ({"NormalizeIntensityd": {"nonzero": False}}, None),
        ({"HistogramNormalized": {}}, "HistogramNormalized"),
    ],
)
def test_the_runner_refuses_what_it_does_not_do(images, tmp_path, step, lacks):
    facts = dataset()
    folder = export_onnx(make_run(tmp_path / "run", pipeline(preprocess=[step]), facts), tmp_path / "onnx")
    assert json.loads((folder / "model.json").read_text())["onnx"]["runner_lacks"] == [lacks] * (lacks is not None)
    command = [sys.executable, str(folder / "run_onnx.py"), str(sorted(images.glob("*.nii.gz"))[0])]
    done = subprocess.run([*command, "-o", str(tmp_path / "masks")], capture_output=True, text=True)
    assert done.returncode == (lacks is not None)
    assert "Traceback" not in done.stderr
    assert lacks is None or lacks in done.stderr


@pytest.mark.parametrize("spacing", [0.91, 0.94, 1.0, 1.03, 1.29, 1.41, 1.45])
def test_the_runner_keeps_voxels_at_the_border_of_the_coarser_grid(runner, spacing):
    """Where 8 voxels become 4 of twice the size, the last voxel's centre lies on the border of the last of them."""
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-20.13, 7.77, 0.1]
    coarse, place = runner.respace(np.zeros((1, 8, 8, 8), np.float32), affine, [2 * spacing])
    found = runner.to_native(np.stack([0 * coarse[0], 0 * coarse[0] + 1]), place, affine, (8, 8, 8))
    assert (found[1] == 1).all()


@pytest.mark.parametrize("rule", ["refuse", -50.0])
def test_the_runner_refuses_nan(tmp_path, rule):
    run = make_run(tmp_path / "run", pipeline(), dataset(nan=rule))
    values = np.random.default_rng(2).normal(0, 100, (16, 16, 16)).astype(np.float32)
    values[3:6, 4, 5] = np.nan
    nibabel.Nifti1Image(values, np.diag([2.0, 2, 3, 1])).to_filename(tmp_path / "a.nii.gz")
    folder = export_onnx(run, tmp_path / "onnx")
    command = [sys.executable, str(folder / "run_onnx.py"), str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "masks")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "NaN" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    return export_bundle(run, tmp_path_factory.mktemp("bundle") / "bundle")


def test_the_bundles_commands_can_be_pasted(bundle):
    text = next(p for p in bundle.rglob("README.md")).read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("    ")]
    assert [command[3] if command[0] == "python" else command[1] for command in commands] == [
        "run", "verify_metadata", "verify_net_in_out", "ckpt_export", "predict"
    ]  # fmt: skip
    for command in commands[:4]:
        words = command[4:]
        values = [b for a, b in itertools.pairwise(words) if a.startswith("--")]
        assert all(not value.startswith("--") for value in values)
        assert all((bundle / value).is_file() for value in values if value.startswith("configs/"))


def test_a_bundle_runs_offline_with_the_same_masks(bundle, images, wanted, tmp_path, monkeypatch):
    from monai.bundle import run as run_bundle

    monkeypatch.chdir(bundle)
    run_bundle(config_file="configs/inference.json", dataset_dir=str(images), output_dir=str(tmp_path), device="cpu")
    found = masks(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    predict(bundle, images, tmp_path / "again", progress=False)
    assert all(np.array_equal(mask, wanted[name]) for name, mask in masks(tmp_path / "again").items())


def test_a_bundle_passes_monais_checks_offline(bundle, monkeypatch, tmp_path):
    from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out

    monkeypatch.chdir(bundle)
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    verify_net_in_out("network_def", device="cpu", **files)
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file="models/model.pt", **files)
    image = torch.randn(1, 1, 16, 16, 32)
    wanted = load_model(bundle).network(image)
    assert torch.equal(torch.jit.load(str(tmp_path / "model.ts"))(image), wanted)
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    verify_metadata(meta_file="configs/metadata.json", filepath="configs/schema.json")


@pytest.mark.slow
def test_a_bundle_passes_as_others_run_it(bundle, images, wanted, tmp_path):
    """`python -m monai.bundle ...` in new processes that cannot reach the network and do not have medseg's folder."""
    pytest.importorskip("fire", reason="fire is not installed")
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    # proxies that refuse: nothing may be fetched, the schema of the metadata included
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    files = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
    commands = {
        "verify_metadata": ["--meta_file", "configs/metadata.json", "--filepath", "configs/schema.json"],
        "verify_net_in_out": ["network_def", "--device", "cpu", *files],
        "run": [*files[2:], "--dataset_dir", str(images), "--output_dir", str(tmp_path / "masks"), "--device", "cpu"],
        "ckpt_export": ["network_def", "--filepath", str(tmp_path / "m.ts"), "--ckpt_file", "models/model.pt", *files],
    }
    for command, arguments in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", "monai.bundle", command, *arguments], cwd=bundle, capture_output=True, text=True,
            env={**os.environ, **offline, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    found = masks(tmp_path / "masks")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    image = torch.randn(1, 1, 16, 16, 32)
    assert torch.equal(torch.jit.load(str(tmp_path / "m.ts"))(image), load_model(bundle).network(image))


def test_a_traced_network_has_the_same_parameters():
    network = build_network("AttentionUNet", spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8)).eval()
    traced = traced_network("AttentionUNet", 2, 1, 2, channels=[4, 8, 8])
    traced.load_state_dict(network.state_dict())
    image = torch.randn(2, 1, 24, 40)
    assert torch.equal(traced(image), network(image))


def test_a_bundles_pickle_cannot_run_code(bundle, tmp_path):
    import shutil

    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    torch.save({"a": Canary()}, folder / "models" / "model.pt")
    content = json.loads((folder / "model.json").read_text())
    from medseg.files import sha256_file

    content["weights"]["sha256"] = sha256_file(folder / "models" / "model.pt")
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        read_package(folder)
    assert not (tmp_path / "canary").exists()

"""The program: formats, failures apart from each other, resume to the byte, shards, names, plan, certificate."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from medseg import volumes
from medseg.cohort import choose_shard, run_cohort, take_shard
from medseg.component import Component
from medseg.config import DatasetSpec
from medseg.data import find_cases
from medseg.errors import DataError, ResourceError, UsageError
from medseg.evaluation import evaluate
from medseg.files_atomic import HOST, TEMPORARY
from medseg.inference import OverlapTileInferer
from medseg.inference.cost import certify
from medseg.inference.intensity import unlike_range
from medseg.inference.memory import resident_bytes
from medseg.inference.outputs import plan_outputs, probability_file
from medseg.networks import UNet
from medseg.prediction import predict


class Bright(torch.nn.Module):
    """Foreground where the image is above 100: the right answer is known."""

    exact_under_tiling, out_channels = True, 2

    def __init__(self, dims, channels=1):
        super().__init__()
        self.spatial_dims, self.context, self.divisor, self.in_channels = dims, (2,) * dims, (2,) * dims, channels
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        value = (images.mean(1, keepdim=True) - 100) * self.scale
        return torch.cat([-value, value], 1)


def make_model(dims=3, channels=1, preprocess=(), inference=None, postprocess=(), networks=None, colour=None):
    spec = DatasetSpec.model_validate_json(json.dumps({
        "name": "made", "title": "made", "modality": "CT", "dims": dims,
        "channels": ["grey"] if channels == 1 else ["red", "green", "blue"],
        "colour": colour, "labels": {0: "background", 1: "bright"}, "unit": "mm" if dims == 3 else "px",
        "files": [{"training": {"image": "{id}.nii.gz", "label": "{id}_label.nii.gz"}}],
    }))  # fmt: skip
    pipeline = SimpleNamespace(
        preprocess=preprocess, postprocess=postprocess, network=Component("Bright"),
        inference=inference or Component("OverlapTileInferer", {"tile": 14}),
    )  # fmt: skip
    networks = networks or (Bright(dims, channels).eval(),)
    return SimpleNamespace(networks=networks, pipeline=pipeline, dataset=spec, metadata={})


def make_volume(path, shape=(20, 18, 16), affine=None, seed=0):
    rng = np.random.default_rng(seed)
    array = (rng.random(shape) * 200).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.diag([0.7, 0.7, 3.5, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return array


def test_nifti_in_nifti_out_on_the_same_grid(tmp_path):
    affine = np.array([[-0.7, 0.1, 0, 5], [0.1, 0.69, 0.2, -9], [0, -0.05, 3.5, 7], [0, 0, 0, 1.0]])
    q = np.linalg.qr(affine[:3, :3])[0]
    affine[:3, :3] = q @ np.diag([0.7, 0.7, 3.5])
    array = make_volume(tmp_path / "a.nii.gz", affine=affine)
    result = predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", progress=False)
    assert result.exit_code == 0
    written, source = nibabel.load(tmp_path / "out" / "a.nii.gz"), nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), array > 100)
    assert np.array_equal(written.affine, source.affine)
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[field] == source.header[field]
    assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["{id}_t1.nii.gz", "{id}_t2.nii.gz"], ["{}_t1.nii.gz", "{}_t2.nii.gz"]),
        (["{id}_t1.nii.gz", "{id}_t2.nii.gz"], ["{}_0000.nii.gz", "{}_0001.nii.gz"]),
        (["t1/{id}.nii.gz", "t2/{id}.nii.gz"], ["{}_0000.nii", "{}_0001.nii"]),
        (["set/{id}/t1.nii.gz", "set/{id}/t2.nii.gz"], ["{}/t1.nii.gz", "{}/t2.nii.gz"]),
        (["t1/{id}.nii.gz", "t2/{id}.nii.gz"], ["t1/{}.nii.gz", "t2/{}.nii.gz"]),
        (["set/t1/raw/{id}.nii.gz", "set/t2/raw/{id}.nii.gz"], ["t1/raw/{}.nii.gz", "t2/raw/{}.nii.gz"]),
    ],
)
def test_channels_that_are_files_of_their_own_are_one_case(tmp_path, patterns, names):
    model = make_model(channels=2)
    facts = {**model.dataset.to_dict(), "channels": ["t1", "t2"]}
    facts["files"] = [{"training": {"image": patterns, "label": "{id}_label.nii.gz"}}]
    model.dataset = DatasetSpec.from_dict(facts)
    (tmp_path / "in").mkdir()
    arrays = {}
    for number, case in enumerate(("p1", "p_0000")):  # the second looks like a channel itself
        files = [tmp_path / "in" / name.format(case) for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        arrays[case] = [make_volume(file, seed=10 * number + k) for k, file in enumerate(files)]
    result = predict(model, tmp_path / "in", tmp_path / "out", progress=False)
    assert [(case.case, case.status) for case in result.cases] == [("p1", "done"), ("p_0000", "done")]
    for case, (first, second) in arrays.items():
        found = volumes.read_label(tmp_path / "out" / f"{case}.nii.gz").array[0]
        np.testing.assert_array_equal(found, (first / 2 + second / 2) > 100)
    again = predict(model, tmp_path / "in", tmp_path / "out", resume=True, progress=False)
    assert [case.status for case in again.cases] == ["skipped", "skipped"]
    changed = make_volume(
        tmp_path / "in" / names[1].format("p1"), seed=99
    )  # a further channel counts as the first does
    again = predict(model, tmp_path / "in", tmp_path / "out", resume=True, progress=False)
    assert [case.status for case in again.cases] == ["done", "skipped"]
    found = volumes.read_label(tmp_path / "out" / "p1.nii.gz").array[0]
    np.testing.assert_array_equal(found, (arrays["p1"][0] / 2 + changed / 2) > 100)
    (tmp_path / "in" / names[1].format("p1")).unlink()
    left = predict(model, tmp_path / "in", tmp_path / "out2", progress=False)
    assert [case.status for case in left.cases] == ["failed", "done"]
    assert "give the files of all channels" in left.cases[0].error["fix"]


def test_cases_whose_folder_bears_their_id_are_called_by_it(tmp_path, monkeypatch):
    model = make_model()
    files = [{"training": {"image": "set/{site}/{id}/ct.nii.gz", "label": "set/{site}/{id}/seg.nii.gz"}}]
    model.dataset = DatasetSpec.from_dict({**model.dataset.to_dict(), "files": files})
    arrays = {}
    for number, case in enumerate(("p1", "p2")):
        (tmp_path / f"new/s/{case}").mkdir(parents=True)
        arrays[case] = make_volume(tmp_path / f"new/s/{case}/ct.nii.gz", seed=number)
    predict(model, str(tmp_path / "new/s/*/ct.nii.gz"), tmp_path / "out", progress=False)
    for case, array in arrays.items():
        found = volumes.read_label(tmp_path / f"out/{case}.nii.gz").array[0]
        np.testing.assert_array_equal(found, array > 100)
    monkeypatch.chdir(tmp_path / "new/s/p2")
    predict(model, "ct.nii.gz", tmp_path / "out2", progress=False)
    make_volume(tmp_path / "other.nii.gz")
    predict(model, tmp_path / "other.nii.gz", tmp_path / "out2", progress=False)
    assert sorted(path.name for path in (tmp_path / "out2").glob("*.gz")) == ["other.nii.gz", "p2.nii.gz"]


def test_labels_beside_their_images_are_no_images(tmp_path):
    model = make_model()  # {id}.nii.gz, {id}_label.nii.gz
    (tmp_path / "in").mkdir()
    for name in ("p1", "p1_label", "p2", "lone_label"):
        make_volume(tmp_path / f"in/{name}.nii.gz")
    result = predict(model, tmp_path / "in", tmp_path / "out", progress=False)
    assert [case.case for case in result.cases] == ["lone_label", "p1", "p2"]
    assert "note: 1 file named like a label of an input, as in made: left out" in result.text()
    named = sorted((tmp_path / "in").iterdir())  # what a shell makes of in/*: a file that is named is always taken
    result = predict(model, named, tmp_path / "out2", progress=False)
    assert [case.case for case in result.cases] == ["lone_label", "p1", "p1_label", "p2"]
    assert "1 input named like a label of another input, as in made: computed like any image" in result.text()


@pytest.mark.parametrize("image", ["{id}/ct.nii.gz", "{id}/{id}.nii.gz"])
def test_labels_beside_their_images_in_a_folder_for_each_case_are_no_images(tmp_path, image):
    model = make_model()
    files = [{"training": {"image": f"set/{image}", "label": "set/{id}/GT.nii.gz"}}]
    model.dataset = DatasetSpec.from_dict({**model.dataset.to_dict(), "files": files})
    for case in ("p1", "p2"):
        (tmp_path / f"in/{case}").mkdir(parents=True)
        for name in (image.format(id=case), f"{case}/GT.nii.gz"):
            make_volume(tmp_path / "in" / name)
    (tmp_path / "in/GT").mkdir()
    make_volume(tmp_path / "in/GT/GT.nii.gz")  # by itself an image, or one that is called so
    result = predict(model, tmp_path / "in", tmp_path / "out", progress=False)
    assert [case.case for case in result.cases] == ["GT", "p1", "p2"]
    assert "note: 2 files named like a label of an input, as in made: left out" in result.text()


def test_frames_of_several_videos_are_called_by_video_and_frame_where_they_lie_as_in_the_set(tmp_path):
    model = make_model(2, colour="grey")
    files = [{"training": {"image": "set/{video}/t{frame}.tif", "label": "set/{video}_ST/man{frame}.tif"}}]
    model.dataset = DatasetSpec.from_dict({**model.dataset.to_dict(), "files": files})
    arrays = {}
    for number, case in enumerate(("01_000", "01_001", "02_000")):
        arrays[case] = np.random.default_rng(number).integers(0, 200, (12, 14), np.uint8)
        path = tmp_path / f"new/set/{case[:2]}/t{case[3:]}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[case]).save(path)
        label = tmp_path / f"new/set/{case[:2]}_ST/man{case[3:]}.tif"
        label.parent.mkdir(exist_ok=True)
        Image.fromarray(arrays[case]).save(label)
    result = predict(model, str(tmp_path / "new/set/0?"), tmp_path / "out", progress=False)
    assert [case.case for case in result.cases] == [case.id for case in find_cases(model.dataset, tmp_path / "new")]
    for case, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/{case}.tif")) > 0, array > 100)
    Image.fromarray(arrays["01_000"]).save(tmp_path / "t7.tif")  # anywhere else a file is called as it is
    assert predict(model, tmp_path / "t7.tif", tmp_path / "out2", progress=False).cases[0].case == "t7"


def test_a_volume_on_another_grid_than_those_of_training_is_told_of(tmp_path):
    model = make_model()
    seen = {"axes": {"RAS": 3}, "spacing": [[0.7, 0.7, 3.5], [0.8, 0.8, 3.5]]}
    for name, affine in (("same", [0.7, 0.7, 3.5, 1]), ("turned", [-0.7, 0.7, 3.5, 1]), ("coarse", [1.4, 1.4, 3.5, 1])):
        make_volume(tmp_path / f"{name}.nii.gz", affine=np.diag(affine))
    files = sorted(tmp_path.glob("*.nii.gz"))
    for metadata in ({"seen": seen}, {"members": [{"seen": seen}, {"seen": {**seen, "axes": {"RPS": 3}}}]}):
        model.metadata = metadata
        result = predict(model, files, tmp_path / "out", progress=False)
        coarse, same, turned = (" ".join(case.notes) for case in result.cases)
        assert "its voxels are 1.4 x 1.4 x 3.5 mm" in coarse
        assert same == ""
        assert "its axes run LAS" in turned
    model.metadata = {"members": [{"seen": seen}, {"seen": {**seen, "axes": {"LAS": 3}}}]}  # one of them knows it
    assert predict(model, files[-1], tmp_path / "out", progress=False).cases[0].notes == ()


def test_numbered_files_that_hold_all_channels_are_cases(tmp_path):
    stack = np.stack([make_volume(tmp_path / "x.nii.gz", seed=k) for k in range(3)], -1)
    (tmp_path / "in").mkdir()
    for number in range(3):
        nibabel.save(nibabel.Nifti1Image(stack, np.eye(4)), tmp_path / f"in/a_{number:04d}.nii.gz")
    result = predict(make_model(channels=3), tmp_path / "in", tmp_path / "out", progress=False)
    assert [(case.case, case.status) for case in result.cases] == [(f"a_{n:04d}", "done") for n in range(3)]


@pytest.mark.parametrize(
    "inference",
    [
        Component("OverlapTileInferer", {"tile": 14}),
        Component("OverlapTileInferer", {"mirror": True}),
        Component("GaussianTileInferer", {"roi_size": 8}),
    ],
)
def test_preprocessing_is_undone(tmp_path, inference):
    array = make_volume(tmp_path / "a.nii.gz", affine=np.diag([-0.7, -0.7, 3.5, 1.0]))
    steps = (Component("Orientationd", {"axcodes": "SRA"}),)
    model = make_model(preprocess=steps, inference=inference)
    predict(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    assert np.array_equal(volumes.read_label(tmp_path / "out" / "a.nii.gz").array[0], array > 100)


def test_whole_prediction_equals_monais_bundle_way_given_its_weights(tmp_path):
    # read, resample, windows, probabilities back to the native grid, argmax, write: every voxel the same as with
    # MONAI's transforms, once its inferer is given our importance (and the sizes place windows alike)
    from monai.data import decollate_batch, list_data_collate
    from monai.inferers import sliding_window_inference
    from monai.transforms import AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged, Spacingd

    from medseg.networks import UNet

    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=4, channels=(4, 8), padding="same", norm="batch").eval()
    array = np.random.default_rng(0).normal(size=(60, 60, 18)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.9, 0.9, 3.1, 1.0])), tmp_path / "a.nii.gz")
    spacing = (1.5, 1.5, 1.5)  # 36 voxels each way: two windows that meet the network's grid
    before = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), Spacingd("image", spacing)])
    after = Compose(
        [Invertd("label", before, orig_keys="image", nearest_interp=False), AsDiscreted("label", argmax=True)]
    )
    batch = list_data_collate([before({"image": str(tmp_path / "a.nii.gz")})])
    line = torch.exp(-((torch.arange(24.0) - 11.5) ** 2) / (2 * 3.0**2))
    weights = line[:, None, None] * line[:, None] * line
    with torch.inference_mode():
        logits = sliding_window_inference(
            batch["image"], (24,) * 3, 1, network, 0.5, mode="constant", roi_weight_map=weights
        )
        batch["label"] = logits.softmax(1)
    expected = after(decollate_batch(batch)[0])["label"][0].numpy()
    model = make_model(
        preprocess=(Component("Spacingd", {"pixdim": list(spacing)}),),
        inference=Component("GaussianTileInferer", {"roi_size": 24}), networks=(network,),
    )  # fmt: skip
    result = predict(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    found = np.asanyarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert len(np.unique(found)) == 4
    assert (found == expected).mean() > 0.999  # ties within rounding; 0.98 with MONAI's own importance


def test_steps_in_slabs_change_no_voxel(monkeypatch):
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms import ScaleIntensityRanged

    from medseg.inference import stages

    step = ScaleIntensityRanged("image", -100, 200, -1.0, 1.0, clip=True)
    image = torch.randn((2, 30, 7, 9), generator=torch.Generator().manual_seed(0)) * 200
    expected = step({"image": MetaTensor(image.clone())})["image"].as_tensor()
    monkeypatch.setattr(stages, "_SLAB", 300)
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1]))
    found = stages._in_slabs(step, {"image": MetaTensor(image.clone(), affine=affine)})["image"]
    assert torch.equal(found.as_tensor(), expected)
    assert torch.equal(found.affine, affine)


def test_pictures_get_an_index_picture_and_an_overlay(tmp_path):
    array = (np.random.default_rng(0).random((40, 33)) * 200).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "cell é 1.png")
    result = predict(make_model(2), [tmp_path], tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "cell é 1.png")), array > 100)
    assert Image.open(tmp_path / "out" / "overlays" / "cell é 1_overlay.png").mode == "RGB"


def test_a_refused_case_does_not_stop_the_others(tmp_path):
    for number in range(3):
        make_volume(tmp_path / f"{number}.nii.gz", seed=number)
    whole = (tmp_path / "1.nii.gz").read_bytes()
    (tmp_path / "1.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = predict(make_model(), [tmp_path], tmp_path / "out", progress=False)
    assert result.exit_code == 4
    assert [case.status for case in result.cases] == ["done", "failed", "done"]
    assert json.dumps(result.as_dict())
    assert "1.nii.gz" in result.text()
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["0.nii.gz", "2.nii.gz"]
    assert not list((tmp_path / "out").rglob(f"{TEMPORARY}*"))


def test_a_picture_for_a_volume_model_is_refused(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    make_volume(tmp_path / "b.nii.gz")
    result = predict(make_model(), [tmp_path], tmp_path / "out", progress=False)
    assert {case.case: case.status for case in result.cases} == {"a": "failed", "b": "done"}


def test_nothing_to_predict_and_wrong_options(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        predict(make_model(), [tmp_path / "empty"], tmp_path / "out", progress=False)
    with pytest.raises(UsageError, match="format"):
        predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", format="bmp", progress=False)
    with pytest.raises(UsageError, match="overwrite"):
        predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path, progress=False)
    with pytest.raises(UsageError, match="share"):
        predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", shard="3/3", progress=False)


def test_resume_skips_what_is_complete_and_only_that(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        make_volume(source / f"{number}.nii.gz", seed=number)
    model, out = make_model(), tmp_path / "out"
    predict(model, [source], out, progress=False)
    before = {p.name: p.read_bytes() for p in out.glob("*.nii.gz")}
    (out / "0.nii.gz").unlink()  # removed
    (out / "1.nii.gz").write_bytes(b"half")  # broken from outside
    make_volume(source / "2.nii.gz", seed=9)  # another input now
    result = predict(model, [source], out, resume=True, progress=False)
    assert [case.status for case in result.cases] == ["done", "done", "done", "skipped"]
    after = {p.name: p.read_bytes() for p in out.glob("*.nii.gz")}
    assert {n for n in before if before[n] != after[n]} == {"2.nii.gz"}
    with torch.no_grad():
        model.networks[0].scale.fill_(2.0)  # another model: nothing counts as complete
    assert {c.status for c in predict(model, [source], out, resume=True, progress=False).cases} == {"done"}


def test_the_mask_of_another_model_that_was_stopped_does_not_count_as_complete(tmp_path, monkeypatch):
    class Moved(Bright):
        def forward(self, images):
            return super().forward(images.roll(1, 2))

    spot = np.zeros((12, 12, 12), np.int16)
    spot[6, 6, 6] = 200
    nibabel.save(nibabel.Nifti1Image(spot, np.eye(4)), tmp_path / "a.nii.gz")
    out, model, other = tmp_path / "out", make_model(), make_model(networks=(Moved(3).eval(),))
    predict(model, tmp_path / "a.nii.gz", out, progress=False)
    before = (out / "a.nii.gz").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg.inference.stages.record", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(other, tmp_path / "a.nii.gz", out, progress=False)
    monkeypatch.undo()
    written = (out / "a.nii.gz").read_bytes()
    assert written != before
    assert len(written) == len(before)  # sizes do not tell
    assert predict(model, tmp_path / "a.nii.gz", out, resume=True, progress=False).cases[0].status == "done"
    assert (out / "a.nii.gz").read_bytes() == before


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_prediction import make_model
from medseg.prediction import predict
print("ready", flush=True)
predict(make_model(), [{source!r}], {out!r}, resume=True, progress=False)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_continued_gives_the_same_bytes(tmp_path):
    source, whole, out = tmp_path / "in", tmp_path / "whole", tmp_path / "out"
    source.mkdir()
    for number in range(6):
        make_volume(source / f"{number}.nii.gz", (96, 96, 60), seed=number)
    begin = time.monotonic()
    predict(make_model(), [source], whole, progress=False)
    took = time.monotonic() - begin
    expected = {p.name: p.read_bytes() for p in whole.glob("*.nii.gz")}
    assert len(expected) == 6
    code = KILLED.format(tests=os.path.dirname(__file__), source=str(source), out=str(out))
    for share in (0.05, 0.2, 0.35, 0.45, 0.1, 0.3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd())
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(share * took)
        process.kill()
        process.wait()
        process.stdout.close()
        for path in out.glob("*"):  # nothing partial under a final name, whenever the process was stopped
            if path.is_file() and not path.name.startswith("."):
                assert path.read_bytes() == expected[path.name]
    result = predict(make_model(), [source], out, resume=True, progress=False)
    assert "skipped" in {case.status for case in result.cases}
    assert {p.name: p.read_bytes() for p in out.glob("*.nii.gz") if not p.name.startswith(".")} == expected
    assert sorted(p.name for p in out.iterdir()) == sorted([".medseg", *expected])  # no temporary file is left


def test_what_a_killed_process_left_is_removed(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "out", save_probabilities=True, progress=False)
    for name in (f"{TEMPORARY}{HOST}-{dead.pid}-1.nii.gz", f"{TEMPORARY}{HOST}-{dead.pid}-2.zarr"):
        for shard in ("0/2", None):  # with shards it may belong to another machine
            (tmp_path / "out" / name).mkdir(exist_ok=True)
            predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "out", shard=shard, progress=False)
            assert (tmp_path / "out" / name).exists() == (shard is not None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_do_every_case_once(tmp_path, count):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(5):
        make_volume(source / f"{number}.nii.gz", (6, 6, 6), seed=number)
    seen = []
    for number in range(count):
        result = predict(make_model(), [source], tmp_path / "out", shard=f"{number}/{count}", progress=False)
        seen += [case.case for case in result.cases]
    assert sorted(seen) == list("01234")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 5


def test_shards_from_the_environment():
    assert choose_shard(None, {"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    slurm = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    assert choose_shard(None, slurm | {"SLURM_ARRAY_TASK_STEP": "4"}) == (2, 3)
    assert choose_shard("0/2", slurm) == (0, 2)
    with pytest.raises(UsageError, match="--shard K/N"):  # of tasks 1, 5 and 13: the third, or one of four?
        choose_shard(None, slurm | {"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_STEP": "4"})
    with pytest.raises(UsageError):
        choose_shard("a/b", {})
    assert sorted(i for k in range(3) for i in take_shard(range(10), k, 3)) == list(range(10))


def test_cohort_keeps_order_and_failures_apart():
    def read(item):
        if item == 2:
            raise DataError("bad")
        return item * 10

    def finish(item, value):
        if item == 4:
            raise ResourceError("disk full")
        return value

    for ahead in (True, False):
        found = list(run_cohort(range(6), read, lambda item, value: value + 1, finish, ahead=ahead))
        assert [o.item for o in found] == list(range(6))
        assert [o.result for o in found] == [1, 11, None, 31, None, 51]
        assert [type(o.error).__name__ for o in found if o.error] == ["DataError", "ResourceError"]
    with pytest.raises(ZeroDivisionError):
        list(run_cohort([0], read, lambda item, value: 1 / 0, finish))


def test_output_names_never_collide(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_volume(tmp_path / folder / "x.nii.gz", (4, 4, 4))
    with pytest.raises(UsageError):
        plan_outputs([tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "x.nii.gz"], tmp_path / "out")


def test_two_suffixes_of_one_name_are_refused(tmp_path):
    """Their overlay, probabilities and record would be one, each of the file that came last."""
    for name in ("a.png", "A.tif"):
        Image.fromarray(np.full((20, 30), 150, np.uint8)).save(tmp_path / name)
    with pytest.raises(UsageError, match="one output") as caught:
        predict(make_model(2), tmp_path, tmp_path / "out", progress=False)
    assert caught.value.code == "E103"
    assert not (tmp_path / "out").exists()


def test_images_of_formats_that_are_not_read_are_told(tmp_path):
    (tmp_path / "in").mkdir()
    make_volume(tmp_path / "in" / "a.nii.gz")
    for name in ("b.hdr", "b.img", "sub/c.BMP", "notes.txt", ".hidden.bmp", "out/d.bmp"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    result = predict(make_model(), tmp_path / "in", tmp_path / "in" / "out", progress=False)
    assert [case.case for case in result.cases] == ["a"]
    (line,) = result.lines
    assert "2 files in formats that medseg does not read (.bmp, .hdr)" in line
    assert result.as_dict()["lines"] == [line]
    assert not predict(make_model(), tmp_path / "in" / "a.nii.gz", tmp_path / "out", progress=False).lines
    with pytest.raises(UsageError, match="holds no images") as caught:
        predict(make_model(), tmp_path / "in" / "sub", tmp_path / "out", progress=False)
    assert caught.value.found == "1 file in formats that medseg does not read (.bmp)"


def test_masks_of_an_earlier_prediction_below_the_images_are_no_images(tmp_path):
    (tmp_path / "in").mkdir()
    make_volume(tmp_path / "in" / "a.nii.gz")
    for output in ("one", "two"):  # before, the masks in `one` were images of the same names
        result = predict(make_model(), tmp_path / "in", tmp_path / "in" / output, progress=False)
        assert [(case.case, case.status) for case in result.cases] == [("a", "done")]
        assert list(result.lines) == ["note: 1 folder of earlier predictions below the inputs: left out"] * (
            output == "two"
        )
    named = predict(make_model(), tmp_path / "in" / "one", tmp_path / "three", progress=False)  # of its own: taken
    assert [case.case for case in named.cases] == ["a"]
    (tmp_path / "in" / "a.nii.gz").unlink()
    with pytest.raises(UsageError, match="masks of an earlier prediction and no images"):
        predict(make_model(), tmp_path / "in", tmp_path / "four", progress=False)


def test_values_of_another_kind_than_the_pipelines_range_are_told(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    array[:, :12] = 0  # much of a picture is black
    kinds = {"same": array, "bits": array.astype(np.uint16) * 257, "share": (array / 255).astype(np.float32)}
    for name, values in kinds.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", values)
    for clip in (False, True):
        scale = Component("ScaleIntensityRanged", {"a_min": 0.0, "a_max": 255.0, "b_min": 0, "b_max": 1, "clip": clip})
        result = predict(make_model(2, preprocess=(scale,)), tmp_path, tmp_path / f"out{clip}", progress=False)
        told = {case.case: [note for note in case.notes if "do not suit" in note] for case in result.cases}
        assert {name: len(notes) for name, notes in told.items()} == {"same": 0, "bits": 1, "share": 1}
        assert "0 to 255" in told["bits"][0]
    result = predict(make_model(2), tmp_path, tmp_path / "none", progress=False)  # no range: any values will do
    assert not any(case.notes for case in result.cases)


def test_ct_in_and_around_the_window_is_not_told():
    scale = Component("ScaleIntensityRanged", {"a_min": -200, "a_max": 250, "clip": True})
    scan = np.full((40, 40, 10), -1024.0)  # mostly air
    scan[:10, :10] = np.linspace(-100, 1500, 10)
    assert unlike_range(scan, [scale]) == []
    assert unlike_range(np.full((9, 9, 9), -1024.0), [scale]) == []  # constant: the reader tells that
    assert len(unlike_range(np.linspace(30000, 40000, 4096), [scale])) == 1


def test_grey_pictures_for_a_model_of_colour_are_told(tmp_path):
    Image.fromarray(np.full((20, 30), 150, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "rgb.png")
    result = predict(make_model(2, channels=3, colour="rgb"), tmp_path, tmp_path / "out", progress=False)
    assert {case.case: "grey picture" in str(case.notes) for case in result.cases} == {"grey": True, "rgb": False}


def test_masks_that_were_predicted_from_other_images_than_the_sets_are_told(tmp_path):
    data = tmp_path / "data"
    for folder in ("im", "la", "other"):
        (data / folder).mkdir(parents=True)
    for number, case in enumerate(("a", "b")):
        array = make_volume(data / "im" / f"{case}.nii.gz", seed=number)
        image = nibabel.load(data / "im" / f"{case}.nii.gz")
        nibabel.save(nibabel.Nifti1Image((array > 100).astype(np.uint8), image.affine), data / "la" / f"{case}.nii.gz")
    (data / "datasets.yaml").write_text(
        "mine:\n  title: Mine\n  modality: CT\n  dims: 3\n  channels: [ct]\n  unit: mm\n"
        "  labels: {0: background, 1: organ}\n"
        "  files: {training: {image: 'im/{id}.nii.gz', label: 'la/{id}.nii.gz'}}\n"
    )

    def told(masks):
        found = evaluate(masks, "mine", data=data, part="training", workers=1, metrics=["Dice"])
        return [note for note in found.summary["notes"] if "from other files" in note]

    shutil.copytree(data / "im", tmp_path / "copy")  # with other times, in another place: the same images
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
    predict(make_model(), tmp_path / "copy", tmp_path / "masks", progress=False)
    assert told(tmp_path / "masks") == []
    make_volume(data / "other" / "b.nii.gz", seed=9)
    predict(make_model(), data / "other" / "b.nii.gz", tmp_path / "masks", progress=False)
    (note,) = told(tmp_path / "masks")
    assert note.startswith("1 of 2 masks: predicted from other files")
    assert "(b)" in note
    given = evaluate(
        tmp_path / "masks", data / "la", images=data / "im", workers=1, metrics=["Dice"], output=tmp_path / "scores"
    )
    assert note in given.summary["notes"]
    mask = tmp_path / "masks" / "b.nii.gz"  # someone else's mask, to which the record beside it does not belong
    shutil.copy(data / "la" / "b.nii.gz", mask)
    assert told(tmp_path / "masks") == []


def test_plan_predicts_nothing_and_tells_the_cost(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    result = predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", plan=True, certify=True, progress=False)
    assert not (tmp_path / "out").exists()
    cost = result.cases[0].cost
    assert cost["tiles"] > 1
    assert cost["redundancy"] > 1
    assert cost["peak_ram"] > 0
    assert result.certificate["exact"]
    assert "redundancy" in result.text()
    assert "exact" in result.text()


def test_certificate_refuses_the_word(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    network = Bright(3).eval()
    network.exact_under_tiling = False
    model = make_model(networks=(network,))
    result = predict(model, [tmp_path / "a.nii.gz"], tmp_path / "out", plan=True, certify=True, progress=False)
    assert not result.certificate["exact"]
    assert "not exact" in result.text()
    network = Bright(3).eval()
    network.context = (1, 1, 1)  # a network that states less context than it uses

    def smooth(images, inner=network.forward):
        for _ in range(2):
            images = torch.nn.functional.avg_pool3d(images, 5, 1, 2)
        return inner(images)

    network.forward = smooth
    model = make_model(networks=(network,))
    result = predict(model, [tmp_path / "a.nii.gz"], tmp_path / "out", plan=True, certify=True, progress=False)
    assert result.certificate["difference"] > 1e-3
    assert not result.certificate["exact"]


def test_certificate_of_an_image_smaller_than_a_tile(tmp_path):
    # the smallest tile has 20 voxels a side; mirrored, the image needs several
    make_volume(tmp_path / "a.nii.gz", (12, 9, 10))
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), padding="same", norm="batch").eval()
    options = {"certify": True, "plan": True, "progress": False}
    inference = Component("OverlapTileInferer", {})
    model = make_model(networks=(network,), inference=inference)
    told = predict(model, tmp_path / "a.nii.gz", tmp_path / "out", **options).certificate
    assert told["exact"], told
    # says less context than it has: seams are seen
    network.__class__ = type("Lying", (UNet,), {"context": property(lambda self: (2, 2, 2))})
    told = predict(model, tmp_path / "a.nii.gz", tmp_path / "out", **options).certificate
    assert not told["exact"], told
    assert told["difference"] > 1e-3


def test_certificate_that_does_not_fit_the_memory():
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), padding="same", norm="batch").eval()
    verdict = certify(torch.zeros(1, 90, 80, 70), network, OverlapTileInferer(max_ram="1MB"))
    assert (verdict.exact, verdict.as_dict()["difference"]) == (False, None)
    assert "nan" not in verdict.text()
    assert "memory" in verdict.text()


@pytest.mark.parametrize(
    ("inference", "channels", "tiles"),
    [
        (Component("OverlapTileInferer", {}), 1, 12),
        (Component("GaussianTileInferer", {"roi_size": 32}), 3, 12 * 3 * 3),
    ],
)
def test_plan_and_certificate_of_a_2d_network_on_a_volume(tmp_path, inference, channels, tiles):
    make_volume(tmp_path / "a.nii.gz", (60, 64, 12))
    torch.manual_seed(0)
    network = UNet(2, channels, 2, (4, 8), padding="same", norm="batch").eval()
    model = make_model(networks=(network,), inference=inference)
    result = predict(model, tmp_path / "a.nii.gz", tmp_path / "out", plan=True, certify=True, progress=False)
    assert result.exit_code == 0, result.text()
    cost = result.cases[0].cost
    assert (cost["tiles"], cost["passes"], cost["image_size"]) == (tiles, tiles, (60, 64, 12))
    assert result.certificate["exact"] == (inference.name == "OverlapTileInferer")
    assert predict(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False).exit_code == 0


@pytest.mark.parametrize("inference", ["OverlapTileInferer", "GaussianTileInferer"])
def test_precision_reaches_the_passes_and_the_certificate(tmp_path, inference):
    make_volume(tmp_path / "a.nii.gz", (48, 18, 16))
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8), padding="same", norm="batch").eval()
    seen = set()
    network.head.register_forward_hook(lambda module, inputs, output: seen.add((output.device.type, output.dtype)))
    argument = {"tile": 32} if inference == "OverlapTileInferer" else {"roi_size": 16}
    model = make_model(networks=(network,), inference=Component(inference, argument))
    labels = {}
    for precision, kind in ((None, torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        out = tmp_path / str(precision)
        assert predict(model, tmp_path / "a.nii.gz", out, precision=precision, progress=False).exit_code == 0
        assert {dtype for device, dtype in seen if device == "cpu"} == {kind}  # those on "meta" only count bytes
        labels[precision] = np.asanyarray(nibabel.load(out / "a.nii.gz").dataobj)
        certificate = predict(
            model, tmp_path / "a.nii.gz", out, precision=precision, plan=True, certify=True, progress=False
        ).certificate
        assert certificate["exact"] == (precision != "bf16" and inference == "OverlapTileInferer")
        assert ("bf16" in certificate["reason"]) == (precision == "bf16")
        if precision == "bf16":  # eight bits of a mantissa: up to 2^-9 of a value is lost at each rounding
            assert certificate["difference"] > 1e-4 * certificate["scale"]
    assert np.array_equal(labels[None], labels["fp32"])
    assert set(np.unique(labels[None])) == {0, 1, 2}
    assert (labels["bf16"] == labels[None]).mean() > 0.97
    # results of another precision are not taken for complete
    again = predict(model, tmp_path / "a.nii.gz", tmp_path / "None", precision="bf16", resume=True, progress=False)
    assert [case.status for case in again.cases] == ["done"]


@pytest.mark.parametrize(("precision", "word"), [("fp16", "CUDA"), ("auto", "bf16"), ("half", "fp32")])
def test_precision_that_cannot_be_had(tmp_path, precision, word):
    make_volume(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match=word) as told:
        predict(make_model(), tmp_path / "a.nii.gz", tmp_path / "out", device="cpu", precision=precision)
    assert "auto" not in str(told.value.expected)
    assert not (tmp_path / "out").exists()


def test_probabilities_are_saved(tmp_path):
    import zarr

    array = make_volume(tmp_path / "a.nii.gz")
    predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", save_probabilities=True, progress=False)
    stored = zarr.open_array(str(tmp_path / "out" / "a.probabilities.zarr"), mode="r")
    assert stored.shape == (2, *array.shape)
    expected = 1 / (1 + np.exp(-2 * (array.astype(float) - 100)))
    assert np.abs(stored[1] - expected).max() < 2e-3
    assert not list((tmp_path / "out").glob(f"{TEMPORARY}*"))


def test_nothing_of_an_earlier_prediction_stays_beside_a_new_mask(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_volume(tmp_path / "a.nii.gz")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "b.png")
    predict(make_model(), tmp_path / "a.nii.gz", out, save_probabilities=True, progress=False)
    predict(make_model(2), tmp_path / "b.png", out, save_probabilities=True, progress=False)
    make_volume(tmp_path / "b.nii.gz")
    seen = []  # mask, probabilities and overlay when the new record is written
    monkeypatch.setattr(
        "medseg.inference.stages.record",
        lambda job, *_: seen.append((job.output.exists(), job.probabilities.exists(), job.overlay.exists())),
    )
    result = predict(make_model(), [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], out, progress=False)
    assert result.exit_code == 0, result.text()
    assert seen == [(True, False, False)] * 2
    assert not [*out.glob("*.zarr"), *out.glob("overlays/*"), *out.glob(f"{TEMPORARY}*")]


def test_ensemble_averages_probabilities(tmp_path):
    array = make_volume(tmp_path / "a.nii.gz")
    opposite = Bright(3).eval()
    with torch.no_grad():
        opposite.scale.fill_(-0.5)
    model = make_model(networks=(Bright(3).eval(), opposite))
    predict(model, [tmp_path / "a.nii.gz"], tmp_path / "out", progress=False)
    value = array.astype(float) - 100
    expected = (1 / (1 + np.exp(-2 * value)) + 1 / (1 + np.exp(value))) / 2 > 0.5
    found = volumes.read_label(tmp_path / "out" / "a.nii.gz").array[0]
    unsure = np.abs((1 / (1 + np.exp(-2 * value)) + 1 / (1 + np.exp(value))) / 2 - 0.5) < 1e-4
    assert np.array_equal(found[~unsure], expected[~unsure])


def test_memory_limit_is_refused_when_it_cannot_be_kept(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    result = predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", max_ram=0.01, progress=False)
    assert result.exit_code == 5
    assert "E522" in result.text()
    assert not (tmp_path / "out" / "a.nii.gz").exists()


def test_an_image_that_resampling_blows_up_fails_alone(tmp_path):
    make_volume(tmp_path / "far.nii.gz", (5, 5, 5), np.diag([90.0, 90.0, 90.0, 1.0]))  # 2e13 voxels of 0.05 mm
    make_volume(tmp_path / "near.nii.gz", (9, 9, 9), np.diag([0.1, 0.1, 0.1, 1.0]))
    # 8 million voxels: 0.5 GB while they are computed
    make_volume(tmp_path / "large.nii.gz", (21, 21, 21), np.diag([0.5, 0.5, 0.5, 1.0]))
    model = make_model(preprocess=[Component("Spacingd", {"pixdim": [0.05, 0.05, 0.05]})])
    result = predict(model, [tmp_path / "far.nii.gz", tmp_path / "near.nii.gz"], tmp_path / "out", progress=False)
    assert [case.status for case in result.cases] == ["failed", "done"]
    assert result.exit_code == 5
    assert "E526" in result.text()
    limited = predict(
        model, tmp_path / "large.nii.gz", tmp_path / "limited", max_ram=resident_bytes() / 2**30 + 0.25, progress=False
    )
    assert limited.exit_code == 5
    assert "E526" in limited.text()


def test_output_folder_that_cannot_be_written(tmp_path):
    make_volume(tmp_path / "a.nii.gz")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ResourceError):
        predict(make_model(), [tmp_path / "a.nii.gz"], tmp_path / "out", progress=False)


def test_multi_page_tiff_is_a_volume(tmp_path):
    import tifffile

    array = (np.random.default_rng(0).random((7, 18, 20)) * 200).astype(np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", array)
    result = predict(make_model(), [tmp_path / "stack.tif"], tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "stack.tif") > 0, array > 100)


@pytest.mark.data
def test_series_and_nifti_of_one_ct_agree(data_root, tmp_path):
    series = data_root / "dicom_ct"
    image = volumes.read_image(series)
    nibabel.save(nibabel.Nifti1Image(image.array[0], image.geometry.affine), tmp_path / "ct.nii.gz")
    result = predict(make_model(), [series, tmp_path / "ct.nii.gz"], tmp_path / "out", progress=False)
    assert result.exit_code == 0, result.text()
    one, two = (volumes.read_label(case.output).array for case in result.cases)
    assert one.any()
    assert np.array_equal(one, two)


def test_the_model_is_named_and_notes_are_told_once(tmp_path):
    for name in ("a", "b"):
        rgba = np.full((20, 30, 4), 150, np.uint8)
        rgba[:, :15, :3] = 50  # transparent pixels keep their stored colour, and a note says so
        Image.fromarray(rgba).save(tmp_path / f"{name}.png")
    model = make_model(2, colour="grey")
    model.metadata = {"sources": ["runs/liver/x/best.pt"]}
    result = predict(model, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out", progress=False)
    lines = result.text().splitlines()
    assert lines[0] == "model: runs/liver/x/best.pt"
    assert result.as_dict()["model"] == ["runs/liver/x/best.pt"]
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 1
    assert "alpha" in notes[0]
    assert notes[0].endswith("(2 cases)")


def test_a_mask_of_another_input_is_not_replaced_without_a_word(tmp_path):
    for folder, seed in (("A", 0), ("B", 1)):
        (tmp_path / folder).mkdir()
        make_volume(tmp_path / folder / "x.nii.gz", seed=seed)
        result = predict(make_model(), tmp_path / folder / "x.nii.gz", tmp_path / "out", progress=False)
        said = "replaced the mask of another input" in result.text()
        assert said == (folder == "B")
    again = predict(make_model(), tmp_path / "B" / "x.nii.gz", tmp_path / "out", progress=False)
    assert not again.cases[0].notes
    assert "A" not in json.loads((tmp_path / "out" / ".medseg" / "x.json").read_text())["place"].upper().split("/")


def test_the_format_may_be_in_capitals(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (20, 30), np.uint8)).save(tmp_path / "a.tif")
    predict(make_model(2, colour="grey"), tmp_path / "a.tif", tmp_path / "out", format="PNG", progress=False)
    assert (tmp_path / "out" / "a.png").is_file()


def test_old_probabilities_go_wholly_or_not_at_all(tmp_path, monkeypatch):
    """Killed while they are removed, none are left: a Zarr folder that lost a part reads as zeros."""
    path = tmp_path / "a.probabilities.zarr"

    for _ in range(2):
        with contextlib.suppress(SystemExit), probability_file(path, (4, 4)) as put:
            put((slice(0, 4), slice(0, 4)), np.ones((2, 4, 4), np.float32))
            if path.exists():  # killed in the middle of removing it
                monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=SystemExit))
    assert not path.exists()

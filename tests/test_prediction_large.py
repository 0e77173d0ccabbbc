"""Pictures that stay in their file: the same labels as read whole, the same refusals, and bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_prediction import make_model

from medseg import volumes_write
from medseg.component import Component
from medseg.inference import OverlapTileInferer, large, stages
from medseg.networks import UNet
from medseg.prediction import predict

SHAPE = (150, 203)
NORMALISE = Component("NormalizeIntensityd", {})
STEPS = {
    "one mean": (NORMALISE,),
    "a mean per channel": (
        Component("NormalizeIntensityd", {"channel_wise": True}),
        Component("BoundaryWeightMapd", {}),
    ),
    "labels alone": (NORMALISE, Component("InstancesToLabeld"), Component("RemapLabelsd", {"mapping": {2: 1}})),
    "given": (Component("NormalizeIntensityd", {"subtrahend": 90, "divisor": 40}),),
    "range": (Component("ScaleIntensityRanged", {"a_min": 10, "a_max": 180, "b_min": 0, "b_max": 1, "clip": True}),),
    "range, then mean": (
        Component("ScaleIntensityRanged", {"a_min": 10, "a_max": 180, "b_min": 0, "b_max": 1, "clip": True}),
        NORMALISE,
    ),
}  # fmt: skip
LAYOUTS = {
    "tiles": {"tile": (32, 48), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "plain": {},
    "big-endian": {"byteorder": ">"},
}


def model(channels, steps, **options):
    torch.manual_seed(0)
    network = UNet(spatial_dims=2, in_channels=channels, out_channels=2, channels=(4, 8), padding="same", norm="batch")
    with torch.no_grad():  # with biases, so that the labels depend on the scale of the input
        for value in network.parameters():
            if value.ndim == 1:
                value.add_(torch.randn(value.shape) * 0.3)
    return make_model(
        2, channels, steps, Component("OverlapTileInferer", {"tile": 64}), networks=(network.eval(),), **options
    )


def picture(channels, kind):
    rng = np.random.default_rng(0)
    smooth = rng.random((8, 11, channels)).repeat(20, 0).repeat(20, 1)[: SHAPE[0], : SHAPE[1]]
    array = (smooth * 150 + rng.random((*SHAPE, channels)) * 50).astype(kind)
    return array if channels > 1 else array[..., 0]


@pytest.mark.parametrize(
    ("channels", "kind", "layout", "steps"),
    [
        (1, np.uint8, "tiles", "one mean"),
        (3, np.uint8, "tiles", "a mean per channel"),
        (3, np.uint8, "strips", "one mean"),
        (3, np.uint8, "plain", "range, then mean"),
        (1, np.uint16, "big-endian", "range"),
        (1, np.float32, "strips", "given"),
        (1, np.uint16, "plain", "one mean"),
    ],
)
def test_windows_give_what_the_whole_gives(tmp_path, monkeypatch, channels, kind, layout, steps):
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", picture(channels, kind), photometric=photometric, **LAYOUTS[layout])
    colour = "rgb" if channels == 3 else "grey"
    whole = predict(model(channels, STEPS[steps], colour=colour), tmp_path / "a.tif", tmp_path / "1", progress=False)
    assert whole.exit_code == 0, whole.text()
    read = []
    real = large.LargePicture.read
    monkeypatch.setattr(large.LargePicture, "read", lambda self, *box: read.append(box) or real(self, *box))
    monkeypatch.setattr(large, "LARGE", 1000)
    monkeypatch.setattr(large, "_PIECE", 3000)
    monkeypatch.setattr(large, "_PREVIEW", 60)
    monkeypatch.setattr(volumes_write, "_LARGE", 1000)
    monkeypatch.setattr(volumes_write, "_TILE", 64)
    result = predict(model(channels, STEPS[steps], colour=colour), tmp_path / "a.tif", tmp_path / "2", progress=False)
    assert result.exit_code == 0, result.text()
    assert len(read) > 4
    one, two = (tifffile.imread(tmp_path / name / "a.tif") for name in "12")
    assert set(np.unique(one)) == {0, 1}
    assert (one != two).mean() < 1e-3  # sums in another order: a logit of zero may fall either way
    with tifffile.TiffFile(tmp_path / "2" / "a.tif") as file:
        assert file.pages[0].is_tiled
    overlay = np.asarray(Image.open(tmp_path / "2" / "overlays" / "a_overlay.png"))
    assert overlay.shape == (38, 51, 3)  # every fourth pixel of 150 x 203


def test_values_that_do_not_suit_the_range_are_told_of_a_picture_in_its_file_too(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1000)
    for name, kind in (("same", np.uint8), ("bits", np.uint16)):
        values = picture(1, np.uint8).astype(kind) * (257 if name == "bits" else 1)
        tifffile.imwrite(tmp_path / f"{name}.tif", values, tile=(32, 48))
    result = predict(model(1, STEPS["range"], colour="grey"), tmp_path, tmp_path / "out", progress=False)
    assert {case.case: case.notes[0] for case in result.cases} == dict.fromkeys(("bits", "same"), "read in windows")
    assert {case.case: len(case.notes) for case in result.cases} == {"bits": 2, "same": 1}


def test_what_windows_cannot_do_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1000)
    spec = make_model(2).dataset
    tifffile.imwrite(tmp_path / "a.tif", picture(1, np.uint8), tile=(32, 32))
    Image.fromarray(picture(1, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(picture(1, np.uint8)).convert("P").save(tmp_path / "palette.tif")
    assert large.open_large(tmp_path / "a.tif", spec, ()) is not None
    targets = tuple(Component(name) for name in ("InstancesToLabeld", "BoundaryWeightMapd"))  # as in `cell` and `hela`
    assert large.open_large(tmp_path / "a.tif", spec, targets) is not None
    assert large.open_large(tmp_path / "a.tif", spec, (Component("Rotate90d", {}),)) is None
    assert large.open_large(tmp_path / "a.tif", spec, (Component("NormalizeIntensityd", {"nonzero": True}),)) is None
    assert large.open_large(tmp_path / "a.png", spec, ()) is None
    assert large.open_large(tmp_path / "palette.tif", spec, ()) is None
    assert large.open_large(tmp_path / "a.tif", spec, (), limit=10**6) is None
    assert large.open_large(tmp_path / "a.tif", make_model(3).dataset, ()) is None


def test_what_a_whole_read_refuses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1000)
    tifffile.imwrite(tmp_path / "colour.tif", picture(3, np.uint8), photometric="rgb", tile=(32, 32))
    broken = picture(1, np.float32)
    broken[70, 80] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", broken, tile=(32, 32))
    result = predict(make_model(2, colour="grey"), tmp_path, tmp_path / "out", progress=False)
    assert [case.error["code"] for case in result.cases] == ["E314", "E311"]
    assert result.exit_code == 4


def test_cost_and_certificate_of_a_large_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1000)
    tifffile.imwrite(tmp_path / "a.tif", picture(1, np.uint8), tile=(32, 32))
    options = {"plan": True, "certify": True, "progress": False}
    result = predict(model(1, (NORMALISE,), colour="grey"), tmp_path / "a.tif", tmp_path / "out", **options)
    assert result.certificate["exact"], result.text()
    assert result.cases[0].cost["image_size"] == SHAPE


MEASURED = """
import resource, sys, tempfile
sys.path.insert(0, {tests!r})
import numpy as np, tifffile, torch
from test_prediction import make_model
from medseg.component import Component
from medseg.prediction import predict
folder, rows, columns = {folder!r}, {rows}, {columns}
def tiles():
    rng = np.random.default_rng(0)
    for _ in range(-(-rows // 512) * -(-columns // 512)):
        yield rng.integers(0, 200, (512, 512), np.uint8)
tifffile.imwrite(folder + "/a.tif", tiles(), shape=(rows, columns), dtype=np.uint8, tile=(512, 512))
steps = (Component("NormalizeIntensityd", {{}}),)
inference = Component("OverlapTileInferer", {{"tile": 1024}})
make = lambda: make_model(2, 1, steps, inference, colour="grey")
tifffile.imwrite(folder + "/small.tif", np.arange(2000 * 2000, dtype=np.uint8).reshape(2000, 2000))
predict(make(), folder + "/small.tif", folder + "/warm", progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = predict(make(), folder + "/a.tif", folder + "/out", progress=False)
assert result.exit_code == 0, result.text()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_of_a_large_picture(tmp_path):
    rows, columns = 12_000, 9_000
    code = MEASURED.format(tests=os.path.dirname(__file__), folder=str(tmp_path), rows=rows, columns=columns)
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    more = int(done.stdout.splitlines()[-1]) * 1024
    # the label is one byte a pixel; read whole, the image alone is four, and preprocessing holds three copies
    assert more < 3 * rows * columns
    label = tifffile.imread(tmp_path / "out" / "a.tif")
    assert label.shape == (rows, columns)


def test_slides_get_small_windows_and_other_images_the_cheapest():
    """(w / (w - 48))^2 computed pixels for one of the image, with 24 pixels of context on a side."""
    network = UNet(2, 1, 2, (4, 8, 8), padding="same", norm="batch").eval()
    inferer = OverlapTileInferer(max_ram="3GB")
    slide, picture = inferer.plan((50_000, 50_000), network), inferer.plan((8000, 8000), network)
    assert slide.context == (24, 24)
    assert slide.redundancy < 1.08
    assert max(slide.window) < 2048
    assert picture.redundancy < 1.02
    assert max(picture.window) > 3000


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_label_is_sampled_in_pieces(step):
    label = np.random.default_rng(0).integers(0, 9, (1000, 33))
    assert np.array_equal(stages._sampled(label, step), label[::step, ::step])

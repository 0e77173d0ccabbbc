"""The whole of `medseg predict` against MONAI's bundle way, same network, weights and machine, interleaved.

    python benchmarks/predict_whole.py [--size 128 128 60] [--classes 5]

Ours: read, resample to 1.5 mm, scale, Gaussian windows, probabilities interpolated slab by slab to the native grid,
written. MONAI: LoadImaged, Spacingd, ScaleIntensityRanged, SlidingWindowInferer, Activationsd(softmax),
Invertd(probabilities, linear), AsDiscreted(argmax), SaveImaged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import torch
from monai.data import decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
)

from medseg.component import Component
from medseg.config import DatasetSpec
from medseg.networks import UNet
from medseg.prediction import predict

ROI, SPACING = 64, (1.5, 1.5, 1.5)
WINDOW = {"a_min": -200, "a_max": 300, "b_min": 0.0, "b_max": 1.0, "clip": True}


def build_peer(network: torch.nn.Module, folder: Path):
    """MONAI's way, as in the model zoo's inference.json."""
    before = Compose([
        LoadImaged("image"), EnsureChannelFirstd("image"), Spacingd("image", SPACING),
        ScaleIntensityRanged("image", **WINDOW),
    ])  # fmt: skip
    after = Compose([
        Activationsd("pred", softmax=True),
        Invertd("pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
        AsDiscreted("pred", argmax=True),
        SaveImaged("pred", output_dir=str(folder), output_postfix="", separate_folder=False, output_dtype=np.uint8,
                   resample=False, print_log=False),
    ])  # fmt: skip
    inferer = SlidingWindowInferer((ROI,) * 3, 4, 0.5, mode="gaussian")

    def run(path: Path) -> None:
        batch = list_data_collate([before({"image": str(path)})])
        with torch.inference_mode():
            batch["pred"] = inferer(batch["image"], network)
        for case in decollate_batch(batch):
            after(case)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=[160, 160, 60])
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--network", default="UNet", choices=["UNet", "1x1"])
    parser.add_argument("--processor-time", action="store_true", help="for a shared machine; use with one thread")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.manual_seed(0)
    if options.network == "UNet":
        network = UNet(
            spatial_dims=3, in_channels=1, out_channels=options.classes, channels=(8, 16), padding="same", norm="batch"
        ).eval()
    else:  # costs next to nothing: what is left is reading, resampling, windows, the way back and writing
        network = torch.nn.Conv3d(1, options.classes, 1).eval()
    spec = {
        "name": "made", "title": "made", "modality": "CT", "dims": 3, "channels": ["CT"], "unit": "mm",
        "labels": {str(i): f"label {i}" for i in range(options.classes)},
        "files": [{"training": {"image": "{id}.nii.gz", "label": "{id}_label.nii.gz"}}],
    }  # fmt: skip
    pipeline = SimpleNamespace(
        preprocess=(Component("Spacingd", {"pixdim": list(SPACING)}), Component("ScaleIntensityRanged", WINDOW)),
        postprocess=(),
        network=Component("UNet"),
        inference=Component("GaussianTileInferer", {"roi_size": ROI}),
    )
    model = SimpleNamespace(networks=(network,), pipeline=pipeline, metadata={},
                            dataset=DatasetSpec.model_validate_json(json.dumps(spec)))  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "ct.nii.gz"
        array = np.random.default_rng(0).integers(-200, 300, options.size, np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.9, 0.9, 2.5, 1.0])), path)
        peer = build_peer(network, folder / "peer")
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats):
            ours_run = lambda: predict(model, path, folder / "ours", progress=False)  # noqa: E731
            for number, run in enumerate((ours_run, lambda: peer(path))):
                begin = clock()
                run()
                seconds[number].append(clock() - begin)
        ours, theirs = (np.asanyarray(nibabel.load(folder / part / "ct.nii.gz").dataobj).squeeze()
                        for part in ("ours", "peer"))  # fmt: skip
        first, second = (statistics.median(part) for part in seconds)
        print("| what | ours | MONAI bundle way | ratio | equal voxels |\n|---|---|---|---|---|")
        print(f"| whole predict, {'x'.join(map(str, options.size))}, {options.network}, {options.classes} classes "
              f"| {first:.2f} s | "
              f"{second:.2f} s | {second / first:.2f}x | {float((ours == theirs).mean()):.4f} |")  # fmt: skip


if __name__ == "__main__":
    main()

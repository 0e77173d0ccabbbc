"""The whole of `medseg predict` against MONAI's bundle way, same network, weights and machine, interleaved.

    python benchmarks/predict_whole.py [--size 160 160 60] [--classes 14] [--channels 16 32 64] [--ways gaussian exact]

Ours: read, resample to 1.5 mm, scale, tiles, probabilities interpolated slab by slab to the native grid, written.
Gaussian windows are as many and as large as MONAI's; exact tiles are what pipelines use for networks without instance
norm. MONAI: LoadImaged, Spacingd, ScaleIntensityRanged, SlidingWindowInferer, Activationsd(softmax),
Invertd(probabilities, linear), AsDiscreted(argmax), SaveImaged.

The last two columns are shares of equal voxels: with MONAI's labels, and with the labels that MONAI's transforms make
of one pass of the network over the whole volume, which is what tiles approximate. Weights and image are random, so
labels change from voxel to voxel: a hard case.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
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
from medseg.inference.windows import network_geometry
from medseg.networks import UNet
from medseg.prediction import predict

SPACING = (1.5, 1.5, 1.5)
WINDOW = {"a_min": -200, "a_max": 300, "b_min": 0.0, "b_max": 1.0, "clip": True}


WAYS = {
    "gaussian": ("Gaussian windows, fp32", "GaussianTileInferer", {}),
    "gaussian-bf16": ("Gaussian windows, bf16", "GaussianTileInferer", {"precision": "bf16"}),
    "exact": ("exact tiles, fp32", "OverlapTileInferer", {}),
    "exact-bf16": ("exact tiles, bf16", "OverlapTileInferer", {"precision": "bf16"}),
}


def build_peer(inferer: Callable, network: torch.nn.Module, folder: Path) -> Callable[[Path], None]:
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

    def run(path: Path) -> None:
        batch = list_data_collate([before({"image": str(path)})])
        with torch.inference_mode():
            batch["pred"] = inferer(batch["image"], network)
        for case in decollate_batch(batch):
            after(case)

    return run


def build_ours(way: str, roi: int, network: UNet | Pointwise, folder: Path) -> Callable[[Path], None]:
    classes = network.out_channels
    spec = {
        "name": "made", "title": "made", "modality": "CT", "dims": 3, "channels": ["CT"], "unit": "mm",
        "labels": {str(i): f"label {i}" for i in range(classes)},
        "files": [{"training": {"image": "{id}.nii.gz", "label": "{id}_label.nii.gz"}}],
    }  # fmt: skip
    _, name, arguments = WAYS[way]
    arguments = arguments | ({"roi_size": roi} if name == "GaussianTileInferer" else {})
    pipeline = SimpleNamespace(
        preprocess=(Component("Spacingd", {"pixdim": list(SPACING)}), Component("ScaleIntensityRanged", WINDOW)),
        postprocess=(),
        network=Component("UNet"),
        inference=Component(name, arguments),
    )
    model = SimpleNamespace(networks=(network,), pipeline=pipeline, metadata={},
                            dataset=DatasetSpec.model_validate_json(json.dumps(spec)))  # fmt: skip

    def run(path: Path) -> None:
        result = predict(model, path, folder, progress=False)
        if result.exit_code:
            raise SystemExit(result.text())

    return run


class Pointwise(torch.nn.Module):
    """Costs next to nothing: what is left is reading, resampling, windows, the way back and writing."""

    context, divisor, exact_under_tiling, spatial_dims = (0, 0, 0), (1, 1, 1), True, 3

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out_channels = classes
        self.convolution = torch.nn.Conv3d(1, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution(images)


def build_network(kind: str, channels: list[int], classes: int) -> UNet | Pointwise:
    torch.manual_seed(0)
    if kind == "UNet":
        return UNet(
            spatial_dims=3, in_channels=1, out_channels=classes, channels=channels, padding="same", norm="batch"
        ).eval()
    return Pointwise(classes).eval()


def pass_whole(image: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
    """One pass; the volume is mirrored at its end up to the network's divisor."""
    size, divisor = image.shape[2:], network_geometry(network, 3).divisor
    extra = [(-n) % d for n, d in zip(size, divisor, strict=True)]
    pad = [v for n in reversed(extra) for v in (0, n)]
    logits = network(torch.nn.functional.pad(image, pad, mode="reflect"))
    return logits[:, :, : size[0], : size[1], : size[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[160, 160, 60], help="voxels of 0.9 x 0.9 x 2.5 mm")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--roi", type=int, default=64)
    parser.add_argument("--peer-batch", type=int, default=4, help="sw_batch_size, 4 in MONAI's bundles")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--network", default="UNet", choices=["UNet", "1x1"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--processor-time", action="store_true", help="for a shared machine; use with one thread")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    network = build_network(options.network, options.channels, options.classes)
    windows = SlidingWindowInferer((options.roi,) * 3, options.peer_batch, 0.5, mode="gaussian")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "ct.nii.gz"
        array = np.random.default_rng(0).integers(-200, 300, options.size, np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.9, 0.9, 2.5, 1.0])), path)
        build_peer(pass_whole, network, folder / "whole")(path)
        # a copy: predict brings the weights into the layout of the windows
        runs = {"peer": build_peer(windows, network, folder / "peer")}
        runs |= {way: build_ours(way, options.roi, copy.deepcopy(network), folder / way) for way in options.ways}
        seconds: dict[str, list[float]] = {part: [] for part in runs}
        for _ in range(options.repeats):
            for part, run in runs.items():
                begin = clock()
                run(path)
                seconds[part].append(clock() - begin)
        labels = {
            part: np.asanyarray(nibabel.load(folder / part / "ct.nii.gz").dataobj).squeeze()
            for part in ("whole", *runs)
        }
    what = f"{options.network} {options.channels}" if options.network == "UNet" else "1x1 convolution"
    size = "x".join(map(str, options.size))
    print(f"{what}, {options.classes} classes, {size}, roi {options.roi}, {torch.get_num_threads()} threads, "
          f"{'processor' if options.processor_time else 'wall'} time, {options.repeats} rounds")  # fmt: skip
    print("| whole predict | time | MONAI / this | as MONAI | as one whole pass |\n|---|---|---|---|---|")
    peer = statistics.median(seconds["peer"])
    for part in runs:
        title = WAYS[part][0] if part in WAYS else f"MONAI bundle way, batch {options.peer_batch}"
        own = statistics.median(seconds[part])
        same = [float((labels[part] == labels[other]).mean()) for other in ("peer", "whole")]
        print(f"| {title} | {own:.2f} s | {peer / own:.2f}x | {same[0]:.4f} | {same[1]:.4f} |")


if __name__ == "__main__":
    main()

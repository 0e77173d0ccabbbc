"""Peak memory of the whole process for `medseg predict` on 512x512 int16 NIfTI volumes, one process per row.

    python benchmarks/predict_memory.py [--classes 3 104] [--slices 200 800] [--modes exact gaussian monai]

The network is a convolution with few channels, so that the numbers are those of the pipeline (reading, preprocessing,
accumulators, labels, writing) and not of a network's activations. MONAI's row is SlidingWindowInferer with its default
accumulators on the host, which hold classes x voxels in float32; where that alone is more than `--limit` GB nothing is
run, and the row says what the arithmetic is. GB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def run_one(mode: str, classes: int, path: str, output: str, ram: float) -> None:
    """In a process of its own: predict, then print peak bytes and seconds as JSON."""
    import resource

    import torch

    from medseg.component import Component
    from medseg.config import DatasetSpec
    from medseg.prediction import predict

    class Small(torch.nn.Module):
        exact_under_tiling, divisor, context, spatial_dims = True, (4, 4, 4), (4, 4, 4), 3

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out_channels = classes
            self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
            self.last = torch.nn.Conv3d(4, classes, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(images).relu_())

    network = Small().eval()
    begin = time.perf_counter()
    if mode == "monai":
        import nibabel
        from monai.inferers import SlidingWindowInferer

        array = np.asarray(nibabel.load(path).dataobj)
        with torch.inference_mode():
            image = torch.from_numpy(array.astype(np.float32))[None, None] / 1000
            logits = SlidingWindowInferer((96, 96, 96), 1, 0.5, mode="gaussian")(image, network)
            label = logits.argmax(1)[0].to(torch.uint8).numpy()
        Path(output).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), Path(output, "monai.nii.gz"))
    else:
        inference = {
            "exact": Component("OverlapTileInferer"),
            "gaussian": Component("GaussianTileInferer", {"roi_size": 96}),
        }[mode]
        spec = {
            "name": "made", "title": "made", "modality": "CT", "dims": 3, "channels": ["CT"], "unit": "mm",
            "labels": {str(i): f"label {i}" for i in range(classes)},
            "files": [{"training": {"image": "{id}.nii.gz", "label": "{id}_label.nii.gz"}}],
        }  # fmt: skip
        window = {"a_min": -1000, "a_max": 1000, "b_min": -1, "b_max": 1, "clip": True}
        scale = Component("ScaleIntensityRanged", window)
        pipeline = SimpleNamespace(preprocess=(scale,), postprocess=(), network=Component("Small"), inference=inference)
        model = SimpleNamespace(networks=(network,), pipeline=pipeline, metadata={},
                                dataset=DatasetSpec.model_validate_json(json.dumps(spec)))  # fmt: skip
        result = predict(model, [path], output, max_ram=ram, progress=False)
        if result.exit_code:
            sys.exit(result.text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - begin}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 104])
    parser.add_argument("--slices", type=int, nargs="+", default=[200, 400, 800])
    parser.add_argument("--modes", nargs="+", default=["exact", "gaussian"])
    parser.add_argument("--ram", type=float, nargs="+", default=[3, 4, 8], help="GB: 3 classes, exact, Gaussian")
    parser.add_argument("--body", type=float, default=0.02, help="squared radius; air is computed once, so time falls")
    parser.add_argument("--limit", type=float, default=12, help="GB of accumulators beyond which MONAI is not run")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        mode, classes, path, output, ram = options.one
        run_one(mode, int(classes), path, output, float(ram))
        return
    import nibabel

    print("| mode | classes | slices | limit | peak | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for slices in options.slices:
            path = Path(folder, f"ct{slices}.nii.gz")
            # a smooth body in noise-free air, as a CT compresses
            i, j = np.ogrid[-1:1:512j, -1:1:512j]
            body = ((i**2 + j**2) < options.body)[..., None]
            rng = np.random.default_rng(0)
            array = np.full((512, 512, slices), -1000, np.int16)
            for k in range(0, slices, 50):
                part = array[..., k : k + 50]
                part[...] = np.where(body, rng.integers(-20, 80, part.shape, np.int16), part)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 1.0, 1.0])), path)
            del array
            for classes in options.classes:
                for mode in options.modes:
                    if mode == "monai" and (sums := classes * 512 * 512 * slices * 4 / 2**30) > options.limit:
                        print(f"| monai | {classes} | {slices} | - | {sums:.1f} GB of accumulators (arithmetic) | |")
                        continue
                    ram = options.ram[0] if classes <= 3 else options.ram[1 if mode == "exact" else 2]
                    case = [mode, str(classes), str(path), f"{folder}/out", str(ram)]
                    command = [sys.executable, "-W", "ignore", __file__, "--one", *case]
                    ended = subprocess.run(command, capture_output=True, text=True, check=False)
                    if ended.returncode:
                        print(f"| {mode} | {classes} | {slices} | {ram} GB | failed: {ended.stderr.strip()[-300:]} | |")
                        continue
                    found = json.loads(ended.stdout.splitlines()[-1])
                    print(f"| {mode} | {classes} | {slices} | {ram if mode != 'monai' else '-'} GB | "
                          f"{found['peak'] / 2**30:.2f} GB | {found['seconds']:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

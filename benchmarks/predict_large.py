"""A picture far larger than memory would like: `medseg predict --max-ram` on a tiled TIFF of 50 000 x 50 000 pixels.

    python benchmarks/predict_large.py [--size 50000 50000] [--max-ram 3] [--roi]

The picture is mostly empty, as a slide is, with a disc of noise in each twelfth of a side, deflated (tiles of 512). The
network is a small 2-D U-Net with batch norm. One row: minutes, peak memory of the whole process, and what the discs say
about the result. Read whole, the picture as float32 would be 10 GB, and preprocessing holds three copies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TILE, DISCS, RADIUS = 512, 12, 300


def draw(rows: int, columns: int) -> Iterator[np.ndarray]:
    """Tiles of the picture in order: 20 with discs of 150 to 199."""
    rng = np.random.default_rng(0)
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            tile = np.full((TILE, TILE), 20, np.uint8)
            disc = inside(rows, columns, top, left, (TILE, TILE))
            tile[disc] = rng.integers(150, 200, int(disc.sum()))
            yield tile


def inside(rows: int, columns: int, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """Where the discs are in a box of the picture."""
    y, x = np.ogrid[top : top + size[0], left : left + size[1]]
    near = []
    for values, length in ((y, rows), (x, columns)):
        step = length / DISCS
        near.append(((values % step) - step / 2) ** 2)
    return (near[0] + near[1] < RADIUS**2) & (y < rows) & (x < columns)


def run_one(path: str, output: str, ram: float) -> None:
    """In a process of its own: predict, then print peak bytes and seconds as JSON."""
    import resource

    import torch

    from medseg.component import Component
    from medseg.config import DatasetSpec
    from medseg.networks import UNet
    from medseg.prediction import predict

    torch.manual_seed(0)
    network = UNet(2, 1, 2, (4, 8, 8), padding="same", norm="batch").eval()
    with torch.no_grad():  # bright or not, whatever the layers before say: the right answer is known
        for parameter in network.parameters():
            parameter.zero_()
        for stack in (network.encoder[0], network.decoder[0]):
            for unit in list(stack)[:2]:
                unit[0].weight[0, -4 if unit[0].in_channels == 8 else 0, 1, 1] = 1.0
                unit[1].weight.fill_(1.0)
        network.head.weight[1, 0], network.head.bias[0] = 1.0, 0.3
    spec = {
        "name": "made", "title": "made", "modality": "slide", "dims": 2, "channels": ["grey"], "colour": "grey",
        "labels": {"0": "background", "1": "bright"}, "unit": "px",
        "files": [{"training": {"image": "{id}.tif", "label": "{id}_label.tif"}}],
    }  # fmt: skip
    pipeline = SimpleNamespace(preprocess=(Component("NormalizeIntensityd", {}),), postprocess=(),
                               network=Component("UNet"), inference=Component("OverlapTileInferer"))  # fmt: skip
    model = SimpleNamespace(networks=(network,), pipeline=pipeline, metadata={},
                            dataset=DatasetSpec.model_validate_json(json.dumps(spec)))  # fmt: skip
    begin = time.perf_counter()
    result = predict(model, path, output, max_ram=ram, progress=False)
    if result.exit_code:
        sys.exit(result.text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - begin, "stages": result.cases[0].seconds,
                      "processor": used.ru_utime + used.ru_stime}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[50_000, 50_000])
    parser.add_argument("--max-ram", type=float, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        path, output, ram = options.one
        run_one(path, output, float(ram))
        return
    import tifffile

    rows, columns = options.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slide.tif")
        tifffile.imwrite(path, draw(rows, columns), shape=(rows, columns), dtype=np.uint8, tile=(TILE, TILE),
                         compression="zlib", compressionargs={"level": 1}, bigtiff=True)  # fmt: skip
        command = [sys.executable, "-W", "ignore", __file__, "--one", str(path), f"{folder}/out", str(options.max_ram)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"failed: {ended.stderr.strip()[-2000:]}")
        found = json.loads(ended.stdout.splitlines()[-1])
        label = tifffile.TiffFile(Path(folder, "out", "slide.tif")).pages[0]
        wrong = pixels = 0
        for segment, place, shape in label.segments():
            top, left = place[2:4] if segment is not None else (0, 0)
            if segment is None:
                continue
            part = segment[0, : min(shape[1], rows - top), : min(shape[2], columns - left), 0]
            wrong += int((part.astype(bool) != inside(rows, columns, top, left, part.shape)).sum())
            pixels += part.size
        print(
            "| picture | on disk | limit | peak | minutes | processor | wrong pixels |\n|---|---|---|---|---|---|---|"
        )
        print(f"| {rows} x {columns} | {path.stat().st_size / 2**20:.0f} MB | {options.max_ram:g} GB "
              f"| {found['peak'] / 2**30:.2f} GB | {found['seconds'] / 60:.1f} | {found['processor'] / 60:.1f} min "
              f"| {wrong} of {pixels} |")  # fmt: skip
        print({stage: round(seconds) for stage, seconds in found["stages"].items()})


if __name__ == "__main__":
    main()

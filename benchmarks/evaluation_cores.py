"""40 cases of 3 labels evaluated by one process and by two, interleaved: medians, ratio.

    python benchmarks/evaluation_cores.py [--cases 40] [--size 160] [--rounds 3]

Volumes of --size cubed voxels hold three wavy balls and a prediction moved by a few voxels; the time is that of
`medseg.evaluate` with the scores of the pipeline `liver`, files read and written included, process start included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import medseg


def write_pair(folder: Path, number: int, size: int) -> None:
    """One reference and one prediction, a shifted copy."""
    rng = np.random.default_rng(number)
    axes = np.ogrid[:size, :size, :size]
    label = np.zeros((size,) * 3, np.uint8)
    for index in (1, 2, 3):
        centre = rng.uniform(0.35, 0.65, 3) * size
        radius = rng.uniform(0.12, 0.3) * size / index**0.5
        wave = 1 + 0.1 * np.sin(axes[0] / 7.0) * np.cos(axes[1] / 9.0)
        label[sum(np.square(a - c) for a, c in zip(axes, centre, strict=True)) < np.square(radius * wave)] = index
    for name, array in (("reference", label), ("prediction", np.roll(label, rng.integers(-3, 4, 3), (0, 1, 2)))):
        (folder / name).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([0.8, 0.8, 2.0, 1.0])), folder / name / f"case_{number:02d}.nii.gz")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(options.cases):
            write_pair(folder, number, options.size)
        for _ in range(options.rounds):
            for workers in seconds:
                start = time.perf_counter()
                medseg.evaluate(
                    folder / "prediction",
                    folder / "reference",
                    output=folder / "scores",
                    metrics=["Dice", "IoU", "Sensitivity", "Precision", "HD", "HD95", "ASSD", "VolumeError"],
                    labels="1=a,2=b,3=c",
                    workers=workers,
                    progress=False,
                )
                seconds[workers].append(time.perf_counter() - start)
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(f"load {os.getloadavg()[0]:.1f}")
    print("| cases x labels | size | one process s | two s | ratio |\n|---|---|---|---|---|")
    print(f"| {options.cases} x 3 | {options.size}^3 | {one:.1f} | {two:.1f} | {one / two:.2f} |")


if __name__ == "__main__":
    main()

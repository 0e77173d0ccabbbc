"""Memory of `medseg train` on 10 and on 40 volumes of 512x512x300: 12 GB of voxels as the store keeps them.

    python benchmarks/training_memory.py --folder DIR [--cases 10 40] [--shape 512 512 300] [--epochs 2]

Writes synthetic volumes (a ball in noise, uncompressed NIfTI, int16) into DIR, trains in a process of its own for each
number of cases, and prints the largest resident memory of that process and its workers at one moment. The
files are removed at the end. Needs about 700 MB of disk for each volume of the full size.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil

ENTRY = """
balls:
  title: balls in noise
  modality: none
  dims: 3
  channels: [image]
  labels: {0: background, 1: ball}
  unit: mm
  files: {training: {image: "images/{id}.nii", label: "labels/{id}.nii"}}
"""
PIPELINE = """
dataset: balls
preprocess:
  - ScaleIntensityRanged: {a_min: 0, a_max: 200, b_min: -1, b_max: 1}
augment:
  - RandElasticDeformationd: {sigma: 4.0, grid: 4, rotate: 12}
network: {UNet: {channels: [4, 8], padding: same, norm: batch, dropout: 0.0}}
loss: DistanceWeightedDiceCELoss
optimizer: {AdamW: {lr: 1e-3}}
train: {epochs: %d, iterations_per_epoch: 10, batch: 2, patch: [96, 96, 96], folds: 10, validation_cases: 1}
metrics: [Dice]
best: Dice
"""


def write(root: Path, first: int, count: int, shape: tuple[int, ...]) -> None:
    """Volumes `first` to `count` - 1; each has its ball elsewhere, the noise is one field rolled along."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 40, shape, dtype=np.int16)
    axes = [np.arange(n, dtype=np.float32) for n in shape]
    for number in range(first, count):
        centre = [n * (0.35 + 0.3 * ((number * 7 + axis) % 10) / 10) for axis, n in enumerate(shape)]
        squares = [(a - c) ** 2 for a, c in zip(axes, centre, strict=True)]
        flat = squares[0][:, None] + squares[1]
        label = np.stack([(flat + z) < (min(shape) / 5) ** 2 for z in squares[2]], axis=-1).astype(np.uint8)
        image = np.roll(noise, number, axis=0) + label.astype(np.int16) * 100
        for name, array in (("images", image), ("labels", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / name / f"c{number:02d}.nii")


def memory(process: psutil.Process) -> int:
    """Resident bytes of the process and its children; pages that they share count once, as the kernel divides them."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(info, "pss", 0) or info.rss
    return total


def train(root: Path, pipeline: Path) -> tuple[int, float]:
    """Largest memory in bytes, and seconds."""
    command = [sys.executable, "-m", "medseg", "train", str(pipeline), "--data", str(root), "-o", str(root / "runs")]
    command += ["--cache", str(root / "cache"), "--no-report", "--device", "cpu"]
    begin, largest = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                largest = max(largest, memory(watched))
            except psutil.Error:
                break
            time.sleep(0.5)
    if process.returncode != 0:
        sys.exit(f"training ended with {process.returncode}")
    return largest, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    shape = tuple(options.shape)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (root / "datasets.yaml").write_text(ENTRY)
        (root / "balls.yaml").write_text(PIPELINE % options.epochs)
        print("| cases | voxels | largest memory, with preparation | seconds |\n|---|---|---|---|", flush=True)
        done = 0
        for count in sorted(options.cases):
            write(root, done, count, shape)
            done = count
            largest, seconds = train(root, root / "balls.yaml")
            size = count * np.prod(shape) * 4 / 1e9
            print(
                f"| {count} of {shape} | {size:.1f} GB as float32 | {largest / 1e9:.2f} GB | {seconds:.0f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

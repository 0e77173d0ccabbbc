"""Efficiency of the whole training loop: steps per second with data / steps per second on one constant batch.

    python benchmarks/training_loop.py [--device cpu] [--cases 12] [--shape 160 160 96] [--seconds 20] [--monai]

Phantom-like volumes are written and stored once; then the loop (store, patches, elastic deformation and noise, workers,
step) and the bare step on one of its batches take turns. `--monai` runs the same network, transforms and cases through
MONAI's CacheDataset, DataLoader and SupervisedTrainer. Prints a Markdown table; memory is the process's largest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from medseg.augmentation import Augmentation
from medseg.component import Component
from medseg.config import Pipeline, load_dataset
from medseg.distributed import Group
from medseg.engine_stream import BatchStream
from medseg.hardware import choose_hardware, configured, peak_memory
from medseg.training import _choose_loaders
from medseg.training_setup import build_step, prepare

ENTRY = """
balls:
  title: balls in noise
  modality: none
  dims: 3
  channels: [image]
  labels: {0: background, 1: ball}
  unit: mm
  files: {training: {image: "images/{id}.nii.gz", label: "labels/{id}.nii.gz"}}
"""
AUGMENT = [
    {"RandElasticDeformationd": {"sigma": 6.0, "rotate": 15, "scale": [0.85, 1.2], "flip": True}},
    {"RandGaussianNoised": {"prob": 0.3, "std": 0.1}},
    {"RandAdjustContrastd": {"prob": 0.3}},
]


def write(root: Path, count: int, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    (root / "datasets.yaml").write_text(ENTRY)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)
    for name in ("images", "labels"):
        (root / name).mkdir()
    for number in range(count):
        centre = np.array([random.uniform(0.35, 0.65) * n for n in shape], np.float32)
        label = (((grid - centre[:, None, None, None]) ** 2).sum(0) < (min(shape) / 4) ** 2).astype(np.uint8)
        image = (label * 100 + random.normal(0, 20, shape)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), root / "images" / f"c{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), root / "labels" / f"c{number}.nii.gz")


def pipeline(workers: int | str, precision: str) -> Pipeline:
    return Pipeline.from_dict(
        {
            "dataset": "balls",
            "preprocess": [{"NormalizeIntensityd": {}}],
            "augment": AUGMENT,
            "network": {"UNet": {"channels": [16, 32, 64, 128], "padding": "same", "norm": "batch", "dropout": 0.0}},
            "loss": "DistanceWeightedDiceCELoss",
            "optimizer": {"AdamW": {"lr": 1e-3}},
            "train": {
                "epochs": 1,
                "batch": 2,
                "patch": [64, 64, 64],
                "workers": workers,
                "precision": precision,
                "folds": 2,
            },
            "metrics": ["Dice"],
            "best": "Dice",
        }
    )


def pace(step: Any, batches: Any, seconds: float, device: torch.device) -> float:
    count, begin = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - begin < seconds:
        step(next(batches), seed=count)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def ours(root: Path, options: argparse.Namespace) -> dict[str, float]:
    hardware = choose_hardware(options.device, "auto")
    workers = _choose_loaders(hardware) if options.workers < 0 else options.workers
    plan = pipeline(workers, "auto")
    spec = load_dataset("balls", root=root)
    prepared, _ = prepare(plan, spec, root, hardware=hardware, group=Group(), cache=root / "cache")
    with configured(hardware):
        step, _ = build_step(prepared)
        stream = BatchStream(prepared.maker, workers=workers, pin=hardware.device.type == "cuda")

        def ready(batch: Any) -> Any:
            batch = batch.to(hardware.device)
            return prepared.maker.finish(batch, prepared.device_augmentation) if prepared.device_augmentation else batch

        constant = ready(next(stream))
        full: list[float] = []
        bare: list[float] = []
        for _ in range(options.rounds):
            stream = BatchStream(prepared.maker, workers=workers, pin=hardware.device.type == "cuda")
            pace(step, map(ready, stream), 1.0, hardware.device)  # the workers' start is paid once in a run
            full.append(pace(step, map(ready, stream), options.seconds / options.rounds, hardware.device))
            stream.close()
            bare.append(pace(step, iter(lambda: constant, None), options.seconds / options.rounds, hardware.device))
    print(f"{hardware.describe()}, {workers} workers; peak {peak_memory(hardware.device)}")
    return {"loop": statistics.median(full), "constant batch": statistics.median(bare)}


def monais(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """The same work as MONAI's tutorials do it: cached cases, random crops, transforms in workers."""
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Rand3DElasticd,
        RandAdjustContrastd,
        RandCropByPosNegLabeld,
        RandGaussianNoised,
    )

    from medseg.losses import DistanceWeightedDiceCELoss
    from medseg.networks import UNet

    keys, device = ["image", "label"], torch.device(choose_hardware(options.device).device)
    elastic = Rand3DElasticd(
        keys, sigma_range=(8, 12), magnitude_range=(20, 60), prob=1.0, rotate_range=(0.26,) * 3,
        scale_range=(0.15,) * 3,
        mode=("bilinear", "nearest"), padding_mode="reflection",
    )  # fmt: skip
    steps = [LoadImaged(keys), EnsureChannelFirstd(keys), NormalizeIntensityd("image")]
    steps += [RandCropByPosNegLabeld(keys, "label", (64, 64, 64), num_samples=1), elastic]
    steps += [RandGaussianNoised("image", prob=0.3), RandAdjustContrastd("image", prob=0.3)]
    files = [{k: str(root / f"{k}s" / f"c{n}.nii.gz") for k in keys} for n in range(options.cases // 2)]
    loader = DataLoader(CacheDataset(files, Compose(steps), progress=False), batch_size=2, num_workers=1, shuffle=True)
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(16, 32, 64, 128), padding="same", norm="batch", dropout=0.0).to(device).train()
    loss, optimizer = DistanceWeightedDiceCELoss(), torch.optim.AdamW(network.parameters(), lr=1e-3)

    def endless() -> Any:
        while True:
            yield from loader

    def step(batch: Any, seed: int) -> None:
        optimizer.zero_grad()
        loss(network(batch["image"].as_tensor().to(device)), batch["label"].as_tensor().to(device)).backward()
        optimizer.step()

    batches = endless()
    constant = next(batches)
    return {
        "loop": pace(step, batches, options.seconds, device),
        "constant batch": pace(step, iter(lambda: constant, None), options.seconds / 2, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 128, 96])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--monai", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), options.cases, tuple(options.shape))
        rows = {"medseg": ours(Path(place), options)}
        if options.monai:
            rows["MONAI"] = monais(Path(place), options)
        begin = time.perf_counter()
        augmentation = Augmentation([Component(*next(iter(part.items()))) for part in AUGMENT])
        batch = {"image": torch.rand(2, 1, 64, 64, 64), "label": torch.ones(2, 1, 64, 64, 64, dtype=torch.uint8)}
        for number in range(5):
            augmentation(batch, [number, number + 1])
        print(f"augmentation of one batch on this machine: {(time.perf_counter() - begin) / 5 * 1000:.0f} ms\n")
    print("| way | loop steps/s | constant batch steps/s | efficiency |\n|---|---|---|---|")
    for name, row in rows.items():
        efficiency = row["loop"] / row["constant batch"]
        print(f"| {name} | {row['loop']:.2f} | {row['constant batch']:.2f} | {efficiency:.2f} |")


if __name__ == "__main__":
    main()

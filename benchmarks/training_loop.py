"""Efficiency of the whole training loop: steps per second with data / steps per second on one constant batch.

    python benchmarks/training_loop.py [--device cpu] [--cases 8] [--shape 128 128 96] [--seconds 6] [--monai]

Phantom-like volumes are written and stored once; then the loop (store, patches, elastic deformation and noise, workers,
step) and the bare step on one of its batches take turns in one process. `--monai` runs the same network, transforms and
cases through MONAI's CacheDataset, DataLoader and SupervisedTrainer, in turns too. Prints a Markdown table;
efficiency is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from medseg.config import Pipeline, load_dataset
from medseg.distributed import Group
from medseg.engine_stream import BatchStream
from medseg.hardware import choose_hardware, configured, peak_memory, real_cores
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
Clock = Callable[[], float]
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


class Ours:
    """The loop that `medseg train` runs, without validation and checkpoints."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.hardware = choose_hardware(options.device, "auto")
        if options.processor_time:
            self.hardware = replace(self.hardware, threads=1)
        self.workers = _choose_loaders(self.hardware) if options.workers < 0 else options.workers
        spec = load_dataset("balls", root=root)
        plan = pipeline(self.workers, "auto")
        self.prepared, _ = prepare(plan, spec, root, hardware=self.hardware, group=Group(), cache=root / "cache")
        with configured(self.hardware):
            self.step, _ = build_step(self.prepared)
        self.constant = self.ready(self.prepared.maker[0, 0])

    def ready(self, batch: Any) -> Any:
        batch, augmentation = batch.to(self.hardware.device), self.prepared.device_augmentation
        return self.prepared.maker.finish(batch, augmentation) if augmentation else batch

    def loop(self, clock: Clock, seconds: float) -> float:
        device = self.hardware.device
        with configured(self.hardware):
            stream = BatchStream(self.prepared.maker, workers=self.workers, pin=device.type == "cuda")
            try:
                return pace(lambda: self.step(self.ready(next(stream)), seed=0), clock, seconds, device)
            finally:
                stream.close()

    def constant_batch(self, clock: Clock, seconds: float) -> float:
        with configured(self.hardware):
            return pace(lambda: self.step(self.constant, seed=0), clock, seconds, self.hardware.device)


class Monais:
    """The same work as MONAI's tutorials do it: cached cases, random crops, transforms in workers, its trainer."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
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

        keys, self.device = ["image", "label"], torch.device(choose_hardware(options.device).device)
        elastic = Rand3DElasticd(
            keys, sigma_range=(8, 12), magnitude_range=(20, 60), prob=1.0, rotate_range=(0.26,) * 3,
            scale_range=(0.15,) * 3, mode=("bilinear", "nearest"), padding_mode="reflection",
        )  # fmt: skip
        steps = [LoadImaged(keys), EnsureChannelFirstd(keys), NormalizeIntensityd("image")]
        steps += [RandCropByPosNegLabeld(keys, "label", (64, 64, 64), num_samples=1), elastic]
        steps += [RandGaussianNoised("image", prob=0.3), RandAdjustContrastd("image", prob=0.3)]
        files = [{k: str(root / f"{k}s" / f"c{n}.nii.gz") for k in keys} for n in range(options.cases // 2)]
        cached = CacheDataset(files * 50, Compose(steps), cache_num=options.cases // 2, progress=False)
        cached.cache_num, cached._cache = len(files) * 50, list(cached._cache) * 50
        workers = 0 if options.processor_time else 1 if options.workers < 0 else options.workers
        self.loader = DataLoader(cached, batch_size=2, num_workers=workers, shuffle=True)
        torch.manual_seed(0)
        network = UNet(3, 1, 2, channels=(16, 32, 64, 128), padding="same", norm="batch", dropout=0.0)
        self.network, self.loss = network.to(self.device).train(), DistanceWeightedDiceCELoss()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.constant = next(iter(self.loader))

    def run(self, loader: Any, clock: Clock, seconds: float) -> float:
        from ignite.engine import Events
        from monai.engines import SupervisedTrainer

        trainer = SupervisedTrainer(
            device=self.device, max_epochs=1, train_data_loader=loader, epoch_length=10**6, network=self.network,
            optimizer=self.optimizer, loss_function=lambda output, target: self.loss(output, target.long()),
        )  # fmt: skip
        trainer.logger.disabled = True
        marks = [0.0, 0.0, 0.0]  # iterations; time after the first two, time now

        def count() -> None:
            marks[0] += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            marks[2] = clock()
            if marks[0] == 2:
                marks[1] = marks[2]
            elif marks[0] > 4 and marks[2] - marks[1] > seconds:
                trainer.terminate()

        trainer.add_event_handler(Events.ITERATION_COMPLETED, count)
        trainer.run()
        return (marks[0] - 2) / (marks[2] - marks[1])

    def loop(self, clock: Clock, seconds: float) -> float:
        return self.run(self.loader, clock, seconds)

    def constant_batch(self, clock: Clock, seconds: float) -> float:
        return self.run([self.constant] * 10**5, clock, seconds)


def pace(run: Callable[[], Any], clock: Clock, seconds: float, device: torch.device) -> float:
    """Calls of `run` in a second; the first two, while workers start, do not count."""
    for _ in range(2):
        run()
    count, begin = 0, clock()
    while count < 3 or clock() - begin < seconds:
        run()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (clock() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 128, 96])
    parser.add_argument("--seconds", type=float, default=6.0, help="of one turn of one way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--monai", action="store_true")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread, no workers, processor time: for a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(1 if options.processor_time else real_cores())
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), options.cases, tuple(options.shape))
        ways: dict[str, Any] = {"medseg": Ours(Path(place), options)}
        if options.monai:
            ways["MONAI SupervisedTrainer"] = Monais(Path(place), options)
        ours = ways["medseg"]
        print(f"{ours.hardware.describe()}, {ours.workers} workers, torch {torch.__version__}\n")
        found: dict[str, list[list[float]]] = {name: [[], []] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                found[name][0].append(way.loop(clock, options.seconds))
                found[name][1].append(way.constant_batch(clock, options.seconds))
                print(f"{name}: {found[name][0][-1]:.3f} / {found[name][1][-1]:.3f}", file=sys.stderr, flush=True)
        print("| way | loop steps/s | constant batch steps/s | efficiency |\n|---|---|---|---|")
        for name, (loops, constants) in found.items():
            ratio = statistics.median(a / b for a, b in zip(loops, constants, strict=True))
            print(f"| {name} | {statistics.median(loops):.2f} | {statistics.median(constants):.2f} | {ratio:.2f} |")
        print(f"\nlargest memory {peak_memory(ours.hardware.device)}")


if __name__ == "__main__":
    main()

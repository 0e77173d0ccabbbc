"""What it costs to read the image around each patch for the elastic deformation, and how much of a patch it mends.

    python benchmarks/patch_context.py liver drive em --data DATA

For each pipeline: how many of a patch's voxels the first transform mirrors without and with the context (40 draws, as
if the images had no end), and the processor's time for a batch without and with it, interleaved, medians, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from medseg.augmentation import Augmentation
from medseg.batches import BatchMaker
from medseg.cache import CaseStore
from medseg.config import load_dataset, load_pipeline
from medseg.data import find_cases
from medseg.training_patch import patch_reader


def mirrored(augmentation: Augmentation, patch: tuple[int, ...], context: tuple[int, ...]) -> float:
    """Share of voxels whose place lies beyond patch and context: 0 in an image that is 1 inside and much larger."""
    far = max(patch)
    sample = torch.zeros(1, 1, *(n + 2 * far for n in patch))
    around = context or (0,) * len(patch)
    inside = (slice(far - c, far + n + c) for c, n in zip(around, patch, strict=True))
    sample[(0, 0, *inside)] = 1
    first = augmentation.transforms[0]
    seen = [first.apply_batch({"label": sample}, [seed], context=(far,) * len(patch))["label"] for seed in range(40)]
    return 1 - float(torch.stack(seen).mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", help="pipelines")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| pipeline | patch | context | mirrored without | with | ms a batch without | with | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.names:
        pipeline = load_pipeline(name)
        spec, patch = load_dataset(pipeline.dataset, root=options.data), tuple(pipeline.train.patch)
        cases = find_cases(spec, options.data, part="training")[:8]
        augmentation = Augmentation(pipeline.augment)
        endless = augmentation.context(patch, (10**6,) * len(patch))
        shares = mirrored(augmentation, patch, ()), mirrored(augmentation, patch, endless)
        with tempfile.TemporaryDirectory() as folder:
            stored = CaseStore(spec, pipeline.preprocess, folder=folder, dims=len(patch)).prepare(cases)
            reader = patch_reader(pipeline, (0,) * len(patch), augmentation, stored)
            makers = [
                BatchMaker(
                    stored, 10**4, one, batch=pipeline.train.batch, seed=0, augmentation=augmentation,
                    ignore=spec.ignore, outside_fov=spec.outside_fov,
                )
                for one in (dataclasses.replace(reader, context=()), reader)
            ]  # fmt: skip
            taken: list[list[float]] = [[], []]
            for number in range(options.batches):
                for maker, times in zip(makers, taken, strict=True):
                    start = time.process_time()
                    maker[0, number]
                    times.append(time.process_time() - start)
        without, beside = (1000 * statistics.median(times) for times in taken)
        shown = " x ".join(map(str, patch)), " x ".join(map(str, reader.context)) or "none"
        print(
            f"| {name} | {' | '.join(shown)} | {100 * shares[0]:.1f} % | {100 * shares[1]:.2f} % | {without:.1f} "
            f"| {beside:.1f} | {beside / without:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Elastic deformation of image and label against MONAI, TorchIO, batchgeneratorsv2, albumentations: medians.

    python benchmarks/elastic.py [3d] [2d] [gpu] [host] [cpu-seconds]

`cpu-seconds` counts the processor time of one thread instead of wall-clock time, for a machine that others use too.

Each library deforms an image (linear) and a label (nearest) of the same size, elastic only, with the settings that its
documentation shows. Claims: at 128^3 at least 5x faster than MONAI's Rand3DElasticd, 6x than TorchIO, 2.2x than
batchgeneratorsv2; at 512^2 at least 4.5x faster than MONAI's Rand2DElasticd, 2.5x than albumentations. The row
"grid_sample" is what the resampling alone costs with torch's kernel (positions given): the limit for whoever uses it.
A peer that is not installed is left out. On a GPU: a batch of 8 x 128^3, in milliseconds. `host` needs no GPU: how long
one thread draws that batch before the GPU begins, and the bytes that its kernels read and write.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from medseg.transforms import RandElasticDeformationd
from medseg.transforms.warp import warp_positions

REPEATS = 9
clock = time.process_time if "cpu-seconds" in sys.argv else time.perf_counter
warnings.filterwarnings("ignore")


def interleave(runs: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            if turn:  # the first one builds caches
                seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ours(sample: dict[str, torch.Tensor], **arguments) -> Callable[[], object]:
    deform = RandElasticDeformationd(**arguments).set_random_state(0)
    return lambda: deform(sample)


def grid_sample_alone(sample: dict[str, torch.Tensor]) -> Callable[[], object]:
    image, label = sample["image"][None], sample["label"][None].float()
    deform = RandElasticDeformationd()
    warp = deform.draw(image.shape[2:], torch.Generator().manual_seed(0))
    grid = warp_positions([warp]).movedim(1, -1).contiguous()

    def run() -> None:
        F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        F.grid_sample(label, grid, mode="nearest", padding_mode="reflection", align_corners=True)

    return run


def peers_3d(sample: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    from monai.transforms import Rand3DElasticd

    size = tuple(sample["image"].shape[1:])
    monai = Rand3DElasticd(
        keys=("image", "label"), sigma_range=(5, 8), magnitude_range=(100, 200), prob=1.0,
        mode=("bilinear", "nearest"), padding_mode="reflection",
    )  # fmt: skip
    monai.set_random_state(0)
    runs: dict[str, Callable[[], object]] = {"MONAI Rand3DElasticd": lambda: monai(sample)}
    try:
        import torchio

        subject = torchio.Subject(
            image=torchio.ScalarImage(tensor=sample["image"]), label=torchio.LabelMap(tensor=sample["label"])
        )
        deform = torchio.RandomElasticDeformation()
        runs["TorchIO RandomElasticDeformation"] = lambda: deform(subject)
    except ImportError as error:
        print(f"(no TorchIO: {error})")
    try:
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

        spatial = SpatialTransform(
            size, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=1.0, mode_seg="nearest"
        )
        label = sample["label"].to(torch.int16)
        runs["batchgeneratorsv2 SpatialTransform"] = lambda: spatial(image=sample["image"], segmentation=label)
    except ImportError as error:
        print(f"(no batchgeneratorsv2: {error})")
    return runs


def peers_2d(sample: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    from monai.transforms import Rand2DElasticd

    monai = Rand2DElasticd(
        keys=("image", "label"), spacing=(30, 30), magnitude_range=(5, 6), prob=1.0,
        mode=("bilinear", "nearest"), padding_mode="reflection",
    )  # fmt: skip
    monai.set_random_state(0)
    runs: dict[str, Callable[[], object]] = {"MONAI Rand2DElasticd": lambda: monai(sample)}
    try:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations

        deform = albumentations.ElasticTransform(alpha=300, sigma=10, p=1.0)
        image, label = np.ascontiguousarray(sample["image"][0].numpy()), sample["label"][0].numpy()
        runs["albumentations ElasticTransform"] = lambda: deform(image=image, mask=label)
    except ImportError as error:
        print(f"(no albumentations: {error})")
    return runs


def compare(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = {
        "image": torch.rand((1, *shape), generator=generator),
        "label": torch.randint(0, 3, (1, *shape), generator=generator).to(torch.uint8),
    }
    all_in = {"rotate": 15.0, "scale": [0.8, 1.25], "shear": 0.1, "flip": True}
    runs = {"medseg": ours(sample), "medseg, with rotation, scale, shear, flips": ours(sample, **all_in)}
    runs["grid_sample, reflection, positions given"] = grid_sample_alone(sample)
    runs |= peers_3d(sample) if len(shape) == 3 else peers_2d(sample)
    seconds = interleave(runs, REPEATS if len(shape) == 3 else 5 * REPEATS)
    name = "x".join(map(str, shape))
    for run, value in seconds.items():
        print(f"| {name} | {run} | {1e3 * value:.1f} ms | {value / seconds['medseg']:.2f}x |", flush=True)


def host() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Traffic(TorchDispatchMode):
        """Counts the operations that are kernels on a GPU (not views), and the bytes of their tensors."""

        bytes = kernels = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            before = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
            results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.device.type == "meta"]
            if results and not (func.is_view and results[0].untyped_storage()._cdata in before):
                sources = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.device.type == "meta"]
                self.kernels += 1
                self.bytes += sum(t.numel() * t.element_size() for t in sources + results)
            return result

    shape = (128, 128, 128)
    deform = RandElasticDeformationd(rotate=15.0, scale=[0.8, 1.25], flip=True)
    batch = {
        "image": torch.empty((8, 1, *shape), device="meta"),
        "label": torch.empty((8, 1, *shape), device="meta", dtype=torch.uint8),
    }
    with Traffic() as traffic:
        deform.apply_batch(batch, list(range(8)))
    torch.set_num_threads(1)
    seconds = []
    for turn in range(60):
        begin = time.process_time()
        deform.draw_batch(shape, [torch.Generator().manual_seed(8 * turn + i) for i in range(8)])
        seconds.append(time.process_time() - begin)
    print(f"| 8 x 128^3 | drawn by one thread | {1e3 * statistics.median(seconds):.1f} ms | |")
    print(f"| 8 x 128^3, image and label | {traffic.kernels} kernels' bytes | {traffic.bytes / 1e9:.2f} GB | |")


def gpu() -> None:
    shape = (128, 128, 128)
    batch = {
        "image": torch.rand((8, 1, *shape), device="cuda"),
        "label": torch.randint(0, 3, (8, 1, *shape), device="cuda").to(torch.uint8),
    }
    deform = RandElasticDeformationd(rotate=15.0, scale=[0.8, 1.25], flip=True)
    seconds = []
    for turn in range(30):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        deform.apply_batch(batch, list(range(8 * turn, 8 * turn + 8)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    name = torch.cuda.get_device_name()
    print(
        f"| 8 x 128^3, image and label, {name} | medseg apply_batch | {1e3 * statistics.median(seconds[5:]):.2f} ms | |"
    )


def main() -> None:
    if clock is time.process_time:
        torch.set_num_threads(1)
    wanted = [a for a in sys.argv[1:] if a != "cpu-seconds"] or [
        "3d",
        "2d",
        *(["gpu"] if torch.cuda.is_available() else []),
    ]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {clock.__name__}, load {os.getloadavg()[0]:.1f}"
    )
    print("| size | what | median | against medseg |\n|---|---|---|---|")
    if "3d" in wanted:
        compare((128, 128, 128))
    if "2d" in wanted:
        compare((512, 512))
    if "host" in wanted:
        host()
    if "gpu" in wanted:
        gpu()


if __name__ == "__main__":
    main()

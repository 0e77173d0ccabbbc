"""Claim: HD95, ASSD and surface Dice of a liver-sized pair 3 times faster than in MONAI, and equal to 1e-4.

Run: python benchmarks/surface.py. Two masks of 4 million voxels in 512 x 512 x 200, 0.75 x 0.75 x 1.5 mm. Ours and
MONAI's three functions (use_subvoxels=True for surface Dice) take turns in one process, with one thread each; memory is
the peak above the masks themselves, of each in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np

SHAPE, SPACING, TOLERANCE = (512, 512, 200), (0.75, 0.75, 1.5), 2.0
REPETITIONS = 5


def make_pair(roughness: float) -> tuple[np.ndarray, np.ndarray]:
    """A liver-sized ellipsoid with a wavy surface, and the same with other waves of `roughness` mm."""
    axes = np.ogrid[-256:256, -256:256, -100:100]
    radius = np.sqrt(sum((np.float32(a) * s / r) ** 2 for a, s, r in zip(axes, SPACING, (88, 82, 66), strict=True)))
    x, y, z = (a * s for a, s in zip(axes, SPACING, strict=True))
    waves = [np.sin(x / 7 + p) * np.sin(y / 9 - p) * np.sin(z / 8 + 2 * p) for p in (0.0, 1.0)]
    first, second = ((radius + roughness / 80 * wave.astype(np.float32)) < 1.17 for wave in waves)
    return first, second


def measure_ours(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    from medseg.metrics import surface_distances

    found = surface_distances(prediction, reference, SPACING)
    return found.hausdorff(95), found.assd(), found.surface_dice(TOLERANCE)


def measure_monai(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    a, b = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    same = {"include_background": True, "spacing": SPACING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            compute_hausdorff_distance(a, b, percentile=95, **same).item(),
            compute_average_surface_distance(a, b, symmetric=True, **same).item(),
            compute_surface_dice(a, b, [TOLERANCE], use_subvoxels=True, **same).item(),
        )


def peak_memory(measure: Callable, roughness: float) -> float:
    """Peak resident memory in MB above that before the call, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (measure, roughness))


def _peak(measure: Callable, roughness: float) -> float:
    pair = make_pair(roughness)
    small = tuple(mask[250:262, 250:262, 94:106].copy() for mask in pair)
    small[0][0] = small[1][:, 0] = False
    measure(*small)  # imports and thread pools are not what is compared
    before = _peak_rss(reset=True)
    measure(*pair)
    return _peak_rss() - before


def _peak_rss(reset: bool = False) -> float:
    if reset:  # Linux: the high-water mark falls back to the present value
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a Markdown table row for each pair."""
    import torch

    torch.set_num_threads(1)
    print("| pair | ours s | MONAI s | ratio (range) | ours MB | MONAI MB | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for name, roughness in (("near, ~1 mm apart", 2.0), ("rough, ~3 mm apart", 8.0)):
        pair = make_pair(roughness)
        measure_ours(*pair)
        ours, peer = [], []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            found = measure_ours(*pair)
            middle = time.perf_counter()
            expected = measure_monai(*pair)
            ours.append(middle - start)
            peer.append(time.perf_counter() - middle)
        ratios = [b / a for a, b in zip(ours, peer, strict=True)]
        difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        memory = [peak_memory(measure, roughness) for measure in (measure_ours, measure_monai)]
        print(
            f"| {name}, {np.count_nonzero(pair[0]) / 1e6:.1f} M voxels, HD95 {found[0]:.2f} mm, ASSD {found[1]:.2f} mm "
            f"| {statistics.median(ours):.2f} | {statistics.median(peer):.2f} "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f}) "
            f"| {memory[0]:.0f} | {memory[1]:.0f} | {difference:.1e} |"
        )


if __name__ == "__main__":
    main()

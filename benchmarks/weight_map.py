"""The weight map against its definition, one scipy distance transform per instance: interleaved medians, differences.

    python benchmarks/weight_map.py [small] [large] [volume] [contour] [cpu-seconds]

Claims: 512^2 with about 370 cells at least 100x faster, difference at most 1e-4; 10 000 cells on 4096^2 in under 5 s
and under 1 GB (the process as a whole, measured in a fresh one); a volume with 5 x 0.8 x 0.8 mm spacing equal to the
definition. `cpu-seconds` counts processor time instead of wall-clock time, for a machine that others use too.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from scipy import ndimage

from medseg.transforms import boundary_weight_map, part_instances

clock = time.process_time if "cpu-seconds" in sys.argv else time.perf_counter


def draw_cells(size: int, count: int, seed: int = 0) -> np.ndarray:
    """Round cells on a jittered lattice, some of them touching: int32 (size, size)."""
    rng = np.random.default_rng(seed)
    label = np.zeros((size, size), np.int32)
    side = int(np.ceil(np.sqrt(count)))
    pitch = size / side
    for number in range(1, count + 1):
        place = np.array(divmod(number - 1, side)) + 0.5
        row, column = place * pitch + rng.normal(scale=0.08 * pitch, size=2)
        radius = pitch * rng.uniform(0.32, 0.46)
        low = [max(0, int(v - radius)) for v in (row, column)]
        high = [min(size, int(v + radius) + 2) for v in (row, column)]
        y, x = np.ogrid[low[0] : high[0], low[1] : high[1]]
        box = label[low[0] : high[0], low[1] : high[1]]
        box[((y - row) ** 2 + (x - column) ** 2 < radius**2) & (box == 0)] = number
    return label


def by_definition(instances: np.ndarray, spacing: tuple[float, ...] | None = None) -> np.ndarray:
    """One distance transform per instance; the two smallest kept as they come, so that memory does not grow."""
    first = np.full(instances.shape, np.inf)
    second = first.copy()
    for value in np.unique(instances[instances > 0]):
        distance = ndimage.distance_transform_edt(instances != value, sampling=spacing)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    term = 10 * np.exp(-((first + second) ** 2) / 50)
    term[instances > 0] = 0
    return (1 + term).astype(np.float32)


def compare(name: str, instances: np.ndarray, spacing: tuple[float, ...] | None, repeats: tuple[int, int]) -> None:
    """Ours several times in turn with the definition, which is slow."""
    parted, _ = part_instances(instances)
    ours_s, slow_s, found, expected = [], [], parted, parted
    for _ in range(repeats[1]):
        for _ in range(repeats[0]):
            begin = clock()
            found = boundary_weight_map(instances, spacing=spacing)
            ours_s.append(clock() - begin)
        begin = clock()
        expected = by_definition(parted, spacing)
        slow_s.append(clock() - begin)
    ours, slow = statistics.median(ours_s), statistics.median(slow_s)
    worst = float(np.abs(found - expected).max())
    print(f"| {name} | {1e3 * ours:.1f} ms | {slow:.2f} s | {slow / ours:.0f}x | {worst:.1e} |", flush=True)


def large() -> None:
    """In a process of its own: the highest memory it ever had is the answer."""
    if os.environ.get("MEDSEG_BENCHMARK_CHILD") != "1":
        environment = {**os.environ, "MEDSEG_BENCHMARK_CHILD": "1"}
        subprocess.run(
            [sys.executable, __file__, "large", *{"cpu-seconds"}.intersection(sys.argv)], check=True, env=environment
        )
        return
    label = draw_cells(4096, 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = []
    for _ in range(3):
        begin = clock()
        boundary_weight_map(label)
        seconds.append(clock() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| 4096^2, {label.max()} cells | {statistics.median(seconds):.2f} s | process {peak:.2f} GB at its highest "
        f"({before:.2f} GB before) | | |",
        flush=True,
    )


def volume() -> None:
    rng = np.random.default_rng(0)
    shape, spacing = (24, 96, 96), (5.0, 0.8, 0.8)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    label = np.zeros(shape, np.int32)
    for number in range(1, 61):
        c = rng.random(3) * shape
        radius = rng.uniform(4, 8)
        ball = ((z - c[0]) * 5.0) ** 2 + ((y - c[1]) * 0.8) ** 2 + ((x - c[2]) * 0.8) ** 2 < radius**2
        label[ball & (label == 0)] = number
    compare(f"24x96x96, 5 x 0.8 x 0.8 mm, {len(np.unique(label)) - 1} objects", label, spacing, (3, 2))


def contour() -> None:
    z, y, x = np.ogrid[:150, :512, :512]
    organ = (((z - 75) / 50) ** 2 + ((y - 250) / 120) ** 2 + ((x - 250) / 140) ** 2 < 1).astype(np.uint8)
    seconds = []
    for _ in range(3):
        begin = clock()
        boundary_weight_map(organ, mode="contour", spacing=(2.0, 0.8, 0.8))
        seconds.append(clock() - begin)
    begin = clock()
    inside = ndimage.distance_transform_edt(organ, sampling=(2.0, 0.8, 0.8))
    outside = ndimage.distance_transform_edt(1 - organ, sampling=(2.0, 0.8, 0.8))
    slow = clock() - begin
    assert inside is not None
    assert outside is not None
    ours = statistics.median(seconds)
    print(f"| contour, 150x512x512, 2 x 0.8 x 0.8 mm, one organ | {ours:.2f} s | {slow:.1f} s | {slow / ours:.1f}x | |")


def main() -> None:
    wanted = [a for a in sys.argv[1:] if a != "cpu-seconds"] or ["small", "large", "volume", "contour"]
    if os.environ.get("MEDSEG_BENCHMARK_CHILD") != "1":
        print(f"numpy {np.__version__}, {clock.__name__}, load {os.getloadavg()[0]:.1f}")
        print(
            "| case | medseg | one distance transform per instance | ratio | largest difference |\n"
            "|---|---|---|---|---|"
        )
    if "small" in wanted:
        compare("512^2, 370 cells", draw_cells(512, 370), None, (5, 3))
    if "large" in wanted:
        large()
    if "volume" in wanted:
        volume()
    if "contour" in wanted:
        contour()


if __name__ == "__main__":
    main()

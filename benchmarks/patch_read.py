"""Reading a 96^3 patch of a stored 512x512x700 volume, against a memory-mapped plain array and a compressed NIfTI.

    python benchmarks/patch_read.py [--folder DIR] [--shape 512 512 700] [--patches 60]

The volume is written as the store writes it (blocks of 32^3), as a plain .npy and as .nii.gz (which has to be
decompressed whole). All are warm: read once before. The ways take turns. Prints a Markdown table with sizes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from medseg.cache import BlockArray


def body(shape: tuple[int, ...]) -> np.ndarray:
    """Smooth structures with noise, as CT has them: it compresses as CT does."""
    random = np.random.default_rng(0)
    coarse = random.normal(0, 300, [n // 32 + 2 for n in shape]).astype(np.float32)
    for axis, n in enumerate(shape):
        coarse = np.repeat(coarse, 32, axis=axis).take(range(n), axis=axis)
    coarse += random.integers(-12, 13, shape, dtype=np.int8)
    return coarse.astype(np.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 700])
    parser.add_argument("--patches", type=int, default=60)
    parser.add_argument("--nifti", action="store_true", help="also time the whole .nii.gz (half a minute)")
    options = parser.parse_args()
    shape, size = tuple(options.shape), (96, 96, 96)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        volume = body(shape)
        image = volume.astype(np.float32)[None]
        begin = time.perf_counter()
        stored = BlockArray.write(Path(place) / "blocks.npy", image, (32, 32, 32))
        built = time.perf_counter() - begin
        np.save(Path(place) / "plain.npy", image)
        raw = 0
        if options.nifti:
            import nibabel

            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), Path(place) / "raw.nii.gz")
            raw = (Path(place) / "raw.nii.gz").stat().st_size
        del volume, image
        times: dict[str, list[float]] = {"medseg store": [], "plain .npy, memory-mapped": []}
        random = np.random.default_rng(1)
        stored.read()
        np.load(Path(place) / "plain.npy").sum()
        for _ in range(options.patches):
            start = [int(random.integers(0, n - p + 1)) for n, p in zip(shape, size, strict=True)]
            box = tuple(slice(a, a + p) for a, p in zip(start, size, strict=True))
            begin = time.perf_counter()
            ours = stored.read(start, size)
            times["medseg store"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            mapped = np.load(Path(place) / "plain.npy", mmap_mode="r")
            theirs = np.array(mapped[(slice(None), *box)])
            del mapped
            times["plain .npy, memory-mapped"].append(time.perf_counter() - begin)
            assert np.array_equal(ours, theirs)
        if options.nifti:
            import nibabel

            begin = time.perf_counter()
            np.asarray(nibabel.load(Path(place) / "raw.nii.gz").dataobj)
            times["whole .nii.gz"] = [time.perf_counter() - begin]
        print(f"volume {shape}, patch {size}; store {stored.size_bytes / 1e6:.0f} MB written in {built:.1f} s"
              + (f", .nii.gz {raw / 1e6:.0f} MB" if raw else "") + "\n")  # fmt: skip
        print("| way | median ms | largest ms |\n|---|---|---|")
        for name, values in times.items():
            print(f"| {name} | {1000 * statistics.median(values):.2f} | {1000 * max(values):.2f} |")


if __name__ == "__main__":
    main()

"""Verified reading of gzipped NIfTI against nibabel, which verifies nothing, and against reading the bytes alone.

python benchmarks/reading.py IMAGE.nii.gz [repeats]    prints a Markdown table row; interleaved, medians, one process
"""

from __future__ import annotations

import gzip
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from medseg.volumes import read_image


def main() -> None:
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else _phantom(Path(folder) / "ct.nii.gz")
        size = path.stat().st_size / 1e6
        ways = {
            "medseg": lambda: read_image(path),
            "nibabel": lambda: np.asarray(nibabel.load(path).dataobj),
            "gzip": lambda: gzip.decompress(path.read_bytes()),
            "bytes": path.read_bytes,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in times.items()}
        shown = " | ".join(f"{median[name]:.3f} s" for name in ways)
        ratio = median["nibabel"] / median["medseg"]
        print(f"| {size:.1f} MB | {shown} | {size / median['medseg']:.0f} MB/s a core | {ratio:.2f} x nibabel |")


def _phantom(path: Path) -> Path:
    """CT-like noise that gzip halves."""
    values = np.random.default_rng(0).normal(0, 12, (512, 512, 120)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
    return path


if __name__ == "__main__":
    main()
